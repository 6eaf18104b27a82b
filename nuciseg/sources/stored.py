"""What the reader of a format hands over, and the rules that hold for all formats.

Every format is an array with named axes that is read by parts. What differs is only how a part comes out of the file;
so channels, planes, colour and pixel types are dealt with once, in `planes.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from nuciseg.errors import DataError

# A plane up to this size is decoded once and kept (two bytes a pixel: 128 MiB), a larger one read by windows.
WHOLE_PX = 2**26
# What must be decoded in one go beyond this size fills the memory of a common computer: the user has to allow it.
MAX_WHOLE_PX = 10**9

_UNEQUAL = 0.01  # relative; less comes of rounding, and hardly changes an area

_UM_PER_UNIT = {
    **dict.fromkeys(("µm", "μm", "um", "micron", "microns", "micrometer", r"\u00B5m"), 1.0),
    **dict.fromkeys(("nm", "nanometer"), 1e-3),
    **dict.fromkeys(("mm", "millimeter"), 1e3),
    **dict.fromkeys(("cm", "centimeter"), 1e4),
    **dict.fromkeys(("m", "meter"), 1e6),
}


class Pixels(Protocol):
    """An array that reads what it is indexed with: zarr, dask, a memory map, or numpy itself."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def __getitem__(self, index: Any, /) -> Any: ...


@dataclass(frozen=True)
class Stored:
    """The pixels of a file, with a letter of `axes` for each axis of `pixels`.

    Y are rows, X columns, C channels, S the samples of a colour (grey and alpha, RGB or RGBA); all other letters are
    stacks of planes. `least_px` is how many pixels have to be decoded to get at one: those of a tile, of a chunk, or of
    the whole plane.
    """

    pixels: Pixels
    axes: str
    least_px: int
    channel_names: tuple[str, ...] = ()
    pixel_width_um: float | None = None
    pixel_height_um: float | None = None

    def pixel_size_um(self) -> tuple[float | None, tuple[str, ...]]:
        """The side of a pixel, and what has to be said where there is none because pixels are not square.

        Where nothing is said of their height they are taken for square.
        """
        width, height = self.pixel_width_um, self.pixel_height_um
        if width is None or height is None or abs(width - height) <= _UNEQUAL * width:
            return width, ()
        return None, (
            f"Pixels are {width:.4g} um wide and {height:.4g} um high, so nothing is given in um; --pixel-size UM "
            "takes them for square.",
        )


def refuse_large(path: Path, num_px: int, allow_large: bool) -> None:
    """Raises DataError for more than `MAX_WHOLE_PX` pixels that must be decoded in one go, where not allowed."""
    if num_px > MAX_WHOLE_PX and not allow_large:
        raise DataError(
            f"{path} claims {num_px / 1e9:.1f} gigapixels that can only be read whole; save it as a tiled TIFF or as "
            "OME-Zarr, or read it with --allow-large if the memory suffices."
        )


def micrometres(length: float, unit: str) -> float | None:
    """`length` in um; None where `unit` is no unit of length or the length no positive number."""
    size_um = length * _UM_PER_UNIT.get(unit, math.nan)
    return size_um if 0 < size_um < math.inf else None
