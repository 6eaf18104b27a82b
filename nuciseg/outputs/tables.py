"""Tables: the measurements of an image's nuclei, and the images of a batch."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nuciseg.errors import DataError
from nuciseg.images import write_bytes
from nuciseg.outputs.nuclei import COLUMNS, Figure, ReportedNuclei, tidy


class MeasurementsWriter:
    """A CSV of one row a nucleus, with COLUMNS; empty where there is no value."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8", newline="")
        self._rows = csv.DictWriter(self._file, COLUMNS, lineterminator="\n")
        self._rows.writeheader()

    def add(self, nuclei: ReportedNuclei) -> None:
        self._rows.writerows(nuclei.measurements)

    def finish(self) -> None:
        self._file.close()

    def close(self) -> None:
        self._file.close()


@dataclass(frozen=True)
class Summary:
    """An image in a few figures: medians over its nuclei, and the mean raw value of all their pixels.

    None where there is no nucleus, in micrometres also where no pixel size is known.
    """

    num_nuclei: int
    median_area_px: float | None = None
    median_diameter_px: float | None = None
    median_diameter_um: float | None = None
    mean_intensity: float | None = None


class Totals:
    """What a Summary is made of: one number a nucleus, and two sums."""

    def __init__(self, pixel_size_um: float | None) -> None:
        self._pixel_size_um = pixel_size_um
        self._areas: list[NDArray[np.int64]] = []
        self._intensity = 0.0

    def add(self, nuclei: ReportedNuclei) -> None:
        self._areas.append(nuclei.area_N)
        self._intensity += float(nuclei.intensity_sums.sum())

    def summary(self) -> Summary:
        area_N = np.concatenate([np.zeros(0, np.int64), *self._areas])
        if not area_N.size:
            return Summary(0)
        diameter_px = float(np.median(2 * np.sqrt(area_N / np.pi)))
        diameter_um = None if self._pixel_size_um is None else diameter_px * self._pixel_size_um
        mean_intensity = self._intensity / int(area_N.sum())
        return Summary(len(area_N), float(np.median(area_N)), diameter_px, diameter_um, mean_intensity)


@dataclass(frozen=True)
class ImageResult:
    """One row of a batch's table: the image `file`, and either its `summary` or the `reason` why it has none.

    `diameter_px` is the size of nucleus that the image was scaled by, if any.
    """

    file: str
    summary: Summary | None = None
    reason: str = ""
    pixel_size_um: float | None = None
    diameter_px: float | None = None


def write_summary(path: Path, rows: Iterable[ImageResult]) -> None:
    """Write a CSV of one row an image: file, status (done or failed), reason, the figures of its Summary, pixel size,
    diameter used; empty where there is no value. Raises `ResourceError` where it cannot be written."""
    figures = list(asdict(Summary(0)))
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["file", "status", "reason", *figures, "pixel_size_um", "diameter_used_px"])
    for row in rows:
        found: dict[str, Figure] = asdict(row.summary) if row.summary else {}
        values = [*(found.get(name) for name in figures), row.pixel_size_um, row.diameter_px]
        table.writerow([row.file, "done" if row.summary else "failed", row.reason, *map(tidy, values)])
    # A file name that is no UTF-8 reaches Python with surrogates; they go out as the bytes they were.
    write_bytes(path, text.getvalue().encode("utf-8", "surrogateescape"))


def read_summary(path: Path) -> list[ImageResult]:
    """The rows of a file that `write_summary` wrote. Raises `DataError` where it is none."""
    figures = list(asdict(Summary(0)))
    try:
        with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
            return [_row(values, figures) for values in csv.DictReader(file)]
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise DataError(f"{path} is no summary of predictions ({error}); remove it, or do without --resume.") from error


def _row(values: dict[str, str], figures: list[str]) -> ImageResult:
    def number(name: str) -> float | None:
        return float(values[name]) if values[name] else None

    summary = None
    if values["status"] == "done":
        summary = Summary(int(values["num_nuclei"]), *(number(name) for name in figures[1:]))
    return ImageResult(values["file"], summary, values["reason"], number("pixel_size_um"), number("diameter_used_px"))
