"""How tests run data_prep/ scripts and look at what they wrote."""

import hashlib
import json
import runpy
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import webdataset
from image_server import ImageServer

from hpc_mm.data.schema import Image, Sample
from hpc_mm.data.shards import check_shards, read_samples
from hpc_mm.data.store import open_store

WEB = ["web.allow=127.0.0.0/8", "cluster=local"]
SCRIPTS = Path(__file__).resolve().parents[1] / "data_prep"


def run(name: str, **values: Any) -> int:
    """The exit code of a script, which runs in this process; it packs, unless another stage is named."""
    values = {"stage": "pack", "cluster": "local", **values}
    words = [f"{name}.py", *(f"{key}={value}" for key, value in values.items())]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")
    assert isinstance(ended.value.code, int)
    return ended.value.code


def written(folder: Path) -> list[Sample]:
    """The samples of a folder of shards; the plain ``webdataset`` library must find the same texts and images."""
    store = open_store(str(folder))
    found = list(read_samples(store))
    assert check_shards(store) == []
    for sample, files in zip(found, plainly_read(sorted(folder.glob("*.tar"))), strict=True):
        parts = json.loads(files["json"])["parts"]
        assert files["__key__"] == sample.id
        assert [part.get("text", files.get(part.get("image"))) for part in parts] == [
            part.data if isinstance(part, Image) else part.text for part in sample.parts
        ]
    return found


def plainly_read(shards: list[Path]) -> Iterator[dict[str, Any]]:
    for path in shards:
        with path.open("rb") as file:
            members = webdataset.tariterators.tar_file_expander([{"url": str(path), "stream": file}])
            yield from webdataset.tariterators.group_by_keys(members)


def told(part: Any) -> Any:
    """A part in short: the role and the text, or the role and the image's bytes."""
    return (part.role, part.data if isinstance(part, Image) else part.text)


# ---------------------------------------------------------------- corpora of image_server, in processes


def write_source(path: Path, server: ImageServer, count: int) -> Path:
    lines = [json.dumps({"url": server.url(number), "caption": f"caption {number}"}) for number in range(count)]
    path.write_text("\n".join(lines) + "\n")
    return path


def command(source: Path, out: Path, *words: str) -> list[str]:
    places = [f"source={source}", f"out={out}/out", f"images={out}/images"]
    rate = [] if any(word.startswith("web.host_rate=") for word in words) else ["web.host_rate=0"]
    return [sys.executable, str(SCRIPTS / "cc3m.py"), *places, *WEB, *rate, *words]


def prepared(source: Path, out: Path, *words: str) -> str:
    result = subprocess.run(command(source, out, *words), capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def shards(out: Path) -> dict[str, str]:
    """Every byte that training reads, by file."""
    folder = out / "out"
    files = [path for path in folder.iterdir() if path.name.endswith((".tar", ".json")) and path.name != "stats.json"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def running(*words: str) -> list[str]:
    """The processes whose command lines hold all of this."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended since
            line = file.read_text(errors="replace")
            if all(word in line for word in words):
                found.append(file.parent.name)
    return found
