"""The real Slurm and the real Ceph of slurm.sh and ceph.sh; tests that need them skip where they do not run."""

import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkout import ROOT, environment
from required import absent

FOLDER = Path(os.environ.get("HPC_MM_CLUSTER_DIR", "/var/tmp/hpc_mm-cluster"))


@pytest.fixture(scope="session")
def slurm() -> None:
    """Slurm with four idle or busy nodes and the partitions main, short and urgent."""
    if shutil.which("sinfo") is None:
        absent("Slurm is not installed (make cluster does it)")
    answer = subprocess.run(["sinfo", "--noheader", "-o", "%R"], capture_output=True, text=True, timeout=30)
    if answer.returncode:
        absent("Slurm does not run (make cluster starts it)")
    if not {"main", "short", "urgent"} <= set(answer.stdout.split()):
        absent("the Slurm here is not that of tests/cluster/slurm.sh")


@pytest.fixture(scope="session")
def ceph() -> Iterator[str]:
    """The address of a new bucket; boto3 finds endpoint and credentials in the environment."""
    file = FOLDER / "ceph" / "s3.env"
    if not file.exists():
        absent("Ceph does not run (make cluster starts it)")
    values = dict(line.split("=", 1) for line in file.read_text().splitlines())
    bucket = f"test-{uuid.uuid4().hex[:12]}"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setenv(name, value)
        import boto3

        s3 = boto3.client("s3")
        s3.create_bucket(Bucket=bucket)
        yield f"s3://{bucket}"
        for page in s3.get_paginator("list_objects_v2").paginate(Bucket=bucket):
            for entry in page.get("Contents", []):
                s3.delete_object(Bucket=bucket, Key=entry["Key"])
        s3.delete_bucket(Bucket=bucket)


@pytest.fixture
def stranger(ceph: str) -> Iterator[dict[str, str]]:
    """The keys of another user of Ceph, who has no rights on anything."""
    name = f"stranger-{uuid.uuid4().hex[:8]}"
    admin = ["radosgw-admin", f"--conf={FOLDER}/ceph/ceph.conf", f"--uid={name}", "user"]
    made = subprocess.run([*admin, "create", "--display-name=stranger"], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    key = json.loads(made.stdout)["keys"][0]
    yield {"AWS_ACCESS_KEY_ID": key["access_key"], "AWS_SECRET_ACCESS_KEY": key["secret_key"], "name": name}
    subprocess.run([*admin, "rm", "--purge-data"], check=True, capture_output=True)


@pytest.fixture(scope="module")
def user(ceph: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A user whose site's store is in Ceph and holds a small shapes corpus."""
    folder = tmp_path_factory.mktemp("user")
    keys = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    values = {**environment(ROOT, folder), **keys, "HPC_MM_STORE": ceph}
    sizes = ["documents=60", "pairs=120", "questions=60", "demonstrations=20", "heldout=8"]
    subprocess.run([sys.executable, "data_prep/shapes.py", *sizes], env=values, cwd=ROOT, check=True)
    return values
