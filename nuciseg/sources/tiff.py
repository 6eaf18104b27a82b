"""TIFF in all its dialects: plain, OME, ImageJ, whole slides.

Tiles are read one by one through tifffile's zarr store, uncompressed pixels that lie in one piece are mapped into
memory, compressed strips are read whole. Of a pyramid the finest level is taken.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import tifffile

from nuciseg.errors import DataError
from nuciseg.images import MAX_COMPRESSION, has_every_segment, missing_pixels
from nuciseg.sources.stored import WHOLE_PX, Pixels, Stored, micrometres

# tifffile also prints what it finds wrong; the user gets one sentence, and it is ours.
logging.getLogger("tifffile").addHandler(logging.NullHandler())

# Pictures that scanners add to a slide, under the names that tifffile gives them.
_BESIDES_THE_SLIDE = {"thumbnail", "label", "macro"}
_COLOURS = (2, 6)  # TIFF 6.0 tag 262: RGB; YCbCr, which tifffile decodes to RGB
# TIFF 6.0 tag 259: LZW, JPEG, deflate, PackBits, old deflate. Of others, such as Zstandard, a blank image of any size
# takes a few bytes; `refuse_large` alone keeps those from filling the memory.
_BOUNDED_COMPRESSIONS = (5, 7, 8, 32773, 32946)
_ALPHA = ((1,), (2,))  # TIFF 6.0 tag 338
# Programs fill in a resolution for printing, such as 72 dpi (353 um) or 300 (85 um), where they know none.
_PLAUSIBLE_UM = (0.01, 10)


@contextlib.contextmanager
def open_tiff(path: Path) -> Iterator[Stored]:
    """The image in the TIFF at `path`. Raises DataError, and what tifffile raises on damaged files."""
    with tifffile.TiffFile(path) as tiff:
        number, series = _only_image(path, tiff)
        pixels, least_px = _pixels(path, tiff, series)
        page = series.keyframe
        is_colour = page.photometric in _COLOURS or (page.samplesperpixel == 2 and page.extrasamples in _ALPHA)
        ome = _ome_pixels(tiff, number)
        width_um, height_um = (_pixel_size_um(tiff, page, ome, axis) for axis in "XY")
        yield Stored(
            pixels=pixels,
            axes=series.axes if is_colour else series.axes.replace("S", "C"),
            least_px=least_px,
            channel_names=tuple(each.get("Name", "") for each in ome.findall("{*}Channel")) if ome is not None else (),
            pixel_width_um=width_um,
            pixel_height_um=height_um,
        )


def _only_image(path: Path, tiff: Any) -> tuple[int, Any]:
    """The number of the one image among tifffile's series, and the series."""
    found = list(enumerate(tiff.series))
    images = [
        (number, series)
        for number, series in found
        if not series.keyframe.is_reduced and series.name.lower() not in _BESIDES_THE_SLIDE
    ] or found
    if len(images) != 1:
        raise DataError(f"{path} holds {len(images)} images where one is needed; save them as separate files.")
    number, series = images[0]
    if series.is_multifile or (tiff.is_ome and series.kind in ("generic", "uniform")):
        raise DataError(f"{path} is one file of an OME-TIFF of several; save the image as one file.")
    if tiff.is_imagej and series.kind in ("generic", "uniform"):  # tifffile's way of saying that its stack is cut off
        raise missing_pixels(path)
    if series.keyframe.dtype is None:
        raise DataError(f"{path} holds pixels of {series.keyframe.bitspersample} bits; save them as 8 or 16 bits.")
    return number, series


def _pixels(path: Path, tiff: Any, series: Any) -> tuple[Pixels, int]:
    """The pixels of a series, and how many must be decoded to get at one."""
    size_bytes = path.stat().st_size
    page = series.keyframe
    if (offset := series.dataoffset) is not None and series.transform is None and 0 not in series.shape:
        dtype = series.dtype.newbyteorder(tiff.byteorder)
        return np.memmap(path, dtype, mode="r", offset=offset, shape=series.shape), 1  # refuses to go beyond the file
    if any(each is None or not has_every_segment(each, size_bytes) for each in series.pages):
        raise missing_pixels(path)
    by_parts = page.is_tiled or page.compression == 1
    least_px = math.prod(page.chunks if by_parts else page.shape) // page.samplesperpixel
    claimed_bits = page.size * page.bitspersample if page.compression in _BOUNDED_COMPRESSIONS else 0
    if (least_px > WHOLE_PX or not by_parts) and claimed_bits > 8 * MAX_COMPRESSION * size_bytes:
        raise missing_pixels(path)
    import zarr

    return zarr.open_array(store=series.aszarr(level=0), mode="r"), least_px


def _ome_pixels(tiff: Any, number: int) -> ElementTree.Element | None:
    """The element Pixels of the image `number` in the OME-XML."""
    if not tiff.is_ome:
        return None
    images = ElementTree.fromstring(tiff.ome_metadata).findall("{*}Image/{*}Pixels")
    return images[number] if number < len(images) else None


def _pixel_size_um(tiff: Any, page: Any, ome: ElementTree.Element | None, axis: str) -> float | None:
    if ome is not None:
        return micrometres(float(ome.get(f"PhysicalSize{axis}", "nan")), ome.get(f"PhysicalSize{axis}Unit", "µm"))
    pixels, units = page.tags.valueof(f"{axis}Resolution", default=(0, 0))
    if not pixels or not units:
        return None
    if tiff.is_imagej:
        return micrometres(units / pixels, str((tiff.imagej_metadata or {}).get("unit", "")))
    size_um = 1e4 * units / pixels
    is_plausible = page.resolutionunit == 3 and _PLAUSIBLE_UM[0] <= size_um <= _PLAUSIBLE_UM[1]
    return size_um if is_plausible else None
