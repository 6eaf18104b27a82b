"""The nuclei of an image of any size, found window by window in bounded memory.

The image is cut into tiles. The network sees each tile with a rim of its neighbours around it (`OVERLAP` of the tile's
side), and what it finds is decoded there. A nucleus belongs to the tile that its centre of mass lies in. Every window
that sees it whole finds the same nucleus, so each is reported once, and a tiled image has the nuclei of an untiled one.

Where nuclei have another size than those that the network was trained on, the windows are rescaled for the network and
the labels brought back. The scale is moved a little, such that tiles begin on whole pixels at both resolutions.

Shape legend: H rows, W columns of the image; K maps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from nuciseg.data.dataset import normalization_bounds, normalize, padding_value, round_up
from nuciseg.engine.inference import forward_views
from nuciseg.engine.network import Network
from nuciseg.engine.refinement import refined
from nuciseg.targets import LabelImage
from nuciseg.types import Instances, Window

# Of what the network sees: larger wastes less on rims and takes more memory, 1.8 GB with an EfficientNet-Lite0.
TILE_PX = 2048
# The rim is the tile's side divided by this. With 256 px all 1,596 nuclei of a mosaic of dsb2018 were the same to the
# pixel as without tiles; with 128 px 1,595 matched with IoU above .9, 1,556 of them to the pixel.
OVERLAP = 8
BOUNDS_SAMPLE_PX = 1 << 24  # of larger images the percentiles are those of windows spread over it
_SAMPLE_SIDE_PX = 512


class Pixels(Protocol):
    """What an image must offer: it is never read whole unless it is small."""

    @property
    def shape(self) -> tuple[int, int]: ...
    def read(self, top: int, left: int, height: int, width: int) -> NDArray[Any]: ...


@dataclass(frozen=True)
class ArrayPixels:
    """An image (H, W) in memory."""

    image_HW: NDArray[Any]

    @property
    def shape(self) -> tuple[int, int]:
        return self.image_HW.shape[0], self.image_HW.shape[1]

    def read(self, top: int, left: int, height: int, width: int) -> NDArray[Any]:
        return self.image_HW[top : top + height, left : left + width]


@dataclass(frozen=True)
class Grid:
    """How an image is cut: tiles of `tile_px` image pixels become `network_px` network pixels.

    `OVERLAP` divides both, so that windows begin on whole pixels at either resolution.
    """

    tile_px: int
    network_px: int

    @staticmethod
    def at(scale: float, network_px: int = TILE_PX) -> Grid:
        """The grid whose scale (network pixels per image pixel) is nearest to `scale`."""
        return Grid(OVERLAP * max(1, round(network_px / (OVERLAP * scale))), network_px)

    @property
    def scale(self) -> float:
        """Network pixels per image pixel."""
        return self.network_px / self.tile_px

    @property
    def rim_px(self) -> int:
        """Image pixels that a window sees beyond its tile."""
        return self.tile_px // OVERLAP

    def spans(self, length_px: int) -> list[_Span]:
        """The tiles along one side of an image of so many pixels."""
        count = -(-length_px // self.tile_px)
        return [_Span(index, index == count - 1, self, length_px) for index in range(count)]


@dataclass(frozen=True)
class _Span:
    """A tile along one side."""

    index: int
    is_last: bool
    grid: Grid
    length_px: int

    @property
    def start_px(self) -> int:
        """Where its window begins in the image."""
        return max(0, self.index * self.grid.tile_px - self.grid.rim_px)

    @property
    def stop_px(self) -> int:
        return min(self.length_px, (self.index + 1) * self.grid.tile_px + self.grid.rim_px)

    @property
    def seen_px(self) -> int:
        """Network pixels of the window."""
        return -(-(self.stop_px - self.start_px) * self.grid.network_px // self.grid.tile_px)

    def owns(self, sums: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether the means, `sums` / `counts` network pixels from the window's start, lie in this tile; exactly."""
        offset = self.start_px * self.grid.network_px // self.grid.tile_px
        tile = (sums + offset * counts) // (counts * self.grid.network_px)
        owned: NDArray[np.bool_] = (tile == self.index) | ((tile > self.index) & self.is_last)
        return owned


def find_nuclei(
    network: Network, pixels: Pixels, grid: Grid | None = None, *, count_open_borders: bool = False
) -> Iterator[Window]:
    """The windows of an image, row by row; nuclei are numbered from 1 in the order in which they are found.

    `grid` None: tiles of 2048 x 2048 pixels at the image's own resolution. An image in which all pixels are equal has
    no nuclei. `count_open_borders` decodes three times.
    """
    grid = grid or Grid.at(1.0)
    bounds = bounds_of(pixels, network)
    num_found = 0
    for rows in grid.spans(pixels.shape[0]):
        for columns in grid.spans(pixels.shape[1]):
            image_HW = pixels.read(
                rows.start_px, columns.start_px, rows.stop_px - rows.start_px, columns.stop_px - columns.start_px
            )
            if bounds is None:
                instances, owned = _nothing(image_HW.shape), np.zeros(0, bool)
            else:
                instances, owned = _found_in(network, image_HW, bounds, rows, columns, count_open_borders)
            ids_N = np.where(owned, np.cumsum(owned) + num_found, 0).astype(np.int64)
            num_found += int(np.count_nonzero(owned))
            yield Window(
                rows.start_px, columns.start_px, image_HW, instances.labels_HW, ids_N, instances.confidences_N,
                instances.num_open_borders,
            )  # fmt: skip


def assembled(windows: Iterator[Window], shape: tuple[int, int]) -> Instances:
    """One label image (H, W) of all reported nuclei; where two claim a pixel, the first one has it."""
    labels_HW = np.zeros(shape, np.int32)
    confidences: list[NDArray[np.float32]] = []
    for window in windows:
        height, width = window.labels_HW.shape
        part_HW = labels_HW[window.top_px : window.top_px + height, window.left_px : window.left_px + width]
        ids_HW = np.append(0, window.ids_N)[window.labels_HW].astype(np.int32)
        np.copyto(part_HW, ids_HW, where=part_HW == 0)
        confidences.append(window.confidences_N[window.ids_N > 0])
    return Instances(labels_HW, np.concatenate(confidences))


def spread_windows(pixels: Pixels, side_px: int, per_side: int) -> list[NDArray[Any]]:
    """Square windows evenly spread over an image, `per_side` along each side, fewer where they would be the same.

    Where they all show one value and nothing else, as in a mosaic that was padded around a small piece of tissue, the
    image is read window by window for others, and as many of those that show more are given, again evenly spread.
    """
    height, width = pixels.shape
    tall, wide = min(height, side_px), min(width, side_px)
    tops = sorted({int(top) for top in np.linspace(0, height - tall, per_side)})
    lefts = sorted({int(left) for left in np.linspace(0, width - wide, per_side)})
    windows = [pixels.read(top, left, tall, wide) for top in tops for left in lefts]
    value = windows[0][0, 0]
    if any((window_HW != value).any() for window_HW in windows):
        return windows
    others = [
        (top, left)
        for top in (min(start, height - tall) for start in range(0, height, tall))
        for left in (min(start, width - wide) for start in range(0, width, wide))
        if (pixels.read(top, left, tall, wide) != value).any()
    ]
    step = max(1, -(-len(others) // per_side**2))
    return [pixels.read(top, left, tall, wide) for top, left in others[::step]] or windows


def bounds_of(pixels: Pixels, network: Network) -> tuple[float, float] | None:
    """The raw values that become 0 and 1 in the whole image; None where all of its pixels are equal."""
    height, width = pixels.shape
    if height * width <= BOUNDS_SAMPLE_PX:
        seen = pixels.read(0, 0, height, width)
    else:
        per_side = int((BOUNDS_SAMPLE_PX**0.5) // _SAMPLE_SIDE_PX)
        seen = np.stack(spread_windows(pixels, _SAMPLE_SIDE_PX, per_side))
    if seen.min() == seen.max():
        return None
    return normalization_bounds(seen.reshape(-1, 1, 1), network.config.data.normalization)


def _found_in(
    network: Network,
    image_HW: NDArray[Any],
    bounds: tuple[float, float],
    rows: _Span,
    columns: _Span,
    count_open_borders: bool,
) -> tuple[Instances, NDArray[np.bool_]]:
    """The nuclei of one window at the image's resolution, and which of them belong to its tile."""
    target, grid = network.target, rows.grid
    maps_KHW = _maps_of(network, image_HW, bounds, rows, columns)
    instances = target.decode(maps_KHW)
    owned = _owned(instances, rows, columns)
    if count_open_borders:
        instances = replace(instances, num_open_borders=target.open_borders(maps_KHW))
    if grid.scale != 1:
        foreground_HW = maps_KHW[target.map_names.index("foreground")]
        threshold = target.config.decode.foreground_threshold
        labels_HW = _at_image_resolution(instances.labels_HW, foreground_HW, threshold, grid, image_HW.shape)
        instances = replace(instances, labels_HW=labels_HW)
        # Of a nucleus that was enlarged for the network nothing may be left.
        owned &= np.bincount(labels_HW.ravel(), minlength=len(owned) + 1)[1:] > 0
    return instances, owned


def _maps_of(
    network: Network, image_HW: NDArray[Any], bounds: tuple[float, float], rows: _Span, columns: _Span
) -> NDArray[np.float32]:
    """The probabilities (K, H, W) of a window at the network's resolution."""
    normalization = network.config.data.normalization
    seen_HW = normalize(image_HW[..., None], normalization, bounds)[..., 0]
    height, width = shape = rows.seen_px, columns.seen_px
    if rows.grid.scale != 1:
        seen_HW = _rescaled(seen_HW, rows.grid)[:height, :width]
    padded = [round_up(length, network.stride) for length in shape]
    input_HW = np.full(padded, padding_value(bounds, normalization), np.float32)
    input_HW[:height, :width] = seen_HW
    images_BCHW = torch.from_numpy(input_HW)[None, None]
    maps_BKHW = refined(partial(forward_views, network), images_BCHW, [shape], network.target, network.rounds)
    return maps_BKHW[0, :, :height, :width]


def _owned(instances: Instances, rows: _Span, columns: _Span) -> NDArray[np.bool_]:
    places = np.nonzero(instances.labels_HW)
    labels = instances.labels_HW[places]
    counts = np.bincount(labels, minlength=len(instances.confidences_N) + 1)[1:]
    owned = np.ones(len(counts), bool)
    for span, coordinates in zip((rows, columns), places, strict=True):
        # Sums of whole numbers, exact in float64, which is all that bincount adds up.
        sums = np.bincount(labels, coordinates, minlength=len(counts) + 1)[1:].astype(np.int64)
        owned &= span.owns(sums, np.maximum(counts, 1))
    return owned


def _rescaled(image_HW: NDArray[np.float32], grid: Grid) -> NDArray[np.float32]:
    """The image at the network's resolution; its last rows and columns are repeated until the scale is exact."""
    (padded_height, height), (padded_width, width) = (_padded_and_seen(length, grid) for length in image_HW.shape)
    bottom, right = padded_height - image_HW.shape[0], padded_width - image_HW.shape[1]
    whole_HW = cv2.copyMakeBorder(image_HW, 0, bottom, 0, right, cv2.BORDER_REPLICATE)
    interpolation = cv2.INTER_AREA if grid.scale < 1 else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(whole_HW, (width, height), interpolation=interpolation))


def _padded_and_seen(length_px: int, grid: Grid) -> tuple[int, int]:
    """Image pixels that a side of a window is filled up to, and the network pixels that they become."""
    if grid.scale < 1 and length_px < grid.rim_px:
        # A rim may be many times the image. With no other tile along this side, less than a pixel off is exact enough.
        seen_px = -(-length_px * grid.network_px // grid.tile_px)
        return -(-seen_px * grid.tile_px // grid.network_px), seen_px
    units = -(-length_px // grid.rim_px)
    return units * grid.rim_px, units * (grid.network_px // OVERLAP)


def _at_image_resolution(
    labels_HW: LabelImage, foreground_HW: NDArray[np.float32], threshold: float, grid: Grid, shape: tuple[int, ...]
) -> LabelImage:
    """Labels at the image's resolution: between nuclei by the nearest pixel, towards the background along the
    interpolated foreground, which makes no steps. Those that were reduced are in one piece each."""
    rows_H, columns_W = ((np.arange(length) + 0.5) * grid.scale - 0.5 for length in shape)
    nearest_HW = labels_HW[
        np.clip(np.rint(rows_H), 0, labels_HW.shape[0] - 1).astype(int)[:, None],
        np.clip(np.rint(columns_W), 0, labels_HW.shape[1] - 1).astype(int),
    ]
    if grid.scale >= 1:
        return np.asarray(nearest_HW)
    xy_HW = np.meshgrid(columns_W.astype(np.float32), rows_H.astype(np.float32))
    inside_HW = cv2.remap(foreground_HW, *xy_HW, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE) >= threshold
    del xy_HW  # eight bytes a pixel
    grown_HW = np.where(inside_HW, _grown(nearest_HW, 1 / grid.scale), 0)
    return _in_one_piece(grown_HW)


def _grown(labels_HW: LabelImage, radius_px: float) -> LabelImage:
    """Each pixel has the label of the nearest labelled one within the radius."""
    distance_HW, numbers_HW = cv2.distanceTransformWithLabels(
        (labels_HW == 0).view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5, labelType=cv2.DIST_LABEL_PIXEL
    )
    places = np.flatnonzero(labels_HW)
    label_of = np.zeros(places.size + 1, np.int32)  # labelled pixels are numbered from 1
    label_of[numbers_HW.ravel()[places]] = labels_HW.ravel()[places]
    return np.where(distance_HW <= radius_px, label_of[numbers_HW], 0)


def _in_one_piece(labels_HW: LabelImage) -> LabelImage:
    """Of each label the largest connected piece alone, in place: foreground that was rejected may lie within reach."""
    boxes: Sequence[tuple[slice, ...] | None] = ndimage.find_objects(labels_HW)
    for label, box in enumerate(boxes, start=1):
        if box is None:  # of this number nothing is left
            continue
        own_HW = labels_HW[box] == label
        num_pieces, pieces_HW, stats_P5, _ = cv2.connectedComponentsWithStats(own_HW.view(np.uint8), connectivity=8)
        if num_pieces > 2:  # the background is one of them
            largest = 1 + int(stats_P5[1:, cv2.CC_STAT_AREA].argmax())
            labels_HW[box][own_HW & (pieces_HW != largest)] = 0
    return labels_HW


def _nothing(shape: tuple[int, ...]) -> Instances:
    return Instances(np.zeros(shape, np.int32), np.zeros(0, np.float32))
