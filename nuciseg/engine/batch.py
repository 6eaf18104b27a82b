"""How far a batch of images has come, kept where its results lie, so that another run can go on with it.

Beside the summary lies what the images were predicted with: a batch that goes on with other weights or another channel
would be a mixture that nobody can tell from its table.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path

from nuciseg import __version__
from nuciseg.engine.checkpoint import METADATA_FILE, WEIGHTS_FILE
from nuciseg.engine.files import Request
from nuciseg.errors import CheckpointError, ConfigError, DataError, writing
from nuciseg.images import write_bytes
from nuciseg.outputs import OUTPUT_NAMES, ImageResult, output_files, read_summary, stem_of, write_summary

SUMMARY_FILE = "summary.csv"
SETTINGS_FILE = "predict.json"
SAVE_S = 5.0  # so much a process that is killed may lose of the summary
NOT_COMPARED = ("nuciseg", "checkpoint", "folder")  # weights and images that were moved are the same

Settings = Mapping[str, str | int | float | None]


def settings_of(checkpoint: Path, request: Request) -> Settings:
    """All that changes what is found in an image, and where the relative names of images begin.

    Raises CheckpointError where `checkpoint` cannot be read.
    """
    weights = blake2b(digest_size=16)
    try:
        for name in (WEIGHTS_FILE, METADATA_FILE):
            weights.update((checkpoint / name).read_bytes())
    except OSError as error:
        raise CheckpointError(
            f"{error.filename} cannot be read ({error.strerror}); copy the checkpoint again"
        ) from error
    return {
        "nuciseg": __version__,
        "folder": os.getcwd(),
        "checkpoint": str(checkpoint),
        "weights": weights.hexdigest(),
        "channel": request.channel,
        "plane": request.plane,
        "diameter": None if request.diameter is None else str(request.diameter),
        "pixel_size_um": request.pixel_size_um,
        "tile_px": request.tile_px,
    }


class Batch:
    """The results so far, at most one of each stem, by which their files are named. Rows are kept in the order of
    `files`, the images asked for, each with a stem of its own; others come after them."""

    def __init__(self, out: Path, settings: Settings, files: Iterable[str]) -> None:
        self._out, self._settings = out, settings
        self._files = {stem_of(file): file for file in files}
        self._order = {stem: number for number, stem in enumerate(self._files)}
        self._rows: dict[str, ImageResult] = {}
        self._is_begun = False
        self._saved_s = -math.inf

    def refuse_results_of_others(self) -> None:
        """Raise DataError where results of another image, by the table of an earlier run, would be replaced."""
        earlier: list[ImageResult] = []
        with contextlib.suppress(DataError):  # a table that cannot be read shows nothing; `resume` complains
            earlier = read_summary(self._out / SUMMARY_FILE)
        folder = self._earlier_folder()
        for row in earlier:
            stem = stem_of(os.path.join(folder, row.file))
            file = self._files.get(stem)
            if row.summary is None or file is None or _is_same(row.file, folder, file):
                continue
            for name in output_files(OUTPUT_NAMES, stem):
                if os.path.exists(self._out / name):  # False for a name that is too long
                    raise DataError(
                        f"{self._out / name} is of {row.file} and would be replaced by that of {file}; choose another "
                        "--out"
                    )

    def resume(self, request: Request) -> None:
        """Take over what an earlier run has finished, as far as all files that `request` names are there.

        Raises ConfigError where it predicted with other settings, DataError where its records cannot be read,
        ResourceError where they cannot be written.
        """
        if not (self._out / SUMMARY_FILE).is_file():
            return
        _refuse_other_settings(self._out, self._settings)
        folder = self._earlier_folder()
        is_elsewhere = folder != self._settings["folder"]
        for row in read_summary(self._out / SUMMARY_FILE):
            stem = stem_of(os.path.join(folder, row.file))
            names = output_files(request.outputs, stem)
            if row.summary is not None and all(os.path.isfile(self._out / name) for name in names):
                named_before = os.path.join(folder, row.file) if is_elsewhere else row.file
                self._rows[stem] = replace(row, file=self._files.get(stem, named_before))
        self._is_begun = bool(self._rows)
        if self._is_begun and is_elsewhere:
            self.save()  # first: the names in it hold whatever the settings say
            self._write_settings()

    def rows(self) -> list[ImageResult]:
        """Those of the images asked for."""
        return [self._rows[stem] for stem in self._files if stem in self._rows]

    def is_done(self, file: str) -> bool:
        return stem_of(file) in self._rows

    def add(self, row: ImageResult) -> None:
        """Raises ResourceError where the summary cannot be written."""
        self._rows[stem_of(row.file)] = row
        if time.monotonic() - self._saved_s >= SAVE_S:
            self.save()

    def save(self) -> None:
        """Write the summary, but none of a single image that could not be used. Raises ResourceError."""
        if len(self._rows) < 2 and all(row.summary is None for row in self._rows.values()):
            return
        if not self._is_begun:
            # In this order no summary ever lies beside settings that are not its own.
            with writing(self._out / SUMMARY_FILE), contextlib.suppress(FileNotFoundError):
                (self._out / SUMMARY_FILE).unlink()
            self._write_settings()
            self._is_begun = True
        stems = sorted(self._rows, key=lambda stem: self._order.get(stem, len(self._order)))
        write_summary(self._out / SUMMARY_FILE, [self._rows[stem] for stem in stems])
        self._saved_s = time.monotonic()

    def _write_settings(self) -> None:
        write_bytes(self._out / SETTINGS_FILE, json.dumps(dict(self._settings), indent=1).encode())

    def _earlier_folder(self) -> str:
        """Where the relative names of an earlier run begin; of one that does not say, here."""
        try:
            return str(json.loads((self._out / SETTINGS_FILE).read_text(encoding="utf-8"))["folder"])
        except (OSError, ValueError, KeyError, TypeError):
            return os.getcwd()


def _is_same(earlier: str, folder: str, file: str) -> bool:
    """Whether an image that was named `earlier` in `folder` is the one that is called `file` here."""
    path = os.path.realpath(os.path.join(folder, earlier))
    # Images that were moved together with the folder that they were named in have the same name, and are gone there.
    return path == os.path.realpath(file) or (earlier == file and not os.path.lexists(path))


def _refuse_other_settings(out: Path, settings: Settings) -> None:
    path = out / SETTINGS_FILE
    cure = "leave out --resume to predict all images anew, or choose another --out"
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        different = [name for name in settings if name not in NOT_COMPARED and earlier[name] != settings[name]]
        before = str(earlier["checkpoint"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} does not say what the images in {out} were predicted with ({error}); {cure}"
        ) from error
    if not different:
        return
    name = different[0]
    if name != "weights":
        what = f"{name} {earlier[name]}, not {settings[name]}"
    elif before != settings["checkpoint"]:
        what = f"the checkpoint {before}, not {settings['checkpoint']}"
    else:
        what = f"other weights than now lie in {before}"
    raise ConfigError(f"the images in {out} were predicted with {what}; give the same again, {cure}")
