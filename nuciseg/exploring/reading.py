"""Open a data set whatever is wrong with it: what can be read is there, what cannot is listed with the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from nuciseg.config import DataConfig
from nuciseg.data.cache import CachedSamples, open_cache
from nuciseg.data.fetching import local_folder
from nuciseg.data.formats import DataFormat, detect_format, get_format, synthetic
from nuciseg.data.formats.folders import LeftOut, own_folder
from nuciseg.errors import DataError
from nuciseg.types import Record, Sample

SPLITS = ("train", "test")


@dataclass(frozen=True)
class Broken:
    """A file or pair that cannot be used; `record` where a pair was found."""

    split: str
    path: Path | None
    reason: str
    record: Record | None = None


@dataclass(frozen=True)
class Part:
    """The readable images of one split; `samples` are those of `records`, None where there is none."""

    split: str
    records: tuple[Record, ...]
    samples: CachedSamples | None

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[tuple[Record, Sample]]:
        return iter(zip(self.records, self.samples or (), strict=True))

    def sample(self, position: int) -> Sample:
        assert self.samples is not None
        return self.samples[position]


@dataclass(frozen=True)
class DataSet:
    """All splits of a data set, and what of it cannot be read; `root` is None where clusters are drawn."""

    root: Path | None
    format_name: str
    parts: tuple[Part, ...]
    broken: tuple[Broken, ...]

    @property
    def num_images(self) -> int:
        return sum(map(len, self.parts))

    def file_of(self, record: Record) -> str:
        """The image's file as the user knows it: its place in the data set; its id where it is drawn."""
        return printable(record.id) if record.image_path is None else self.relative(record.image_path)

    def relative(self, path: Path) -> str:
        """`path` from the data set's folder, as text that any page can hold."""
        root = self.root
        name = path.relative_to(root).as_posix() if root is not None and path.is_relative_to(root) else str(path)
        return printable(name)


def printable(text: str) -> str:
    """`text` with the bytes of a file name that are no UTF-8 written out."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def open_data(config: DataConfig) -> DataSet:
    """The train and test images that are there, decoded into the cache that training reads too.

    Raises DataError where there is no data at all: no folder, no layout, no image in any split.
    """
    if config.format == "synthetic" or config.root is None:
        parts = [_drawn(config, split) for split in SPLITS]
        return DataSet(None, synthetic.NAME, tuple(parts), ())
    root = local_folder(config.root, config.cache_dir)
    layout = detect_format(root) if config.format == "auto" else get_format(config.format)
    found, refusals = [], []
    for split in _splits(root):
        try:
            found.append(_open_part(layout, root, split, config.cache_dir))
        except DataError as error:
            refusals.append((split, error))
    if not found:
        raise refusals[0][1]
    broken = [each for _, faults in found for each in faults]
    broken += [Broken(split, None, str(error)) for split, error in refusals]
    return DataSet(root, layout.NAME, tuple(part for part, _ in found), tuple(broken))


def _splits(root: Path) -> tuple[str, ...]:
    """The splits that have a folder; a root that is one split itself counts as the training images."""
    return tuple(split for split in SPLITS if own_folder(root, split) is not None) or ("train",)


def _open_part(layout: DataFormat, root: Path, split: str, cache_dir: Path | None) -> tuple[Part, list[Broken]]:
    left_out: list[LeftOut] = []
    records = layout.read(root, split, left_out)
    broken = [Broken(split, each.path, each.reason) for each in left_out]
    part, unreadable = _decode(split, records, layout.load, layout.NAME, cache_dir)
    return part, broken + unreadable


def _decode(
    split: str, records: list[Record], load: Callable[[Record], Sample], name: str, cache_dir: Path | None
) -> tuple[Part, list[Broken]]:
    """The records that can be decoded. All are tried one by one only where they cannot be opened together."""
    broken: list[Broken] = []
    if not records:
        return Part(split, (), None), broken
    try:
        return Part(split, tuple(records), open_cache(records, load, format_name=name, cache_dir=cache_dir)), broken
    except DataError:
        good = []
        for record in records:
            try:
                load(record)
            except DataError as error:
                broken.append(Broken(split, record.image_path, str(error), record))
            else:
                good.append(record)
        if not broken:
            raise
    samples = open_cache(good, load, format_name=name, cache_dir=cache_dir) if good else None
    return Part(split, tuple(good), samples), broken


def _drawn(config: DataConfig, split: str) -> Part:
    records = synthetic.read(config.synthetic, split)
    load = partial(synthetic.load, config=config.synthetic)
    samples = open_cache(records, load, format_name=synthetic.NAME, cache_dir=config.cache_dir)
    return Part(split, tuple(records), samples)
