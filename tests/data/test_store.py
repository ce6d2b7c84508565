import json
import os
import pickle
import tempfile
import threading
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_mm.config import ConfigError
from hpc_mm.data import s3
from hpc_mm.data.store import FolderStore, MissingKey, StoreError, open_store, opened

parts = st.text(alphabet="ab-./é", min_size=1, max_size=4).filter(lambda part: "/" not in part and part.strip("."))
keys = st.lists(parts, min_size=1, max_size=3).map("/".join)


def test_verbs(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    store.write("a/b.bin", b"0123456789")
    assert store.read("a/b.bin") == b"0123456789"
    assert store.read("a/b.bin", 2, 5) == b"234"
    assert store.read("a/b.bin", 8) == b"89"
    assert store.read("a/b.bin", 4, 4) == b""
    assert store.size("a/b.bin") == 10 and store.size("a/c") is None and store.size("a") is None
    (tmp_path / "file").write_bytes(b"up")
    store.upload("up", tmp_path / "file")
    store.download("a/b.bin", tmp_path / "down")
    assert store.read("up") == b"up" and (tmp_path / "down").read_bytes() == b"0123456789"
    store.delete("up")
    store.delete("up")
    assert [(entry.key, entry.size) for entry in store.list()] == [("a/b.bin", 10)]


def test_missing_keys_and_short_values(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.write("short", b"abc")
    with pytest.raises(MissingKey, match="no nothing in"):
        store.read("nothing")
    with pytest.raises(MissingKey):
        store.read("short/below")
    with pytest.raises(MissingKey):
        store.download("nothing", tmp_path / "x")
    with pytest.raises(StoreError, match="ends before byte 9"):
        store.read("short", 1, 9)
    assert [entry.key for entry in store.list()] == ["short"]


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "./a", "a/", "a\0b"])
def test_keys_stay_inside_the_folder(tmp_path: Path, key: str) -> None:
    store = open_store(str(tmp_path / "store"))
    for verb in (store.read, store.size, store.delete, lambda key: store.write(key, b"")):
        with pytest.raises(ValueError, match="is no key"):
            verb(key)
    with pytest.raises(ValueError, match="is no key"):
        list(store.list("../x/"))


@pytest.mark.parametrize(
    ("address", "said"),
    [("", "names no store"), ("s3://", "names no bucket"), ("gs://b/c", "not gs://")],
)
def test_wrong_addresses(address: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        open_store(address)


def test_a_missing_folder_is_told(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "nowhere"))
    for verb in (lambda: store.read("a"), lambda: list(store.list()), lambda: store.size("a")):
        with pytest.raises(ConfigError, match=r"no folder .*nowhere"):
            verb()


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="cannot make the folder"):
        open_store(str(tmp_path / "file")).write("a", b"")


def test_a_failed_upload_leaves_nothing(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    store.write("a", b"old")
    with pytest.raises(FileNotFoundError):
        store.upload("a", tmp_path / "absent")
    assert store.read("a") == b"old"
    assert os.listdir(tmp_path / "store") == ["a"]


@given(found=st.sets(keys, max_size=8), prefix=st.text(alphabet="ab-.", max_size=2))
def test_lists_are_sorted_by_key_as_in_s3(
    tmp_path_factory: pytest.TempPathFactory, found: set[str], prefix: str
) -> None:
    wanted = {key for key in found if not any(other.startswith(f"{key}/") for other in found)}
    store = FolderStore(str(tmp_path_factory.mktemp("store")))
    for key in wanted:
        store.write(key, key.encode())
    expected = sorted((key for key in wanted if key.startswith(prefix)), key=lambda key: key.encode())
    assert [entry.key for entry in store.list(prefix)] == expected


def test_a_link_to_nothing_is_not_listed(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.write("a", b"abc")
    (tmp_path / "b").symlink_to(tmp_path / "nowhere")
    assert [entry.key for entry in store.list()] == ["a"]


def test_a_folder_that_may_not_be_listed_is_told() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        Path(folder, "closed").mkdir(mode=0)
        user = os.geteuid()
        if not user:
            os.seteuid(65534)  # root may list anything
        try:
            with pytest.raises(ConfigError, match=r"cannot list .*closed: Permission denied"):
                list(open_store(folder).list())
        finally:
            os.seteuid(user)


def test_a_value_as_a_file(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    data = os.urandom(3_000_000)
    store.write("big", data)
    with opened(store, "big", len(data)) as file:
        file.seek(1_500_000)
        assert file.read(10) == data[1_500_000:1_500_010]
        file.seek(-5, os.SEEK_END)
        assert file.read() == data[-5:]


# ---------------------------------------------------------------- an s3 that misbehaves


class Faulty(BaseHTTPRequestHandler):
    """Answers GETs with what ``server.answers`` lists, one after the other, the last one for ever."""

    protocol_version = "HTTP/1.1"

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()

    def do_GET(self) -> None:
        server = self.server
        server.seen += 1
        status, announced, body = server.answers[min(server.seen, len(server.answers)) - 1]
        self.send_response(status)
        self.send_header("Content-Length", str(announced))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Faulty)
    server.seen = 0
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def error(code: str) -> bytes:
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>m</Message></Error>".encode()


def answer(status: int, body: bytes) -> tuple[int, int, bytes]:
    return status, len(body), body


def test_busy_servers_and_cut_answers_are_asked_again(faulty: ThreadingHTTPServer) -> None:
    faulty.answers = [
        answer(503, error("SlowDown")),
        answer(500, error("InternalError")),
        (206, 5, b"ab"),
        answer(206, b"abcde"),
    ]
    assert open_store("s3://bucket/prefix").read("key", 0, 5) == b"abcde"
    assert faulty.seen == 4


def test_a_deadline_ends_the_asking(faulty: ThreadingHTTPServer) -> None:
    faulty.answers = [answer(503, error("SlowDown"))]
    with pytest.raises(StoreError, match=r"key in s3://bucket/prefix: failed for 1 s: .*SlowDown"):
        open_store("s3://bucket/prefix", deadline=1).read("key")
    assert faulty.seen > 1


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("NoSuchBucket", 404, "the bucket does not exist"),
        ("InvalidAccessKeyId", 403, "the access key is unknown"),
        ("SignatureDoesNotMatch", 403, "the secret key is wrong"),
        ("AccessDenied", 403, "access is denied"),
    ],
)
def test_what_only_the_user_can_help_is_asked_once(
    faulty: ThreadingHTTPServer, code: str, status: int, said: str
) -> None:
    faulty.answers = [answer(status, error(code))]
    with pytest.raises(ConfigError, match=f"s3://bucket: {said}"):
        open_store("s3://bucket").read("key")
    assert faulty.seen == 1


def test_an_address_whose_credentials_ended_is_signed_anew(faulty: ThreadingHTTPServer) -> None:
    good = answer(206, b"abcde")
    faulty.answers = [good, answer(403, error("InvalidAccessKeyId")), good, good]
    store = open_store("s3://bucket")
    assert [store.read("key", 0, 5) for _ in range(3)] == [b"abcde"] * 3
    assert faulty.seen == 4


def test_no_signature_stands_in_a_message(monkeypatch: pytest.MonkeyPatch, faulty: ThreadingHTTPServer) -> None:
    faulty.answers = [answer(206, b"abcde")]
    store = open_store("s3://bucket")
    store.read("key", 0, 5)
    faulty.shutdown()
    faulty.server_close()
    store.deadline = 0.3
    with pytest.raises(StoreError, match=r"127\.0\.0\.1") as found:
        store.read("key", 0, 5)
    assert "X-Amz" not in "".join(traceback.format_exception(found.value))


def test_few_signed_addresses_are_kept(monkeypatch: pytest.MonkeyPatch, faulty: ThreadingHTTPServer) -> None:
    monkeypatch.setattr(s3, "ADDRESSES", 3)
    faulty.answers = [answer(206, b"abcde")]
    store = open_store("s3://bucket")
    for number in (*range(5), 0, 0):
        assert store.read(f"key{number}", 0, 5) == b"abcde"
    assert [key for _, key in store._addresses] == ["key3", "key4", "key0"]


def test_an_absent_object_is_asked_once(faulty: ThreadingHTTPServer) -> None:
    faulty.answers = [answer(404, error("NoSuchKey"))]
    with pytest.raises(MissingKey, match="key: not in s3://bucket"):
        open_store("s3://bucket").read("key")
    assert faulty.seen == 1


def test_an_object_that_ends_early_is_an_error(faulty: ThreadingHTTPServer) -> None:
    faulty.answers = [answer(206, b"abc")]
    with pytest.raises(StoreError, match="ends before byte 5"):
        open_store("s3://bucket").read("key", 0, 5)


def test_an_endpoint_where_nothing_answers(monkeypatch: pytest.MonkeyPatch, faulty: ThreadingHTTPServer) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # the discard port
    with pytest.raises(ConfigError, match=r"nothing answers at http://127.0.0.1:9 within 0.3 s; AWS_ENDPOINT_URL"):
        open_store("s3://bucket", deadline=0.3).read("key")


def test_an_outage_of_a_store_that_has_answered_is_no_mistake_of_the_users(
    monkeypatch: pytest.MonkeyPatch, faulty: ThreadingHTTPServer
) -> None:
    """Not in this process alone: reading workers are born from one that has read the manifest."""
    faulty.answers = [answer(404, error("NoSuchKey"))]
    store = open_store("s3://bucket", deadline=0.3)
    with pytest.raises(MissingKey):
        store.read("key")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # the discard port
    with pytest.raises(StoreError, match=r"key in s3://bucket: failed for 0.3 s: .*127.0.0.1:9"):
        pickle.loads(pickle.dumps(store)).read("key")


def failing_credentials(monkeypatch: pytest.MonkeyPatch, folder: Path, failures: int) -> None:
    """Credentials from a program that fails at first."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    keys = {"Version": 1, "AccessKeyId": "key", "SecretAccessKey": "secret"}
    program = folder / "credentials.sh"
    program.write_text(
        f"echo >> {folder}/calls\n[ $(wc -l < {folder}/calls) -gt {failures} ] || exit 1\necho '{json.dumps(keys)}'\n"
    )
    (folder / "config").write_text(f"[default]\ncredential_process = sh {program}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(folder / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(folder / "absent"))


def test_credentials_that_cannot_be_fetched_are_asked_for_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, faulty: ThreadingHTTPServer
) -> None:
    faulty.answers = [answer(200, b"abc")]
    failing_credentials(monkeypatch, tmp_path, failures=2)
    assert open_store("s3://bucket").read("key") == b"abc"


def test_credentials_that_are_never_fetched_are_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, faulty: ThreadingHTTPServer
) -> None:
    failing_credentials(monkeypatch, tmp_path, failures=10**6)
    with pytest.raises(ConfigError, match=r"s3://bucket: no usable credentials"):
        open_store("s3://bucket", deadline=0.3).read("key")


def test_a_large_upload_has_time_in_proportion(faulty: ThreadingHTTPServer, tmp_path: Path) -> None:
    """Seven mebibytes have seven seconds more, so that four busy answers (0.7 s of waiting) end nothing."""
    faulty.answers = [answer(503, error("SlowDown"))] * 4 + [answer(200, b"")]
    (tmp_path / "file").write_bytes(bytes(7 * 2**20))
    open_store("s3://bucket", deadline=0.2).upload("key", tmp_path / "file")
    assert faulty.seen == 5


def test_without_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, faulty: ThreadingHTTPServer) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "absent"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(ConfigError, match=r"s3://bucket: no usable credentials .* AWS_ACCESS_KEY_ID"):
        open_store("s3://bucket").read("key")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(ConfigError, match=r"boto3 makes no client: .*nobody"):
        open_store("s3://bucket").read("key")


def test_a_store_travels_to_other_processes(faulty: ThreadingHTTPServer) -> None:
    faulty.answers = [answer(200, b"abc")]
    store = open_store("s3://bucket")
    assert store.read("key") == b"abc"
    assert pickle.loads(pickle.dumps(store)).read("key") == b"abc"
