"""A store in an S3 bucket (Ceph, AWS, MinIO) by boto3, with deadlines and retries of our own."""

from __future__ import annotations

import itertools
import os
import random
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import boto3
from boto3.exceptions import Boto3Error, S3UploadFailedError
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectTimeoutError,
    CredentialRetrievalError,
    EndpointConnectionError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
)
from botocore.parsers import create_parser
from urllib3.exceptions import HTTPError

from hpc_mm.config import ConfigError
from hpc_mm.data.store import NONE, Entry, MissingKey, StoreError, checked, checked_range, written_aside

T = TypeVar("T")

FIRST_WAIT, LONGEST_WAIT = 0.1, 5.0  # seconds; the upper ends of the first and of the longest random wait
CONNECT_TIMEOUT, SILENCE_TIMEOUT = 5, 15  # seconds; for a connection, and between two pieces of an answer
CONNECTIONS = 64  # per process and store
SIGNED = 3600  # seconds that the signed address of an object is good for
ADDRESSES = 1000  # signed ones that are kept
PIECE = 16 * 1024  # bytes between two looks at the clock
UPLOAD_RATE = 2**20  # bytes per second, below which an upload has failed

USER_CODES = {
    "NoSuchBucket": "the bucket does not exist",
    "InvalidBucketName": "the bucket's name is not valid",
    "AccessDenied": "access is denied to these credentials",
    "403": "access is denied to these credentials",
    "InvalidAccessKeyId": "the access key is unknown there (AWS_ACCESS_KEY_ID)",
    "SignatureDoesNotMatch": "the secret key is wrong (AWS_SECRET_ACCESS_KEY)",
    "ExpiredToken": "the credentials have expired",
}
ABSENT_CODES = {"NoSuchKey", "404", "NotFound"}
RETRIED_CODES = {"SlowDown", "Throttling", "RequestTimeout", "TooManyRequests", "429"}


class Making:
    """A lock that a forked process has anew, whoever held it in the old one."""

    def __init__(self) -> None:
        self.renew()
        os.register_at_fork(after_in_child=self.renew)

    def renew(self) -> None:
        self.lock = threading.Lock()


MAKING = Making()


class S3Store:
    """A bucket below a prefix. One boto3 client per process, made after any fork; safe with threads."""

    def __init__(self, bucket: str, prefix: str, deadline: float) -> None:
        self.bucket, self.prefix, self.deadline = bucket, prefix, deadline
        self.address = f"s3://{bucket}/{prefix}".rstrip("/")
        self._answered = False  # then what is wrong now is no mistake in an address or in a key
        # By process and key: signed address, when made. Each use is one call, which is atomic, so threads need no lock.
        self._addresses: OrderedDict[tuple[int, str], tuple[str, float]] = OrderedDict()
        self._clients: dict[int, Any] = {}  # by process id: sockets must not be shared across a fork

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_addresses": OrderedDict(), "_clients": {}}

    def _client(self) -> Any:
        client = self._clients.get(os.getpid())
        if client is None:
            with MAKING.lock:  # a client takes half a second of a core; threads that start together need but one
                client = self._clients.get(os.getpid()) or new_client(self.address, self.deadline)
                self._clients[os.getpid()] = client
        return client

    def _key(self, key: str) -> str:
        return f"{self.prefix}/{checked(key)}" if self.prefix else checked(key)

    def _call(self, what: str, action: Callable[[Any, float], T], more: float = 0) -> T:
        """``action(client, end)`` with retries: exponential backoff, full jitter, ``end`` on the monotonic clock.

        ``more``: seconds beyond the store's deadline.
        """
        end = time.monotonic() + self.deadline + more
        for attempt in itertools.count():
            try:
                value = action(self._client(), end)
                self._answered = True
                return value
            except (BotoCoreError, ClientError, Boto3Error, HTTPError, OSError) as error:
                self._judge(what, error)
                wait = random.uniform(0, min(LONGEST_WAIT, FIRST_WAIT * 2**attempt))
                if time.monotonic() + wait >= end:
                    self._give_up(what, error, self.deadline + more)
            time.sleep(wait)
        raise AssertionError("count() does not end")

    def _judge(self, what: str, error: Exception) -> None:
        """Raise what no retry can help; return for what one may."""
        if isinstance(error, NoCredentialsError | PartialCredentialsError | ProfileNotFound):
            self._refuse_credentials(error)
        if isinstance(error, S3UploadFailedError) and isinstance(error.__context__, ClientError):
            error = error.__context__
        if not isinstance(error, ClientError):
            return
        self._answered = True
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        if code in USER_CODES:
            raise ConfigError(f"{self.address}: {USER_CODES[code]} ({what})") from None
        if code in ABSENT_CODES:
            raise MissingKey(f"{what}: not in {self.address}") from None
        if code not in RETRIED_CODES and 400 <= status < 500:
            raise StoreError(f"{what} in {self.address}: {_line(error)}") from None

    def _refuse_credentials(self, error: Exception) -> NoReturn:
        raise ConfigError(
            f"{self.address}: no usable credentials ({_line(error)}); "
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        ) from None

    def _give_up(self, what: str, error: Exception, seconds: float) -> NoReturn:
        """A store that answered before is out of order; one that never did is perhaps not what the user means."""
        if isinstance(error, CredentialRetrievalError) and not self._answered:
            self._refuse_credentials(error)
        if isinstance(error, EndpointConnectionError | ConnectTimeoutError) and not self._answered:
            raise ConfigError(
                f"{self.address}: nothing answers at {self._client().meta.endpoint_url} within {self.deadline:g} s; "
                "AWS_ENDPOINT_URL names the endpoint"
            ) from None
        # From None: a traceback of the error itself would show the signature.
        raise StoreError(f"{what} in {self.address}: failed for {seconds:g} s: {_line(error)}") from None

    def read(self, key: str, start: int | None = None, end: int | None = None) -> bytes:
        first, end = checked_range(key, start, end)
        if end == first:
            return b""
        name, span = self._key(key), {} if not first and end is None else {"Range": f"bytes={first}-{_last(end)}"}
        data = self._call(key, lambda client, limit: self._get(client, name, span, limit))
        if end is not None and len(data) < end - first:
            raise StoreError(f"{key} in {self.address} ends before byte {end}")
        return data

    def _get(self, client: Any, name: str, span: dict[str, str], limit: float) -> bytes:
        """One GET. An answer shorter than the server announced is an error that is retried."""
        body, length = self._answer(client, name, span)
        pieces = []
        with body:
            while piece := body.read(PIECE):
                pieces.append(piece)
                if time.monotonic() > limit:
                    raise TimeoutError(f"{sum(map(len, pieces))} of {length} bytes came in time")
        data = b"".join(pieces)
        if len(data) != length:
            raise OSError(f"{len(data)} of {length} bytes came")
        return data

    def _answer(self, client: Any, name: str, span: dict[str, str]) -> tuple[Any, int]:
        """The body of a GET and its length, by the address that is signed once per object, over boto3's connections.

        boto3's own call costs four times the processor time, nearly as much as decoding an image. It follows where the
        bucket is elsewhere, or where an older address is refused: its credentials may have ended.
        """
        fresh = (os.getpid(), name) not in self._addresses
        request = AWSRequest("GET", self._signed(client, name), span, stream_output=True)
        answer = client._endpoint.http_session.send(request.prepare())
        if answer.status_code in (200, 206):
            return answer.raw, int(answer.headers["Content-Length"])
        with answer.raw:
            text = answer.raw.read(PIECE)
        if answer.status_code < 400 or (answer.status_code in (400, 401, 403) and not fresh):
            self._addresses.pop((os.getpid(), name), None)
            found = client.get_object(Bucket=self.bucket, Key=name, **span)
            return found["Body"], int(found["ContentLength"])
        refusal = {"status_code": answer.status_code, "headers": answer.headers, "body": text}
        shape = client.meta.service_model.operation_model("GetObject").output_shape
        raise ClientError(create_parser("rest-xml").parse(refusal, shape), "GetObject")

    def _signed(self, client: Any, name: str) -> str:
        address, made = self._addresses.get((os.getpid(), name), ("", 0.0))
        now = time.monotonic()
        if not address or now - made > SIGNED / 2:
            values = {"Bucket": self.bucket, "Key": name}
            address = client.generate_presigned_url("get_object", Params=values, ExpiresIn=SIGNED)
            self._addresses[os.getpid(), name] = address, now
            if len(self._addresses) > ADDRESSES:
                self._addresses.popitem(last=False)
        return address

    def write(self, key: str, data: bytes, metadata: Mapping[str, str] = NONE) -> None:
        values = {"Bucket": self.bucket, "Key": self._key(key), "Body": data, "Metadata": dict(metadata)}
        self._call(key, lambda client, _: client.put_object(**values))

    def upload(self, key: str, path: Path) -> None:
        name = self._key(key)
        more = path.stat().st_size / UPLOAD_RATE
        self._call(key, lambda client, _: client.upload_file(str(path), self.bucket, name), more)

    def download(self, key: str, path: Path) -> None:
        name = self._key(key)
        try:
            with written_aside(path) as part:
                self._call(key, lambda client, _: client.download_file(self.bucket, name, str(part)))
        except MissingKey:
            self._check_bucket()
            raise

    def list(self, prefix: str = "") -> Iterator[Entry]:
        start = f"{self.prefix}/" if self.prefix else ""
        token: str | None = ""
        while token is not None:
            page, token = self._page(start + prefix, token)
            yield from (Entry(found["Key"].removeprefix(start), found["Size"], found["ETag"]) for found in page)

    def _page(self, prefix: str, token: str) -> tuple[Iterator[dict[str, Any]], str | None]:
        """Up to 1,000 objects, and where the next ones begin. Keys with a last slash only mark folders."""
        values = {"Bucket": self.bucket, "Prefix": prefix, **({"ContinuationToken": token} if token else {})}
        page = self._call(f"the list of {prefix or 'all keys'}", lambda client, _: client.list_objects_v2(**values))
        objects = (found for found in page.get("Contents", []) if not found["Key"].endswith("/"))
        return objects, page.get("NextContinuationToken")

    def size(self, key: str) -> int | None:
        name = self._key(key)
        try:
            found = self._call(key, lambda client, _: client.head_object(Bucket=self.bucket, Key=name))
        except MissingKey:
            self._check_bucket()
            return None
        return int(found["ContentLength"])

    def _check_bucket(self) -> None:
        """Raise ConfigError where the bucket is missing: a HEAD has no body that tells it from a missing key."""
        try:
            self._call("the bucket", lambda client, _: client.head_bucket(Bucket=self.bucket))
        except MissingKey:
            raise ConfigError(f"{self.address}: {USER_CODES['NoSuchBucket']}") from None

    def delete(self, key: str) -> None:
        name = self._key(key)
        self._call(key, lambda client, _: client.delete_object(Bucket=self.bucket, Key=name))


def new_client(address: str, deadline: float) -> Any:
    """A boto3 client that leaves retrying to us and adds no checksum that Ceph does not know."""
    config = Config(
        signature_version="s3v4",  # of signed addresses too, which else have the old one
        max_pool_connections=CONNECTIONS,
        connect_timeout=min(CONNECT_TIMEOUT, deadline),
        read_timeout=min(SILENCE_TIMEOUT, deadline),
        retries={"total_max_attempts": 1},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    try:
        return boto3.session.Session().client("s3", config=config)
    except CredentialRetrievalError:  # what gives them out may only be busy
        raise
    except (BotoCoreError, ValueError) as error:
        raise ConfigError(f"{address}: boto3 makes no client: {_line(error)}") from None


def _line(error: Exception) -> str:
    """What it says, without what a signed address proves who asks by."""
    return re.sub(r"\?X-Amz-[^\s\"']*", "", " ".join(str(error).split())) or type(error).__name__


def _last(end: int | None) -> str:
    """The inclusive end of an HTTP range."""
    return "" if end is None else str(end - 1)
