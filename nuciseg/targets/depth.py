"""Foreground, touching border and depth: a target for whole fields of many nuclei.

Where two nuclei touch, a predicted line of a few pixels may be open. The third map says how deep in its nucleus a pixel
lies: the distance to the nucleus' edge, divided by the largest one of that nucleus (the normalised distance of Naylor
et al. 2019, "Segmentation of nuclei in histopathology images by deep regression of the distance map"; divided by the
largest, nuclei of all sizes look alike). Two tops of that map are the cores of two nuclei where the way from one to the
other leads far enough down from both, and one nucleus' else: h-maxima (Soille 2003, "Morphological Image Analysis",
6.3.5). Cores then grow over the foreground, first where it is deep, each pixel to the nearest core: a watershed in
three steps of array operations, in the frame of each region that has several cores.

Tried on validation maps of dsb2018, and no better: cores from a fixed depth (nuclei that press against each other have
deep ways between them, small ones no deep cores); the border taken out of the depth; the depth's root or power.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import cv2
import edt
import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy.spatial import KDTree

from nuciseg.section import Section
from nuciseg.targets.borders import DecodeConfig, FloatImage, LabelImage, Mask, line_between
from nuciseg.types import Instances

MAP_NAMES = ("foreground", "border", "depth")
_RISES = (0.1, 0.15, 0.2, 0.25, 0.3, 0.35)
_FOREGROUNDS = (0.35, 0.4, 0.45, 0.5, 0.55)
_AREAS_PX = (12, 16, 20, 25, 30, 36)
_CONFIDENCES = (0.5, 0.6, 0.7, 0.75, 0.8, 0.84, 0.88, 0.92)
CALIBRATED = (
    (("core_rise", _RISES), ("foreground_threshold", _FOREGROUNDS)),
    (("min_area_px", _AREAS_PX), ("min_confidence", _CONFIDENCES)),
    # Once more: the lower this threshold is, the less sure are the outlines that it leaves.
    (("foreground_threshold", _FOREGROUNDS), ("min_confidence", _CONFIDENCES)),
)
# Depths within which cores grow, in turn. With fewer a small nucleus takes the rim of a large one beside it.
_GROWN = (0.3, 0.15, 0.0)
_LEVELS = 255
_NEIGHBOURS = np.ones((3, 3), np.uint8)
_ROUNDS = 8  # of spreading between two looks at whether it is over


class DepthConfig(Section):
    """Foreground, the line between touching nuclei, and the depth within the nucleus."""

    kind: Literal["depth"] = "depth"
    width_px: int = Field(default=2, ge=1, le=31, description="full width of the line between two nuclei, in pixels")
    decode: DecodeConfig = Field(default=DecodeConfig(), description="how probabilities become nuclei")


@dataclass(frozen=True)
class DepthTarget:
    """See above; make it with `build_target`. Picklable and stateless."""

    config: DepthConfig
    map_names: tuple[str, ...] = MAP_NAMES
    border_index: int = MAP_NAMES.index("border")
    typical_shares: tuple[float, ...] = (0.2, 0.02, 0.1)  # of the pixels, by map: where a fresh network starts
    decoded_by: tuple[str, ...] = ("foreground_threshold", "core_rise", "min_area_px", "min_confidence")

    def encode(self, labels_HW: LabelImage) -> FloatImage:
        """The maps (K, H, W) that a network is taught, in [0, 1]; 0 where labels are negative."""
        maps_KHW = np.empty((3, *labels_HW.shape), np.float32)
        maps_KHW[0] = labels_HW > 0
        maps_KHW[1] = self.border_of(labels_HW)
        maps_KHW[2] = _depth(labels_HW)
        return maps_KHW

    def border_of(self, labels_HW: LabelImage) -> Mask:
        """The line (H, W) between touching nuclei: what scores take for true."""
        return line_between(labels_HW, self.config.width_px) & (labels_HW >= 0)

    def border_found(self, probabilities_KHW: FloatImage) -> Mask:
        """The pixels (H, W) that count as border."""
        found_HW: Mask = probabilities_KHW[self.border_index] >= self.config.decode.border_threshold
        return found_HW

    def open_borders(self, probabilities_KHW: FloatImage) -> None:
        """Depth needs no closed border, so none is asked for."""

    def decode(self, probabilities_KHW: FloatImage) -> Instances:
        """Nuclei from probabilities (K, H, W) in [0, 1].

        A region of foreground without a core is one nucleus. A nucleus' confidence is its mean foreground probability;
        where that is less than `min_confidence`, there is none: specks and blur are foreground, but not surely.
        Whether a pixel belongs to a nucleus depends on its own connected foreground alone, so a part of an image gives
        the same nuclei as the whole where it holds them whole.
        """
        foreground_HW, _, depth_HW = np.asarray(probabilities_KHW, np.float32)
        config = self.config.decode
        inside_HW = foreground_HW >= config.foreground_threshold
        num_labels, labels_HW = _cores(depth_HW, inside_HW, config.core_rise)
        num_labels, labels_HW = _grown(labels_HW, num_labels, inside_HW, depth_HW)
        return _numbered(labels_HW, foreground_HW, num_labels, config)


def _depth(labels_HW: LabelImage) -> FloatImage:
    """Distance to the nucleus' edge / the largest one in that nucleus.

    Ignored pixels, and those beyond the image, are not known to be outside: there a nucleus is taken to go on.
    """
    extended_HW = labels_HW
    ignored_HW = labels_HW < 0
    if ignored_HW.any() and not ignored_HW.all():
        known, ignored = np.flatnonzero(~ignored_HW), np.flatnonzero(ignored_HW)
        extended_HW = labels_HW.copy()
        extended_HW.ravel()[ignored] = _nearest_of(ignored_HW.view(np.uint8), known, labels_HW.ravel()[known], ignored)
    distance_HW = edt.edt(np.maximum(extended_HW, 0).astype(np.uint32), black_border=False)
    np.copyto(distance_HW, 0, where=labels_HW <= 0)
    largest = np.zeros(int(labels_HW.max(initial=0)) + 1, np.float32)
    np.maximum.at(largest, np.maximum(labels_HW, 0).ravel(), distance_HW.ravel())
    finite = np.where(np.isfinite(largest) & (largest > 0), largest, 1)  # a nucleus without any edge is deep throughout
    return np.asarray(np.minimum(distance_HW / finite[np.maximum(labels_HW, 0)], 1), np.float32)


def _cores(depth_HW: FloatImage, inside_HW: Mask, rise: float) -> tuple[int, LabelImage]:
    """(number of cores + 1, cores numbered from 1): around each top of the map that rises so far above all ways to a
    higher one, what is less than `rise` below it."""
    level_HW = cv2.convertScaleAbs(depth_HW, alpha=_LEVELS)
    level_HW[~inside_HW] = 0
    rise_levels = max(1, round(rise * _LEVELS))
    flooded_HW = _reconstructed(cv2.subtract(level_HW, rise_levels), level_HW)
    num_above, above_HW = _connected(level_HW > flooded_HW, connectivity=8)
    # Above the flood lie lower tops, too. Only a core's own top is `rise` above it.
    is_core = np.zeros(num_above, bool)
    is_core[above_HW[cv2.subtract(level_HW, flooded_HW) == rise_levels]] = True
    number = np.where(is_core, np.cumsum(is_core), 0).astype(np.int32)
    return int(number.max(initial=0)) + 1, number[above_HW]


def _reconstructed(marker_HW: NDArray[np.uint8], mask_HW: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """`marker_HW` (at most `mask_HW`) spread to its neighbours, as far up as the mask allows, until nothing changes.

    Morphological reconstruction by dilation. scikit-image has it as well, but sorts all pixels (docs/decisions.md).
    """
    spread_HW = marker_HW
    while True:
        before_HW = spread_HW
        for _ in range(_ROUNDS):
            spread_HW = cv2.min(cv2.dilate(spread_HW, _NEIGHBOURS), mask_HW)
        if np.array_equal(spread_HW, before_HW):
            return spread_HW


def _connected(mask_HW: Mask, connectivity: int) -> tuple[int, LabelImage]:
    """(number of regions + 1, regions numbered from 1)."""
    number, regions_HW = cv2.connectedComponents(mask_HW.view(np.uint8), connectivity=connectivity, ltype=cv2.CV_32S)
    return number, np.asarray(regions_HW)


def _grown(cores_HW: LabelImage, num_cores: int, inside_HW: Mask, depth_HW: FloatImage) -> tuple[int, LabelImage]:
    """(number of labels + 1, labels): each region of foreground divided among its cores; without any it is one."""
    num_regions, regions_HW, stats_R5, _ = cv2.connectedComponentsWithStats(
        inside_HW.view(np.uint8), connectivity=8, ltype=cv2.CV_32S
    )
    places = np.flatnonzero(cores_HW)
    region_of = np.zeros(num_cores, np.int32)
    region_of[cores_HW.ravel()[places]] = regions_HW.ravel()[places]
    num_in_R = np.bincount(region_of[1:], minlength=num_regions)
    label_of_R = np.zeros(num_regions, np.int32)
    label_of_R[region_of[1:]] = np.arange(1, num_cores)
    without = np.flatnonzero(num_in_R[1:] == 0) + 1
    label_of_R[without] = np.arange(num_cores, num_cores + len(without))
    shared = np.flatnonzero(num_in_R > 1)
    label_of_R[shared] = 0
    labels_HW, number = label_of_R[regions_HW], np.zeros(num_cores, np.int32)
    for region in shared:  # few, and small beside the image: each in its own frame
        left, top, width, height = stats_R5[region, : cv2.CC_STAT_AREA]
        frame = np.s_[top : top + height, left : left + width]
        within_HW = regions_HW[frame] == region
        own = np.append(0, np.flatnonzero(region_of == region)).astype(np.int32)
        number[own] = np.arange(len(own))
        parts_HW = np.where(within_HW, number[cores_HW[frame]], 0)
        for depth in _GROWN:
            _grow(parts_HW, within_HW & (depth_HW[frame] >= depth), len(own))
        np.copyto(labels_HW[frame], own[parts_HW], where=within_HW)
    return num_cores + len(without), labels_HW


def _grow(labels_HW: LabelImage, within_HW: Mask, num_labels: int) -> None:
    """Each pixel of `within_HW` gets, in place, the label of the nearest labelled one of its own connected region.

    On the pixels of the mask alone, in flat arrays: most of a field is background.
    """
    num_regions, regions_HW = _connected(within_HW, connectivity=8)
    places = np.flatnonzero(within_HW)
    regions, labels = regions_HW.ravel()[places], labels_HW.ravel()[places]
    known = np.flatnonzero(labels)
    region_of = np.zeros(num_labels, np.int32)
    region_of[labels[known]] = regions[known]
    num_in = np.bincount(region_of[1:], minlength=num_regions)
    label_of = np.zeros(num_regions, np.int32)
    label_of[region_of[1:]] = np.arange(1, num_labels)
    label_of[num_in != 1] = 0
    found = np.where(labels > 0, labels, label_of[regions])
    missing = np.flatnonzero((found == 0) & (num_in[regions] > 1))
    if missing.size:
        found[missing] = _nearest_labels(places, labels, regions, missing, region_of, within_HW.shape)
    labels_HW.ravel()[places] = found


def _nearest_labels(
    places: NDArray[np.intp],
    labels: NDArray[np.int32],
    regions: NDArray[np.int32],
    missing: NDArray[np.intp],
    region_of: NDArray[np.int32],
    shape: tuple[int, ...],
) -> NDArray[np.int32]:
    """The nearest labels within their region, of the flat pixels `missing` of `places`."""
    known = np.flatnonzero(labels)
    unknown_HW = np.ones(shape, np.uint8)
    unknown_HW.ravel()[places[known]] = 0
    nearest = _nearest_of(unknown_HW, places[known], labels[known], places[missing])
    # The nearest may lie in another region. Few do: those are looked up in a tree, where regions lie far apart.
    astray = np.flatnonzero(region_of[nearest] != regions[missing])
    if astray.size:
        own = known[np.isin(regions[known], regions[missing[astray]])]
        tree = KDTree(_apart(places[own], regions[own], shape))
        _, index = tree.query(_apart(places[missing[astray]], regions[missing[astray]], shape))
        nearest[astray] = labels[own[index]]
    return nearest


def _apart(places: NDArray[np.intp], regions: NDArray[np.int32], shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Row, column, and the region as a third direction in which no two regions are near."""
    rows, columns = np.divmod(places, shape[1])
    return np.stack([rows, columns, regions * float(2 * sum(shape))], axis=1)


def _nearest_of(
    unknown_HW: NDArray[np.uint8], known: NDArray[np.intp], values: NDArray[np.int32], asked: NDArray[np.intp]
) -> NDArray[np.int32]:
    """Of the flat pixels `asked`, the values of the nearest known ones, by OpenCV's 5 x 5 chamfer distance."""
    _, number_HW = cv2.distanceTransformWithLabels(
        unknown_HW, cv2.DIST_L2, cv2.DIST_MASK_5, labelType=cv2.DIST_LABEL_PIXEL
    )
    numbers = number_HW.ravel()
    value_of = np.zeros(known.size + 1, np.int32)  # known pixels are numbered from 1
    value_of[numbers[known]] = values
    return np.asarray(value_of[numbers[asked]])


def _numbered(labels_HW: LabelImage, foreground_HW: FloatImage, num_labels: int, config: DecodeConfig) -> Instances:
    """The labels numbered 1..N, without those that are too small or unsure, and how sure each is."""
    places = np.flatnonzero(labels_HW)
    labels = labels_HW.ravel()[places]
    area_px = np.bincount(labels, minlength=num_labels)
    total = np.bincount(labels, foreground_HW.ravel()[places], minlength=num_labels)
    confidence = total / np.maximum(area_px, 1)
    kept = (area_px >= config.min_area_px) & (confidence >= config.min_confidence)
    kept[0] = False
    number = np.where(kept, np.cumsum(kept), 0).astype(np.int32)
    labels_HW.ravel()[places] = number[labels]
    return Instances(labels_HW, confidence[kept].astype(np.float32))
