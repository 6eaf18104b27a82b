"""The picture of a whole image with its nuclei outlined, as one PNG of at most PICTURE_PX a side.

Windows only deliver their pixels, reduced; the picture is drawn when all are there. So the percentiles that become
black and white are those of the whole picture, the same in all windows, and nothing depends on the division.
"""

from __future__ import annotations

from pathlib import Path

import imageio.v3 as iio
import numpy as np
from numpy.typing import NDArray

from nuciseg.outputs.canvas import LabelCanvas
from nuciseg.outputs.nuclei import ReportedNuclei
from nuciseg.plots import outlined_rgb, stretch

PICTURE_PX = 4096
SMALL_PX = 384  # a smaller image is enlarged by a whole factor, so that its outlines are seen
BAND_PX = 512  # rows that are drawn at a time, which bounds the memory of drawing
OUTLINE_PX = 1


class OverlayWriter:
    """The picture of an image of `shape` (rows, columns), whose labels `canvas` holds.

    In an image with a side above PICTURE_PX, each pixel of the picture is the mean of `factor` x `factor` pixels. Where
    windows share such a square, the one that has most of it gives its mean.
    """

    def __init__(self, path: Path, shape: tuple[int, int], canvas: LabelCanvas) -> None:
        self._path, self._shape, self._canvas = path, shape, canvas
        self._factor = -(-max(shape) // PICTURE_PX)
        size = (-(-shape[0] // self._factor), -(-shape[1] // self._factor))
        self._picture_HW = np.zeros(size, np.float32)
        self._num_seen_HW = np.zeros(size, np.uint16)

    def add(self, nuclei: ReportedNuclei) -> None:
        image_HW = nuclei.window.image_HW
        rows, row_starts = _blocks(nuclei.window.top_px, image_HW.shape[0], self._factor)
        columns, column_starts = _blocks(nuclei.window.left_px, image_HW.shape[1], self._factor)
        sums_HW = np.add.reduceat(image_HW.astype(np.float32), row_starts, axis=0)
        sums_HW = np.add.reduceat(sums_HW, column_starts, axis=1)
        num_rows_H = np.diff(row_starts, append=image_HW.shape[0])
        num_columns_W = np.diff(column_starts, append=image_HW.shape[1])
        num_pixels_HW = np.outer(num_rows_H, num_columns_W)
        num_seen_HW, picture_HW = self._num_seen_HW[rows, columns], self._picture_HW[rows, columns]
        better_HW = num_pixels_HW > num_seen_HW
        picture_HW[better_HW] = (sums_HW / num_pixels_HW)[better_HW]
        num_seen_HW[better_HW] = num_pixels_HW[better_HW]

    def finish(self) -> None:
        scale = max(1, SMALL_PX // max(self._shape))
        grey_HWC = stretch(self._picture_HW)
        num_rows = grey_HWC.shape[0]
        bands = []
        for top in range(0, num_rows, BAND_PX):
            bottom = min(top + BAND_PX, num_rows)
            above, below = max(top - OUTLINE_PX, 0), min(bottom + OUTLINE_PX, num_rows)
            drawn = outlined_rgb(grey_HWC[above:below], self._labels(above, below), scale=scale, outline_px=OUTLINE_PX)
            bands.append(drawn[(top - above) * scale : (bottom - above) * scale])
            self._canvas.release()
        iio.imwrite(self._path, np.concatenate(bands), extension=".png", plugin="pillow")

    def close(self) -> None:
        """Nothing is open between calls."""

    def _labels(self, top: int, bottom: int) -> NDArray[np.int32]:
        """Of rows `top` to `bottom` of the picture: the label in the middle of each square."""
        middle = self._factor // 2
        rows = np.minimum(np.arange(top, bottom) * self._factor + middle, self._shape[0] - 1)
        columns = np.arange(self._picture_HW.shape[1]) * self._factor + middle
        return np.asarray(self._canvas.labels[np.ix_(rows, np.minimum(columns, self._shape[1] - 1))], np.int32)


def _blocks(start: int, length: int, factor: int) -> tuple[slice, NDArray[np.int64]]:
    """Which squares of the picture the pixels `start` to `start + length` reach, and where in these each begins."""
    first, last = start // factor, -(-(start + length) // factor)
    return slice(first, last), np.maximum(np.arange(first, last) * factor - start, 0)
