"""Two maps, "foreground" (inside any nucleus) and "border": for clusters that were cut out.

The targets differ in the border:

- `touching_border`: only the line between touching nuclei. The outer edge is already given by the foreground, and
  a network that does not have to repeat it spends its effort on the separations.
- `full_border`: that line and the outer edge of every nucleus, the solution of the original study.

Decoding must survive a border that does not close, the usual failure of such networks. Cutting the foreground along
the thresholded border and taking connected regions joins two nuclei through a gap of one pixel. Here two parts are
one nucleus only if the passage between them is wide compared with the parts: see `_separate`.

Tried on true maps of gnovis/nucleus train, blurred, faded and with gaps, share of clusters separated (93 clusters,
touching border; none / 10 % / 30 % / 60 % of the line erased): `gap_closing` 0.55: 1.00 / .99 / .91 / .68; closed
borders only: .42 / 0 / 0 / 0. Not better: averaging distances over several border thresholds, weighing the pass
with the mean border probability along it, and an absolute slack beside the share.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from skimage.segmentation import watershed

from nuciseg.label_smoothing import smooth_lines
from nuciseg.section import Section
from nuciseg.straight_cuts import StraightCut, best_cut, divide
from nuciseg.types import Instances

FloatImage = NDArray[np.float32]
LabelImage = NDArray[np.int32]
LabelImage16 = NDArray[np.uint16]
Mask = NDArray[np.bool_]

MAP_NAMES = ("foreground", "border")
CALIBRATED = ((("border_threshold", (0.1, 0.2, 0.35, 0.5)), ("gap_closing", (0.1, 0.2, 0.3, 0.45, 0.6))),)
_CLOSED_ONLY = {"gap_closing": 0.0, "border_share": 1.0, "min_nuclei": 1}
_GAPS_BRIDGED = {"gap_closing": 0.6, "border_share": 0.5}
_MIN_BORDER_LEFT_PX = 10  # less is noise, not a border that ends within a nucleus


class DecodeConfig(Section):
    """How probabilities become nuclei. None of these is trained: choose them on validation maps (`decode_grids`).

    One section for all targets, so that each key is a flag; which of them a target heeds says its `decoded_by`.
    """

    foreground_threshold: float = Field(
        default=0.5, gt=0, lt=1, description="a pixel lies in a nucleus if its foreground probability reaches this"
    )
    border_threshold: float = Field(
        default=0.35, gt=0, lt=1, description="a pixel is border if its border probability reaches this"
    )
    core_rise: float = Field(
        default=0.2,
        gt=0,
        lt=1,
        description="target depth alone: two tops of the depth are two nuclei if it falls by this from both on the way "
        "between them",
    )
    min_confidence: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="target depth alone: nuclei whose mean foreground probability is less are left out",
    )
    gap_closing: float = Field(
        default=0.55,
        ge=0,
        le=1,
        description="two parts are cut if the gap between them is narrower than this share of the narrower part's "
        "width; 0: only closed borders separate, 1: every constriction separates",
    )
    min_area_px: int = Field(
        default=20,
        ge=1,
        description="smaller parts join the neighbour they are most open to, or vanish; no straight cut leaves one, "
        "in pixels",
    )
    min_width_share: float = Field(
        default=0.2,
        ge=0,
        lt=1,
        description="parts narrower than this share of a neighbour's width join it too: rims beyond an outline and "
        "specks within a line are no nuclei; those without a neighbour vanish if narrower than this share of the "
        "image's median nucleus; 0: all parts may be",
    )
    border_share: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="a border that ends within a nucleus divides it along a straight cut if it shows along this share "
        "of the cut at least, fainter parts counting less; 1: never",
    )
    min_nuclei: int = Field(
        default=1,
        ge=1,
        description="how many nuclei an image is known to hold at least, 2 if every image is a cluster: where fewer "
        "were found, the region with the best straight cut is divided there; an image without foreground stays empty",
    )


class BorderSection(Section):
    """What is done to the border that a network is taught; what scores count as border stays as it is."""

    smooth_px: float = Field(
        default=0.0,
        ge=0,
        le=32,
        description="standard deviation of the Gaussian that makes lines between nuclei smooth; 0: as drawn, in pixels",
    )
    soft_px: float = Field(
        default=0.0,
        ge=0,
        le=16,
        description="how far on both sides of the border pixels are border in part, falling from 1 to 0, in pixels",
    )


class TouchingBorderConfig(BorderSection):
    """Foreground, and the line between touching nuclei."""

    kind: Literal["touching_border"] = "touching_border"
    width_px: int = Field(default=3, ge=1, le=31, description="full width of the line between two nuclei, in pixels")
    decode: DecodeConfig = Field(default=DecodeConfig(), description="how probabilities become nuclei")


class FullBorderConfig(BorderSection):
    """Foreground, and the whole outline of every nucleus (the original study's solution).

    Of all widths, 4 px comes closest to the solutions of gnovis/nucleus (IoU 0.80 on every eighth of train).
    """

    kind: Literal["full_border"] = "full_border"
    width_px: int = Field(
        default=4,
        ge=1,
        le=31,
        description="width of the outline in pixels: inside the nucleus at its outer edge, both sides together "
        "between two nuclei",
    )
    decode: DecodeConfig = Field(default=DecodeConfig(), description="how probabilities become nuclei")


@dataclass(frozen=True)
class BorderTarget:
    """See above; make it with `build_target`. Picklable and stateless."""

    config: TouchingBorderConfig | FullBorderConfig
    map_names: tuple[str, ...] = MAP_NAMES
    border_index: int = MAP_NAMES.index("border")
    typical_shares: tuple[float, ...] = (0.5, 0.05)  # of the pixels, by map: where a fresh network starts
    decoded_by: tuple[str, ...] = tuple(
        name for name in DecodeConfig.model_fields if name not in ("core_rise", "min_confidence")
    )

    def encode(self, labels_HW: LabelImage) -> FloatImage:
        """The maps (K, H, W) that a network is taught, 0 or 1, between them near a soft border; 0 where labels are
        negative.
        """
        border_HW = self.border_of(smooth_lines(labels_HW, self.config.smooth_px))
        maps_KHW = np.empty((2, *labels_HW.shape), np.float32)
        maps_KHW[0] = labels_HW > 0
        maps_KHW[1] = _softened(border_HW, self.config.soft_px) * (labels_HW >= 0)
        return maps_KHW

    def border_of(self, labels_HW: LabelImage) -> Mask:
        """The border (H, W) of the labels as they are: what scores take for true, however the network is taught.

        The image's edge is no border: a nucleus that it cuts goes on outside. Ignored pixels are none either.
        """
        border_HW = line_between(labels_HW, self.config.width_px)
        if self.config.kind == "full_border":
            inside_HW = (labels_HW != 0).astype(np.uint8)  # ignored pixels are not known to be outside
            border_HW |= (labels_HW > 0) & (cv2.erode(inside_HW, _disk(2 * self.config.width_px + 1)) == 0)
        return np.asarray(border_HW & (labels_HW >= 0))

    def border_found(self, probabilities_KHW: FloatImage) -> Mask:
        """The pixels (H, W) that count as border."""
        found_HW: Mask = probabilities_KHW[self.border_index] >= self.config.decode.border_threshold
        return found_HW

    def open_borders(self, probabilities_KHW: FloatImage) -> int:
        """How many borders are there but do not close: nuclei that are found only where gaps are bridged."""
        return max(
            self._num_nuclei(probabilities_KHW, _GAPS_BRIDGED) - self._num_nuclei(probabilities_KHW, _CLOSED_ONLY), 0
        )

    def _num_nuclei(self, probabilities_KHW: FloatImage, changes: dict[str, float]) -> int:
        decode = self.config.decode.model_copy(update=changes)
        return len(
            BorderTarget(self.config.model_copy(update={"decode": decode})).decode(probabilities_KHW).confidences_N
        )

    def decode(self, probabilities_KHW: FloatImage) -> Instances:
        """Nuclei from probabilities (K, H, W) in [0, 1].

        A nucleus' confidence is its mean foreground probability, times how closed the narrowest cut to a neighbour is
        (1 for a closed border or no neighbour, less the wider the gap that had to be bridged).
        """
        foreground_HW, border_HW = np.asarray(probabilities_KHW, np.float32)
        return _separate(foreground_HW, border_HW, self.config.decode, self.config.width_px)


@lru_cache(maxsize=64)
def _disk(diameter_px: int) -> NDArray[np.uint8]:
    """A disk as structuring element; of even diameter it is centred between pixels."""
    offset = np.arange(diameter_px) - (diameter_px - 1) / 2
    return (offset[:, None] ** 2 + offset**2 <= (diameter_px / 2) ** 2).astype(np.uint8)


def line_between(labels_HW: LabelImage, width_px: int) -> Mask:
    """Pixels with two different nuclei under a disk of diameter width + 1: a line `width_px` wide between neighbours.

    An odd width cannot lie evenly on the crack between two pixels: it is half a pixel off.
    """
    compact_HW: LabelImage16 | FloatImage = np.maximum(labels_HW, 0).astype(np.uint16)
    if labels_HW.max(initial=0) > 65534:  # cv2 dilates no int32; float32 holds ids up to 2^24 exactly
        compact_HW = np.maximum(labels_HW, 0).astype(np.float32)
    kernel = _disk(width_px + 1)
    largest_HW = cv2.dilate(compact_HW, kernel)
    above_all = np.array(65535 if compact_HW.dtype == np.uint16 else np.inf, compact_HW.dtype)
    smallest_HW = cv2.erode(np.where(compact_HW > 0, compact_HW, above_all), kernel)
    return np.asarray((largest_HW > 0) & (smallest_HW < largest_HW))


def _softened(border_HW: Mask, soft_px: float) -> FloatImage:
    """1 on the border, falling in a straight line to 0 at `soft_px` + 1: a line drawn a little off costs little.

    Not by a Gaussian, which never gets to 0 and would have to be cut off.
    """
    if soft_px <= 0 or not border_HW.any():
        return border_HW.astype(np.float32)
    return np.asarray(np.maximum(0, 1 - _distance_to_zero(~border_HW) / np.float32(soft_px + 1)), np.float32)


def _separate(foreground_HW: FloatImage, border_HW: FloatImage, config: DecodeConfig, width_px: int) -> Instances:
    """Cut the foreground into nuclei along the border, closing the border's gaps.

    The distance to the nearest outside or border pixel is a landscape whose hills are the nuclei; the pass between two
    hills is half as high as the gap in the border between them is wide. Hills are joined, highest pass first,
    where the pass reaches `gap_closing` of the lower summit: h-maxima of the logarithm of the distance
    (cf. Vincent 1993, "dynamics" of Grimaud 1992; scale-free, so it fits small and large nuclei alike).
    Border pixels themselves have height 0 and go to the nucleus that reaches them first, so labels touch. A piece of
    foreground that is all border (a small nucleus under a wide outline) is a nucleus of its own.
    """
    inside_HW = foreground_HW >= config.foreground_threshold
    interior_HW = inside_HW & (border_HW < config.border_threshold)
    height_HW = _distance_to_zero(interior_HW)
    summits_HW = interior_HW & (height_HW >= cv2.dilate(height_HW, np.ones((3, 3), np.uint8)))
    num_hills, seeds_HW = cv2.connectedComponents(summits_HW.astype(np.uint8), connectivity=8)
    hills_HW = watershed(-height_HW, seeds_HW, mask=inside_HW)
    flat_HW = inside_HW & (hills_HW == 0)
    num_flat, pieces_HW = cv2.connectedComponents(flat_HW.astype(np.uint8), connectivity=4)
    hills_HW = np.where(flat_HW, num_hills - 1 + pieces_HW, hills_HW)
    group_of = _join_hills(hills_HW, height_HW, num_hills - 1 + num_flat, config)
    labels_HW = group_of[hills_HW].astype(np.int32)
    labels_HW = _without_specks(labels_HW, inside_HW, config.min_width_share)
    if config.border_share < 1:
        _divide_where_borders_end(labels_HW, border_HW, config, width_px)
    _divide_until_enough(labels_HW, border_HW, config)
    return Instances(labels_HW, _confidences(labels_HW, height_HW, foreground_HW))


def _distance_to_zero(mask_HW: Mask) -> FloatImage:
    """Euclidean distance in pixels of each pixel to the nearest one that is False, to the same last bit each time.

    OpenCV's answer for the same mask differs in its last bit with the place of the array in memory, which moves
    borders between equally near nuclei. The squares are whole numbers, so rounding them gives the exact distance.
    """
    approximate_HW = cv2.distanceTransform(mask_HW.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return np.asarray(np.sqrt(np.rint(approximate_HW.astype(np.float64) ** 2)), np.float32)


@dataclass(frozen=True)
class _Passes:
    """Where regions meet: region `first[i]` < `second[i]` touch, and the highest way across has `height[i]`."""

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    height: NDArray[np.float64]


def _passes(regions_HW: LabelImage, height_HW: FloatImage) -> _Passes:
    """The highest pass between each two regions that touch side by side."""
    firsts, seconds, heights = [], [], []
    for a, b in (
        (np.s_[:, :-1], np.s_[:, 1:]),
        (np.s_[:-1, :], np.s_[1:, :]),
    ):
        region_a, region_b = regions_HW[a], regions_HW[b]
        meets = (region_a != region_b) & (region_a > 0) & (region_b > 0)
        region_a, region_b = region_a[meets], region_b[meets]
        firsts.append(np.minimum(region_a, region_b))
        seconds.append(np.maximum(region_a, region_b))
        heights.append(np.minimum(height_HW[a][meets], height_HW[b][meets]))
    num_regions = int(regions_HW.max(initial=0)) + 1
    key = np.concatenate(firsts).astype(np.int64) * num_regions + np.concatenate(seconds)
    pairs, pair_of = np.unique(key, return_inverse=True)
    height = np.zeros(len(pairs))
    np.maximum.at(height, pair_of, np.concatenate(heights))
    return _Passes(pairs // num_regions, pairs % num_regions, height)


def _join_hills(hills_HW: LabelImage, height_HW: FloatImage, num_hills: int, config: DecodeConfig) -> NDArray[np.int64]:
    """Which nucleus (0 none, 1..N) each hill belongs to; `num_hills` counts the background as hill 0."""
    passes = _passes(hills_HW, height_HW)
    summit = np.zeros(num_hills)
    np.maximum.at(summit, hills_HW.ravel(), height_HW.ravel())
    area_px = np.bincount(hills_HW.ravel(), minlength=num_hills)
    root = np.arange(num_hills)

    def join(a: int, b: int) -> None:
        root[root == b] = a
        summit[a] = max(summit[a], summit[b])
        area_px[a] += area_px[b]

    highest_first = np.lexsort((passes.second, passes.first, -passes.height))
    for i in highest_first:
        a, b, height = root[passes.first[i]], root[passes.second[i]], passes.height[i]
        if a != b and height > 0 and height >= config.gap_closing * min(summit[a], summit[b]):
            join(a, b)
    for i in highest_first:
        a, b = root[passes.first[i]], root[passes.second[i]]
        lower, higher = sorted((summit[a], summit[b]))
        if a != b and (min(area_px[a], area_px[b]) < config.min_area_px or lower < config.min_width_share * higher):
            join(a, b)
    kept = [hill for hill in np.unique(root[1:]) if area_px[hill] >= config.min_area_px]
    number = np.zeros(num_hills, np.int64)
    number[kept] = np.arange(1, len(kept) + 1)
    return number[root]


def _without_specks(labels_HW: LabelImage, inside_HW: Mask, min_width_share: float) -> LabelImage:
    """The labels without nuclei that stand alone and are much narrower than the image's median nucleus."""
    num_bins = int(labels_HW.max(initial=0)) + 1
    if num_bins <= 2 or not min_width_share:
        return labels_HW
    half_width = np.zeros(num_bins)
    np.maximum.at(half_width, labels_HW.ravel(), _distance_to_zero(inside_HW).ravel())
    passes = _passes(labels_HW, np.ones(labels_HW.shape, np.float32))
    kept = half_width >= min_width_share * np.median(half_width[1:])
    kept[np.concatenate([passes.first, passes.second])] = True
    kept[0] = False
    return np.where(kept, np.cumsum(kept), 0).astype(np.int32)[labels_HW]


def _divide_where_borders_end(
    labels_HW: LabelImage, border_HW: FloatImage, config: DecodeConfig, width_px: int
) -> None:
    """Divide regions in place in which a border is left that separates nothing."""
    spent = _disk(2 * width_px + 3)  # so near to another nucleus, a border lies between the two, if a little bent
    pending = list(range(1, int(labels_HW.max(initial=0)) + 1))
    while pending:
        label = pending.pop()
        region_HW = labels_HW == label
        others_HW = (labels_HW > 0) & ~region_HW
        near_others_HW = cv2.dilate(others_HW.astype(np.uint8), spent) > 0
        left_HW = np.where(near_others_HW, np.float32(0), border_HW)
        if np.count_nonzero(region_HW & (left_HW >= config.border_threshold)) < _MIN_BORDER_LEFT_PX:
            continue
        division = _best_division(region_HW, left_HW, config.min_area_px)
        if division is not None and division.cut.border_share >= config.border_share:
            new_label = int(labels_HW.max()) + 1
            labels_HW[division.part_HW] = new_label
            pending += [label, new_label]


def _divide_until_enough(labels_HW: LabelImage, border_HW: FloatImage, config: DecodeConfig) -> None:
    """Divide regions in place, best cut first, until there are `min_nuclei`, or none can be divided."""
    num_nuclei = int(labels_HW.max(initial=0))
    while 0 < num_nuclei < config.min_nuclei:
        divisions = [
            _best_division(labels_HW == label, border_HW, config.min_area_px) for label in range(1, num_nuclei + 1)
        ]
        possible = [division for division in divisions if division is not None]
        if not possible:
            return
        num_nuclei += 1
        labels_HW[min(possible, key=lambda division: division.cut.cost).part_HW] = num_nuclei


@dataclass(frozen=True)
class _Division:
    """A cut, and the part of the region (H, W) that lies on one side of it."""

    cut: StraightCut
    part_HW: Mask


def _best_division(region_HW: Mask, border_HW: FloatImage, min_area_px: int) -> _Division | None:
    cut = best_cut(region_HW, border_HW, min_area_px)
    if cut is None:
        return None
    part_HW = divide(region_HW, cut)
    # The cut knows the outline alone: holes in the region make its parts smaller.
    part_px, rest_px = np.count_nonzero(part_HW), np.count_nonzero(region_HW & ~part_HW)
    return _Division(cut, part_HW) if min(part_px, rest_px) >= min_area_px else None


def _confidences(labels_HW: LabelImage, height_HW: FloatImage, foreground_HW: FloatImage) -> NDArray[np.float32]:
    num_bins = int(labels_HW.max(initial=0)) + 1
    area_px = np.bincount(labels_HW.ravel(), minlength=num_bins)
    confidences = np.bincount(labels_HW.ravel(), foreground_HW.ravel(), num_bins) / np.maximum(area_px, 1)
    summit = np.zeros(num_bins)
    np.maximum.at(summit, labels_HW.ravel(), height_HW.ravel())
    passes = _passes(labels_HW, height_HW)
    lower_summit = np.maximum(np.minimum(summit[passes.first], summit[passes.second]), 1)
    closed = np.ones(num_bins)
    for ends in (passes.first, passes.second):
        np.minimum.at(closed, ends, np.clip(1 - passes.height / lower_summit, 0, 1))
    return np.asarray((confidences * closed)[1:], np.float32)
