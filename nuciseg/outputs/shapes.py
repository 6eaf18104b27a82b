"""Outlines for other programs: ROIs for ImageJ and Fiji, GeoJSON for QuPath.

Both programs take pixel (row, column) for the square from (column, row) to (column + 1, row + 1) and count a pixel to a
shape when its middle lies within, so both get the corners of `nuclei.trace_outline` as they are.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from roifile import ROI_TYPE, ImagejRoi

from nuciseg.outputs.nuclei import ReportedNuclei


class RoisWriter:
    """A ZIP archive with one ImageJ ROI a nucleus, named by its label; ROI Manager, Open... reads it."""

    def __init__(self, path: Path) -> None:
        self._archive = zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED)

    def add(self, nuclei: ReportedNuclei) -> None:
        for number, corners_P2 in zip(nuclei.ids_N, nuclei.outlines, strict=True):
            roi = ImagejRoi.frompoints(corners_P2, name=str(number))
            # What ImageJ's wand makes of a mask: it then takes the perimeter along pixels, as it does for its own.
            # Coordinates beyond 60,535 are stored as floats, which a traced ROI cannot have.
            if roi.subpixel_coordinates is None:
                roi.roitype = ROI_TYPE.TRACED
            entry = zipfile.ZipInfo(f"{roi.name}.roi")  # without the time, so that the same nuclei give the same bytes
            entry.external_attr = 0o644 << 16
            self._archive.writestr(entry, roi.tobytes(), zipfile.ZIP_DEFLATED)

    def finish(self) -> None:
        self._archive.close()

    def close(self) -> None:
        self._archive.close()


class GeoJsonWriter:
    """A FeatureCollection with one Polygon a nucleus, as QuPath (0.4 and later) imports it: a detection, `name` its
    label, `measurements` the columns of the table; those without a value are left out. Coordinates are pixels."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8")
        self._file.write('{"type": "FeatureCollection", "features": [')
        self._separator = "\n"

    def add(self, nuclei: ReportedNuclei) -> None:
        for row, corners_P2 in zip(nuclei.measurements, nuclei.outlines, strict=True):
            ring = corners_P2.tolist()
            measurements = {name: value for name, value in row.items() if name != "label" and value is not None}
            feature = {
                "type": "Feature",
                "geometry": {"type": "Polygon", "coordinates": [[*ring, ring[0]]]},
                "properties": {"objectType": "detection", "name": str(row["label"]), "measurements": measurements},
            }
            self._file.write(self._separator + json.dumps(feature, separators=(",", ":")))
            self._separator = ",\n"

    def finish(self) -> None:
        self._file.write("\n]}\n")
        self._file.close()

    def close(self) -> None:
        self._file.close()
