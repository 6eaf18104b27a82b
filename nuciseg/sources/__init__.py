"""Images to predict, read by windows: a slide of any size goes through a computer with little memory.

`open_source` takes what microscopes and their programs write, and says in one sentence what it cannot decide for the
user: which of several channels, which plane of a stack. Training data go through `images.py` instead, which refuses all
that is not one grey plane.

    stored.py     what the reader of a format hands over; limits
    planes.py     the one grey plane in it: channel, plane or projection, colour, pixel types
    tiff.py  ome_zarr.py  pictures.py  vendor.py     the formats
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nuciseg.errors import DataError
from nuciseg.images import IMAGE_SUFFIXES, decoding
from nuciseg.sources.planes import Projection, choose_plane
from nuciseg.sources.stored import WHOLE_PX, Stored, refuse_large

__all__ = ["SOURCE_SUFFIXES", "ImageSource", "Projection", "open_source"]

_TIFF_SUFFIXES = (".tif", ".tiff", ".btf", ".tf8", ".svs", ".ndpi", ".scn", ".qptiff", ".lsm", ".stk")
_VENDOR_SUFFIXES = (".czi", ".nd2", ".lif")
# What a folder of images is searched for; `open_source` itself goes by the contents, too.
SOURCE_SUFFIXES = (*dict.fromkeys((*IMAGE_SUFFIXES, *_TIFF_SUFFIXES)), ".zarr", *_VENDOR_SUFFIXES)

_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # TIFF 6.0 and BigTIFF


@dataclass(frozen=True)
class ImageSource:
    """An open image: one grey plane, of which windows are read.

    `shape` is (height, width) in pixels; `dtype` uint8, uint16 or float32, the same for every window. `pixel_size_um`
    is the side of a pixel, None where nobody says or pixels are not square. `notices` are sentences for the user about
    what was done to the pixels; of an image that is read by windows they tell what is done where it applies.
    """

    path: Path
    shape: tuple[int, int]
    dtype: np.dtype[Any]
    pixel_size_um: float | None
    notices: tuple[str, ...]
    _pixels: Callable[[slice, slice], NDArray[Any]] = field(repr=False)

    def read(self, top: int, left: int, height: int, width: int) -> NDArray[Any]:
        """The raw pixels of a window that lies within the image: HW, `dtype`, a copy of its own.

        Raises DataError where the file is damaged there, or holds pixels that are no finite numbers.
        """
        assert 0 <= top <= top + height <= self.shape[0], (top, height, self.shape)
        assert 0 <= left <= left + width <= self.shape[1], (left, width, self.shape)
        pixels_HW = self._pixels(slice(top, top + height), slice(left, left + width))
        if pixels_HW.dtype.kind == "f":
            num_wrong = pixels_HW.size - int(np.count_nonzero(np.isfinite(pixels_HW)))
            if num_wrong:
                raise DataError(
                    f"{self.path} holds NaN or infinity in {num_wrong} of the {pixels_HW.size} pixels from "
                    f"row {top}, column {left} to row {top + height - 1}, column {left + width - 1}; replace them, by "
                    "0 for example."
                )
        return pixels_HW


@contextlib.contextmanager
def open_source(
    path: Path | str,
    *,
    channel: int | None = None,
    plane: int | Projection | None = None,
    pixel_size_um: float | None = None,
    allow_large: bool = False,
) -> Iterator[ImageSource]:
    """The image at `path`, open within a `with` block: TIFF, PNG, JPEG, OME-Zarr, and with an extra CZI, ND2 and LIF.

    `channel` is counted from 0; without it there must be one, or colour, which becomes grey. `plane`, along Z or T, is
    counted from 0, too; "max" and "mean" project all planes, the mean of whole numbers rounded. `pixel_size_um` counts
    more than what the file says. `allow_large` reads an image of more than a gigapixel that is not tiled, and so must
    be read whole.

    Raises DataError for a file that is missing, damaged or too large, and where channel or plane are left open or are
    not there.
    """
    path = Path(path)
    with contextlib.ExitStack() as stack:
        with decoding(path):
            stored = stack.enter_context(_open(path, allow_large))
        chosen = choose_plane(path, stored, channel, plane)
        refuse_large(path, stored.least_px, allow_large)
        height, width = chosen.shape

        if height * width <= WHOLE_PX or stored.least_px > WHOLE_PX:
            whole_HW, notices = chosen.read(slice(0, height), slice(0, width))

            def pixels(rows: slice, columns: slice) -> NDArray[Any]:
                return whole_HW[rows, columns].copy()
        else:
            notices = chosen.possible_notices()

            def pixels(rows: slice, columns: slice) -> NDArray[Any]:
                return chosen.read(rows, columns)[0]

        if pixel_size_um is None:
            pixel_size_um, said = stored.pixel_size_um()
            notices += said
        yield ImageSource(path, (height, width), chosen.dtype, pixel_size_um, notices, pixels)


def _open(path: Path, allow_large: bool) -> contextlib.AbstractContextManager[Stored]:
    if path.is_dir():
        from nuciseg.sources.ome_zarr import open_ome_zarr

        return contextlib.nullcontext(open_ome_zarr(path))
    if path.is_symlink() and not path.exists():
        raise DataError(f"{path} is a link to {path.readlink()}, which does not exist; fetch it, or mend the link.")
    if not path.is_file():
        raise DataError(f"{path} does not exist or is no file; check the path.")
    if path.suffix.lower() in _VENDOR_SUFFIXES:
        from nuciseg.sources.vendor import open_vendor

        return contextlib.nullcontext(open_vendor(path))
    with path.open("rb") as file:
        start = file.read(4)
    if start in _TIFF_STARTS or path.suffix.lower() in _TIFF_SUFFIXES:
        from nuciseg.sources.tiff import open_tiff

        return open_tiff(path)
    from nuciseg.sources.pictures import open_picture

    return contextlib.nullcontext(open_picture(path, allow_large))
