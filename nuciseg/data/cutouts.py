"""Clusters cut out of their field: 0 outside, the outer border drawn on the nuclei in the highest value.

Shape legend: H rows, W columns, C channels.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from nuciseg.data.synthetic import outer_border
from nuciseg.images import saturated_value
from nuciseg.types import Sample

MAX_LINE_PX = 6  # a drawn line reaches no deeper into the cluster
REDRAWN_PX = 3  # around what has changed the line is drawn anew: its own width


def drawn_line(image_HWC: NDArray[Any]) -> NDArray[np.bool_]:
    """Where the border is drawn."""
    is_highest_HWC: NDArray[np.bool_] = image_HWC == saturated_value(image_HWC)
    return np.asarray(is_highest_HWC.all(axis=2))


def within_line(sample: Sample) -> NDArray[np.bool_]:
    """Where the picture shows the light of nuclei."""
    return (sample.labels_HW > 0) & ~drawn_line(sample.image_HWC)


def light_without_line(sample: Sample) -> NDArray[np.float32]:
    """The light of the nuclei, 0 outside of them; on the drawn line that of the nearest pixels within it, softened."""
    return light_within(sample.image_HWC, sample.labels_HW > 0)


def light_within(image_HWC: NDArray[Any], inside_HW: NDArray[np.bool_]) -> NDArray[np.float32]:
    """`light_without_line` where only the cluster as a whole is known."""
    seen_HW = inside_HW & ~drawn_line(image_HWC)
    light_HWC = image_HWC.astype(np.float32)
    if seen_HW.any():
        soft_HWC = cv2.blur(light_HWC.reshape(-1, light_HWC.shape[2])[nearest_position(seen_HW)], (3, 3))
        light_HWC = np.where(seen_HW[..., None], light_HWC, np.asarray(soft_HWC).reshape(light_HWC.shape))
    return np.where(inside_HW[..., None], light_HWC, 0).astype(np.float32)


def nearest_position(mask_HW: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Of each pixel, where in the flattened picture the nearest pixel of the mask is; the mask is not empty."""
    _, nearest_HW = cv2.distanceTransformWithLabels(
        (~mask_HW).astype(np.uint8), cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
    )
    position_N = np.zeros(int(nearest_HW.max()) + 1, np.int64)
    position_N[nearest_HW[mask_HW]] = np.flatnonzero(mask_HW)
    return np.asarray(position_N[nearest_HW])


def draw_cutout(
    light_HWC: NDArray[np.float32],
    labels_HW: NDArray[np.int32],
    like: Sample,
    old_line_HW: NDArray[np.bool_] | None = None,
    changed_HW: NDArray[np.bool_] | None = None,
) -> Sample:
    """A picture as the data set has it: values of the type of `like`, 0 outside, the line in the highest value.

    Where nothing has changed an old line stays as it is; elsewhere one is drawn along the edge of `labels_HW`. Where
    `like` has no line, as in a data set without markings, none is drawn.
    """
    image_HWC = zeroed_outside(light_HWC, labels_HW, like.image_HWC.dtype)
    if not drawn_line(like.image_HWC).any():
        return Sample(image_HWC, labels_HW)
    line_HW = outer_border(labels_HW)
    if old_line_HW is not None and changed_HW is not None:
        # What was the line of an edge that now lies within the cluster is none any more.
        kept_line_HW = old_line_HW & (depth_px(labels_HW > 0) <= MAX_LINE_PX)
        kernel = np.ones((2 * REDRAWN_PX + 1, 2 * REDRAWN_PX + 1), np.uint8)
        anew_HW = np.asarray(cv2.dilate(changed_HW.astype(np.uint8), kernel)) > 0
        line_HW = np.where(anew_HW, line_HW, kept_line_HW)
    image_HWC[line_HW & (labels_HW > 0)] = saturated_value(image_HWC)
    return Sample(image_HWC, labels_HW)


def zeroed_outside(light_HWC: NDArray[np.float32], labels_HW: NDArray[np.int32], dtype: np.dtype[Any]) -> NDArray[Any]:
    """A picture of an integer type with 0 outside the nuclei and within them neither 0 nor the highest value."""
    image_HWC = np.clip(np.rint(light_HWC), 1, np.iinfo(dtype).max - 1).astype(dtype)
    image_HWC[labels_HW == 0] = 0
    return np.asarray(image_HWC)


def depth_px(mask_HW: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Distance of each pixel of the mask to the outside, px; the picture's edge is outside."""
    padded_HW = np.pad(mask_HW.astype(np.uint8), 1)
    return np.asarray(cv2.distanceTransform(padded_HW, cv2.DIST_L2, 5))[1:-1, 1:-1]


def areas_px(labels_HW: NDArray[np.int32]) -> NDArray[np.int64]:
    """Pixels of each nucleus 1..N."""
    return np.bincount(labels_HW.ravel())[1:].astype(np.int64)
