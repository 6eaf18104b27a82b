"""Foreground, touching border and depth: a target for whole fields of many nuclei.

Where two nuclei touch, a predicted line of a few pixels may be open. The third map says how deep in its nucleus a pixel
lies: the distance to the nucleus' edge, divided by the largest one of that nucleus (the normalised distance of Naylor
et al. 2019, "Segmentation of nuclei in histopathology images by deep regression of the distance map"; divided by the
largest, nuclei of all sizes look alike). What lies deeper than a share of the whole are cores, one a nucleus, with a
gap between them that is as wide as the nuclei are large. Cores then grow over the foreground, deepest pixels first,
each pixel to the nearest core, which is a watershed in few steps of whole-array operations.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Literal

import cv2
import edt
import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from nuciseg.section import Section
from nuciseg.targets.borders import FloatImage, LabelImage, Mask, line_between
from nuciseg.types import Instances

MAP_NAMES = ("foreground", "border", "depth")
_GROWTH_LEVELS = (0.5, 0.0)  # of `core_depth`: cores grow to the first, then over all foreground


class DepthDecodeConfig(Section):
    """How probabilities become nuclei. None of these is trained: choose them on validation maps (`decode_grid`)."""

    foreground_threshold: float = Field(
        default=0.5, gt=0, lt=1, description="a pixel lies in a nucleus if its foreground probability reaches this"
    )
    border_threshold: float = Field(
        default=0.5, gt=0, lt=1, description="a pixel is border, and part of no core, if its border reaches this"
    )
    core_depth: float = Field(
        default=0.4, gt=0, lt=1, description="a pixel is part of a nucleus' core if its depth reaches this"
    )
    min_area_px: int = Field(default=12, ge=1, description="smaller nuclei are dropped, pixels")


class DepthConfig(Section):
    """Foreground, the line between touching nuclei, and the depth within the nucleus."""

    kind: Literal["depth"] = "depth"
    width_px: int = Field(default=2, ge=1, le=31, description="full width of the line between two nuclei, in pixels")
    decode: DepthDecodeConfig = Field(default=DepthDecodeConfig(), description="how probabilities become nuclei")


@dataclass(frozen=True)
class DepthTarget:
    """See above; make it with `build_target`. Picklable and stateless."""

    config: DepthConfig
    map_names: tuple[str, ...] = MAP_NAMES
    border_index: int = MAP_NAMES.index("border")
    typical_shares: tuple[float, ...] = (0.2, 0.02, 0.1)  # of the pixels, by map: where a fresh network starts

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

        A region of foreground without a core is one nucleus. A nucleus' confidence is its mean foreground probability.
        Whether a pixel belongs to a nucleus depends on its own connected foreground alone, so a part of an image gives
        the same nuclei as the whole where it holds them whole.
        """
        foreground_HW, border_HW, depth_HW = np.asarray(probabilities_KHW, np.float32)
        config = self.config.decode
        inside_HW = foreground_HW >= config.foreground_threshold
        core_HW = inside_HW & (depth_HW >= config.core_depth) & (border_HW < config.border_threshold)
        num_cores, labels_HW = _connected(core_HW, connectivity=4)
        for level in _GROWTH_LEVELS:
            within_HW = inside_HW & (depth_HW >= level * config.core_depth) if level else inside_HW
            labels_HW = _grown(labels_HW, within_HW, num_cores)
        left_HW = inside_HW & (labels_HW == 0)
        num_left, pieces_HW = _connected(left_HW, connectivity=8)
        np.copyto(labels_HW, pieces_HW + (num_cores - 1), where=left_HW)
        return _numbered(labels_HW, foreground_HW, num_cores + num_left - 1, config.min_area_px)


def decode_grid(config: DepthConfig) -> list[list[DepthConfig]]:
    """`config` with other foreground thresholds (rows) and core depths and border thresholds (columns)."""
    return [
        [
            config.model_copy(
                update={
                    "decode": config.decode.model_copy(
                        update={"foreground_threshold": foreground, "core_depth": depth, "border_threshold": border}
                    )
                }
            )
            for border, depth in product((0.3, 0.5, 0.7), (0.2, 0.3, 0.4, 0.5))
        ]
        for foreground in (0.4, 0.45, 0.5, 0.55, 0.6)
    ]


def _depth(labels_HW: LabelImage) -> FloatImage:
    """Distance to the nucleus' edge / the largest one in that nucleus.

    Ignored pixels, and those beyond the image, are not known to be outside: there a nucleus is taken to go on.
    """
    extended_HW = labels_HW
    if labels_HW.min(initial=0) < 0 and labels_HW.max(initial=-1) >= 0:
        extended_HW = _nearest(labels_HW + 1, labels_HW >= 0) - 1
    distance_HW = edt.edt(np.maximum(extended_HW, 0).astype(np.uint32), black_border=False)
    np.copyto(distance_HW, 0, where=labels_HW <= 0)
    largest = np.zeros(int(labels_HW.max(initial=0)) + 1, np.float32)
    np.maximum.at(largest, np.maximum(labels_HW, 0).ravel(), distance_HW.ravel())
    finite = np.where(np.isfinite(largest) & (largest > 0), largest, 1)  # a nucleus without any edge is deep throughout
    return np.asarray(np.minimum(distance_HW / finite[np.maximum(labels_HW, 0)], 1), np.float32)


def _connected(mask_HW: Mask, connectivity: int) -> tuple[int, LabelImage]:
    """(number of regions + 1, regions numbered from 1)."""
    number, regions_HW = cv2.connectedComponents(mask_HW.view(np.uint8), connectivity=connectivity, ltype=cv2.CV_32S)
    return number, np.asarray(regions_HW)


def _nearest(values_HW: LabelImage, known_HW: Mask) -> LabelImage:
    """The value of the nearest pixel that is known (by OpenCV's 5 x 5 chamfer distance, which is exact for ties)."""
    _, place_HW = cv2.distanceTransformWithLabels(
        (~known_HW).view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5, labelType=cv2.DIST_LABEL_PIXEL
    )
    value_at = np.zeros(int(place_HW.max()) + 1, values_HW.dtype)
    value_at[place_HW[known_HW]] = values_HW[known_HW]
    return np.asarray(value_at[place_HW])


def _grown(labels_HW: LabelImage, within_HW: Mask, num_labels: int) -> LabelImage:
    """Each pixel of `within_HW` gets the label of the nearest labelled one of its own connected region."""
    num_regions, regions_HW = _connected(within_HW, connectivity=8)
    labelled_HW = labels_HW > 0
    region_of = np.zeros(num_labels, np.int32)
    region_of[labels_HW[labelled_HW]] = regions_HW[labelled_HW]
    labels_in = np.bincount(region_of[1:], minlength=num_regions)
    only_label = np.zeros(num_regions, np.int32)
    only_label[region_of] = np.arange(num_labels)
    only_label[labels_in != 1] = 0
    only_label[0] = 0
    labels_HW = np.where(within_HW & ~labelled_HW, only_label[regions_HW], labels_HW)
    labels_in[0] = 0
    missing_HW = (labels_in > 1)[regions_HW] & (labels_HW == 0)
    # The nearest label may be another region's; but regions lie apart, so each time those next to a label get theirs.
    while missing_HW.any():
        nearest_HW = _nearest(labels_HW, labels_HW > 0)
        reached_HW = missing_HW & (region_of[nearest_HW] == regions_HW)
        labels_HW = np.where(reached_HW, nearest_HW, labels_HW)
        missing_HW &= ~reached_HW
    return labels_HW


def _numbered(labels_HW: LabelImage, foreground_HW: FloatImage, num_labels: int, min_area_px: int) -> Instances:
    """The labels numbered 1..N, without those that are smaller, and how sure each is."""
    area_px = np.bincount(labels_HW.ravel(), minlength=num_labels)
    kept = area_px >= min_area_px
    kept[0] = False
    number = np.where(kept, np.cumsum(kept), 0).astype(np.int32)
    total = np.bincount(labels_HW.ravel(), foreground_HW.ravel(), minlength=num_labels)
    confidences_N: NDArray[np.float32] = (total[kept] / area_px[kept]).astype(np.float32)
    return Instances(number[labels_HW], confidences_N)
