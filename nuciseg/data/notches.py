"""Outlines that tell less: notches of cut-out clusters filled at random, and others cut into their nuclei.

Most nuclei that touch leave a notch on either side, so that a network which sees the outline learns to cut from notch
to notch, whatever lies between. Here notches vanish although there is a line between the nuclei, and are there although
there is none, so that only the light of the nuclei tells.

Shape legend: H rows, W columns, C channels.
"""

from __future__ import annotations

import math

import cv2
import numpy as np
from numpy.typing import NDArray

from nuciseg.data.cutouts import (
    all_mostly_left,
    areas_px,
    depth_px,
    draw_cutout,
    drawn_line,
    light_without_line,
    nearest_position,
)
from nuciseg.types import Sample

FILLED_SHARE = 0.5  # of the changed clusters
FILLED_RADIUS_PX = (4.0, 80.0)  # a disk of this radius reaches into what stays unfilled
SOFT_PX = 5  # side of the window that softens the filled light
MAX_NEW_NOTCHES = 2
NOTCH_DEPTH_PX = (4.0, 24.0)
NOTCH_TILT_DEG = 25.0  # against the outline's normal
NOTCH_HALF_ANGLE_DEG = (0.0, 50.0)
FLANK_RADIUS_PX = (8.0, 40.0)  # its sides are round, as of two nuclei that meet
ROUNDED_PX = 9  # diameter of the corners that a notch leaves
BEYOND_PX = 12.0  # how far past the outline a notch is cut, for outlines that bulge
MIN_LEFT_SHARE = 0.75  # of each nucleus


def change_notches(sample: Sample, rng: np.random.Generator) -> Sample:
    """`sample`, a cut-out cluster, with all notches narrower than a random width filled, or not, and 0 to 2 new ones.

    The filled pixels belong to the nearest nucleus and shine like its nearest pixel; a new notch is as deep as 4 to 24
    px and leaves each nucleus whole. The border is drawn anew where the outline has changed. Shapes and dtypes stay.
    """
    labels_HW, light_HWC = sample.labels_HW, light_without_line(sample)
    if rng.random() < FILLED_SHARE:
        light_HWC, labels_HW = _filled(light_HWC, labels_HW, rng.uniform(*FILLED_RADIUS_PX))
    for _ in range(int(rng.integers(MAX_NEW_NOTCHES + 1))):
        notched_HW = _notched(labels_HW, rng)
        if all_mostly_left(notched_HW, areas_px(sample.labels_HW), MIN_LEFT_SHARE):
            labels_HW = notched_HW
    return draw_cutout(light_HWC, labels_HW, sample, drawn_line(sample.image_HWC), labels_HW != sample.labels_HW)


def _closed(mask_HW: NDArray[np.bool_], radius_px: float) -> NDArray[np.bool_]:
    """Filled wherever a disk from outside does not reach; through distances, as a kernel of that size is slow."""
    margin = math.ceil(radius_px) + 1
    padded_HW = np.pad(mask_HW, margin)
    grown_HW = np.asarray(cv2.distanceTransform((~padded_HW).astype(np.uint8), cv2.DIST_L2, 5)) <= radius_px
    closed_HW = padded_HW | (depth_px(grown_HW) > radius_px)
    return closed_HW[margin:-margin, margin:-margin]


def _opened(mask_HW: NDArray[np.bool_], diameter_px: int) -> NDArray[np.bool_]:
    """Without what is narrower than a disk; beyond the picture there is nothing."""
    kernel = np.asarray(cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (diameter_px, diameter_px)))
    opened_HW = cv2.morphologyEx(np.pad(mask_HW.astype(np.uint8), diameter_px), cv2.MORPH_OPEN, kernel)
    return np.asarray(opened_HW)[diameter_px:-diameter_px, diameter_px:-diameter_px] > 0


def _filled(
    light_HWC: NDArray[np.float32], labels_HW: NDArray[np.int32], radius_px: float
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    new_HW = _closed(labels_HW > 0, radius_px) & (labels_HW == 0)
    if not new_HW.any():
        return light_HWC, labels_HW
    nearest_HW = nearest_position(labels_HW > 0)
    soft_HWC = cv2.blur(light_HWC.reshape(-1, light_HWC.shape[2])[nearest_HW], (SOFT_PX, SOFT_PX))
    light_HWC = np.where(new_HW[..., None], np.asarray(soft_HWC).reshape(light_HWC.shape), light_HWC)
    return light_HWC, np.where(new_HW, labels_HW.ravel()[nearest_HW], labels_HW).astype(np.int32)


def _notched(labels_HW: NDArray[np.int32], rng: np.random.Generator) -> NDArray[np.int32]:
    """With one notch more at a random place of the outline, whatever that cuts off."""
    inside_depth_px = depth_px(labels_HW > 0)
    rim_N2 = np.argwhere((inside_depth_px > 0) & (inside_depth_px <= 1.5))
    start = rim_N2[rng.integers(len(rim_N2))]
    tilt, notch_px = math.radians(rng.uniform(-NOTCH_TILT_DEG, NOTCH_TILT_DEG)), rng.uniform(*NOTCH_DEPTH_PX)
    slope, flank_px = math.tan(math.radians(rng.uniform(*NOTCH_HALF_ANGLE_DEG))), rng.uniform(*FLANK_RADIUS_PX)
    soft_depth_HW = cv2.GaussianBlur(inside_depth_px, (0, 0), 3.0)
    inward = np.array([_slope_at(soft_depth_HW, start, axis) for axis in (0, 1)])
    if not inward.any():
        return labels_HW
    inward = np.array([[math.cos(tilt), -math.sin(tilt)], [math.sin(tilt), math.cos(tilt)]]) @ inward
    inward /= np.linalg.norm(inward)

    tip = start + notch_px * inward
    from_tip_HW2 = np.moveaxis(np.indices(labels_HW.shape), 0, -1) - tip
    outward_px = -from_tip_HW2 @ inward
    aside_px = np.abs(from_tip_HW2 @ np.array([-inward[1], inward[0]]))
    cut_HW = (outward_px > 0) & (outward_px < notch_px + BEYOND_PX)
    cut_HW &= aside_px < outward_px * slope + outward_px**2 / (2 * flank_px)
    notched_HW = np.where(cut_HW, 0, labels_HW)
    near_HW = np.linalg.norm(from_tip_HW2, axis=-1) < 2 * notch_px + BEYOND_PX
    notched_HW[near_HW & ~_opened(notched_HW > 0, ROUNDED_PX)] = 0
    return notched_HW


def _slope_at(values_HW: NDArray[np.float32], at: NDArray[np.int64], axis: int) -> float:
    step = np.eye(2, dtype=np.int64)[axis]
    highest = np.array(values_HW.shape) - 1
    after, before = (np.clip(at + side * step, 0, highest) for side in (1, -1))
    return float(values_HW[tuple(after)] - values_HW[tuple(before)])
