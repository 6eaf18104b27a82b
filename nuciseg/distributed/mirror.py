"""Runs and searches in a bucket: a copy on this machine to work in, and what keeps the two the same.

The bucket is the truth. Who begins to work fetches it, so that the copy equals it, and pushes what then changes: first
what a checkpoint consists of, then the file that makes it one, then what names it, in the order of writing; deletions
come last. So at any moment the bucket holds a run that can go on. Nothing here knows Ray. For a plain folder there is
nothing to do: `fetch` and `push` return at once.

Names with a part that begins with a dot are left alone (files that are being written), and so is what Ray keeps there.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path, PurePosixPath

from filelock import FileLock

from nuciseg.buckets import BucketFolder, StoredFile
from nuciseg.data.cache import default_cache_dir
from nuciseg.data.fetching import fetch_file
from nuciseg.engine.checkpoint import METADATA_FILE, find_checkpoint
from nuciseg.errors import CheckpointError, ResourceError, writing
from nuciseg.patience import names_in, patiently

COPIES = "runs"  # below the cache folder
NUM_THREADS = 8
EXCHANGE_S = 5.0
OF_RAY = ("ray_train/", "checkpoint_")  # what Train and Tune store in a run's folder
_NUM_LISTINGS = 3

_Stat = tuple[int, int]  # bytes, time of change in ns


@dataclass
class _Known:
    """A file as it was when copy and bucket were the same; `there` is None until the bucket was asked."""

    here: _Stat
    there: _Stat | None = None


@dataclass(frozen=True)
class Mirror:
    """The folder of a run or search and, with a `uri`, the folder in a bucket that it is a copy of.

    `below`: with all folders in it, as those of runs; a search's have mirrors of their own. Methods that speak to the
    bucket wait for two minutes where it is away, and raise ResourceError.
    """

    folder: Path
    uri: str | None = None
    below: bool = True

    def __str__(self) -> str:
        """The address that a user knows it by."""
        return self.uri or str(self.folder)

    def shown(self, path: Path) -> str:
        """The address of a path in it."""
        return str(path) if self.uri is None else f"{self.uri}/{path.relative_to(self.folder).as_posix()}"

    def inner(self, name: str, *, below: bool = True) -> Mirror:
        """That of a folder in it."""
        return Mirror(self.folder / name, self.uri and f"{self.uri}/{name}", below)

    def fetch(self, wanted: Callable[[str], bool] = lambda name: True) -> None:
        """Make the copy equal to the bucket, as far as its files are `wanted`; files that only the copy has go.

        A file of the copy that is not `wanted` may be an older one. A checkpoint that did not come into the bucket
        whole is left out.
        """
        if self.uri is None:
            return
        bucket = patiently(lambda: BucketFolder(str(self.uri)))
        with self._index() as index:
            self._download(bucket, index, wanted)

    def push(self) -> None:
        """Make the bucket equal to the copy. What this returns from is saved."""
        if self.uri is None:
            return
        bucket = patiently(lambda: BucketFolder(str(self.uri)))
        with self._index() as index:
            here = self._files()
            changed = [name for name, stat in here.items() if name not in index or index[name].here != stat]
            gone = sorted((name for name in index if name not in here), key=lambda name: not _makes_whole(name))
            if not changed and not gone:
                return
            # A checkpoint that is written anew is none until its last file is there again.
            outdated = [name for name in _outdated(changed, index) if name in here]
            _each(outdated, lambda name: self._delete(bucket, name, index))
            changed = sorted({*changed, *outdated})
            for stage in _stages(changed, here):
                _each(stage, lambda name: self._upload(bucket, name, here[name], index))
            for name in gone:
                self._delete(bucket, name, index)
            there = self._listed(bucket)
            for name in changed:
                if name in index:
                    index[name].there = _as_stored(there.get(name))

    @contextlib.contextmanager
    def exchanging(self, *, sent: Sequence[str] = (), received: Sequence[str] = ()) -> Iterator[None]:
        """Within, every few seconds files that somebody else waits for go to the bucket, and others come from it."""
        if self.uri is None:
            yield
            return
        done = threading.Event()
        thread = threading.Thread(
            target=self._exchange, args=(tuple(sent), tuple(received), done), name="nuciseg-exchange", daemon=True
        )
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def marks(self, folder: str) -> set[str]:
        """The names of the empty files in a folder that all who work on a search look into."""
        if self.uri is None:
            return set(names_in(self.folder / folder))
        bucket = patiently(lambda: BucketFolder(f"{self.uri}/{folder}"))
        return {file.name for file in patiently(bucket.files)}

    def mark(self, folder: str, name: str) -> None:
        """Make such a file."""
        if self.uri is None:
            patiently(lambda: (self.folder / folder).mkdir(exist_ok=True))
            patiently((self.folder / folder / name).touch)
            return
        bucket = patiently(lambda: BucketFolder(f"{self.uri}/{folder}"))
        patiently(lambda: bucket.write(name, b""))

    def unmark(self, folder: str) -> None:
        """Remove all such files."""
        if self.uri is None:
            for name in names_in(self.folder / folder):
                patiently(partial((self.folder / folder / name).unlink, missing_ok=True))
            with contextlib.suppress(FileNotFoundError):
                patiently((self.folder / folder).rmdir)
            return
        bucket = patiently(lambda: BucketFolder(f"{self.uri}/{folder}"))
        for name in self.marks(folder):
            patiently(partial(bucket.delete, name))

    # --- one file -----------------------------------------------------------------------------------------------------

    def _upload(self, bucket: BucketFolder, name: str, stat: _Stat, index: dict[str, _Known]) -> None:
        path = self.folder / name
        try:
            patiently(lambda: bucket.upload(path, name))
        except ResourceError:
            if path.exists():
                raise
            return  # gone since it was listed, as files are that W&B's own process holds for a moment
        index[name] = _Known(stat)

    def _delete(self, bucket: BucketFolder, name: str, index: dict[str, _Known]) -> None:
        patiently(lambda: bucket.delete(name))
        index.pop(name, None)

    def _download(self, bucket: BucketFolder, index: dict[str, _Known], wanted: Callable[[str], bool]) -> None:
        for attempt in range(_NUM_LISTINGS):
            try:
                names = self._fetch_missing(bucket, index, wanted)
                break
            except ResourceError as error:
                # The run goes on meanwhile and has dropped a checkpoint.
                if not isinstance(error.__cause__, FileNotFoundError) or attempt == _NUM_LISTINGS - 1:
                    raise
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in set(self._files()) - names:
                (self.folder / name).unlink()
            for name in set(index) - names:
                del index[name]
            if self.below:
                _drop_empty_folders(self.folder)

    def _fetch_missing(self, bucket: BucketFolder, index: dict[str, _Known], wanted: Callable[[str], bool]) -> set[str]:
        """Fetch what the copy lacks; the names of all files in the bucket."""
        there, here = self._listed(bucket), self._files()
        names = set(_whole(there))
        missing = sorted(name for name in names if wanted(name) and not _same(index, name, here, there))
        _each(missing, lambda name: self._fetch_one(bucket, there[name], index))
        return names

    def _fetch_one(self, bucket: BucketFolder, file: StoredFile, index: dict[str, _Known]) -> None:
        path = self.folder / file.name
        temporary = path.with_name(f".{path.name}.fetched")
        with writing(path):
            patiently(lambda: fetch_file(bucket, file, temporary))
            os.replace(temporary, path)
            index[file.name] = _Known(_stat(path), _as_stored(file))

    def _exchange(self, sent: Sequence[str], received: Sequence[str], done: threading.Event) -> None:
        waiting: set[str] = set(sent)
        seen: dict[str, StoredFile | None] = dict.fromkeys(received)
        while not done.wait(EXCHANGE_S):
            # The next turn may do better, and where not the run itself says why.
            with contextlib.suppress(ResourceError):
                bucket = BucketFolder(str(self.uri))
                for name in [name for name in waiting if (self.folder / name).exists()]:
                    bucket.upload(self.folder / name, name)
                    waiting.discard(name)
                there = {file.name: file for file in bucket.files(below=False)}
                for name in [name for name in received if there.get(name) != seen[name]]:
                    self._replace(name, bucket.read(name) if name in there else None)
                    seen[name] = there.get(name)

    def _replace(self, name: str, data: bytes | None) -> None:
        path = self.folder / name
        temporary = path.with_name(f".{name}.received")
        with writing(path):
            if data is None:
                path.unlink(missing_ok=True)
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(data)
            os.replace(temporary, path)

    # --- both sides ---------------------------------------------------------------------------------------------------

    def _files(self) -> dict[str, _Stat]:
        """The files of the copy by name. W&B links to its newest run; links are left out."""
        found = {}
        for folder, folders, names in os.walk(self.folder):
            folders[:] = [name for name in folders if self.below and not name.startswith(".")]
            for path in (Path(folder, name) for name in names):
                name = path.relative_to(self.folder).as_posix()
                with contextlib.suppress(FileNotFoundError):
                    if _is_ours(name) and not path.is_symlink():
                        found[name] = _stat(path)
        return found

    def _listed(self, bucket: BucketFolder) -> dict[str, StoredFile]:
        files = patiently(lambda: bucket.files(below=self.below))
        return {file.name: file for file in files if _is_ours(file.name)}

    @contextlib.contextmanager
    def _index(self) -> Iterator[dict[str, _Known]]:
        """What is known to be the same on both sides, kept beside the copy; one process at a time has it."""
        described = json.dumps([self.uri, str(self.folder.resolve())])
        path = default_cache_dir() / COPIES / "index" / f"{_digest(described)}.json"
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path.with_suffix(".lock"))
            lock.acquire()
        try:
            index = _read_index(path)
            try:
                yield index
            finally:
                with writing(path):
                    temporary = path.with_suffix(".tmp")
                    rows = {name: [*known.here, *(known.there or ())] for name, known in index.items()}
                    temporary.write_text(json.dumps(rows), encoding="utf-8")
                    os.replace(temporary, path)
        finally:
            lock.release()


def working_copy(uri: str, role: str, *, below: bool = True) -> Mirror:
    """The copy, in this node's cache folder, of a run or search in a bucket.

    Each `role` has its own: what a driver fetches must not be written over what its workers on the same node write.
    """
    uri = uri.rstrip("/")
    return Mirror(default_cache_dir() / COPIES / role / _digest(uri) / uri.rsplit("/", 1)[-1], uri, below)


def opened(location: Path | str, *, below: bool = True) -> Mirror:
    """The run or search that a user names, fetched to be worked on. Raises ResourceError, at once where it is away."""
    if isinstance(location, Path):
        return Mirror(location, below=below)
    mirror = working_copy(location, "work", below=below)
    BucketFolder(location).files(below=False)
    mirror.fetch()
    return mirror


def fetched_to_read(location: Path | str, wanted: Callable[[str], bool] = lambda name: True) -> Path:
    """The folder itself, or a copy of the `wanted` files of one in a bucket. Raises ResourceError."""
    if isinstance(location, Path):
        return location
    if not BucketFolder(location).files():
        raise ResourceError(f"{location} holds no files; give the address that train or tune printed")
    mirror = working_copy(location, "read")
    mirror.fetch(wanted)
    return mirror.folder


def fetched_checkpoint(location: Path | str) -> Path:
    """What `find_checkpoint` finds in a folder, or in a copy of one in a bucket. Raises as it does, ResourceError."""
    if isinstance(location, Path):
        return find_checkpoint(location)
    folder = fetched_to_read(location, lambda name: name.startswith(("checkpoints/", "final/")) or "/" not in name)
    try:
        return find_checkpoint(folder)
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(str(folder), location)) from None


def _stages(changed: Iterable[str], here: dict[str, _Stat]) -> list[list[str]]:
    """In which order files go to the bucket; those of one stage go together."""
    of_checkpoints = [name for name in changed if PurePosixPath(name).parts[0] == "checkpoints"]
    others = [name for name in changed if name not in of_checkpoints]
    deep = [name for name in others if "/" in name]  # W&B's many: nothing names them
    parts = [name for name in of_checkpoints if not _makes_whole(name)]
    wholes = [name for name in of_checkpoints if _makes_whole(name)]
    named = sorted((name for name in others if "/" not in name), key=lambda name: here[name][1])
    return [parts + deep, wholes, *([name] for name in named)]


def _outdated(changed: Iterable[str], index: dict[str, _Known]) -> list[str]:
    """The files that say of a checkpoint in the bucket that it is whole where other files of it are to be written."""
    wholes = {str(PurePosixPath(name).with_name(METADATA_FILE)) for name in changed if not _makes_whole(name)}
    return sorted(name for name in wholes if name in index)


def _whole(names: Iterable[str]) -> list[str]:
    """Without those of checkpoints that lack the file that comes last."""
    names = set(names)
    return sorted(
        name
        for name in names
        if PurePosixPath(name).parent.parent.name != "checkpoints"
        or str(PurePosixPath(name).with_name(METADATA_FILE)) in names
    )


def _makes_whole(name: str) -> bool:
    return PurePosixPath(name).name == METADATA_FILE


def _is_ours(name: str) -> bool:
    return not name.startswith(OF_RAY) and not any(part.startswith(".") for part in PurePosixPath(name).parts)


def _each(names: Sequence[str], do: Callable[[str], None]) -> None:
    if len(names) <= 1:
        for name in names:
            do(name)
        return
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        list(pool.map(do, names))


def _same(index: Mapping[str, _Known], name: str, here: Mapping[str, _Stat], there: Mapping[str, StoredFile]) -> bool:
    known = index.get(name)
    return known is not None and known == _Known(here.get(name, (-1, -1)), _as_stored(there[name]))


def _stat(path: Path) -> _Stat:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _as_stored(file: StoredFile | None) -> _Stat | None:
    return None if file is None else (file.num_bytes, file.changed_ns)


def _read_index(path: Path) -> dict[str, _Known]:
    if not path.exists():
        return {}
    try:
        rows: dict[str, list[int]] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # torn by a power cut: then all is fetched, or pushed, anew
        return {}
    return {name: _Known((row[0], row[1]), (row[2], row[3]) if row[2:] else None) for name, row in rows.items()}


def _drop_empty_folders(folder: Path) -> None:
    for each, _, _ in os.walk(folder, topdown=False):
        if Path(each) != folder:
            with contextlib.suppress(OSError):  # not empty
                os.rmdir(each)


def _digest(text: str) -> str:
    return blake2b(text.encode(), digest_size=8).hexdigest()
