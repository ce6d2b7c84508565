"""How tests run data_prep/ scripts and look at what they wrote."""

import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import webdataset

from hpc_mm.data.schema import Image, Sample
from hpc_mm.data.shards import check_shards, read_samples
from hpc_mm.data.store import open_store

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
