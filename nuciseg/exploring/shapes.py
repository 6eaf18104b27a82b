"""The geometry of labelled nuclei: area, elongation, where two touch, and which hang together.

Shape legend: H rows, W columns, N nuclei, P points.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

LabelImage = NDArray[np.int32]
Mask = NDArray[np.bool_]

# Sides of pixels overstate the length of a line by 4 / pi, averaged over its directions (Cauchy-Crofton).
PX_PER_SIDE = np.pi / 4


@dataclass(frozen=True)
class Nuclei:
    """All nuclei of one image, label i in row i - 1. `elongation` is the long by the short axis of the ellipse with
    the same second moments; `at_edge`: the image's edge may cut the nucleus."""

    area_px: NDArray[np.int64]
    elongation: NDArray[np.float64]
    at_edge: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.area_px)

    @property
    def diameter_px(self) -> NDArray[np.float64]:
        """Of the disk of the same area."""
        return np.asarray(2 * np.sqrt(self.area_px / np.pi))


@dataclass(frozen=True)
class Contact:
    """Where nuclei `first` < `second` touch side by side: `points_P2` (row, column) are the middles of the sides of
    pixels between them."""

    first: int
    second: int
    points_P2: NDArray[np.float64]

    @property
    def length_px(self) -> float:
        return float(len(self.points_P2) * PX_PER_SIDE)

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Top, left, bottom, right."""
        (top, left), (bottom, right) = self.points_P2.min(axis=0), self.points_P2.max(axis=0)
        return int(top), int(left), int(np.ceil(bottom)) + 1, int(np.ceil(right)) + 1


def measure_nuclei(labels_HW: LabelImage) -> Nuclei:
    """Area, elongation and place of each nucleus; labels are 1..N."""
    num_bins = int(labels_HW.max(initial=0)) + 1
    rows, columns = np.nonzero(labels_HW > 0)
    label = labels_HW[rows, columns]
    area_px = np.bincount(label, minlength=num_bins)
    divisor = np.maximum(area_px, 1)
    y, x = rows.astype(np.float64), columns.astype(np.float64)
    y -= (np.bincount(label, y, num_bins) / divisor)[label]
    x -= (np.bincount(label, x, num_bins) / divisor)[label]
    # A pixel is a square, not a point: its own second moment is 1/12.
    yy, xx, yx = (np.bincount(label, product, num_bins) / divisor for product in (y * y, x * x, y * x))
    middle, spread = (yy + xx) / 2 + 1 / 12, np.hypot((yy - xx) / 2, yx)
    elongation = np.sqrt((middle + spread) / np.maximum(middle - spread, 1 / 12))
    at_edge = np.zeros(num_bins, bool)
    for edge in (labels_HW[0], labels_HW[-1], labels_HW[:, 0], labels_HW[:, -1]):
        at_edge[edge[edge > 0]] = True
    return Nuclei(area_px[1:], elongation[1:], at_edge[1:])


def find_contacts(labels_HW: LabelImage) -> list[Contact]:
    """All pairs of nuclei that touch, in ascending order of their labels."""
    firsts, seconds, points = [], [], []
    for a, b, offset in (
        (np.s_[:, :-1], np.s_[:, 1:], (0.0, 0.5)),
        (np.s_[:-1, :], np.s_[1:, :], (0.5, 0.0)),
    ):
        one, other = labels_HW[a], labels_HW[b]
        rows, columns = np.nonzero((one != other) & (one > 0) & (other > 0))
        firsts.append(np.minimum(one[rows, columns], other[rows, columns]))
        seconds.append(np.maximum(one[rows, columns], other[rows, columns]))
        points.append(np.stack([rows + offset[0], columns + offset[1]], axis=1))
    first, second, points_P2 = (np.concatenate(each) for each in (firsts, seconds, points))
    if not len(first):
        return []
    order = np.lexsort((second, first))
    first, second, points_P2 = first[order], second[order], points_P2[order]
    starts = np.flatnonzero(np.append(True, (np.diff(first) != 0) | (np.diff(second) != 0)))
    return [
        Contact(int(first[start]), int(second[start]), part)
        for start, part in zip(starts, np.split(points_P2, starts[1:]), strict=True)
    ]


def nuclei_per_cluster(num_nuclei: int, contacts: list[Contact]) -> list[int]:
    """How many nuclei hang together, for each group of touching nuclei; a nucleus that touches none is one."""
    if num_nuclei == 0:
        return []
    ends = np.array([[contact.first - 1, contact.second - 1] for contact in contacts], np.int64).reshape(-1, 2)
    graph = coo_array((np.ones(len(ends)), (ends[:, 0], ends[:, 1])), shape=(num_nuclei, num_nuclei))
    _, member_of = connected_components(graph, directed=False)
    return [int(count) for count in np.bincount(member_of)]
