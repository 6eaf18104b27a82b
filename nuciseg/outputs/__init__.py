"""Files of predicted nuclei for people and other programs, written while an image is predicted window by window.

    with open_outputs(("masks", "measurements"), folder, stem, image_HW.shape, pixel_size_um=0.325) as outputs:
        for window in windows:
            outputs.add(window)
    print(outputs.summary.num_nuclei)

An output is a module here with a class that has `add`, `finish` and `close`, named below in `OutputName` and
`_open_writers`. None keeps more than a window, but for a few numbers a nucleus and the reduced picture of the overlay.
"""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, Protocol, get_args

from nuciseg.errors import ConfigError, DataError, writing
from nuciseg.outputs.canvas import LabelCanvas, MasksWriter
from nuciseg.outputs.nuclei import ReportedNuclei
from nuciseg.outputs.overlay import OverlayWriter
from nuciseg.outputs.shapes import GeoJsonWriter, RoisWriter
from nuciseg.outputs.tables import ImageResult, MeasurementsWriter, Summary, Totals, read_summary, write_summary
from nuciseg.types import Window

__all__ = [
    "OUTPUT_NAMES",
    "ImageResult",
    "OutputName",
    "Outputs",
    "Summary",
    "open_outputs",
    "output_files",
    "read_summary",
    "stem_of",
    "write_summary",
]

OutputName = Literal["masks", "overlay", "rois", "geojson", "measurements"]
OUTPUT_NAMES: tuple[OutputName, ...] = get_args(OutputName)

_ENDINGS: dict[OutputName, str] = {
    "masks": "_masks.tif",
    "overlay": "_overlay.png",
    "rois": "_rois.zip",
    "geojson": ".geojson",
    "measurements": "_measurements.csv",
}


def output_files(names: Iterable[OutputName], stem: str) -> list[str]:
    """The names of the files that these outputs of an image are."""
    return [stem + _ENDINGS[name] for name in names]


def stem_of(image: Path | str) -> str:
    """What the results of the image at this path are called by: its name without the ending. Within a folder NAME.zarr
    they are NAME_0 of the image 0, for each such folder may have one of that name."""
    path = Path(os.path.abspath(image))
    for folder in path.parents:
        if folder.suffix.lower() == ".zarr":
            return "_".join((folder.stem, *path.relative_to(folder).parent.parts, path.stem))
    return path.stem


class Writer(Protocol):
    """One file. Each call may raise OSError."""

    def add(self, nuclei: ReportedNuclei) -> None: ...

    def finish(self) -> None:
        """Make the file whole."""

    def close(self) -> None:
        """Let go of it, whole or not; also after `finish`."""


class Outputs:
    """The files of one image; `open_outputs` makes it."""

    def __init__(self, folder: Path, shape: tuple[int, int], pixel_size_um: float | None) -> None:
        self._folder, self._shape, self._pixel_size_um = folder, shape, pixel_size_um
        self._totals = Totals(pixel_size_um)
        self._canvas: LabelCanvas | None = None
        self._writers: dict[str, Writer] = {}

    def add(self, window: Window) -> None:
        """Write the nuclei that `window` reports; an id is reported once. Raises `ResourceError` on a full disk."""
        bottom, right = window.top_px + window.labels_HW.shape[0], window.left_px + window.labels_HW.shape[1]
        assert window.image_HW.shape == window.labels_HW.shape, "image and labels of a window differ in shape"
        assert min(window.top_px, window.left_px) >= 0, "a window lies outside of its image"
        assert bottom <= self._shape[0], "a window lies outside of its image"
        assert right <= self._shape[1], "a window lies outside of its image"
        nuclei = ReportedNuclei(window, self._shape, self._pixel_size_um)
        self._totals.add(nuclei)
        if self._canvas is not None:
            with writing(self._folder):
                self._canvas.paint(nuclei)
        for name, writer in self._writers.items():
            with writing(self._folder / name):
                writer.add(nuclei)

    @property
    def summary(self) -> Summary:
        """The image in a few figures, from the windows added so far; also when the files are published."""
        return self._totals.summary()

    def _open_writers(self, names: set[OutputName], scratch: Path, stem: str) -> None:
        if names & {"masks", "overlay"}:
            self._canvas = LabelCanvas(scratch / "canvas", self._shape)
        for name in OUTPUT_NAMES:
            if name in names:
                file_name = stem + _ENDINGS[name]
                self._writers[file_name] = self._open_writer(name, scratch / file_name)

    def _open_writer(self, name: OutputName, path: Path) -> Writer:
        match name:
            case "masks":
                assert self._canvas is not None
                return MasksWriter(path, self._canvas)
            case "overlay":
                assert self._canvas is not None
                return OverlayWriter(path, self._shape, self._canvas)
            case "rois":
                return RoisWriter(path)
            case "geojson":
                return GeoJsonWriter(path)
            case "measurements":
                return MeasurementsWriter(path)

    def _publish(self, scratch: Path) -> None:
        for name, writer in self._writers.items():
            with writing(self._folder / name):
                writer.finish()
        for name in self._writers:
            with writing(self._folder / name):
                os.replace(scratch / name, self._folder / name)

    def _close(self) -> None:
        for close in [each.close for each in (*self._writers.values(), self._canvas) if each is not None]:
            with contextlib.suppress(OSError):  # what is not on disk by now is thrown away with the rest
                close()


@contextlib.contextmanager
def open_outputs(
    names: Iterable[OutputName], folder: Path, stem: str, shape: tuple[int, int], pixel_size_um: float | None
) -> Iterator[Outputs]:
    """Within, `Outputs` takes the windows of an image of `shape` (rows, columns); at the end its files are in `folder`.

    They are written in a hidden folder in there and renamed when all are whole, so that files of these names are
    replaced. Where the block ends with an exception, KeyboardInterrupt among them, nothing of it is left and earlier
    files stay as they were. Raises `ConfigError` for an unknown name, `DataError` for a pixel size that is no positive
    number and a `stem` too long for the names of its files, `ResourceError` where `folder` cannot be written.
    """
    wanted = set(names)
    if unknown := sorted(wanted - set(OUTPUT_NAMES)):
        raise ConfigError(f"There is no output '{unknown[0]}'; choose from {', '.join(OUTPUT_NAMES)}.")
    if pixel_size_um is not None and not (pixel_size_um > 0 and math.isfinite(pixel_size_um)):
        raise DataError(f"{stem} has a pixel size of {pixel_size_um} um; give the side of a pixel, above 0, or none.")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        most_bytes = os.pathconf(folder, "PC_NAME_MAX")
        longest = max(output_files(wanted, stem), key=_num_bytes, default="")
        if _num_bytes(longest) > most_bytes:
            raise DataError(
                f"{longest} has {_num_bytes(longest)} bytes, and a name in {folder} at most {most_bytes}; shorten the "
                "name of the image"
            )
        scratch = tempfile.TemporaryDirectory(prefix=".", suffix=".tmp", dir=folder, ignore_cleanup_errors=True)
    try:
        with scratch as scratch_name:
            outputs = Outputs(folder, shape, pixel_size_um)
            try:
                with writing(folder):
                    outputs._open_writers(wanted, Path(scratch_name), stem)
                yield outputs
                outputs._publish(Path(scratch_name))
            finally:
                outputs._close()
    except KeyboardInterrupt:
        scratch.cleanup()  # it may have come while that went on
        raise


def _num_bytes(name: str) -> int:
    return len(os.fsencode(name))
