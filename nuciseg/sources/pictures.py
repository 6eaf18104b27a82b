"""PNG, JPEG and what else Pillow decodes: files that can only be read whole."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
from PIL import Image

from nuciseg.images import MAX_COMPRESSION, missing_pixels, refuse_png_that_pillow_reduces
from nuciseg.sources.stored import Stored, refuse_large

_TO_RGB = ("CMYK", "YCbCr", "LAB", "HSV")


def open_picture(path: Path, allow_large: bool) -> Stored:
    """The decoded picture at `path`. Raises DataError, and what Pillow raises on damaged files."""
    refuse_png_that_pillow_reduces(path)
    with _any_size():
        with Image.open(path) as picture:  # reads no more than the header
            num_px = picture.width * picture.height
            # A pixel of PNG may be one bit. A blank WebP, for one, takes a few bytes whatever its size.
            least_bytes = num_px // 8 if picture.format in ("PNG", "JPEG") else 0
            mode = "RGB" if picture.mode in _TO_RGB else None
        if least_bytes > MAX_COMPRESSION * path.stat().st_size:
            raise missing_pixels(path)
        refuse_large(path, num_px, allow_large)
        pixels: Any = np.asarray(iio.imread(path, plugin="pillow", index=0, mode=mode))
    return Stored(pixels, "YXS" if pixels.ndim == 3 else "YX", least_px=1)


@contextlib.contextmanager
def _any_size() -> Iterator[None]:
    """Within, Pillow leaves it to us what is too large: its own limit is below what microscopes write."""
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit
