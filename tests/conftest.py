"""What several tests share."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from required import absent

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``-n``: tests of a file stay in one process, which shares what they are set up with; so do all those that
    share the nodes of the cluster, where one's urgent job preempts another's."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = Path(nodeid.partition("::")[0])
            return str(file.parent if file.parent.name == "cluster" else file)

    return ByFile(config, log)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real test data beside the checkout."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the real test data is not beside this checkout")
    return SHARED_DATA


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a small shapes corpus."""
    store = tmp_path_factory.mktemp("store")
    sizes = ["documents=60", "pairs=120", "questions=60", "chats=120", "demonstrations=20", "heldout=8"]
    subprocess.run([sys.executable, "data_prep/shapes.py", f"out={store}", "seed=0", *sizes], check=True, cwd=ROOT)
    return store


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Threads that wait for each other cost more than small models do."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def java() -> None:
    if shutil.which("java") is None:
        absent("no java on PATH; the oracle's tokenizer is written in it")
