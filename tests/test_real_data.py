"""Real captions, documents and photographs, as published, all the way to 30 optimizer steps."""

import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from checkout import ROOT, environment, launch
from runs import lines
from samples import tokenizer

from hpc_mm.data.schema import image_key
from hpc_mm.data.store import open_store


def make_store(shared_data: Path, store: Path) -> list[str]:
    """Images under sha256(url), the foreign tar, and a tokenizer of the captions; the captions."""
    captions = []
    images = open_store(str(store / "images"))
    with tarfile.open(shared_data / "cc12m-32.tar") as tar:
        files = {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]
    for name in files:
        if name.endswith(".json"):
            images.write(image_key(json.loads(files[name])["url"]), files[name.replace("json", "jpg")])
            captions.append(files[name.replace("json", "txt")].decode())
    (store / "pairs").mkdir(parents=True)
    shutil.copy(shared_data / "cc12m-32.tar", store / "pairs")
    tokenizer(captions).backend_tokenizer.save(str(store / "tokenizer.json"))
    return captions


def test_real_input_trains_and_the_loss_falls(shared_data: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    make_store(shared_data, store)
    values = environment(ROOT, tmp_path)
    source = shared_data / "omnicorpus-8.jsonl"
    for command in (
        [
            "data_prep/omnicorpus.py",
            f"source={source}",
            f"images={store}/images",
            f"out={store}/documents",
            "stage=pack",
            "cluster=local",
        ],
        ["-m", "hpc_mm.index", f"shards={store}/pairs"],
    ):
        subprocess.run([sys.executable, *command], env=values, cwd=ROOT, check=True)
    words = ["sources.documents.data=documents", "sources.documents.batch=4", "sources.documents.max_images=6"]
    words += ["sources.pairs.data=pairs", "sources.pairs.batch=8", "model.language.tokenizer=store:tokenizer.json"]
    words += ["sources.documents.max_tokens=192", "sources.pairs.max_tokens=48"]
    words += ["sources.questions.data=documents", "sources.questions.batch=2"]  # the toy's third source: the same ones
    words += ["train.steps=30", "train.log_every=1", "train.warmup=5", "nodes=2", "strategy=ddp"]
    result = launch(values, "recipe=toy", "cluster=local", *words)
    assert result.returncode == 0, result.stdout + result.stderr
    found = lines(tmp_path / "runs" / "toy")
    assert [line["step"] for line in found] == list(range(1, 31))
    assert found[-1]["unreadable"] == found[-1]["left_out"] == found[-1]["skipped"] == 0
    for source_name in ("documents", "pairs"):
        losses = [line[f"loss/{source_name}"] for line in found]
        print(f"{source_name}: {losses[0]:.3f} at step 1, {losses[-1]:.3f} at step 30")
        assert losses[-1] < 0.8 * losses[0]
