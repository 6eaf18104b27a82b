"""Layouts of data sets. Each is one module here with `NAME`, `LAYOUT`, `holds`, `read` and `load`.

A new folder layout is one such module, named below in `FormatName` and `_FORMATS`. `synthetic` draws its samples from a
configuration instead of a folder, so it is never detected and its `read` and `load` take that configuration.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Protocol

from nuciseg.data.formats import cellpose, dsb, labels, nucleus
from nuciseg.data.formats.folders import LeftOut, listed, own_folder
from nuciseg.data.synthetic import SPLITS
from nuciseg.errors import ConfigError, DataError
from nuciseg.types import Record, Sample

FormatName = Literal["auto", "nucleus", "labels", "cellpose", "dsb", "synthetic"]

CLUSTER_FORMATS = ("nucleus", "synthetic")  # each image is one cluster, cut out on black, its outer border drawn


class DataFormat(Protocol):
    """What a module of this package offers."""

    NAME: str
    LAYOUT: str  # as the user sees it in a message

    def holds(self, folder: Path) -> bool: ...  # whether the files of one split lie in `folder`

    def read(self, root: Path, split: str, left_out: list[LeftOut] | None = None) -> list[Record]: ...

    def load(self, record: Record) -> Sample: ...


_FORMATS: tuple[DataFormat, ...] = (nucleus, labels, cellpose, dsb)


def get_format(name: str) -> DataFormat:
    """The folder layout called `name`."""
    for data_format in _FORMATS:
        if name == data_format.NAME:
            return data_format
    names = ", ".join(data_format.NAME for data_format in _FORMATS)
    raise ConfigError(f"There is no folder layout '{name}'; choose data.format from auto, {names}.")


def detect_format(root: Path) -> DataFormat:
    """The layout of the folder `root`. Raises `DataError` where none fits, or more than one."""
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"The data folder {root} does not exist; check data.root.")
    folders = [root, *filter(None, (own_folder(root, split) for split in SPLITS))]
    found = [data_format for data_format in _FORMATS if any(map(data_format.holds, folders))]
    if len(found) == 1:
        return found[0]
    if found:
        names = " and ".join(data_format.NAME for data_format in found)
        raise DataError(f"The data folder {root} fits the formats {names}; say which one with data.format.")
    layouts = "; ".join(f"{data_format.NAME}: {data_format.LAYOUT}" for data_format in _FORMATS)
    content = listed(path.name for path in root.iterdir()) or "nothing"
    raise DataError(
        f"The data folder {root} has no known layout, it holds {content}; arrange the files as one of these: {layouts}."
    )
