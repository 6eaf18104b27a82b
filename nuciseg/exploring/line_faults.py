"""Faults of solutions that are drawn lines (the `nucleus` layout): gaps, strays, and lines that disagree.

The image carries the cluster's outer border too, so the two drawings can be compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from skimage.morphology import skeletonize

from nuciseg.data.formats.nucleus import BORDER_THRESHOLD
from nuciseg.exploring.faults import Box, Finding
from nuciseg.images import saturated_value

Mask = NDArray[np.bool_]

# Spurs that thinning leaves on ragged lines are shorter than the lines are wide: of gnovis/nucleus' 597 solutions
# three have one, of 1 to 4 px.
LOOSE_END_PX = 8
STRAY_PX = 60  # a line of its own that encloses nothing is an unclosed border if larger, a slip of the pen if not
LIGHT_PX = 60  # light outside of all closed lines: about the size of the smallest nuclei
RIM_PX = 2  # of that light, what lies along a line is its ragged edge
APART_PX = 2  # how far two drawings of one line may lie apart
DISAGREE_PX = 10


def line_faults(
    image_HW: NDArray[Any], solution_HW: NDArray[np.uint8], labels_HW: NDArray[np.int32]
) -> Iterator[Finding]:
    """All faults of one solution (H, W), 255 where a line is, with its image and the nuclei that it encloses."""
    line_HW = solution_HW > BORDER_THRESHOLD
    stray_HW = _stray(line_HW)
    yield from _stray_findings(stray_HW)
    yield from _loose_ends(line_HW & ~stray_HW)
    yield from _light_outside(image_HW, line_HW, labels_HW)
    yield from _disagreements(image_HW, line_HW & ~stray_HW)


def _stray(line_HW: Mask) -> Mask:
    """Parts of the drawing that enclose nothing and hang together with nothing else."""
    num, parts_HW, stats, _ = cv2.connectedComponentsWithStats(line_HW.astype(np.uint8), connectivity=8)
    stray_HW = np.zeros_like(line_HW)
    for part in range(1, num):
        left, top, width, height, _ = stats[part]
        window_HW = np.pad(parts_HW[top : top + height, left : left + width] == part, 1)
        num_outside, _ = cv2.connectedComponents((~window_HW).astype(np.uint8), connectivity=4)
        if num_outside == 2:  # the pixels of the line itself, and one outside
            stray_HW[top : top + height, left : left + width] |= window_HW[1:-1, 1:-1]
    return stray_HW


def _stray_findings(stray_HW: Mask) -> Iterator[Finding]:
    for box, area_px in _parts(stray_HW):
        if area_px < STRAY_PX:
            yield Finding("stray pixels", f"{area_px} px drawn apart from all lines", box, area_px)
        else:
            yield Finding("unclosed border", f"a line of {area_px} px encloses nothing", box, area_px)


def _loose_ends(line_HW: Mask) -> Iterator[Finding]:
    """Lines that begin at another one and end within a nucleus."""
    thin_HW = np.pad(skeletonize(line_HW), 1)
    neighbours_HW = cv2.filter2D(thin_HW.astype(np.uint8), -1, np.ones((3, 3), np.uint8)) - thin_HW
    for row, column in np.argwhere(thin_HW & (neighbours_HW == 1)):
        path = _walk(thin_HW, neighbours_HW, (int(row), int(column)))
        if len(path) < LOOSE_END_PX:
            continue
        points = np.array(path) - 1
        (top, left), (bottom, right) = points.min(axis=0), points.max(axis=0)
        box = (int(top), int(left), int(bottom) + 1, int(right) + 1)
        yield Finding("unclosed border", f"a line ends after {len(path)} px without closing", box, len(path))


def _walk(thin_HW: Mask, neighbours_HW: NDArray[np.uint8], end: tuple[int, int]) -> list[tuple[int, int]]:
    """The pixels of a thin line from its end to where it meets another."""
    path, seen = [end], {end}
    while True:
        row, column = path[-1]
        around = [(row + dy, column + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
        following = [each for each in around if thin_HW[each] and each not in seen]
        if len(following) != 1 or neighbours_HW[following[0]] > 2:
            return path
        path.append(following[0])
        seen.add(following[0])


def _light_outside(image_HW: NDArray[Any], line_HW: Mask, labels_HW: NDArray[np.int32]) -> Iterator[Finding]:
    """Light that belongs to no nucleus: the border around it is not closed, or was not drawn."""
    lost_HW = (image_HW > 0) & (image_HW < saturated_value(image_HW)) & (labels_HW <= 0) & ~line_HW
    size = 2 * RIM_PX + 1
    cores_HW = cv2.morphologyEx(lost_HW.astype(np.uint8), cv2.MORPH_OPEN, np.ones((size, size), np.uint8)) > 0
    for box, area_px in _parts(cores_HW):
        if area_px >= LIGHT_PX:
            yield Finding("unclosed border", f"{area_px} px of light lie outside of all closed lines", box, area_px)


def _disagreements(image_HW: NDArray[Any], line_HW: Mask) -> Iterator[Finding]:
    """Where only one of the two, image and solution, has the cluster's outer border."""
    drawn_HW = image_HW == saturated_value(image_HW)
    if not drawn_HW.any():  # data without a drawn border have nothing to disagree with
        return
    outside_HW = np.pad(image_HW == 0, APART_PX, constant_values=True)
    size = 2 * APART_PX + 1
    near_outside_HW = _grown(outside_HW, size)[APART_PX:-APART_PX, APART_PX:-APART_PX]
    num, parts_HW = cv2.connectedComponents(drawn_HW.astype(np.uint8), connectivity=8)
    is_outline = np.zeros(num, bool)  # other saturated pixels are bright spots
    is_outline[np.unique(parts_HW[near_outside_HW & drawn_HW])] = True
    outline_HW = is_outline[parts_HW] & drawn_HW
    only_image_HW = outline_HW & ~_grown(line_HW, size)
    only_solution_HW = line_HW & near_outside_HW & ~_grown(outline_HW, size)
    for where_HW, what in ((only_image_HW, "image"), (only_solution_HW, "solution")):
        for box, area_px in _parts(where_HW):
            if area_px >= DISAGREE_PX:
                yield Finding("lines disagree", f"{area_px} px of border are on the {what} alone", box, area_px)


def _grown(mask_HW: Mask, size: int) -> Mask:
    return np.asarray(cv2.dilate(mask_HW.astype(np.uint8), np.ones((size, size), np.uint8)) > 0)


def _parts(mask_HW: Mask) -> Iterator[tuple[Box, int]]:
    """Box and area of each 8-connected part."""
    num, _, stats, _ = cv2.connectedComponentsWithStats(mask_HW.astype(np.uint8), connectivity=8)
    for left, top, width, height, area_px in stats[1:num]:
        yield (int(top), int(left), int(top + height), int(left + width)), int(area_px)
