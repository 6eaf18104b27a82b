"""Crops that were cut from one field and share a part of it: small windows whose pixels are equal to the last bit.

Each window of an image is hashed (as Rabin and Karp do for text), and the same share of all hashes is kept in every
image, so that a window which two images have in common is kept in both or in neither, wherever it lies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from nuciseg.images import saturated_value

Marks = NDArray[np.uint64]

WINDOW_PX = 8
KEPT = 16  # one of so many hashes
MIN_RANGE = 6  # grey levels within a window: flat ground is equal everywhere
MIN_SHARED = 4  # kept windows; a shared square of 16 px has about five
MAX_IMAGES = 8  # a window that more images have is a pattern of the camera, no place

# Odd numbers, as good as any: the fractional digits of the golden ratio, multiplied on (Knuth, TAOCP 3, 6.4).
_FACTORS = np.cumprod(np.full(2 * WINDOW_PX, 0x9E3779B97F4A7C15, np.uint64), dtype=np.uint64)


def window_marks(image_HW: NDArray[Any]) -> Marks:
    """The kept hashes of an image's windows, each once, those with marks or without structure left out."""
    if min(image_HW.shape) < WINDOW_PX:
        return np.zeros(0, np.uint64)
    hashes = image_HW.astype(np.uint64)
    for axis, factors in ((1, _FACTORS[:WINDOW_PX]), (0, _FACTORS[WINDOW_PX:])):
        length = hashes.shape[axis] - WINDOW_PX + 1
        total = np.zeros_like(np.take(hashes, range(length), axis))
        for offset, factor in enumerate(factors):
            part = hashes[:, offset : offset + length] if axis == 1 else hashes[offset : offset + length]
            total += part * factor
        hashes = total ^ (total >> np.uint64(29))
    rows, columns = hashes.shape
    kernel = np.ones((WINDOW_PX, WINDOW_PX), np.uint8)
    lowest, highest = (
        np.asarray(each(image_HW, kernel, anchor=(0, 0)))[:rows, :columns].astype(np.int64)
        for each in (cv2.erode, cv2.dilate)
    )
    usable = (lowest > 0) & (highest < saturated_value(image_HW)) & (highest - lowest >= MIN_RANGE)
    return np.unique(hashes[usable & (hashes % np.uint64(KEPT) == 0)])


def find_overlaps(marks: Sequence[Marks]) -> dict[tuple[int, int], float]:
    """Pairs of images (first < second) that share a part, and the share of the smaller one's windows that it holds."""
    image_of = np.repeat(np.arange(len(marks)), [len(each) for each in marks])
    everything = np.concatenate([np.zeros(0, np.uint64), *marks])
    order = np.lexsort((image_of, everything))
    everything, image_of = everything[order], image_of[order]
    starts = np.flatnonzero(np.append(True, np.diff(everything) != 0))
    ends = np.append(starts[1:], everything.size)
    shared: Counter[tuple[int, int]] = Counter()
    for start, end in zip(starts, ends, strict=True):
        if 1 < end - start <= MAX_IMAGES:
            shared.update(combinations(image_of[start:end].tolist(), 2))
    return {
        (first, second): number / min(len(marks[first]), len(marks[second]))
        for (first, second), number in sorted(shared.items())
        if number >= MIN_SHARED
    }
