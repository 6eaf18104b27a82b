"""The nuclei that one window reports: measured, and outlined, once for all files that tell of them.

Most of it is sums over pixels, taken for all nuclei at once: `skimage.measure.regionprops_table` gives the same figures
but spends about a millisecond a nucleus on the eccentricity and another on the solidity, ten times what all of this
takes; the tests hold the two against each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from nuciseg.types import Window

Box = tuple[slice, slice]
Figure = int | float | None

COLUMNS = (
    "label", "area_px", "area_um2", "centroid_row_px", "centroid_column_px", "centroid_row_um", "centroid_column_um",
    "diameter_px", "diameter_um", "eccentricity", "solidity", "mean_intensity", "integrated_intensity",
    "touching_neighbours", "confidence", "touches_image_edge",
)  # fmt: skip


class ReportedNuclei:
    """The nuclei of `window` that it reports, in the order of its labels; N counts these alone.

    Places are those of the whole image, which has `shape` (rows, columns). What is asked for first is computed then,
    and kept.
    """

    def __init__(self, window: Window, shape: tuple[int, int], pixel_size_um: float | None) -> None:
        self.window, self.shape, self.pixel_size_um = window, shape, pixel_size_um
        table = np.concatenate([[0], window.ids_N])
        self.ids_HW: NDArray[np.int32] = table.astype(np.int32)[np.maximum(window.labels_HW, 0)]
        self._pixels = np.nonzero(self.ids_HW)
        self._label_P = window.labels_HW[self._pixels]
        area_N = self._sum()
        self.labels_N: NDArray[np.int64] = 1 + np.flatnonzero((table[1:] > 0) & (area_N > 0))
        self.ids_N: NDArray[np.int64] = window.ids_N[self.labels_N - 1]
        self.area_N: NDArray[np.int64] = area_N[self.labels_N - 1]

    def __len__(self) -> int:
        return len(self.labels_N)

    @property
    def diameters_px(self) -> NDArray[np.float64]:
        """In pixels, of the disk of the same area."""
        return np.asarray(2 * np.sqrt(self.area_N / np.pi))

    @cached_property
    def intensity_sums(self) -> NDArray[np.float64]:
        """The sum of the raw pixels of each nucleus."""
        return self._of_reported(self._sum(self.window.image_HW[self._pixels].astype(np.float64)))

    @cached_property
    def outlines(self) -> list[NDArray[np.int32]]:
        """For each nucleus the corners of its outline, (x, y), in the whole image; see `trace_outline`."""
        offset = np.array([self.window.left_px, self.window.top_px])
        return [
            (trace_outline(mask_HW) + offset + (box[1].start, box[0].start)).astype(np.int32)
            for box, mask_HW in self._crops()
        ]

    @cached_property
    def measurements(self) -> list[dict[str, Figure]]:
        """For each nucleus the figures of COLUMNS; those in micrometres are None where no pixel size is known.

        Rows and columns count from 0 in the middle of the image's first pixel; `eccentricity` is that of the ellipse
        with the same second moments, `solidity` the share of the pixels within the convex hull (of pixel centres) that
        are the nucleus's, `touching_neighbours` the number of nuclei, also of those reported elsewhere, with a pixel
        beside one of its own or at its corner; `touches_image_edge` is 0 or 1. Eight digits are kept.
        """
        row_N, column_N, eccentricity_N = self._moments()
        row_N, column_N = row_N + self.window.top_px, column_N + self.window.left_px
        um = self.pixel_size_um
        whole_numbers = self.window.image_HW.dtype.kind in "ui"
        values: dict[str, NDArray[Any] | None] = {
            "label": self.ids_N,
            "area_px": self.area_N,
            "area_um2": None if um is None else self.area_N * um**2,
            "centroid_row_px": row_N,
            "centroid_column_px": column_N,
            "centroid_row_um": None if um is None else row_N * um,
            "centroid_column_um": None if um is None else column_N * um,
            "diameter_px": self.diameters_px,
            "diameter_um": None if um is None else self.diameters_px * um,
            "eccentricity": eccentricity_N,
            "solidity": self.area_N / np.array([_hull_area(mask_HW) for _, mask_HW in self._crops()], np.int64),
            "mean_intensity": self.intensity_sums / self.area_N,
            "integrated_intensity": self.intensity_sums.astype(np.int64) if whole_numbers else self.intensity_sums,
            "touching_neighbours": count_neighbours(self.window.labels_HW)[self.labels_N],
            "confidence": self.window.confidences_N[self.labels_N - 1],
            "touches_image_edge": np.array([self._at_edge(box) for box in self._boxes], np.int64),
        }
        nothing = [None] * len(self)
        lists = [nothing if values[name] is None else np.asarray(values[name]).tolist() for name in COLUMNS]
        return [dict(zip(COLUMNS, map(tidy, row), strict=True)) for row in zip(*lists, strict=True)]

    def _sum(self, weight_P: NDArray[np.float64] | None = None) -> NDArray[Any]:
        """Summed over the pixels of each label of the window, from label 1."""
        return np.bincount(self._label_P, weight_P, minlength=len(self.window.ids_N) + 1)[1:]

    def _of_reported(self, values: NDArray[Any]) -> NDArray[np.float64]:
        return np.asarray(values[self.labels_N - 1], np.float64)

    def _moments(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Rows and columns of the centroids, in the window, and eccentricities."""
        y, x = (axis.astype(np.float64) for axis in self._pixels)
        all_areas = np.maximum(self._sum(), 1)
        row, column = self._sum(y) / all_areas, self._sum(x) / all_areas
        y, x = y - row[self._label_P - 1], x - column[self._label_P - 1]
        yy, xx, yx = (self._of_reported(self._sum(product) / all_areas) for product in (y * y, x * x, y * x))
        middle, spread = (yy + xx) / 2, np.hypot((yy - xx) / 2, yx)
        # One pixel, or one row of them, has no width: the quotient's limits are 0 for a point, 1 for a line.
        ratio = np.maximum(middle - spread, 0) / np.maximum(middle + spread, 1e-12)
        eccentricity_N = np.where(middle > 0, np.sqrt(1 - ratio), 0.0)
        return self._of_reported(row), self._of_reported(column), eccentricity_N

    @cached_property
    def _boxes(self) -> list[Box]:
        found = ndimage.find_objects(np.maximum(self.window.labels_HW, 0))
        return [found[label - 1] for label in self.labels_N]

    def _crops(self) -> Iterator[tuple[Box, NDArray[np.bool_]]]:
        for label, box in zip(self.labels_N, self._boxes, strict=True):
            yield box, self.window.labels_HW[box] == label

    def _at_edge(self, box: Box) -> bool:
        starts = (self.window.top_px + box[0].start, self.window.left_px + box[1].start)
        stops = (self.window.top_px + box[0].stop, self.window.left_px + box[1].stop)
        return 0 in starts or stops[0] == self.shape[0] or stops[1] == self.shape[1]


def trace_outline(mask_HW: NDArray[np.bool_]) -> NDArray[np.int32]:
    """The outline of `mask_HW` along the sides of its pixels: the corners (x, y) of a closed polygon, the first not
    repeated, int32.

    Pixel (row, column) is the square from (column, row) to (column + 1, row + 1), as in ImageJ and QuPath, so the
    pixels whose middle lies within the polygon are exactly those of a mask in one piece and without holes. Of several
    pieces the largest is outlined; holes are not. It runs clockwise in the picture, rows downward: what GeoJSON calls
    counterclockwise.
    """
    # With each pixel made two by two, the path through pixel centres that OpenCV returns passes one point per side
    # beside each corner, and half of it, rounded up, is the corner; where the path cuts an inner corner, both points
    # beside it become that corner.
    doubled_HW = mask_HW.astype(np.uint8).repeat(2, axis=0).repeat(2, axis=1)
    contours, _ = cv2.findContours(doubled_HW, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    corners_P2 = (max(contours, key=cv2.contourArea)[::-1, 0] + 1) // 2
    before_P2 = np.concatenate([corners_P2[-1:], corners_P2[:-1]])
    return np.asarray(corners_P2[(corners_P2 != before_P2).any(axis=1)], np.int32)


def count_neighbours(labels_HW: NDArray[np.int32]) -> NDArray[np.int64]:
    """How many other nuclei share a side or a corner of a pixel with nucleus i, in row i; row 0 means nothing."""
    labels_HW = np.maximum(labels_HW, 0).astype(np.int64)
    num_labels = int(labels_HW.max(initial=0)) + 1
    keys = []
    for one, other in (
        (labels_HW[:, :-1], labels_HW[:, 1:]),
        (labels_HW[:-1], labels_HW[1:]),
        (labels_HW[:-1, :-1], labels_HW[1:, 1:]),
        (labels_HW[:-1, 1:], labels_HW[1:, :-1]),
    ):
        touch = (one != other) & (one > 0) & (other > 0)
        low, high = np.minimum(one[touch], other[touch]), np.maximum(one[touch], other[touch])
        keys.append(np.unique(low * num_labels + high))
    pairs = np.unique(np.concatenate(keys))
    return np.bincount(np.concatenate([pairs // num_labels, pairs % num_labels]), minlength=num_labels)


def tidy(value: Figure) -> Figure:
    """`value` with eight digits: a hundredth of a pixel in an image 99,999 wide, and nothing that is only rounding."""
    return float(f"{value:.8g}") if isinstance(value, float) else value


def _hull_area(mask_HW: NDArray[np.bool_]) -> int:
    """How many pixels the convex hull of `mask_HW` has."""
    pixels = mask_HW.astype(np.uint8)
    hull = cv2.convexHull(cv2.findNonZero(pixels))
    return int(np.count_nonzero(cv2.fillConvexPoly(pixels, hull, 1)))
