"""The drawn border of cut-out clusters as a thing of its own: erased, or drawn where it does not belong.

The data set's images carry a white line along each cluster's outline. These functions show what a network makes of an
image without it, or with a line that was drawn carelessly.

Shape legend: H rows, W columns, C channels.
"""

from __future__ import annotations

from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from nuciseg.data.cutouts import drawn_line, light_within
from nuciseg.images import saturated_value

Marking = Literal["as_is", "erased"]

PATCH_PX = 24  # borders are drawn or left out in patches of about this size


def with_marking(image_HWC: NDArray[Any], marking: Marking) -> NDArray[Any]:
    """The image with its drawn border as a network is to see it."""
    return erase_marking(image_HWC) if marking == "erased" else image_HWC


def erase_marking(image_HWC: NDArray[Any]) -> NDArray[Any]:
    """The image without its drawn border: there it shines like the nearest pixels within, softened.

    Of the same shape and dtype; no pixel inside the cluster (not 0) becomes 0 or stays saturated. An image without
    saturated pixels comes back as it is.
    """
    line_HW = drawn_line(image_HWC)
    if not line_HW.any():
        return image_HWC
    inside_HW = np.asarray(image_HWC.any(axis=2))
    light_HWC = np.clip(np.rint(light_within(image_HWC, inside_HW)), 1, saturated_value(image_HWC) - 1)
    return np.where(inside_HW[..., None], light_HWC, 0).astype(image_HWC.dtype)


def shift_marking(image_HWC: NDArray[Any], rows: int, columns: int) -> NDArray[Any]:
    """The image with its drawn border moved by whole pixels, also onto the black around the cluster."""
    line_HW = drawn_line(image_HWC)
    if not line_HW.any():
        return image_HWC
    height, width = line_HW.shape
    moved_HW = np.zeros_like(line_HW)
    to = slice(max(rows, 0), height + min(rows, 0)), slice(max(columns, 0), width + min(columns, 0))
    source = slice(max(-rows, 0), height - max(rows, 0)), slice(max(-columns, 0), width - max(columns, 0))
    moved_HW[to] = line_HW[source]
    shifted_HWC = erase_marking(image_HWC).copy()
    shifted_HWC[moved_HW] = np.asarray(saturated_value(image_HWC)).astype(image_HWC.dtype)
    return shifted_HWC


def disturb_marking(
    image_HWC: NDArray[Any], dropped: float, largest_shift_px: int, rng: np.random.Generator
) -> NDArray[Any]:
    """For training: erased with the chance `dropped`, else moved by up to `largest_shift_px` along either axis."""
    if rng.random() < dropped:
        return erase_marking(image_HWC)
    rows, columns = (int(shift) for shift in rng.integers(-largest_shift_px, largest_shift_px + 1, 2))
    return shift_marking(image_HWC, rows, columns) if rows or columns else image_HWC


def draw_border(image_HWC: NDArray[Any], border_HW: NDArray[np.bool_]) -> NDArray[Any]:
    """The image with a border drawn on it as the outer one is, in the highest value."""
    drawn_HWC = image_HWC.copy()
    drawn_HWC[border_HW] = np.asarray(saturated_value(image_HWC)).astype(image_HWC.dtype)
    return drawn_HWC


def part_of(border_HW: NDArray[np.bool_], rng: np.random.Generator) -> NDArray[np.bool_]:
    """A random part of a border, from none of it to nearly all, in pieces: what a network may have found of it."""
    height, width = border_HW.shape
    coarse = rng.random((-(-height // PATCH_PX) + 1, -(-width // PATCH_PX) + 1), dtype=np.float32)
    smooth_HW = np.asarray(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR))
    return border_HW & (smooth_HW < rng.random())
