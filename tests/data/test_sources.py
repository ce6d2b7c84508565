import io
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from hpc_mm.config import ConfigError
from hpc_mm.data import sources
from hpc_mm.data.sources import open_source

ENDINGS = (".json", ".tsv")
OUT = "s3://never/asked"  # for what is on the web alone


def test_a_file_or_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.json").write_bytes(b"[]")
    store, key = open_source(str(tmp_path / "a.json"), ENDINGS, OUT)
    assert (store.read(key), key) == (b"[]", "a.json")
    store, key = open_source(str(tmp_path), ENDINGS, OUT)
    assert ([entry.key for entry in store.list()], key) == (["a.json"], "")
    monkeypatch.chdir(tmp_path)
    assert open_source("a.json", ENDINGS, OUT)[1] == "a.json"
    with pytest.raises(ConfigError, match=r"b.json does not exist"):
        open_source("b.json", ENDINGS, OUT)


def test_a_dataset_in_the_cache_of_the_hub_is_its_newest_snapshot(tmp_path: Path) -> None:
    """As the hub's client lays it out: links to blobs, one folder per revision, the newest named in refs/main."""
    cache = tmp_path / "datasets--owner--name"
    for revision in ("old", "new"):
        blob = cache / "blobs" / revision
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(revision.encode())
        link = cache / "snapshots" / revision / "data" / "train.json"
        link.parent.mkdir(parents=True)
        link.symlink_to(Path("../../../blobs") / revision)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("new\n")
    for address in (cache, cache / "snapshots" / "new"):
        store, _ = open_source(str(address), ENDINGS, OUT)
        assert [(entry.key, entry.size) for entry in store.list()] == [("data/train.json", 3)]
        assert store.read("data/train.json") == b"new"
    (cache / "refs" / "main").write_text("gone")
    with pytest.raises(ConfigError, match=r"the snapshot .*gone is missing"):
        open_source(str(cache), ENDINGS, OUT)


class Handler(BaseHTTPRequestHandler):
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        status = 404 if "missing" in self.path else 200
        self.send_response(status)
        self.send_header("Content-Length", "9" if "short" in self.path else "3")
        self.end_headers()
        self.wfile.write(b"a\tb")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web() -> Iterator[str]:
    Handler.asked.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_file_on_the_web(web: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, key = open_source(f"{web}/folder/a%20b.tsv?download=true", ENDINGS, str(tmp_path))
    assert (key, store.read(key)) == ("a b.tsv", b"a\tb")
    monkeypatch.setattr(sources, "MOST", 2)
    for name, said in (
        ("a.tsv", "it has more than 2 bytes"),
        ("missing.tsv", "HTTP Error 404"),
        ("", "is not one of .json, .tsv"),
        ("a.exe", "is not one of .json, .tsv"),
        ("a%00.tsv", "is not one of .json, .tsv"),
    ):
        with pytest.raises(ConfigError, match=said):
            open_source(f"{web}/{name}", ENDINGS, str(tmp_path))
        monkeypatch.setattr(sources, "MOST", 2**20)
    with pytest.raises(ConfigError, match=r"it ended after 3 of 9 bytes|IncompleteRead"):
        open_source(f"{web}/short.tsv", ENDINGS, str(tmp_path))
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1, "nothing is kept but what is whole"


def test_a_file_on_the_web_is_asked_for_once(web: str, tmp_path: Path) -> None:
    for _ in range(3):
        for name in ("one/a.tsv", "two/a.tsv"):
            store, key = open_source(f"{web}/{name}", ENDINGS, str(tmp_path))
            assert store.read(key) == b"a\tb"
    assert Handler.asked == ["/one/a.tsv", "/two/a.tsv"]


class Drip(io.RawIOBase):
    def read1(self, size: int) -> bytes:
        time.sleep(0.01)
        return b"x"


def test_an_answer_that_drips_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "SILENCE", 0.05)
    with pytest.raises(OSError, match=r"bytes in 0 s are too few"):
        sources.copied(Drip(), io.BytesIO(), None)  # type: ignore[arg-type]
