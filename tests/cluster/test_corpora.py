"""Corpora into the real Ceph: as a Slurm array of which tasks are killed, and through a proxy that fails."""

import json
import os
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
import samples
from checkout import ROOT, environment
from fault_proxy import fault_proxy
from image_server import ImageServer, image_server
from jobs import start_now, submitted, wait
from scripts import plainly_read, run

from hpc_mm.config import ConfigError
from hpc_mm.data.schema import Sample, Text, image_key
from hpc_mm.data.shards import ShardWriter, check_shards, read_manifest
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


def prepared(values: dict[str, str], *words: str, script: str = "omnicorpus") -> str:
    command = [sys.executable, f"data_prep/{script}.py", *words]
    result = subprocess.run(command, cwd=ROOT, env=values, capture_output=True, text=True)
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
        *WEB,
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
    while "RUNNING" not in (now := state(jobs["fetch"])):
        assert now, "it is over before a task of it could be killed"
        time.sleep(0.1)
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
    assert {line.split()[-1] for line in listed.splitlines()} - {".recode.json"} == {
        image_key(url)
        for file in source.iterdir()
        for line in file.read_text().splitlines()
        for url in json.loads(line)["images"]
        if url
    }
    bucket, _, key = f"{ceph}/array/images/{listed.split()[-1]}".removeprefix("s3://").partition("/")
    assert {"sha256", "original-size"} <= set(boto3.client("s3").head_object(Bucket=bucket, Key=key)["Metadata"])


@pytest.fixture
def pairs(tmp_path: Path) -> Iterator[tuple[ImageServer, Path]]:
    """Nine files of eight captions each, and the server of their images, of which each of its eight hosts has nine."""
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "0.jpg").write_bytes(samples.encoded(samples.picture(0)))
    (tmp_path / "in").mkdir()
    with image_server(tmp_path / "pictures") as server:
        for number in range(9):
            rows = [{"url": server.url(8 * number + i), "caption": f"{number} {i}"} for i in range(8)]
            (tmp_path / "in" / f"{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        yield server, tmp_path / "in"


@pytest.mark.parametrize("warning", ["a signal", pytest.param("the time limit", marks=pytest.mark.chaos)])
def test_a_task_near_its_end_goes_back_into_the_queue(
    slurm: None, pairs: tuple[ImageServer, Path], tmp_path: Path, warning: str
) -> None:
    server, source = pairs
    rate = 1 if warning == "a signal" else 0.05  # of a host's nine URLs a second: 8 s, or 160 s, of which a job has 120
    words = [*WEB[:1], f"source={source}", "slurm.cpus_per_task=1", "slurm.memory=500M", "slurm.time=4"]
    values = environment(ROOT, tmp_path)
    prepared(values, *words, f"out={tmp_path}/quiet/out", "web.host_rate=0", "cluster=local", script="cc3m")
    server.requests()
    words += [f"out={tmp_path}/out", f"web.host_rate={rate}", "tasks=2", "cluster=slurm", "name=pairs"]
    jobs = submitted(prepared(values, *words, script="cc3m"))
    while not server.requests():
        time.sleep(0.1)
    running = subprocess.run(["squeue", "-h", "-r", "-j", jobs["fetch"][0], "-o", "%i"], capture_output=True, text=True)
    task = running.stdout.split()[-1]  # the other one may have had nothing to do
    if warning == "a signal":
        subprocess.run(["scancel", "--batch", "--signal=USR2", task], check=True)
    start_now(task)
    assert wait(jobs["verify"][0]) == "COMPLETED"
    first, *_, again = (tmp_path / f"runs/prepare-pairs/submissions/001/fetch-{task}.log").read_text().split("REQUEUE")
    assert "fetched " in again and "fetched " not in first
    assert everything(f"{tmp_path}/out") == everything(f"{tmp_path}/quiet/out")
    assert len(list((tmp_path / "images").glob("[!.]*"))) == 72


def test_more_tasks_than_an_array_takes(slurm: None, pairs: tuple[ImageServer, Path], tmp_path: Path) -> None:
    server, source = pairs
    open_store(f"{tmp_path}/images", make=True).write(image_key(server.url(0)), samples.encoded(samples.picture(0)))
    values = environment(ROOT, tmp_path)
    words = [f"source={source}", "tasks=9", "slurm.cpus_per_task=1", "slurm.memory=500M", "cluster=slurm"]
    held = submitted(prepared(values, *words, f"out={tmp_path}/held", "slurm.extra.hold=", script="cc3m"))
    shown = subprocess.check_output(["scontrol", "show", "job", held["verify"][0]], text=True)
    subprocess.run(["scancel", *(job for jobs in held.values() for job in jobs)], check=True)
    assert [len(jobs) for jobs in held.values()] == [1, 2, 2, 1], "8 tasks and 1"
    assert re.findall(r"afterok:(\d+)_", shown) == held["pack"]
    jobs = submitted(prepared(values, *words, f"out={tmp_path}/out", "stage=pack", script="cc3m"))
    assert [wait(job) for job in jobs["pack"]] == ["COMPLETED", "COMPLETED"]
    assert json.loads((tmp_path / "out/stats.json").read_text())["records"] == 72


def test_the_hand_written_script_runs_a_stage(slurm: None, pairs: tuple[ImageServer, Path], tmp_path: Path) -> None:
    server, source = pairs
    open_store(f"{tmp_path}/images", make=True).write(image_key(server.url(0)), samples.encoded(samples.picture(0)))
    values = environment(ROOT, tmp_path, PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    command = ["sbatch", "--parsable", "--cpus-per-task=1", "--mem=500M", f"--output={tmp_path}/%a.log", "--array=0-1"]
    command += ["sbatch/data_prep.sbatch", "data_prep/cc3m.py", f"source={source}", f"out={tmp_path}/out", "tasks=2"]
    job = subprocess.check_output([*command, "stage=pack"], cwd=ROOT, env=values, text=True).strip()
    assert wait(job) == "COMPLETED"
    logs = [(tmp_path / f"{task}.log").read_text() for task in range(2)]
    done = [re.findall(r"^(\d).jsonl: 8 records", log, re.MULTILINE) for log in logs]
    assert done == [list("02468"), list("1357")]


def test_a_bucket_without_permission(
    ceph: str,
    stranger: dict[str, str],
    pairs: tuple[ImageServer, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One line, exit code 2; once the bucket's owner gives the right, the same command completes."""
    _, source = pairs
    store = open_store(f"{ceph}/forbidden/in")
    for file in source.iterdir():
        store.upload(file.name, file)
    here = {"source": str(source), "out": f"{tmp_path}/out", "images": f"{tmp_path}/images"}
    there = {"source": store.address, "out": f"{ceph}/forbidden/out", "images": f"{ceph}/forbidden/images"}
    words = [*WEB, "cluster=local"]
    prepared(dict(os.environ), *words, *words_of(here), script="cc3m")
    owner = boto3.client("s3")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, stranger[name])
    for place, address in there.items():
        places = {**here, "out": f"{tmp_path}/{place}/out", place: address}
        command = [sys.executable, "data_prep/cc3m.py", *words, *words_of(places)]
        refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert refused.returncode == 2
        assert address in refused.stderr and "access is denied to these credentials" in refused.stderr
        assert refused.stderr.count("\n") == 1
    bucket = ceph.removeprefix("s3://")
    right: dict[str, object] = {"Effect": "Allow", "Action": "s3:*"}
    right["Principal"] = {"AWS": [f"arn:aws:iam:::user/{stranger['name']}"]}
    right["Resource"] = [f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/*"]
    owner.put_bucket_policy(Bucket=bucket, Policy=json.dumps({"Version": "2012-10-17", "Statement": [right]}))
    prepared(dict(os.environ), *words, *words_of(there), script="cc3m")
    assert everything(there["out"]) == everything(here["out"])
    owner.delete_bucket_policy(Bucket=bucket)


def words_of(places: dict[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in places.items()]


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
    words = [*WEB, f"source={source}", "cluster=local", "shard_mb=1"]
    prepared(dict(os.environ), *words, f"out={ceph}/peaceful/documents")
    with fault_proxy(os.environ["AWS_ENDPOINT_URL"], seed=3) as (address, counts):
        said = prepared({**os.environ, "AWS_ENDPOINT_URL": address}, *words, f"out={ceph}/faulty/documents")
    assert counts["burst"] and counts["cut"] and counts["silence"], counts
    assert "128 ok" in said
    assert everything(f"{ceph}/faulty/documents") == everything(f"{ceph}/peaceful/documents")
    names = [{entry.key for entry in open_store(f"{ceph}/{kind}/images").list()} for kind in ("faulty", "peaceful")]
    assert names[0] == names[1] and len(names[0]) == 128 + 1  # how they were made


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


DYING = """
import os, sys, time
from fault_proxy import fault_proxy
with fault_proxy(sys.argv[1], seed=3) as (address, counts):
    print(address, flush=True)
    while counts["served"] < 200:
        time.sleep(0.01)
    os._exit(0)
"""


@pytest.mark.chaos
def test_lint_of_a_store_that_goes_away_ends(ceph: str, tmp_path: Path) -> None:
    with ShardWriter(open_store(f"{ceph}/linted"), "part") as writer:
        for number in range(3000):
            writer.add(Sample(f"s{number:04d}", (Text("a"),)))
    gateway = [sys.executable, "-c", DYING, os.environ["AWS_ENDPOINT_URL"]]
    lint = [sys.executable, "-m", "hpc_mm.lint", f"shards={ceph}/linted", f"out={tmp_path}", "reads=4"]
    with subprocess.Popen(gateway, cwd=ROOT / "tests", stdout=subprocess.PIPE, text=True) as dying:
        assert dying.stdout is not None
        values = {**os.environ, "AWS_ENDPOINT_URL": dying.stdout.readline().strip()}
        ended = subprocess.run(lint, cwd=ROOT, env=values, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 2 and not ended.stdout
    assert ended.stderr.startswith("the store does not answer: ") and ended.stderr.count("\n") == 1
