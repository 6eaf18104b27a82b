"""The layout of the Data Science Bowl 2018: a folder for each image, in it one mask file for each nucleus.

`ROOT/{train,test}/ID/images/ID.png` with `ROOT/{train,test}/ID/masks/*.png`; the folders may be called `stage1_train`
and `stage1_test`, as they come, or ROOT itself holds the folders ID. An image is 8- or 16-bit grey, also as RGBA with
equal colour channels and nothing hidden. A mask has the size of its image, 0 outside of its nucleus and one other value
within, be it in several pieces. A file `groups.csv` (columns `id,group`) beside the folders ID may say which images
were cut from one field.

StarDist's subset of these images, called dsb2018, comes in the layout `labels`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nuciseg.data.formats.folders import (
    LeftOut,
    files_by_stem,
    groups_of,
    listed,
    refuse,
    refuse_other_size,
    split_folder,
)
from nuciseg.errors import DataError
from nuciseg.images import read_image, read_mask
from nuciseg.types import Record, Sample

NAME = "dsb"
LAYOUT = "train/ID/images/ID.png with train/ID/masks/*.png, one file per nucleus"

IMAGES, MASKS = "images", "masks"
SUFFIX = ".png"


def holds(folder: Path) -> bool:
    """Whether there is an image, `ID/images/ID.png`, in `folder`."""
    return folder.is_dir() and any(_image_of(place).is_file() for place in folder.iterdir())


def read(root: Path, split: str, left_out: list[LeftOut] | None = None) -> list[Record]:
    """The records of a split, sorted by id; `label_paths` are the masks, sorted by file name.

    The group is what `groups.csv` says; without that file each image is its own group, except that images with the
    same bytes share one. Raises `DataError` for a missing or empty folder and, without a list `left_out` to note them
    in, for images without masks, masks without image and a bad `groups.csv`.
    """
    folder = split_folder(Path(root), split, holds)
    places = [place for place in sorted(folder.iterdir()) if any((place / part).is_dir() for part in (IMAGES, MASKS))]
    if not places:
        raise DataError(f"{folder} holds no images; arrange them as ID/{IMAGES}/ID{SUFFIX}, ID being any name.")
    images = {place.name: _image_of(place) for place in places}
    masks = {place.name: _masks_of(place, left_out) for place in places}
    if lacking := [id for id in images if not images[id].is_file()]:
        refuse(
            f"{len(lacking)} of {len(images)} folders in {folder} hold no image ID/{IMAGES}/ID{SUFFIX}: "
            f"{listed(lacking)}; add the images or remove the folders.",
            [(folder / id, f"{folder / id} holds no image {IMAGES}/{id}{SUFFIX}.") for id in lacking],
            left_out,
        )
    if unlabelled := [id for id in images if not masks[id] and id not in lacking]:
        refuse(
            f"{len(unlabelled)} of {len(images)} images in {folder} are unlabelled, there is no file in ID/{MASKS}: "
            f"{listed(unlabelled)}; add one mask per nucleus or remove the images.",
            [(images[id], f"{images[id]} is unlabelled, there is no file in {id}/{MASKS}.") for id in unlabelled],
            left_out,
        )
    images = {id: image for id, image in images.items() if id not in lacking and id not in unlabelled}
    groups = groups_of(folder, images, left_out)
    return [Record(id, image, masks[id], groups[id]) for id, image in images.items()]


def load(record: Record) -> Sample:
    """Decode an image and its masks: `image_HWC` uint8 or uint16 with C = 1, `labels_HW` int32: 0 background, 1..N.

    Nuclei are numbered in the order of their files' names. Where masks overlap, the pixel belongs to the smallest of
    them, of equally large ones to the last by name: so that a large nucleus does not swallow its neighbour. A mask that
    has no pixel of its own left is refused.

    Raises `DataError` for unreadable or coloured files, and for a mask that is empty, of another size, not binary or
    covered by others.
    """
    assert record.image_path is not None
    image_HW = read_image(record.image_path)
    # Places and not masks are kept, since an image may have hundreds of nuclei.
    places = []
    for path in record.label_paths:
        mask_HW = read_mask(path)
        refuse_other_size(path, mask_HW.shape, image_HW.shape)
        places.append(np.flatnonzero(mask_HW))
        if not places[-1].size:
            raise DataError(f"The mask {path} is empty; mark its nucleus in 255 or remove the file.")
    labels_HW = np.zeros(image_HW.shape, np.int32)
    for index in sorted(range(len(places)), key=lambda index: -places[index].size):
        labels_HW.flat[places[index]] = index + 1
    num_left = np.bincount(labels_HW.ravel(), minlength=len(places) + 1)[1:]
    if not num_left.all():
        raise DataError(f"The mask {record.label_paths[int(num_left.argmin())]} is covered by other masks; remove it.")
    return Sample(image_HW[..., None], labels_HW)


def _image_of(place: Path) -> Path:
    return place / IMAGES / f"{place.name}{SUFFIX}"


def _masks_of(place: Path, left_out: list[LeftOut] | None) -> tuple[Path, ...]:
    folder = place / MASKS
    return tuple(files_by_stem(folder, (SUFFIX,), left_out).values()) if folder.is_dir() else ()
