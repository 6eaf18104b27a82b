"""Folders in object storage, `s3://BUCKET/FOLDER` or `gs://BUCKET/FOLDER`, through pyarrow.

Credentials are found where the cloud's own tools find them: environment, profile, the machine's role. S3 servers other
than AWS are named by AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL, which pyarrow does not read by itself.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import PlainValidator

from nuciseg.errors import ResourceError, StorageAwayError

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

# pyarrow is imported where it is used: a run without buckets need not load its libraries.

SCHEMES = ("s3", "gs")
CONNECT_TIMEOUT_S = 10
REQUEST_TIMEOUT_S = 60
NUM_ATTEMPTS = 5
GCS_RETRIES_FOR_S = 60

_SCHEME = re.compile(r"^([a-zA-Z][a-zA-Z0-9+.-]*)://")
_AWAY = (
    "network_connection", "could not resolve", "could not connect", "unavailable", "slow_down", "request_timeout",
    "internal_failure", "http status 5",
)  # fmt: skip


def location(value: object) -> Path | str:
    """Text with a scheme stays text: as a path it would lose a slash. Raises ValueError."""
    if not isinstance(value, (str, Path)):
        raise ValueError("give a folder, s3://BUCKET/FOLDER or gs://BUCKET/FOLDER")
    found = _SCHEME.match(str(value))
    if found is None:
        return Path(value)
    if found[1] not in SCHEMES or not str(value)[found.end() :].split("/")[0]:
        raise ValueError("no such storage; give a folder, s3://BUCKET/FOLDER or gs://BUCKET/FOLDER")
    return str(value)


Location = Annotated[Path | str, PlainValidator(location)]
"""A folder: text is one in a bucket, a path one of this machine."""


def is_bucket(location: Path | str) -> bool:
    """Whether `location`, as text too, names a folder in a bucket."""
    return str(location).startswith(tuple(f"{scheme}://" for scheme in SCHEMES))


@dataclass(frozen=True)
class StoredFile:
    """One object: its `name` from the folder on, and what changes when it is written again."""

    name: str
    num_bytes: int
    changed_ns: int


class BucketFolder:
    """A folder in a bucket. Every method raises ResourceError where the storage does not do what is asked."""

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        scheme, _, path = self.uri.partition("://")
        self.path = path
        self.bucket = path.split("/")[0]
        with _explained(self.uri):
            self.system = _s3(self.bucket) if scheme == "s3" else _gcs()

    def files(self, *, below: bool = True) -> list[StoredFile]:
        """All files in the folder, and in those below it unless told otherwise, by name; [] where there is none."""
        from pyarrow.fs import FileSelector, FileType

        with _explained(self.uri):
            found = self.system.get_file_info(FileSelector(self.path, recursive=below, allow_not_found=True))
            if not found and self.system.get_file_info(self.bucket).type == FileType.NotFound:
                raise ResourceError(f"{self.uri}: there is no bucket {self.bucket!r}; check its name, or make it")
        files = [
            StoredFile(_relative(info.path, self.path, self.uri), info.size, info.mtime_ns)
            for info in found
            if info.type == FileType.File
        ]
        return sorted(files, key=lambda file: file.name)

    def open_input(self, name: str) -> Any:
        """A stream of a file's bytes; reading from it raises OSError."""
        with _explained(f"{self.uri}/{name}"):
            return self.system.open_input_stream(f"{self.path}/{name}", compression=None)

    def read(self, name: str) -> bytes:
        """The whole of a file."""
        with _explained(f"{self.uri}/{name}"), self.open_input(name) as stream:
            data: bytes = stream.read()
            return data

    def write(self, name: str, data: bytes) -> None:
        """Store `data` as a file."""
        with _explained(f"{self.uri}/{name}"), self.system.open_output_stream(f"{self.path}/{name}") as stream:
            stream.write(data)

    def upload(self, path: Path, name: str) -> None:
        """Store the file at `path`, whole or not at all: an object is there once its last byte has come."""
        from pyarrow.fs import LocalFileSystem, copy_files

        with _explained(f"{self.uri}/{name}"):
            # Not through a Python stream: leaving its block after an error would store what was written so far.
            copy_files(str(path), f"{self.path}/{name}", LocalFileSystem(), self.system)

    def delete(self, name: str) -> None:
        """Remove a file; nothing where there is none."""
        with _explained(f"{self.uri}/{name}"), contextlib.suppress(FileNotFoundError):
            self.system.delete_file(f"{self.path}/{name}")


def _relative(path: str, folder: str, uri: str) -> str:
    """A name that leads out of the folder is none that we wrote: what is fetched must stay in its place."""
    name = path.removeprefix(folder + "/")
    if ".." in PurePosixPath(name).parts or name.startswith("/"):
        raise ResourceError(f"{uri} has an object {name!r}, which would be written outside of its folder; remove it")
    return name


@cache
def _s3(bucket: str) -> FileSystem:
    from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem, resolve_s3_region

    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") if endpoint else None
    return S3FileSystem(
        # AWS redirects requests that go to another region than the bucket's, and pyarrow does not follow.
        region=(region or "us-east-1") if endpoint else resolve_s3_region(bucket),
        endpoint_override=endpoint,
        connect_timeout=CONNECT_TIMEOUT_S,
        request_timeout=REQUEST_TIMEOUT_S,
        retry_strategy=AwsStandardS3RetryStrategy(max_attempts=NUM_ATTEMPTS),
    )


@cache
def _gcs() -> FileSystem:
    from pyarrow.fs import GcsFileSystem

    # The library reads this address by itself, but asks Google for an access token all the same.
    emulated = "CLOUD_STORAGE_EMULATOR_ENDPOINT" in os.environ
    return GcsFileSystem(anonymous=emulated, retry_time_limit=timedelta(seconds=GCS_RETRIES_FOR_S))


@contextlib.contextmanager
def _explained(uri: str) -> Iterator[None]:
    """Within, an OSError of pyarrow becomes a ResourceError of one sentence."""
    try:
        yield
    except OSError as error:
        raise explained(uri, error) from error


def explained(uri: str, error: OSError) -> ResourceError:
    """The error to raise for what happened at `uri`; a StorageAwayError where it may go by."""
    is_away = any(word in str(error).lower() for word in _AWAY)
    return (StorageAwayError if is_away else ResourceError)(f"{uri}: {_explain(error)}")


def _explain(error: OSError) -> str:
    """What a storage's error means and what to do, by the words that the cloud's library puts into it."""
    text = " ".join(str(error).split())
    lower = text.lower()
    if "no_such_bucket" in lower or re.search(r"bucket '\S+' not found", lower):
        return "there is no such bucket; check its name, or make it"
    if any(word in lower for word in ("access_denied", "http status 403", "invalid_access_key", "signature_does_not")):
        return (
            "access is denied: there are no credentials, or they may not do this; set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, a profile in ~/.aws, or give the machine a role that may use the bucket"
        )
    if any(word in lower for word in ("permission_denied", "unauthenticated", "could not create a oauth2")):
        return (
            "access is denied: there are no Google credentials, or they may not do this; run `gcloud auth "
            "application-default login`, or give the machine a service account that may use the bucket"
        )
    if any(word in lower for word in _AWAY):
        return f"the storage cannot be reached ({_reason(text)}); check the network and AWS_ENDPOINT_URL, if it is set"
    if isinstance(error, FileNotFoundError):
        return "there is no such file; check the address"
    return f"the storage failed ({_reason(text)})"


def _reason(text: str) -> str:
    """The library's last words, without what surrounds them."""
    return text.rsplit("Details: ", 1)[-1].split(" (Request ID", 1)[0][:200]
