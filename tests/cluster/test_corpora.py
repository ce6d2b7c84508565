"""Corpora into the real Ceph: as a Slurm array of which tasks are killed, and through a proxy that fails."""

import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from checkout import ROOT, environment
from fault_proxy import fault_proxy
from image_server import ImageServer, image_server
from jobs import wait
from scripts import plainly_read, run

from hpc_mm.config import ConfigError
from hpc_mm.data.schema import image_key
from hpc_mm.data.shards import check_shards, read_manifest
from hpc_mm.data.store import open_store

WEB = ["web.allow=127.0.0.0/8", "web.host_rate=0"]


@pytest.fixture(scope="module")
def real(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ImageServer, list[dict]]]:
    """The 32 real images at paths 0 to 31, and the 8 real documents with their URLs turned to this server."""
    folder = tmp_path_factory.mktemp("real")
    places: dict[str, int] = {}
    with tarfile.open(shared_data / "cc12m-32.tar") as tar:
        files = {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]
    for name in sorted(files):
        if name.endswith(".json"):
            places[json.loads(files[name])["url"]] = len(places)
            (folder / f"{len(places):03d}").write_bytes(files[name.replace("json", "jpg")])
    with image_server(folder) as server:
        records = [json.loads(line) for line in (shared_data / "omnicorpus-8.jsonl").read_text().splitlines()]
        for record in records:
            record["images"] = [url and server.url(places[url]) for url in record["images"]]
        yield server, records


def write_source(folder: Path, records: list[dict], copies: int) -> Path:
    """A file of records for each task; a copy's image addresses differ in their path alone."""
    folder.mkdir()
    for copy in range(copies):
        lines = []
        for record in records:
            urls = [
                url and f"{url.rpartition('/')[0]}/{int(url.rpartition('/')[2]) + 32 * copy}"
                for url in record["images"]
            ]
            lines.append(json.dumps({**record, "images": urls}) + "\n")
        (folder / f"part-{copy}.jsonl").write_text("".join(lines))
    return folder


def prepared(values: dict[str, str], *words: str) -> str:
    result = subprocess.run(
        [sys.executable, "data_prep/omnicorpus.py", *WEB, *words], cwd=ROOT, env=values, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def everything(address: str) -> dict[str, bytes]:
    """Shards and indexes."""
    store = open_store(address)
    return {entry.key: store.read(entry.key) for entry in store.list() if entry.key.endswith((".tar", "index.json"))}


def test_a_slurm_array_of_which_tasks_are_killed(
    slurm: None, ceph: str, real: tuple[ImageServer, list[dict]], tmp_path: Path
) -> None:
    _, records = real
    source = write_source(tmp_path / "in", records, 8)
    values = {
        **environment(ROOT, tmp_path),
        **{key: value for key, value in os.environ.items() if key.startswith("AWS_")},
    }
    words = [
        f"source={source}",
        "shard_mb=1",
        "part_urls=20",
        "slurm.cpus_per_task=1",
        "slurm.memory=500M",
        "slurm.time=9",
    ]
    quiet = prepared(values, *words, f"out={ceph}/quiet/documents", "cluster=local")
    assert "256 of them different" in quiet
    said = prepared(values, *words, f"out={ceph}/array/documents", "tasks=8", "cluster=slurm", "name=array")
    jobs = {line.split()[1].rstrip(":"): line.split()[-1] for line in said.splitlines() if line.startswith("submitted")}
    assert list(jobs) == ["plan", "fetch", "pack", "verify"]
    wait(jobs["plan"])
    while "RUNNING" not in state(jobs["fetch"]):
        time.sleep(0.2)
    subprocess.run(["scancel", f"{jobs['fetch']}_2", f"{jobs['fetch']}_5"], check=True)
    wait(jobs["fetch"])
    wait(jobs["verify"])  # taken out of the queue
    with pytest.raises(ConfigError):
        read_manifest(open_store(f"{ceph}/array/documents"))
    again = prepared(values, *words, f"out={ceph}/array/documents", "tasks=8", "cluster=slurm", "name=array")
    last = again.splitlines()[3].split()[-1]
    assert wait(last) == "COMPLETED"
    assert everything(f"{ceph}/array/documents") == everything(f"{ceph}/quiet/documents")
    assert not check_shards(open_store(f"{ceph}/array/documents"))
    assert len(list(plainly_read(downloaded(f"{ceph}/array/documents", tmp_path)))) == 64
    listed = aws("s3", "ls", f"{ceph}/array/images/", values=values)
    assert {line.split()[-1] for line in listed.splitlines()} == {
        image_key(url)
        for file in source.iterdir()
        for line in file.read_text().splitlines()
        for url in json.loads(line)["images"]
        if url
    }
    bucket, _, key = f"{ceph}/array/images/{listed.split()[-1]}".removeprefix("s3://").partition("/")
    assert {"sha256", "original-size"} <= set(boto3.client("s3").head_object(Bucket=bucket, Key=key)["Metadata"])


def state(job: str) -> str:
    return subprocess.run(["squeue", "-h", "-r", "-j", job, "-o", "%T"], capture_output=True, text=True).stdout


def aws(*words: str, values: dict[str, str]) -> str:
    """An S3 client of other people's."""
    command = [str(Path(sys.executable).parent / "aws"), *words]
    return subprocess.run(command, env={**os.environ, **values}, capture_output=True, text=True, check=True).stdout


def downloaded(address: str, folder: Path) -> list[Path]:
    store = open_store(address)
    paths = [folder / shard.name for shard in read_manifest(store)]
    for path in paths:
        store.download(path.name, path)
    return paths


@pytest.mark.chaos
def test_a_store_that_fails_at_times_loses_nothing(
    ceph: str, real: tuple[ImageServer, list[dict]], tmp_path: Path
) -> None:
    _, records = real
    source = write_source(tmp_path / "in", records, 4)
    words = [f"source={source}", "cluster=local", "shard_mb=1"]
    prepared(dict(os.environ), *words, f"out={ceph}/peaceful/documents")
    with fault_proxy(os.environ["AWS_ENDPOINT_URL"], seed=3) as (address, counts):
        said = prepared({**os.environ, "AWS_ENDPOINT_URL": address}, *words, f"out={ceph}/faulty/documents")
    assert counts["burst"] and counts["cut"] and counts["silence"], counts
    assert "128 ok" in said
    assert everything(f"{ceph}/faulty/documents") == everything(f"{ceph}/peaceful/documents")
    names = [{entry.key for entry in open_store(f"{ceph}/{kind}/images").list()} for kind in ("faulty", "peaceful")]
    assert names[0] == names[1] and len(names[0]) == 128


def test_packing_again_touches_what_has_changed(ceph: str, tmp_path: Path) -> None:
    """Images of two of three files come late; then the store's own dates tell what was written anew."""
    images, out = open_store(f"{ceph}/late/images"), f"{ceph}/late/out"
    (tmp_path / "in").mkdir()
    for part in range(3):
        lines = [json.dumps({"url": f"u/{part}/{i}", "caption": "a"}) + "\n" for i in range(4)]
        (tmp_path / "in" / f"part-{part}.jsonl").write_text("".join(lines))
    urls = [f"u/{part}/{i}" for part in range(3) for i in range(4)]
    late = {"u/0/1", "u/2/3"}
    for url in urls:
        if url not in late and url != "u/1/2":
            images.write(image_key(url), url.encode() * 99)
    values = {"source": tmp_path / "in", "images": f"{ceph}/late/images"}
    assert run("cc3m", **values, out=out) == 0
    first = dates(out)
    for url in late:
        images.write(image_key(url), url.encode() * 99)
    assert run("cc3m", **values, out=out, recheck="1") == 0
    second = dates(out)
    same = {name for name in first if second.get(name) == first[name]}
    assert {name[:6] for name in same if name.endswith(".tar")} == {"part-1"}
    assert run("cc3m", **values, out=out, recheck="1") == 0
    assert dates(out) == second
    assert run("cc3m", **values, out=f"{ceph}/late/quiet", recheck="1") == 0
    assert everything(out) == everything(f"{ceph}/late/quiet")


def dates(address: str) -> dict[str, object]:
    """When each object was written."""
    bucket, _, prefix = address.removeprefix("s3://").partition("/")
    found = boto3.client("s3").list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/")["Contents"]
    return {entry["Key"].removeprefix(f"{prefix}/"): entry["LastModified"] for entry in found}
