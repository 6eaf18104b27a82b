"""Decoded samples on disk, memory-mapped: decoded once per node, shared by all its workers and all trials.

`cache_dir/KEY/{images.bin,labels.bin,index.json}`. KEY is a hash of what the samples are made from, so a changed file
gives another entry. The entry is built in a temporary folder under a lock and renamed when whole: processes that open
the same data at the same time build it once, and a builder that was killed leaves nothing that passes for whole.
The pages lie in the operating system's cache, once for all processes that open the entry.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from nuciseg.errors import DataError, ResourceError
from nuciseg.types import Record, Sample

# Raise this when the layout below changes, or when a format's `load` makes other samples from the same files.
SCHEMA_VERSION = 2
NUM_THREADS = 4
CHUNK = 16  # images decoded at a time: bounds the memory of a build
ALIGNMENT_BYTES = 64


def default_cache_dir() -> Path:
    """`$NUCISEG_CACHE`, else `$XDG_CACHE_HOME/nuciseg`, else `~/.cache/nuciseg`."""
    if named := os.environ.get("NUCISEG_CACHE"):
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "nuciseg"


def open_cache(
    records: Sequence[Record],
    load: Callable[[Record], Sample],
    *,
    format_name: str,
    cache_dir: Path | None = None,
) -> CachedSamples:
    """The decoded samples of `records`, in their order; decoded now unless an entry of the same content exists.

    `load` may run in several threads. `cache_dir` None means `default_cache_dir()`. Entries are never removed; to make
    room delete any of them while nothing runs. Raises the `DataError` of `load` for a bad file, and `ResourceError`
    where the cache cannot be written.
    """
    if not records:
        raise DataError("There are no images to open; check data.root and the split.")
    cache_dir = default_cache_dir() if cache_dir is None else Path(cache_dir)
    key = content_key(records, format_name)
    entry = cache_dir / key
    if not entry.is_dir():
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
            with FileLock(cache_dir / f"{key}.lock"):
                if not entry.is_dir():
                    _build(entry, records, load)
        except OSError as error:
            raise ResourceError(
                f"The cache folder {cache_dir} cannot be written ({error.strerror or error}); make room, or choose "
                "another folder with data.cache_dir or the environment variable NUCISEG_CACHE."
            ) from error
    return CachedSamples(entry)


def content_key(records: Sequence[Record], format_name: str) -> str:
    """32 hex digits of BLAKE2b over schema version, format, and id, group and file contents of every record.

    A record without an image file is drawn from its id, so the id is its content.
    """
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        contents = list(pool.map(_digests, records))
    parts = [[record.id, record.group, digests] for record, digests in zip(records, contents, strict=True)]
    described = json.dumps([SCHEMA_VERSION, format_name, parts])
    return blake2b(described.encode(), digest_size=16).hexdigest()


class CachedSamples:
    """The samples of one cache entry: `len(samples)`, `samples[i]`, and `ids`, `groups`, `shapes` by position.

    Pickles as the path of its entry; the process that unpickles it maps the same pages.
    """

    def __init__(self, entry: Path) -> None:
        self._entry = Path(entry)
        try:
            index: list[dict[str, Any]] = json.loads((self._entry / "index.json").read_bytes())
            self._images = np.memmap(self._entry / "images.bin", np.uint8, "r")
            self._labels = np.memmap(self._entry / "labels.bin", np.uint8, "r")
        except (OSError, ValueError) as error:
            raise DataError(f"The cache entry {self._entry} cannot be opened ({error}); delete that folder.") from error
        self._index = index
        last = index[-1]
        if self._images.size < _end(last["image"]) or self._labels.size < _end(last["labels"]):
            raise DataError(f"The cache entry {self._entry} is truncated; delete that folder.")
        self.ids: tuple[str, ...] = tuple(item["id"] for item in index)
        self.groups: tuple[str, ...] = tuple(item["group"] for item in index)
        # (height, width) in pixels
        self.shapes: tuple[tuple[int, int], ...] = tuple((item["image"][2][0], item["image"][2][1]) for item in index)

    @property
    def path(self) -> Path:
        """The folder of the entry."""
        return self._entry

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, position: int) -> Sample:
        """The sample at `position`. `image_HWC` is a read-only view of the file, `labels_HW` an int32 copy."""
        item = self._index[position]
        return Sample(_view(self._images, item["image"]), _view(self._labels, item["labels"]).astype(np.int32))

    def __iter__(self) -> Iterator[Sample]:
        return (self[position] for position in range(len(self)))

    def __reduce__(self) -> tuple[type[CachedSamples], tuple[Path]]:
        return CachedSamples, (self._entry,)


def _digests(record: Record) -> list[str]:
    paths = () if record.image_path is None else (record.image_path, *record.label_paths)
    digests = []
    for path in paths:
        try:
            digests.append(blake2b(path.read_bytes(), digest_size=16).hexdigest())
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}); check that the file is there.") from error
    return digests


def _build(entry: Path, records: Sequence[Record], load: Callable[[Record], Sample]) -> None:
    """Decode every record into `entry`. The caller holds the entry's lock, so older temporary folders are dead."""
    for leftover in entry.parent.glob(f"{entry.name}.tmp-*"):
        shutil.rmtree(leftover)
    temporary = entry.with_name(f"{entry.name}.tmp-{uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        index = []
        with (
            (temporary / "images.bin").open("wb") as images,
            (temporary / "labels.bin").open("wb") as labels,
            ThreadPoolExecutor(NUM_THREADS) as pool,
        ):
            for start in range(0, len(records), CHUNK):
                chunk = records[start : start + CHUNK]
                for record, sample in zip(chunk, pool.map(load, chunk), strict=True):
                    index.append(
                        {
                            "id": record.id,
                            "group": record.group,
                            "image": _append(images, sample.image_HWC),
                            "labels": _append(labels, _smallest(sample.labels_HW)),
                        }
                    )
        (temporary / "index.json").write_text(json.dumps(index))
        os.replace(temporary, entry)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _smallest(labels_HW: NDArray[np.int32]) -> NDArray[np.generic]:
    lowest, highest = int(labels_HW.min()), int(labels_HW.max())
    for dtype in (np.uint8, np.uint16):
        if lowest >= 0 and highest <= np.iinfo(dtype).max:
            return labels_HW.astype(dtype)
    return labels_HW.astype(np.int32)


def _append(file: BinaryIO, array: NDArray[np.generic]) -> list[Any]:
    """Write an array at an aligned place; [place in bytes, dtype, shape]."""
    file.write(b"\0" * (-file.tell() % ALIGNMENT_BYTES))
    place = file.tell()
    file.write(np.ascontiguousarray(array).data)
    return [place, array.dtype.str, array.shape]


def _end(block: list[Any]) -> int:
    place, dtype, shape = block
    return int(place + np.dtype(dtype).itemsize * np.prod(shape))


def _view(pages: NDArray[np.uint8], block: list[Any]) -> NDArray[Any]:
    place, dtype, shape = block
    # A plain array, no memmap: the subclass costs time at every slice and would be pickled with its content.
    view: NDArray[Any] = np.asarray(pages[place : _end(block)]).view(dtype).reshape(shape)
    return view
