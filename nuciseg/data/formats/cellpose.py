"""The layout that Cellpose trains from: `ROOT/{train,test}/X.tif` beside `X_masks.tif`, or ROOT itself holding such
pairs.

Files are `.tif`, `.tiff` or `.png`. `X_cp_masks.png`, as Cellpose itself names what it found, serves as well; where
both are there, one has to go. The `_img` of `X_img.png` is no part of the name: its labels are `X_masks.png`, as in
Cellpose's own data. What else Cellpose writes there (flows, outlines, `_seg.npy`) is passed over. An image is 8- or
16-bit grey; its label image has the same size and one integer id per nucleus: 0 is background, negative pixels are
ignored in every loss and score. A file `groups.csv` (columns `id,group`) beside the images may say which of them were
cut from one field.

Naming: `get_image_files`, `get_label_files` and `save_masks` in `cellpose/io.py` of MouseLand/cellpose.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from nuciseg.data.formats import labels
from nuciseg.data.formats.folders import LeftOut, groups_of, pair_files, split_folder
from nuciseg.types import Record, Sample

NAME = "cellpose"
LAYOUT = "train/X.tif beside train/X_masks.tif (or .tiff, .png)"

MASKS_ENDINGS = ("_cp_masks", "_masks")  # the longer one first: it ends like the other
IMAGE_ENDING = "_img"
# Other pictures of Cellpose; those of its results end in `_cp_masks` besides.
OUTPUT_ENDINGS = ("_flows", "_flows_0", "_flows_1", "_flows_2", "_cellprob", "_dP", "_cp_output", "_outlines")


def holds(folder: Path) -> bool:
    """Whether there is a label image, `X_masks.tif`, in `folder`."""
    return folder.is_dir() and any(
        path.suffix.lower() in labels.SUFFIXES and _stem(path, is_labels=True) is not None for path in folder.iterdir()
    )


def read(root: Path, split: str, left_out: list[LeftOut] | None = None) -> list[Record]:
    """The records of a split, sorted by file name; the id of `X.tif` is X.

    The group is what `groups.csv` says; without that file each image is its own group, except that images with the
    same bytes share one. Raises `DataError` for a missing or empty folder and, without a list `left_out` to note them
    in, for unpaired files and a bad `groups.csv`.
    """
    folder = split_folder(Path(root), split, holds)
    pairs = pair_files(
        folder,
        folder,
        labels.SUFFIXES,
        "_masks file",
        left_out,
        image_stem=partial(_stem, is_labels=False),
        labels_stem=partial(_stem, is_labels=True),
    )
    groups = groups_of(folder, {id: image for id, image, _ in pairs}, left_out)
    return [Record(id, image, (mask,), groups[id]) for id, image, mask in pairs]


def load(record: Record) -> Sample:
    """Decode one pair: `image_HWC` uint8 or uint16 with C = 1, `labels_HW` int32: 0 background, 1..N, -1 ignored.

    Raises `DataError` as `labels.load` does.
    """
    return labels.load(record)


def _stem(path: Path, *, is_labels: bool) -> str | None:
    """The name of the image that `path` is, or with `is_labels` holds the labels of; None where it does not."""
    ending = next((ending for ending in MASKS_ENDINGS if path.stem.endswith(ending)), "")
    stem = path.stem.removesuffix(ending)
    if bool(ending) != is_labels or stem.endswith(OUTPUT_ENDINGS):
        return None
    return stem.removesuffix(IMAGE_ENDING)
