"""Image files: read PNG, TIFF and JPEG as grey planes, write pictures and label images.

Every reader returns exactly what lies in the file or raises `DataError`: a truncated file is refused, never filled
with zeros. Every writer writes under a temporary name first, so that a file that exists is whole.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import imageio.v3 as iio
import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL.Image import DecompressionBombError

from nuciseg.errors import DataError, ResourceError, writing

IMAGE_SUFFIXES = (".png", ".tif", ".tiff", ".jpg", ".jpeg")

_TIFF_SUFFIXES = (".tif", ".tiff")
# tifffile decodes these alone (TIFF 6.0 tag 259: none, Adobe deflate, packbits, old deflate); Pillow decodes the rest.
_TIFFFILE_COMPRESSIONS = (1, 8, 32773, 32946)
# Deflate reaches 1032 : 1 (zlib's own figure), LZW 1400 : 1; beyond that the header is damaged, and decoding would fill
# the memory.
MAX_COMPRESSION = 2000
# What Pillow, tifffile and zlib raise on damaged files (found by cutting and flipping bytes of real ones).
_DECODE_ERRORS = (
    OSError, ValueError, SyntaxError, EOFError, TypeError, LookupError, ArithmeticError, RuntimeError, MemoryError,
    struct.error, zlib.error, tifffile.TiffFileError, DecompressionBombError,
)  # fmt: skip


def read_image(path: Path) -> NDArray[np.generic]:
    """The grey image at `path`: HW, uint8 or uint16.

    A colour image whose channels are all equal is taken as grey, an alpha channel that hides nothing is dropped.
    Raises `DataError` for a file that is missing, damaged, coloured, a stack, or neither 8- nor 16-bit.
    """
    plane_HW = _read_plane(Path(path))
    if plane_HW.dtype not in (np.uint8, np.uint16):
        raise DataError(f"{path} holds {plane_HW.dtype} pixels; convert the image to 8- or 16-bit unsigned integers.")
    return plane_HW


def read_labels(path: Path) -> NDArray[np.int32]:
    """The label image at `path`: HW int32, ids as they are in the file (0 background, negative = ignored).

    Raises `DataError` as `read_image` does; any integer type whose values fit int32 is taken.
    """
    plane_HW = _read_plane(Path(path))
    if not np.issubdtype(plane_HW.dtype, np.integer):
        raise DataError(
            f"{path} holds {plane_HW.dtype} pixels where labels are needed; save one integer id per nucleus "
            "as uint8, uint16 or int32."
        )
    labels_HW = plane_HW.astype(np.int32)
    if not np.array_equal(labels_HW, plane_HW):
        raise DataError(f"{path} holds label ids beyond the range of int32; renumber the labels 1 to N.")
    return labels_HW


def read_mask(path: Path) -> NDArray[np.bool_]:
    """The mask of one nucleus at `path`: HW, True where the file is not 0.

    Raises `DataError` as `read_image` does, and for a file with several values beside 0, which may be several nuclei.
    """
    plane_HW = _read_plane(Path(path))
    mask_HW = np.asarray(plane_HW != 0)
    if (num_values := len(np.unique(plane_HW[mask_HW]))) > 1:
        raise DataError(
            f"{path} holds {num_values} values beside 0 where the mask of one nucleus is needed; save 0 and 255 alone, "
            "one file per nucleus."
        )
    return mask_HW


def write_png(path: Path, rgb_HWC: NDArray[np.uint8]) -> None:
    """Write an 8-bit picture, HWC (or HW for grey). Raises `ResourceError` where it cannot be written."""
    write_bytes(path, iio.imwrite("<bytes>", rgb_HWC, extension=".png", plugin="pillow"))


def write_labels_tiff(path: Path, labels_HW: NDArray[np.integer[Any]]) -> None:
    """Write a label image as deflate-compressed int32 TIFF. Raises `ResourceError` where it cannot be written."""
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, labels_HW.astype(np.int32), compression="zlib", photometric="minisblack")
    write_bytes(path, buffer.getvalue())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file or none: under a temporary name beside `path`, then renamed over it."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:8]}.tmp")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(data)
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # it is gone where all went well
            temporary.unlink()


def require_writable(folder: Path) -> None:
    """Make `folder` and see that files can be written there, before hours of work are lost. Raises `ResourceError`."""
    probe = Path(folder) / f".{uuid4().hex[:8]}.tmp"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ResourceError(f"The folder {folder} cannot be written ({error.strerror}); choose another.") from error


def _read_plane(path: Path) -> NDArray[np.generic]:
    if not path.is_file():
        raise DataError(f"{path} does not exist or is no file; check the path.")
    with decoding(path):
        if path.suffix.lower() in _TIFF_SUFFIXES:
            pixels = _decode_tiff(path)
        else:
            refuse_png_that_pillow_reduces(path)
            pixels = np.asarray(iio.imread(path, plugin="pillow", index=0))
    return _as_grey(path, pixels)


@contextlib.contextmanager
def decoding(path: Path) -> Iterator[None]:
    """Within, what the decoders raise on a damaged file becomes a DataError that names `path`."""
    try:
        yield
    except _DECODE_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path} cannot be read as an image ({reason}); replace the file with a whole one.") from error


def _decode_tiff(path: Path) -> NDArray[np.generic]:
    with tifffile.TiffFile(path) as tiff:
        if len(tiff.series) != 1:
            raise DataError(f"{path} holds {len(tiff.series)} images where one is needed; save them as separate files.")
        page = tiff.pages.first
        series = tiff.series[0]
        size_bytes = path.stat().st_size
        if not has_every_segment(page, size_bytes) or series.nbytes > MAX_COMPRESSION * size_bytes:
            raise missing_pixels(path)
        if int(page.compression) in _TIFFFILE_COMPRESSIONS:
            pixels = np.asarray(series.asarray())
        else:
            pixels = np.asarray(iio.imread(path, plugin="pillow", index=0))
        # Planar colour is stored channels first.
        return np.moveaxis(pixels, 0, -1) if series.axes == "SYX" and pixels.shape == series.shape else pixels


def has_every_segment(page: Any, size_bytes: int) -> bool:
    """Whether all strips or tiles of a tifffile page lie within a file of `size_bytes`.

    tifffile fills segments that are not there with zeros, so look before it does.
    """
    layout = page.keyframe
    segments = list(zip(page.dataoffsets, page.databytecounts, strict=True))
    return not (
        len(segments) < math.prod(layout.chunked)
        or any(offset <= 0 or count <= 0 or offset + count > size_bytes for offset, count in segments)
        or (layout.compression == 1 and 8 * sum(page.databytecounts) < layout.size * layout.bitspersample)
    )


def missing_pixels(path: Path) -> DataError:
    """The error for a file that holds less than its header says."""
    return DataError(f"{path} is truncated or damaged: pixels are missing; replace the file with a whole one.")


def refuse_png_that_pillow_reduces(path: Path) -> None:
    """Pillow decodes 16-bit colour PNG to 8 bit without a word (PNG 1.2: byte 24 is the depth, 25 the colour type)."""
    with path.open("rb") as file:
        header = file.read(26)
    if header[:4] == b"\x89PNG" and len(header) == 26 and header[24] == 16 and header[25] != 0:
        raise DataError(f"{path} is a 16-bit colour image where grey is needed; convert it to one grey channel.")


def _as_grey(path: Path, pixels: NDArray[np.generic]) -> NDArray[np.generic]:
    if pixels.size == 0:
        raise DataError(f"{path} holds no pixels; replace the file.")
    if pixels.ndim == 3 and pixels.shape[-1] in (2, 4):
        opaque = np.iinfo(str(pixels.dtype)).max if pixels.dtype.kind in "iu" else 1
        if np.all(pixels[..., -1] == opaque):
            pixels = pixels[..., :-1]
    while pixels.ndim > 2 and pixels.shape[0] == 1 and pixels.shape[-1] > 4:  # axes of length one, as Z and T
        pixels = pixels[0]
    if pixels.ndim == 2:
        return np.ascontiguousarray(pixels)
    if pixels.ndim != 3 or pixels.shape[-1] > 4:
        raise DataError(f"{path} has the shape {pixels.shape} where one grey plane is needed; save a single plane.")
    if not np.all(pixels == pixels[..., :1]):
        raise DataError(f"{path} is a colour image where grey is needed; convert it to one grey channel.")
    return np.ascontiguousarray(pixels[..., 0])


def saturated_value(image_HWC: NDArray[Any]) -> float:
    """The raw value of a saturated pixel; infinity for floating-point images, which do not saturate."""
    return float(np.iinfo(image_HWC.dtype).max) if image_HWC.dtype.kind in "ui" else float("inf")
