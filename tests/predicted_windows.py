"""An image of drawn nuclei as prediction hands it to its writers: whole, or in two windows that overlap."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from nuciseg.types import Window

PITCH_PX = 24  # nuclei stand this far apart, and none is larger


@dataclass(frozen=True)
class Drawn:
    """`image_HW` uint16, `labels_HW` int32 with nuclei 1..N."""

    image_HW: NDArray[np.uint16]
    labels_HW: NDArray[np.int32]

    @property
    def num_nuclei(self) -> int:
        return int(self.labels_HW.max())

    def whole(self) -> Window:
        return self.window(0, self.labels_HW.shape[1], np.arange(1, self.num_nuclei + 1))

    def halves(self) -> tuple[Window, Window]:
        """Each reports the nuclei whose middle lies in its half; it reaches one nucleus into the other."""
        width = self.labels_HW.shape[1]
        rows, columns = np.nonzero(self.labels_HW)
        label = self.labels_HW[rows, columns]
        middles = np.bincount(label, columns)[1:] / np.bincount(label)[1:]
        ids = np.arange(1, self.num_nuclei + 1)
        return (
            self.window(0, width // 2 + PITCH_PX + 3, ids[middles < width // 2]),
            self.window(width // 2 - PITCH_PX - 3, width, ids[middles >= width // 2]),
        )

    def window(self, left: int, right: int, reported: NDArray[np.int64]) -> Window:
        """Columns `left` to `right`, its labels numbered anew; it reports those of `reported`."""
        old, new_HW = np.unique(np.append(0, self.labels_HW[:, left:right]), return_inverse=True)
        labels_HW = new_HW[1:].reshape(-1, right - left).astype(np.int32)
        ids_N = np.where(np.isin(old[1:], reported), old[1:], 0).astype(np.int64)
        confidences_N = (1 / (1 + old[1:])).astype(np.float32)
        return Window(0, left, self.image_HW[:, left:right], labels_HW, ids_N, confidences_N)


def draw(rows: int = 4, columns: int = 8, seed: int = 0) -> Drawn:
    """Ellipses in `rows` and `columns`, some of which touch, the outermost at the image's edge."""
    rng = np.random.default_rng(seed)
    shape = (rows * PITCH_PX, columns * PITCH_PX + 5)
    labels_HW = np.zeros(shape, np.int32)
    for index in range(rows * columns):
        row, column = divmod(index, columns)
        middle = (column * PITCH_PX + PITCH_PX // 2, row * PITCH_PX + PITCH_PX // 2)
        axes = (int(rng.integers(8, 12)), int(rng.integers(5, 12)))
        cv2.ellipse(labels_HW, middle, axes, float(rng.integers(180)), 0, 360, index + 1, -1)
    image_HW = rng.integers(100, 400, shape) + np.where(labels_HW > 0, 2000 + 50 * (labels_HW % 7), 0)
    return Drawn(image_HW.astype(np.uint16), labels_HW)
