"""Data sets in a bucket: fetched once per node, checked, and used as a local folder from then on.

`cache_dir/fetched/KEY/` holds the files, `KEY.json` beside it what they were when they came. KEY is a hash of the
address and of names, sizes and times of all objects, so that a changed data set is another entry and all nodes have the
same one. An entry is made under a lock, in a temporary folder that is renamed when it is whole.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from base64 import b64decode
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b, file_digest, md5
from pathlib import Path
from uuid import uuid4

from filelock import FileLock

from nuciseg.buckets import BucketFolder, StoredFile, explained
from nuciseg.data.cache import default_cache_dir
from nuciseg.errors import DataError, ResourceError

NUM_THREADS = 16
CHUNK_BYTES = 4 * 2**20
DIGEST_BYTES = 16
NUM_COPIES = 3
PARTS_MIB = (8, 10, 5, 16, 15, 32, 50, 64, 100, 128, 256, 512)  # of AWS's tools, pyarrow, s3fs, rclone and others
FETCHED = "fetched"


@dataclass(frozen=True)
class _Fetched:
    """A file as it was when it came: by size and time untouched since, by its digest surely the same."""

    num_bytes: int
    changed_ns: int
    digest: str


def local_folder(root: Path | str, cache_dir: Path | None = None) -> Path:
    """`root` itself, or the copy on this node of a folder in a bucket, fetched now unless it is there.

    Several processes that ask at the same time fetch once. `cache_dir` None means `default_cache_dir()`. Raises
    ResourceError where the storage cannot be used or the cache cannot be written, DataError where there are no files.
    """
    if isinstance(root, Path):
        return root
    source = BucketFolder(root)
    files = source.files()
    if not files:
        raise DataError(f"{root} holds no files; check data.root.")
    folder = (default_cache_dir() if cache_dir is None else Path(cache_dir)) / FETCHED
    entry = folder / _key(source.uri, files)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{entry.name}.lock"):
            if not _is_whole(entry):
                _fetch(source, files, entry)
    except OSError as error:
        raise ResourceError(
            f"The cache folder {folder} cannot be written ({error.strerror or error}); make room, or choose another "
            "folder with data.cache_dir or the environment variable NUCISEG_CACHE."
        ) from error
    return entry


def _key(uri: str, files: Sequence[StoredFile]) -> str:
    described = json.dumps([uri, [[file.name, file.num_bytes, file.changed_ns] for file in files]])
    return blake2b(described.encode(), digest_size=DIGEST_BYTES).hexdigest()


def _index_path(entry: Path) -> Path:
    return entry.with_name(f"{entry.name}.json")


def _is_whole(entry: Path) -> bool:
    """Whether the entry has every file as it came. Files that look touched are read, the others not."""
    if not entry.is_dir() or not _index_path(entry).is_file():
        return False
    index: dict[str, list[object]] = json.loads(_index_path(entry).read_bytes())
    return all(_is_as_it_came(entry / name, _Fetched(*found)) for name, found in index.items())  # type: ignore[arg-type]


def _is_as_it_came(path: Path, fetched: _Fetched) -> bool:
    try:
        stat = path.stat()
    except FileNotFoundError:
        return False
    if stat.st_size != fetched.num_bytes:
        return False
    return stat.st_mtime_ns == fetched.changed_ns or _digest(path) == fetched.digest


def _digest(path: Path) -> str:
    return blake2b(path.read_bytes(), digest_size=DIGEST_BYTES).hexdigest()


def _fetch(source: BucketFolder, files: Sequence[StoredFile], entry: Path) -> None:
    """Fetch all files into `entry`. The caller holds the entry's lock, so what lies there otherwise is dead."""
    for leftover in (entry, *entry.parent.glob(f"{entry.name}.tmp-*")):
        if leftover.exists():
            shutil.rmtree(leftover)
    _index_path(entry).unlink(missing_ok=True)
    temporary = entry.with_name(f"{entry.name}.tmp-{uuid4().hex[:8]}")
    _refuse_without_room(files, entry.parent)
    try:
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            fetched = list(pool.map(lambda file: fetch_file(source, file, temporary / file.name), files))
        _write_index(entry, {file.name: found for file, found in zip(files, fetched, strict=True)})
        os.replace(temporary, entry)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_index(entry: Path, fetched: Mapping[str, _Fetched]) -> None:
    temporary = _index_path(entry).with_suffix(".tmp")
    rows = {name: [found.num_bytes, found.changed_ns, found.digest] for name, found in fetched.items()}
    temporary.write_text(json.dumps(rows), encoding="utf-8")
    os.replace(temporary, _index_path(entry))


def _refuse_without_room(files: Sequence[StoredFile], folder: Path) -> None:
    need, free = sum(file.num_bytes for file in files), shutil.disk_usage(folder).free
    if need > free:
        raise ResourceError(
            f"the data takes {need / 1e6:.0f} MB and {folder} has {free / 1e6:.0f} MB free; make room, or choose "
            "another folder with data.cache_dir or the environment variable NUCISEG_CACHE"
        )


def fetch_file(source: BucketFolder, file: StoredFile, path: Path) -> _Fetched:
    """Write the object to `path`; raises ResourceError where it did not come whole, OSError from the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    digests = set()
    for _ in range(NUM_COPIES):
        digest, metadata = _copy(source, file.name, path)
        if path.stat().st_size != file.num_bytes:
            raise ResourceError(
                f"{source.uri}/{file.name} came with {path.stat().st_size} of {file.num_bytes} bytes; try again once "
                "nobody writes there"
            )
        is_as_stored = _is_as_stored(path, metadata)
        if is_as_stored or (is_as_stored is None and digest in digests):
            return _Fetched(file.num_bytes, path.stat().st_mtime_ns, digest)
        digests.add(digest)
    raise ResourceError(f"{source.uri}/{file.name} comes damaged, each time otherwise; check the network")


def _copy(source: BucketFolder, name: str, path: Path) -> tuple[str, Mapping[str, bytes]]:
    """Write the object to `path`: BLAKE2b of what came, and what the storage says of the object."""
    own = blake2b(digest_size=DIGEST_BYTES)
    with source.open_input(name) as stream, path.open("wb") as file:
        while chunk := _read(stream, f"{source.uri}/{name}"):
            own.update(chunk)
            file.write(chunk)
        return own.hexdigest(), _metadata(stream, f"{source.uri}/{name}")


def _is_as_stored(path: Path, metadata: Mapping[str, bytes]) -> bool | None:
    """Whether the file has the MD5 that the storage tells: Google's has its own field, that of S3 is its ETag, or, of
    an object that was sent in parts, which had one of the usual sizes, the MD5 of its parts' MD5s.

    None where that cannot be known, so that two equal copies have to do: an ETag is another hash where S3 encrypts with
    keys of its own, or the parts had another size.
    """
    if metadata.get("md5Hash"):
        return b64decode(metadata["md5Hash"]) == _md5(path)
    etag = re.fullmatch(r'"?([0-9a-f]{32})(?:-(\d+))?"?', metadata.get("ETag", b"").decode())
    if etag is None:
        return None
    if etag[2] is None:
        return etag[1] == _md5(path).hex() or None
    num_bytes, num_parts = path.stat().st_size, int(etag[2])
    sizes = [size for size in (mib * 2**20 for mib in PARTS_MIB) if -(-num_bytes // size) == num_parts]
    return any(etag[1] == _md5_of_parts(path, size).hex() for size in sizes) or None


def _md5(path: Path) -> bytes:
    with path.open("rb") as file:
        return file_digest(file, partial(md5, usedforsecurity=False)).digest()


def _md5_of_parts(path: Path, num_bytes: int) -> bytes:
    whole = md5(usedforsecurity=False)
    with path.open("rb") as file:
        for start in range(0, path.stat().st_size, num_bytes):
            part = md5(usedforsecurity=False)
            while (left := start + num_bytes - file.tell()) and (piece := file.read(min(left, CHUNK_BYTES))):
                part.update(piece)
            whole.update(part.digest())
    return whole.digest()


def _metadata(stream: object, uri: str) -> Mapping[str, bytes]:
    try:
        metadata: Mapping[str, bytes] = stream.metadata()  # type: ignore[attr-defined]
    except OSError as error:
        raise explained(uri, error) from error
    return metadata


def _read(stream: object, uri: str) -> bytes:
    try:
        chunk: bytes = stream.read(CHUNK_BYTES)  # type: ignore[attr-defined]
    except OSError as error:
        raise explained(uri, error) from error
    return chunk
