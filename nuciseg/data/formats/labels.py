"""Images with label images: `ROOT/{train,test}/{images,masks}/STEM.{tif,tiff,png}`, or ROOT itself holding `images`
and `masks`.

An image is 8- or 16-bit grey. Its label image has the same stem and size and one integer id per nucleus: 0 is
background, negative pixels are ignored in every loss and score. A file `groups.csv` (columns `id,group`) beside the
two folders says which images were cut from one field; images of one group never straddle train and validation.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nuciseg.data.formats.folders import LeftOut, groups_of, pair_files, refuse_other_size, split_folder
from nuciseg.images import read_image, read_labels
from nuciseg.labels import relabel
from nuciseg.types import Record, Sample

NAME = "labels"
LAYOUT = "train/images/STEM.tif with train/masks/STEM.tif (or .tiff, .png)"

IMAGES, MASKS = "images", "masks"
SUFFIXES = (".tif", ".tiff", ".png")


def holds(folder: Path) -> bool:
    """Whether there are folders `images` and `masks` in `folder`."""
    return (folder / IMAGES).is_dir() and (folder / MASKS).is_dir()


def read(root: Path, split: str, left_out: list[LeftOut] | None = None) -> list[Record]:
    """The records of a split, sorted by id.

    The group is what `groups.csv` says; without that file each image is its own group, except that images with the
    same bytes share one. Raises `DataError` for a missing or empty folder and, without a list `left_out` to note them
    in, for unpaired files and a bad `groups.csv`.
    """
    folder = split_folder(Path(root), split, holds)
    pairs = pair_files(folder / IMAGES, folder / MASKS, SUFFIXES, "label image", left_out)
    groups = groups_of(folder, {id: image for id, image, _ in pairs}, left_out)
    return [Record(id, image, (mask,), groups[id]) for id, image, mask in pairs]


def load(record: Record) -> Sample:
    """Decode one pair: `image_HWC` uint8 or uint16 with C = 1, `labels_HW` int32: 0 background, 1..N, -1 ignored.

    Files may number their nuclei as they like, also beyond what augmentation can carry; here they are numbered anew.

    Raises `DataError` for unreadable or coloured files, labels that are no integers, and labels of another size.
    """
    assert record.image_path is not None
    image_HW, labels_HW = read_image(record.image_path), read_labels(record.label_paths[0])
    refuse_other_size(record.label_paths[0], labels_HW.shape, image_HW.shape)
    return Sample(image_HW[..., None], np.maximum(relabel(labels_HW), -1))
