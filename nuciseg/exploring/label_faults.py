"""Faults that label images of every layout can have: pieces, holes, specks, straight lines, labels without light."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from nuciseg.exploring.faults import Box, Finding
from nuciseg.exploring.shapes import Contact, Nuclei

LabelImage = NDArray[np.int32]
Mask = NDArray[np.bool_]

STRAY_PX = 10  # a smaller piece is a slip of the pen
TINY_SHARE = 0.05  # of the data set's median area
TINY_PX = 12  # and whatever the others are: no nucleus is seen on so few pixels
# Of 612 lines of 30 px and more between drawn nuclei (`synthetic`) none is so straight; of 241 that were cut
# straight, at any angle, 172 are. In drawn fields 2 are, of 30 and 31 px.
STRAIGHT_PX, STRAIGHT_BEND_PX, STRAIGHT_NOISE_PX = 32.0, 0.2, 0.3
# The steps of a straight line lie within a strip of one pixel, at any angle; near rows, columns and diagonals they make
# a bend. So long and narrow is one of 1600 lines between drawn nuclei.
STRIP_LONG_PX, STRIP_WIDTH_PX = 48.0, 1.01
# Along rows or columns a straight line has no steps, so that shorter ones can be told.
LEVEL_PX, LEVEL_NOISE_PX = 20, 0.05
LEVEL_EXCESS = 2.0  # times as long as the flat side of an ellipse in the nucleus' box
RING_PX = 5
DARKER_PERCENTILE = 40.0
DARK_MIN_PX = 30  # fewer pixels have no mean worth comparing


@dataclass(frozen=True)
class Line:
    """How straight a line between two nuclei is.

    `span_px` is its extent along its direction, `noise_px` the root mean square distance from the straight line,
    `bend_px` the whole deflection of the cubic that fits it best, `strip_px` the width of the narrowest strip that
    holds it. The steps of pixels alone give a noise of 0.2 to 0.3 px and hardly any bend.
    """

    span_px: float
    noise_px: float
    bend_px: float
    strip_px: float

    @property
    def is_long(self) -> bool:
        return self.span_px >= STRAIGHT_PX

    @property
    def is_straight(self) -> bool:
        smooth = self.is_long and self.bend_px < STRAIGHT_BEND_PX and self.noise_px < STRAIGHT_NOISE_PX
        narrow = self.span_px >= STRIP_LONG_PX and self.strip_px <= STRIP_WIDTH_PX
        return smooth or narrow or (self.span_px >= LEVEL_PX and self.noise_px < LEVEL_NOISE_PX)


def line_of(contact: Contact) -> Line:
    """The straightness of a contact."""
    centred_P2 = contact.points_P2 - contact.points_P2.mean(axis=0)
    if len(centred_P2) < 4:
        return Line(float(len(centred_P2)), 0.0, 0.0, 0.0)
    _, directions = np.linalg.eigh(centred_P2.T @ centred_P2)
    across, along = centred_P2 @ directions[:, 0], centred_P2 @ directions[:, 1]
    span_px = float(np.ptp(along))
    cubic = np.polynomial.Polynomial.fit(along, across, 3)
    deflection = cubic(np.linspace(along.min(), along.max(), 41))
    return Line(span_px, float(across.std()), float(np.ptp(deflection)), _strip_px(centred_P2))


def _strip_px(points_P2: NDArray[np.float64]) -> float:
    """Width of the narrowest strip that holds all points; one of its sides lies along their convex hull."""
    hull_P2 = cv2.convexHull(points_P2.astype(np.float32))[:, 0, :].astype(np.float64)
    sides_P2 = np.roll(hull_P2, -1, axis=0) - hull_P2
    normals_P2 = sides_P2[:, ::-1] * (1, -1) / np.maximum(np.linalg.norm(sides_P2, axis=1, keepdims=True), 1e-9)
    return float(np.ptp(hull_P2 @ normals_P2.T, axis=0).min())


def straight_contacts(contacts: list[Contact]) -> Iterator[Finding]:
    """Lines between two nuclei that are too straight to have grown."""
    for contact in contacts:
        line = line_of(contact)
        if line.is_straight:
            what = f"the line between two nuclei is straight over {line.span_px:.0f} px"
            yield Finding("straight border", what, contact.box, line.span_px)


def straight_outlines(labels_HW: LabelImage) -> Iterator[Finding]:
    """Outer edges that run along a row or column for longer than an ellipse's would, away from the image's edge.

    An ellipse with half axes a (along the row) and b keeps within one pixel of its tangent for 2 a sqrt(2 / b).
    """
    boxes = ndimage.find_objects(np.maximum(labels_HW, 0))
    for plane_HW, turned in ((labels_HW, False), (labels_HW.T, True)):
        for one, other in ((plane_HW[:-1], plane_HW[1:]), (plane_HW[1:], plane_HW[:-1])):
            edge_HW = np.where((one > 0) & (other == 0), one, 0)
            for label, row, start, length_px in _runs(edge_HW):
                along, across = boxes[label - 1][:: 1 if turned else -1]
                flat_px = (along.stop - along.start) * np.sqrt(4 / (across.stop - across.start))
                if length_px < max(LEVEL_PX, LEVEL_EXCESS * flat_px):
                    continue
                box = (row, start, row + 2, start + length_px)
                what = f"the outline runs along one {'column' if turned else 'row'} for {length_px} px"
                yield Finding("straight border", what, _turned(box) if turned else box, length_px)


def _runs(edge_HW: LabelImage) -> Iterator[tuple[int, int, int, int]]:
    """(label, row, first column, length) of each run of one label of at least `LEVEL_PX` along a row."""
    padded = np.pad(edge_HW, ((0, 0), (0, 1))).ravel()  # so that no run goes on in the next row
    starts = np.flatnonzero(np.append(True, np.diff(padded) != 0))
    lengths = np.diff(np.append(starts, padded.size))
    for start, length in zip(starts[lengths >= LEVEL_PX], lengths[lengths >= LEVEL_PX], strict=True):
        if padded[start] > 0:
            row, column = divmod(int(start), edge_HW.shape[1] + 1)
            yield int(padded[start]), row, column, int(length)


def _turned(box: Box) -> Box:
    top, left, bottom, right = box
    return left, top, right, bottom


def broken_nuclei(labels_HW: LabelImage) -> Iterator[Finding]:
    """Nuclei that lie in pieces, have holes, or lie wholly within another."""
    all_px = np.bincount(np.maximum(labels_HW, 0).ravel())
    padded_HW = np.pad(labels_HW, 1)  # beyond the image there is room, so that a hole at its edge is none
    for label, where in enumerate(ndimage.find_objects(np.maximum(padded_HW, 0)), start=1):
        rows, columns = where
        window_HW = padded_HW[rows.start - 1 : rows.stop + 1, columns.start - 1 : columns.stop + 1]
        own_HW = window_HW == label
        at = (rows.start - 2, columns.start - 2)
        yield from _pieces(own_HW, at, labels_HW.shape)
        yield from _holes(window_HW, own_HW, at, all_px)


def _pieces(own_HW: Mask, at: tuple[int, int], shape: tuple[int, ...]) -> Iterator[Finding]:
    num, _, boxes, _ = cv2.connectedComponentsWithStats(own_HW.astype(np.uint8), connectivity=8)
    if num <= 2:
        return
    areas_px = boxes[1:, cv2.CC_STAT_AREA]
    for piece in np.argsort(areas_px)[:-1]:
        area_px, box = int(areas_px[piece]), _box(boxes[1 + piece], at)
        if box[0] == 0 or box[1] == 0 or box[2] == shape[0] or box[3] == shape[1]:
            continue  # beyond the image's edge it may hang together
        if area_px < STRAY_PX:
            what = f"{area_px} px apart from the rest of their nucleus"
            yield Finding("stray pixels", what, box, area_px)
        else:
            what = f"a piece of {area_px} px does not hang together with the rest of its nucleus"
            yield Finding("nucleus in several pieces", what, box, area_px)


def _holes(window_HW: LabelImage, own_HW: Mask, at: tuple[int, int], all_px: NDArray[np.int64]) -> Iterator[Finding]:
    """Regions that the nucleus encloses: background is a hole, a whole other nucleus lies within it."""
    num, regions_HW, boxes, _ = cv2.connectedComponentsWithStats((~own_HW).astype(np.uint8), connectivity=4)
    for region in range(1, num):
        left, top, width, height, area_px = (int(value) for value in boxes[region])
        if left == 0 or top == 0 or left + width == own_HW.shape[1] or top + height == own_HW.shape[0]:
            continue
        content = window_HW[regions_HW == region]
        if (content > 0).all() and all_px[np.unique(content)].sum() == area_px:  # all of it, no corner of a neighbour
            what = f"a nucleus of {area_px} px lies within another"
            yield Finding("nucleus within another", what, _box(boxes[region], at), area_px)
        elif (content == 0).all():
            what = f"{area_px} px of background within a nucleus"
            yield Finding("hole in a nucleus", what, _box(boxes[region], at), area_px)


def _box(stats: NDArray[np.int32], at: tuple[int, int]) -> Box:
    left, top, width, height = (int(value) for value in stats[:4])
    return at[0] + top, at[1] + left, at[0] + top + height, at[1] + left + width


def tiny_nuclei(labels_HW: LabelImage, nuclei: Nuclei, median_area_px: float) -> Iterator[Finding]:
    """Nuclei far smaller than the data set's median one, those at the image's edge left out."""
    limit_px = max(TINY_PX, TINY_SHARE * median_area_px)
    small = np.flatnonzero((nuclei.area_px < limit_px) & (nuclei.area_px > 0) & ~nuclei.at_edge)
    if not small.size:
        return
    boxes = ndimage.find_objects(np.maximum(labels_HW, 0))
    for index in small:
        rows, columns = boxes[index]
        area_px = int(nuclei.area_px[index])
        what = f"{area_px} px, the data set's median nucleus has {median_area_px:.0f}"
        yield Finding("tiny nucleus", what, (rows.start, columns.start, rows.stop, columns.stop), -area_px)


def dark_nuclei(image_HW: NDArray[Any], labels_HW: LabelImage, nuclei: Nuclei) -> Iterator[Finding]:
    """Nuclei no brighter than the darker part of the background around them; it may hold something brighter, too.

    Those at the image's edge are left out: too little of them and of their surroundings is seen.
    """
    for label, where in enumerate(ndimage.find_objects(np.maximum(labels_HW, 0)), start=1):
        if nuclei.area_px[label - 1] < DARK_MIN_PX or nuclei.at_edge[label - 1]:
            continue
        rows, columns = where
        around = (
            slice(max(0, rows.start - RING_PX), rows.stop + RING_PX),
            slice(max(0, columns.start - RING_PX), columns.stop + RING_PX),
        )
        own_HW = labels_HW[around] == label
        size = 2 * RING_PX + 1
        near_HW = cv2.dilate(own_HW.astype(np.uint8), np.ones((size, size), np.uint8)) > 0
        ring = image_HW[around][near_HW & (labels_HW[around] == 0)].astype(np.float64)
        inside = image_HW[around][own_HW].astype(np.float64)
        if ring.size < DARK_MIN_PX:
            continue
        around_it = float(np.percentile(ring, DARKER_PERCENTILE))
        if inside.mean() <= around_it:
            what = f"mean {inside.mean():.4g} within, {around_it:.4g} in the darker part of the {RING_PX} px around"
            box = (rows.start, columns.start, rows.stop, columns.stop)
            yield Finding("dark nucleus", what, box, float(around_it - inside.mean()) / max(around_it, 1e-9))
