"""The labels of a whole image, painted window by window into a file, and the label TIFF made of them.

An image of 20,000 x 20,000 pixels has 1.6 GB of labels, of which no more than a window is in memory. They are written
with `write` and only read through a memory map: on a full disk `write` raises OSError, where storing through the map
would end the process. What was read through it counts as memory of the process until it is released.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tifffile
from numpy.typing import NDArray

from nuciseg.outputs.nuclei import ReportedNuclei

TILED_ABOVE_PX = 4096  # the longest side of an image whose TIFF is the plain one of `images.write_labels_tiff`
TILE_PX = 512
CLASSIC_TIFF_BYTES = 2**32 - 2**25  # more than this of raw pixels, as tifffile has it, and offsets may not fit 32 bits
NUM_WAITING_BYTES = 2**26  # tiles that tifffile compresses at a time


class LabelCanvas:
    """The labels of an image of `shape` (rows, columns), 0 where nothing was painted, in the temporary file `path`."""

    def __init__(self, path: Path, shape: tuple[int, int]) -> None:
        self._shape = shape
        self._file = path.open("w+b")
        self._file.truncate(math.prod(shape) * np.dtype(np.int32).itemsize)  # holes take no room and read as 0
        self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        self._labels_HW = np.frombuffer(self._map, np.int32).reshape(shape)

    @property
    def labels(self) -> NDArray[np.int32]:
        """All that was painted; int32, read from the file where it is indexed. `release` when a large part was."""
        return self._labels_HW

    def release(self) -> None:
        """Give back the memory of what was read; it is read again from the file, or from the system's cache of it."""
        if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
            self._map.madvise(mmap.MADV_DONTNEED)

    def paint(self, nuclei: ReportedNuclei) -> None:
        """Add the ids of `nuclei` where no other nucleus is. Raises OSError."""
        top, left = nuclei.window.top_px, nuclei.window.left_px
        rows = np.flatnonzero(nuclei.ids_HW.any(axis=1))
        before_HW = self._labels_HW[top + rows, left : left + nuclei.ids_HW.shape[1]]
        painted_HW = np.where(before_HW == 0, nuclei.ids_HW[rows], before_HW)
        for row, painted_W in zip(rows.tolist(), painted_HW, strict=True):
            self._file.seek(((top + row) * self._shape[1] + left) * painted_W.itemsize)
            self._file.write(painted_W.tobytes())
        self._file.flush()
        self.release()

    def close(self) -> None:
        self._file.close()


class MasksWriter:
    """`canvas` as a label TIFF: int32, deflate-compressed; in tiles where the image is large."""

    def __init__(self, path: Path, canvas: LabelCanvas) -> None:
        self._path, self._canvas = path, canvas

    def add(self, nuclei: ReportedNuclei) -> None:
        """Nothing: the canvas has them."""

    def finish(self) -> None:
        labels_HW = self._canvas.labels
        if max(labels_HW.shape) <= TILED_ABOVE_PX:
            tifffile.imwrite(self._path, np.array(labels_HW), compression="zlib", photometric="minisblack")
            return
        tifffile.imwrite(
            self._path, self._tiles(), shape=labels_HW.shape, dtype=labels_HW.dtype, tile=(TILE_PX, TILE_PX),
            compression="zlib", photometric="minisblack", bigtiff=labels_HW.nbytes > CLASSIC_TIFF_BYTES,
            buffersize=NUM_WAITING_BYTES,
        )  # fmt: skip

    def close(self) -> None:
        """Nothing is open between calls."""

    def _tiles(self) -> Iterator[NDArray[np.int32]]:
        labels_HW = self._canvas.labels
        for top in range(0, labels_HW.shape[0], TILE_PX):
            for left in range(0, labels_HW.shape[1], TILE_PX):
                yield labels_HW[top : top + TILE_PX, left : left + TILE_PX]
            self._canvas.release()
