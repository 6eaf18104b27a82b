"""From image files to files of nuclei."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nuciseg.engine.fields import TILE_PX
from nuciseg.engine.prediction import Predictor
from nuciseg.errors import ConfigError, DataError
from nuciseg.outputs import ImageResult, OutputName, open_outputs, stem_of
from nuciseg.sources import Projection, open_source

LEAST_DIAMETER_PX = 1.0

_LENGTH = re.compile(r"(\d+(?:\.\d+)?)\s*(px|um)?")


@dataclass(frozen=True)
class Diameter:
    """How large the nuclei are, in pixels or in micrometres."""

    length: float
    unit: str

    @staticmethod
    def parse(text: str) -> Diameter:
        """From "30", "30px" or "8.5um". Raises ConfigError."""
        found = _LENGTH.fullmatch(text.strip().lower().replace("µm", "um").replace("μm", "um"))
        if found is None or not 0 < float(found[1]) < math.inf:
            raise ConfigError(f"--diameter {text!r} is no size; give pixels, such as 30, or micrometres, such as 8um")
        return Diameter(float(found[1]), found[2] or "px")

    def __str__(self) -> str:
        return f"{self.length:g} {self.unit}"

    def in_px(self, pixel_size_um: float | None, name: str) -> float:
        """The diameter in pixels of the image called `name`.

        Raises DataError where it is given in micrometres and the image has no pixel size, and where it is no pixel.
        """
        if self.unit == "um" and pixel_size_um is None:
            raise DataError(
                f"{name} does not say how large a pixel is, or has pixels that are not square, so a diameter of "
                f"{self.length:g} um means nothing there; give --pixel-size UM, or the diameter in pixels"
            )
        length_px = self.length if pixel_size_um is None or self.unit == "px" else self.length / pixel_size_um
        if length_px < LEAST_DIAMETER_PX:
            raise DataError(
                f"nuclei of {self} would be {length_px:.2g} pixels wide in {name}, too small to be seen; check "
                "--diameter and the size of a pixel"
            )
        return length_px


@dataclass(frozen=True)
class Request:
    """What is asked of each image."""

    outputs: tuple[OutputName, ...]
    out: Path
    channel: int | None = None
    plane: int | Projection | None = None
    diameter: Diameter | None = None
    pixel_size_um: float | None = None
    allow_large: bool = False
    tile_px: int = TILE_PX


@dataclass(frozen=True)
class FileResult:
    """A row of the summary, and what the user should be told."""

    row: ImageResult
    notices: tuple[str, ...] = ()
    num_open_borders: int | None = None
    estimated: bool = False


def predict_file(
    predictor: Predictor, path: Path, request: Request, on_share: Callable[[float], None] | None = None
) -> FileResult:
    """Find the nuclei of the image at `path` and write what is asked for, whole or not at all.

    `on_share` is told, again and again, which share of the image is done.

    Raises DataError for an image that cannot be used, ResourceError where the results cannot be written.
    """
    with open_source(
        path,
        channel=request.channel,
        plane=request.plane,
        pixel_size_um=request.pixel_size_um,
        allow_large=request.allow_large,
    ) as source:
        pixel_size_um = source.pixel_size_um
        diameter_px = None if request.diameter is None else request.diameter.in_px(pixel_size_um, str(path))
        plan = predictor.plan(source, str(path), diameter_px, request.tile_px)
        num_open_borders = None
        with open_outputs(request.outputs, request.out, stem_of(path), source.shape, pixel_size_um) as outputs:
            num_windows = math.prod(len(plan.grid.spans(length)) for length in source.shape)
            for number, window in enumerate(predictor.windows(source, plan), start=1):
                outputs.add(window)
                num_open_borders = window.num_open_borders
                if on_share is not None:
                    on_share(number / num_windows)
        row = ImageResult(str(path), outputs.summary, "", pixel_size_um, plan.diameter_px)
        return FileResult(row, source.notices, num_open_borders, plan.estimated)
