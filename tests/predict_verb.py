"""`predict` as a user calls it, in this process: importing torch once more takes seconds."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import tifffile
from drawn_fields import draw_discs

from nuciseg.cli import run_verb
from nuciseg.predict import main


def predict(*words: str | Path) -> int:
    """The exit code of the verb."""
    with pytest.raises(SystemExit) as exit_:
        run_verb(lambda: main([str(word) for word in words]))
    return int(str(exit_.value.code))


def read_summary_rows(out: Path) -> list[dict[str, str]]:
    with (out / "summary.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def num_masks(path: Path) -> int:
    """How many nuclei a label file has; they are numbered without gaps."""
    labels = np.unique(tifffile.imread(path))
    assert labels.tolist() == list(range(len(labels)))
    return len(labels) - 1


def write_fields(folder: Path, count: int, side_px: int = 96) -> list[Path]:
    """So many drawn fields, `field_N.tif`."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"field_{number:02d}.tif" for number in range(count)]
    for seed, path in enumerate(paths):
        tifffile.imwrite(path, draw_discs((side_px, side_px), 18, seed=50 + seed)[0])
    return paths
