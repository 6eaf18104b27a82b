"""Two cut-out clusters laid against each other: training images with more nuclei than most clusters have.

A copy-paste augmentation (Ghiasi et al., "Simple Copy-Paste is a Strong Data Augmentation Method for Instance
Segmentation", CVPR 2021) for the one case where it matters that objects touch. Light adds up where nuclei overlap and
fades towards their rims, so that the new contact is a dark valley, a bright band or nearly nothing, as real ones are.

Shape legend: H rows, W columns, C channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from nuciseg.data.cutouts import (
    areas_px,
    depth_px,
    draw_cutout,
    drawn_line,
    light_without_line,
    within_line,
)
from nuciseg.types import Sample

MAX_TRIES = 8
OVERLAP_PX = (4.0, 18.0)  # how far one cluster is pushed over the other
PRESSED_PX = (8.0, 32.0)  # and how far where nuclei give way instead: the contact is longer and its notches flatter
PRESSED_SHARE = 0.5  # of the clusters
REACH_PX = (-1.5, 4.0)  # how far a nucleus that gives way reaches across the middle; negative: a dark gap is left
RIM_PX = (1.0, 6.0)  # over this distance the light of a nucleus rises from its edge
PRESSED_RIM_PX = (1.0, 3.0)
DARKEST = 0.4  # of the light of the brighter nucleus: real contacts are never black
RELATIVE_SIZE = (0.6, 1.1)  # of the second cluster: small nuclei beside large ones are what the data set has few of
SPREAD_OF_BRIGHTNESS = 0.2  # relative, between neighbours
MIN_SEEN_SHARE = 0.6  # of each nucleus, else too much of it lies beneath another
LANE_PX = 2.0  # wider than the diagonal of a pixel, so that a lane across a nucleus is never empty


def join_clusters(first: Sample, second: Sample, rng: np.random.Generator) -> Sample:
    """`second`, turned by a multiple of 90 degrees, mirrored, resized and matched in brightness, touching `first`.

    Both are cut-out clusters (0 outside, outer border drawn in the highest value) of one dtype and number of channels,
    and so is the result; `labels_HW` of the second follow those of the first. Where they overlap a pixel belongs to
    the cluster that it lies deeper in. `first` comes back as it is where no place is found.
    """
    second = _resized(_turned(second, rng), rng.uniform(*RELATIVE_SIZE))
    for _ in range(MAX_TRIES):
        pressed = bool(rng.random() < PRESSED_SHARE)
        overlap_px = rng.uniform(*(PRESSED_PX if pressed else OVERLAP_PX))
        offset = _touching_offset(first.labels_HW > 0, second.labels_HW > 0, overlap_px, rng)
        joined = None if offset is None else _composed(first, second, offset, pressed, rng)
        if joined is not None:
            return joined
    return first


def _turned(sample: Sample, rng: np.random.Generator) -> Sample:
    quarter_turns = int(rng.integers(4))
    mirrored = bool(rng.integers(2))

    def turn(array: NDArray[Any]) -> NDArray[Any]:
        turned = np.rot90(array, quarter_turns)
        return np.ascontiguousarray(turned[:, ::-1] if mirrored else turned)

    return Sample(turn(sample.image_HWC), turn(sample.labels_HW))


def _resized(sample: Sample, factor: float) -> Sample:
    """The cluster made smaller or larger; its line is drawn anew, as an interpolated one would leave light behind."""
    height, width = (max(round(side * factor), 1) for side in sample.labels_HW.shape)
    light_HW = cv2.resize(light_without_line(sample), (width, height), interpolation=cv2.INTER_LINEAR)
    labels_HW = cv2.resize(sample.labels_HW.astype(np.float32), (width, height), interpolation=cv2.INTER_NEAREST)
    labels_HW = np.asarray(labels_HW).astype(np.int32)
    return draw_cutout(np.asarray(light_HW, np.float32).reshape(height, width, -1), labels_HW, sample)


def _touching_offset(
    first_HW: NDArray[np.bool_], second_HW: NDArray[np.bool_], overlap_px: float, rng: np.random.Generator
) -> tuple[int, int] | None:
    """(rows, columns) to move `second` by, so that it comes from a random side and is pushed `overlap_px` into `first`.

    None where it would pass `first` by, which can only happen where one of them is in several pieces.
    """
    angle = rng.uniform(0, 2 * math.pi)
    along, across = np.array([math.sin(angle), math.cos(angle)]), np.array([math.cos(angle), -math.sin(angle)])
    first_N2, second_N2 = np.argwhere(first_HW), np.argwhere(second_HW)
    # The second's centre meets the line of approach somewhere in the middle half of the first's width.
    width_N = first_N2 @ across
    aim = rng.uniform(*np.quantile(width_N, [0.25, 0.75]))
    aside = aim - float(np.median(second_N2 @ across))
    lane_first_N = np.rint(width_N / LANE_PX).astype(int)
    lane_second_N = np.rint((second_N2 @ across + aside) / LANE_PX).astype(int)
    lowest = min(lane_first_N.min(), lane_second_N.min())
    num_lanes = max(lane_first_N.max(), lane_second_N.max()) - lowest + 1
    front_first, front_second = np.full(num_lanes, -np.inf), np.full(num_lanes, np.inf)
    np.maximum.at(front_first, lane_first_N - lowest, first_N2 @ along)
    np.minimum.at(front_second, lane_second_N - lowest, second_N2 @ along)
    touch = float(np.max(front_first - front_second))
    if not math.isfinite(touch):
        return None
    moved = along * (touch - overlap_px) + across * aside
    return round(moved[0]), round(moved[1])


@dataclass(frozen=True)
class _Layer:
    """One cluster on the picture of both: its light without the drawn line, float32."""

    light_HWC: NDArray[np.float32]
    labels_HW: NDArray[np.int32]
    line_HW: NDArray[np.bool_]
    depth_HW: NDArray[np.float32]


def _composed(
    first: Sample, second: Sample, offset: tuple[int, int], pressed: bool, rng: np.random.Generator
) -> Sample | None:
    """Both on one picture; None where that hides or divides a nucleus."""
    top, left = min(0, offset[0]), min(0, offset[1])
    height = max(first.labels_HW.shape[0], offset[0] + second.labels_HW.shape[0]) - top
    width = max(first.labels_HW.shape[1], offset[1] + second.labels_HW.shape[1]) - left
    below = _layer(first, (height, width), (-top, -left))
    above = _layer(second, (height, width), (offset[0] - top, offset[1] - left))
    labels_HW = np.where(
        above.depth_HW > below.depth_HW,
        above.labels_HW + below.labels_HW.max() * (above.labels_HW > 0),
        below.labels_HW,
    ).astype(np.int32)
    areas_N = np.concatenate([areas_px(first.labels_HW), areas_px(second.labels_HW)])
    if not _mostly_seen(labels_HW, areas_N):
        return None

    brightness = math.exp(SPREAD_OF_BRIGHTNESS * rng.standard_normal()) * _median(first) / _median(second)
    both_HW = (below.labels_HW > 0) & (above.labels_HW > 0)
    past_middle_HW = (above.depth_HW - below.depth_HW) / 2  # px, into the second
    reach_px = rng.uniform(*REACH_PX) if pressed else math.inf
    rim_px = rng.uniform(*(PRESSED_RIM_PX if pressed else RIM_PX))
    whole = [below.light_HWC, above.light_HWC * brightness]
    seen = []
    for light_HWC, depth_HW, past_HW in zip(
        whole, (below.depth_HW, above.depth_HW), (past_middle_HW, -past_middle_HW), strict=True
    ):
        share_HW = np.clip(np.minimum(depth_HW, reach_px - past_HW) / rim_px, 0, 1)
        seen.append(light_HWC * np.where(both_HW, share_HW, 1)[..., None])
    light_HWC = np.maximum(*seen) + rng.uniform(0, 1) * np.minimum(*seen)
    light_HWC = np.maximum(light_HWC, DARKEST * np.maximum(*whole))
    return draw_cutout(light_HWC, labels_HW, first, below.line_HW | above.line_HW, both_HW)


def _layer(sample: Sample, shape: tuple[int, int], corner: tuple[int, int]) -> _Layer:
    rows, columns, num_channels = sample.image_HWC.shape
    window = slice(corner[0], corner[0] + rows), slice(corner[1], corner[1] + columns)
    light_HWC = np.zeros((*shape, num_channels), np.float32)
    labels_HW, line_HW = np.zeros(shape, np.int32), np.zeros(shape, np.bool_)
    light_HWC[window] = light_without_line(sample)
    labels_HW[window] = sample.labels_HW
    line_HW[window] = drawn_line(sample.image_HWC)
    return _Layer(light_HWC, labels_HW, line_HW, depth_px(labels_HW > 0))


def _median(sample: Sample) -> float:
    values = sample.image_HWC[within_line(sample)].astype(np.float32)
    return max(float(np.median(values)), 1.0) if values.size else 1.0


def _mostly_seen(labels_HW: NDArray[np.int32], areas_before_N: NDArray[np.int64]) -> bool:
    """Whether most of each nucleus 1..N is still there, in one piece."""
    num_nuclei = areas_before_N.size
    areas_N = np.bincount(labels_HW.ravel(), minlength=num_nuclei + 1)[1:]
    if np.any(areas_N < MIN_SEEN_SHARE * areas_before_N):
        return False
    return all(
        cv2.connectedComponents((labels_HW == label).astype(np.uint8), connectivity=4)[0] == 2
        for label in range(1, num_nuclei + 1)
        if areas_before_N[label - 1]
    )
