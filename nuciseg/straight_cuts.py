"""Where to divide a region in which a border ends, or which is known to hold two nuclei though no border showed.

Candidates are the chords between points of the region's outline. A good cut is short compared with the parts it
leaves, as in the ratio cut of graphs (Wei & Cheng 1989), and runs where the network was least sure that there is
no border: a border too faint for any threshold still raises the logarithm of its probability.

Tried on clusters of two nuclei of gnovis/nucleus, held-out fold, each taken as one region and divided: 94 of 94
right with two networks; by shortness alone 92; with the smaller part's area to the power of 0.35 in place of 0.5,
92 and 94. `benchmarks/ablation.py` measures what such cuts bring to whole clusters.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from skimage.segmentation import watershed

Mask = NDArray[np.bool_]

_OUTLINE_STEP_PX = 2  # chords end at every second point of the outline: a quarter of the pairs, no visible loss
_SAMPLES_PER_CHORD = 48
_MIN_PART_SHARE = 0.05  # of the region's area: less is a bump of the outline
_MIN_INSIDE_SHARE = 0.9  # of the chord's length: drawn outlines are ragged
_FLOOR = 1e-4  # below this, probabilities are noise
_BORDER_DISCOUNT = 0.7  # a chord on a certain border costs the rest of its length: with none, chords along it are free


@dataclass(frozen=True)
class StraightCut:
    """A chord from outline point `first` to `last` of `outline_xy` (N, 2).

    `cost` is free of scale, less is better; `border_share` is how far a border shows along the cut, 0 to 1.
    """

    cost: float
    border_share: float
    outline_xy: NDArray[np.int32]
    first: int
    last: int


def best_cut(region_HW: Mask, border_HW: NDArray[np.float32], min_part_px: float = 0) -> StraightCut | None:
    """The best chord of a region (H, W), given border probabilities (H, W), that leaves no part below `min_part_px`,
    holes counted in.

    None where the region is too small.
    """
    outlines, _ = cv2.findContours(region_HW.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    if not outlines:
        return None
    outline_xy = np.asarray(max(outlines, key=len)[:, 0, :], np.int32)
    point = np.arange(0, len(outline_xy), _OUTLINE_STEP_PX)
    first, last = (point[i] for i in np.triu_indices(len(point), 1))
    length_px = np.hypot(*(outline_xy[last] - outline_xy[first]).T.astype(np.float64))
    smaller_px, whole_px = _smaller_part_px(outline_xy, first, last)
    possible = (smaller_px > max(_MIN_PART_SHARE * whole_px, min_part_px)) & (length_px > _OUTLINE_STEP_PX)
    first, last, length_px, smaller_px = (a[possible] for a in (first, last, length_px, smaller_px))
    along = (np.arange(_SAMPLES_PER_CHORD) + 0.5) / _SAMPLES_PER_CHORD
    start_xy, end_xy = outline_xy[first][:, :, None], outline_xy[last][:, :, None]
    x, y = np.moveaxis(np.rint(start_xy * (1 - along) + end_xy * along).astype(np.intp), 1, 0)
    inside = region_HW[y, x].mean(axis=1) >= _MIN_INSIDE_SHARE
    if not inside.any():
        return None
    border_share = _signs_of_border(border_HW, region_HW)[y, x].mean(axis=1)
    price = 1 - _BORDER_DISCOUNT * border_share
    cost = np.where(inside, length_px * price / np.sqrt(smaller_px), np.inf)
    best = int(np.argmin(cost))
    return StraightCut(float(cost[best]), float(border_share[best]), outline_xy, int(first[best]), int(last[best]))


def divide(region_HW: Mask, cut: StraightCut) -> Mask:
    """The part (H, W) of the region on one side of the cut; it and the rest are each in one piece if the region is."""
    side_HW = np.zeros(region_HW.shape, np.uint8)
    cv2.fillPoly(side_HW, [cut.outline_xy[cut.first : cut.last + 1]], 1)
    seeds_HW = np.zeros(region_HW.shape, np.int32)
    for number, part_HW in enumerate((region_HW & (side_HW > 0), region_HW & (side_HW == 0)), start=1):
        seeds_HW[_largest_piece(part_HW)] = number
    return np.asarray(watershed(np.zeros(region_HW.shape), seeds_HW, mask=region_HW) == 1)


def _smaller_part_px(
    outline_xy: NDArray[np.int32], first: NDArray[np.intp], last: NDArray[np.intp]
) -> tuple[NDArray[np.float64], float]:
    """The smaller area on either side of each chord, and that of the whole, by the shoelace formula."""
    x, y = outline_xy.T.astype(np.float64)
    swept = np.concatenate([[0.0], np.cumsum(x * np.roll(y, -1) - np.roll(x, -1) * y)])
    whole_px = abs(swept[-1]) / 2
    one_side_px = np.abs(swept[last] - swept[first] + x[last] * y[first] - x[first] * y[last]) / 2
    return np.minimum(one_side_px, whole_px - one_side_px), float(whole_px)


def _signs_of_border(border_HW: NDArray[np.float32], region_HW: Mask) -> NDArray[np.float64]:
    """How far the log probability lies above the region's median, as a share of what is possible, 0 to 1."""
    log_HW = np.log10(np.maximum(border_HW.astype(np.float64), _FLOOR))
    usual = min(float(np.median(log_HW[region_HW])), -1e-3)
    return np.asarray(np.clip(1 - log_HW / usual, 0, 1))


def _largest_piece(mask_HW: Mask) -> Mask:
    num, pieces_HW = cv2.connectedComponents(mask_HW.astype(np.uint8), connectivity=4)
    if num < 2:
        return mask_HW
    area_px = np.bincount(pieces_HW.ravel())
    area_px[0] = 0
    return np.asarray(pieces_HW == area_px.argmax())
