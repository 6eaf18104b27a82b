"""Microscope makers' own formats, CZI, ND2 and LIF, through bioio: an extra, for few need it and it brings much."""

from __future__ import annotations

import math
from pathlib import Path

from nuciseg.errors import DataError
from nuciseg.sources.stored import Stored


def open_vendor(path: Path) -> Stored:
    """The image at `path`. Raises DataError, also where bioio or its reader of this format is not installed."""
    cure = "install its readers with pip install 'nuciseg[vendor]', or save the image as OME-TIFF."
    try:
        from bioio import BioImage
        from bioio_base.exceptions import UnsupportedFileFormatError
    except ImportError as error:
        raise DataError(f"{path} is in a microscope maker's format; {cure}") from error
    try:
        image = BioImage(path)
        pixels = image.dask_data
    except UnsupportedFileFormatError as error:
        raise DataError(f"{path} is damaged, or its reader is missing; replace the file, or {cure}") from error
    if len(image.scenes) != 1:
        raise DataError(f"{path} holds {len(image.scenes)} images where one is needed; save them as separate files.")
    return Stored(
        pixels=pixels,
        axes=image.dims.order,
        least_px=math.prod(pixels.chunksize),
        channel_names=tuple(map(str, image.channel_names or ())),
        pixel_width_um=image.physical_pixel_sizes.X or None,
        pixel_height_um=image.physical_pixel_sizes.Y or None,
    )
