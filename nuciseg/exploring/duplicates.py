"""Images that show the same thing, and what of it would leak from training into validation or test.

Candidates are images whose small pictures are alike in one of the eight orientations; a candidate is a near-duplicate
if its fine structure, the part that no two nuclei share, matches at the best shift. Crops that share only a part are
found by `overlaps`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from nuciseg.data.formats.folders import groups_of_duplicates
from nuciseg.data.splits import split_records
from nuciseg.exploring.overlaps import Marks, find_overlaps
from nuciseg.exploring.reading import DataSet, Part
from nuciseg.images import saturated_value
from nuciseg.types import Record

Float = NDArray[np.float32]

THUMB_PX = 16
NUM_CANDIDATES = 4  # most alike pictures of each image and orientation that are looked at closely
FLAT = 1e-4  # of full scale; less is rounding
ALIKE = 0.8  # cosine of two small pictures
COMPARED_PX = 160  # longest side at which fine structure is compared
DETAIL_PX = 2.0  # standard deviation of what is taken away
LIKENESS = 0.4  # correlation of fine structure from which on two images show the same; of strangers it is below 0.2
SHIFT_SHARE = 0.1  # of the side, by which two crops may be shifted
ROWS_AT_ONCE = 256  # bounds the memory of the comparison


@dataclass(frozen=True)
class Place:
    """An image: split, position in it, id and file."""

    split: str
    position: int
    id: str
    file: str


@dataclass(frozen=True)
class Pair:
    """Two images that show the same; `turned` where one is rotated or mirrored against the other.

    `likeness` is the correlation of their fine structure, or where they share only a part (`partly`), how much of the
    smaller one that is.
    """

    first: Place
    second: Place
    likeness: float
    turned: bool
    same_group: bool
    partly: bool = False

    @property
    def crosses_splits(self) -> bool:
        return self.first.split != self.second.split


@dataclass(frozen=True)
class Leaks:
    """What stands on both sides of a division: `groups` of train and test, pairs of train and test, and pairs of train
    and validation under the default split."""

    groups: tuple[str, ...]
    train_test: tuple[Pair, ...]
    train_validation: tuple[Pair, ...]


def small_picture(image_HW: NDArray[Any]) -> Float:
    """What candidates are found by: `THUMB_PX` x `THUMB_PX`, mean 0 and length 1, marks left out, all 0 if flat."""
    light_HW, free_HW = _without_marks(image_HW)
    rows, columns = np.flatnonzero(free_HW.any(axis=1)), np.flatnonzero(free_HW.any(axis=0))
    if rows.size:
        window = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        light_HW = light_HW[window]
    small = np.asarray(cv2.resize(light_HW, (THUMB_PX, THUMB_PX), interpolation=cv2.INTER_AREA))
    small -= small.mean()
    length = float(np.linalg.norm(small))
    return np.asarray(small / length if length > FLAT else 0 * small, np.float32)


def find_near_duplicates(data: DataSet, pictures: Sequence[Float]) -> list[Pair]:
    """All pairs of images, most alike first; `pictures` are the small ones of all images in the order of the parts."""
    places = [(part, position) for part in data.parts for position in range(len(part))]
    if len(places) < 2:
        return []
    pairs = []
    for first, second, orientation in _candidates(np.stack(pictures)):
        one, other = places[first], places[second]
        likeness = _likeness(_image(*one), turned(_image(*other), orientation))
        if likeness >= LIKENESS:
            pairs.append((first, second, likeness, orientation > 0))
    best: dict[tuple[int, int], Pair] = {}
    for first, second, likeness, is_turned in sorted(pairs, key=lambda pair: (-pair[2], pair[3], pair[:2])):
        best.setdefault((first, second), _pair(data, places[first], places[second], likeness, is_turned))
    return list(best.values())


def find_shared_parts(data: DataSet, marks: Sequence[Marks], known: Sequence[Pair]) -> list[Pair]:
    """Pairs beside the `known` ones that share a part, the largest first; `marks` of all images in order."""
    places = [(part, position) for part in data.parts for position in range(len(part))]
    pairs = [
        _pair(data, places[first], places[second], share, partly=True)
        for (first, second), share in find_overlaps(marks).items()
    ]
    told = {(pair.first, pair.second) for pair in known}
    return sorted((pair for pair in pairs if (pair.first, pair.second) not in told), key=lambda pair: -pair.likeness)


def _pair(
    data: DataSet,
    first: tuple[Part, int],
    second: tuple[Part, int],
    likeness: float,
    is_turned: bool = False,
    partly: bool = False,
) -> Pair:
    records = [part.records[position] for part, position in (first, second)]
    same_group = first[0] is second[0] and records[0].group == records[1].group
    return Pair(_place(data, *first), _place(data, *second), likeness, is_turned, same_group, partly)


def find_leaks(data: DataSet, pairs: Sequence[Pair], validation_fraction: float, split_seed: int) -> Leaks:
    """Which groups and which of `pairs` stand on both sides of train and test, or of train and validation."""
    train_test = tuple(pair for pair in pairs if pair.crosses_splits)
    train = next((part for part in data.parts if part.split == "train"), None)
    straddling: tuple[Pair, ...] = ()
    if train is not None and len({record.group for record in train.records}) > 1:
        held_out = set(split_records(train.records, validation_fraction, split_seed).validation)
        straddling = tuple(
            pair
            for pair in pairs
            if pair.first.split == pair.second.split == "train"
            and (pair.first.position in held_out) != (pair.second.position in held_out)
        )
    return Leaks(tuple(_shared_groups(data)), train_test, straddling)


def _shared_groups(data: DataSet) -> list[str]:
    """Groups that were named by hand, in either split, and occur in more than one."""
    if len(data.parts) < 2 or not any(_names_groups(part.records) for part in data.parts):
        return []
    one, *others = ({record.group for record in part.records} for part in data.parts)
    return sorted(one.intersection(*others))


def _names_groups(records: Sequence[Record]) -> bool:
    """Whether the groups say more than which files are equal."""
    images = {record.id: record.image_path for record in records if record.image_path is not None}
    return bool(images) and {record.id: record.group for record in records} != groups_of_duplicates(images)


def _candidates(pictures_NSS: Float) -> Iterator[tuple[int, int, int]]:
    """(first, second, orientation of the second) of the pairs whose small pictures are most alike, first < second."""
    num = len(pictures_NSS)
    flat = pictures_NSS.reshape(num, -1)
    for orientation in range(8):
        others = np.stack([turned(picture, orientation) for picture in pictures_NSS]).reshape(num, -1)
        for start in range(0, num, ROWS_AT_ONCE):
            cosine = flat[start : start + ROWS_AT_ONCE] @ others.T
            cosine[np.arange(num) <= np.arange(start, start + len(cosine))[:, None]] = -1
            nearest = np.argpartition(-cosine, min(NUM_CANDIDATES, num) - 1, axis=1)[:, :NUM_CANDIDATES]
            for row, column in zip(*np.nonzero(np.take_along_axis(cosine, nearest, 1) >= ALIKE), strict=True):
                yield start + int(row), int(nearest[row, column]), orientation


def turned(image_HW: NDArray[Any], orientation: int) -> NDArray[Any]:
    """One of the eight ways to lay a picture: 0 is as it is, 4 to 7 are mirrored."""
    mirrored = image_HW[:, ::-1] if orientation >= 4 else image_HW
    return np.ascontiguousarray(np.rot90(mirrored, orientation % 4))


def _likeness(one_HW: NDArray[Any], other_HW: NDArray[Any]) -> float:
    """Correlation of the fine structure of two images at the best shift, -1 to 1; 0 where their sizes do not fit."""
    if min(_share(a, b) for a, b in zip(one_HW.shape, other_HW.shape, strict=True)) < 1 - 2 * SHIFT_SHARE:
        return 0.0
    scale = min(1.0, COMPARED_PX / max(one_HW.shape))
    one, other = _detail(one_HW, scale), _detail(other_HW, scale)
    margins = [max(1, round(SHIFT_SHARE * side)) for side in one.shape]
    core = one[margins[0] : -margins[0], margins[1] : -margins[1]]
    if min(core.shape) < 4 or not core.any() or not other.any():
        return 0.0
    field = cv2.copyMakeBorder(other, margins[0], margins[0], margins[1], margins[1], cv2.BORDER_CONSTANT, value=0.0)
    if field.shape[0] < core.shape[0] or field.shape[1] < core.shape[1]:
        return 0.0
    shared = cv2.matchTemplate(field, core, cv2.TM_CCORR_NORMED)
    return float(np.clip(shared[np.isfinite(shared)].max(initial=0.0), -1, 1))


def _share(a: int, b: int) -> float:
    return min(a, b) / max(a, b)


def _detail(image_HW: NDArray[Any], scale: float) -> Float:
    """What is finer than a nucleus and no mark: the image less its own blur, by local contrast."""
    light_HW, free_HW = _without_marks(image_HW)
    weight_HW = free_HW.astype(np.float32)
    if scale < 1:
        light_HW, weight_HW = (
            np.asarray(cv2.resize(each, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA))
            for each in (light_HW, weight_HW)
        )
    inside_HW = cv2.erode((weight_HW > 0.99).astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
    blurred = cv2.GaussianBlur(light_HW * weight_HW, (0, 0), DETAIL_PX)
    share = cv2.GaussianBlur(weight_HW, (0, 0), DETAIL_PX)
    local = blurred / np.maximum(share, 1e-3)
    return np.asarray(np.where(inside_HW, (light_HW - local) / np.maximum(local, 1e-3), 0), np.float32)


def _without_marks(image_HW: NDArray[Any]) -> tuple[Float, NDArray[np.bool_]]:
    """Light as shares of full scale with zeroed background and saturated pixels at 0, and which pixels are neither."""
    full_scale = saturated_value(image_HW)
    free_HW = (image_HW > 0) & (image_HW < full_scale)
    return np.where(free_HW, image_HW / full_scale, 0).astype(np.float32), free_HW


def _image(part: Part, position: int) -> NDArray[Any]:
    return part.sample(position).image_HWC[..., 0]


def _place(data: DataSet, part: Part, position: int) -> Place:
    record = part.records[position]
    return Place(part.split, position, record.id, data.file_of(record))
