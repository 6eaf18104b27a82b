"""Print the names of the images that StarDist's example notebooks hold out for validation, one a line.

    python scripts/stardist_split.py DATA > validation.txt
    python -m nuciseg.train --config tune_configs/fields.yaml --data.root DATA --data.validation_list validation.txt

DATA is a folder in the `labels` layout. Of its n training images, in the order of their names, those are held out that
are the last 15 % (rounded) of `numpy.random.RandomState(42).permutation(n)`: 67 of dsb2018's 447.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from nuciseg.cli import run_verb
from nuciseg.data.formats import labels

SEED, HELD_OUT = 42, 0.15


def held_out(ids: list[str]) -> list[str]:
    """The held-out ids, sorted."""
    num_held_out = max(1, round(HELD_OUT * len(ids)))
    chosen = np.random.RandomState(SEED).permutation(len(ids))[-num_held_out:]
    ordered = sorted(ids)
    return sorted(ordered[index] for index in chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA", help="folder with train/images and train/masks")
    args = parser.parse_args()
    print("\n".join(held_out([record.id for record in labels.read(args.data, "train")])))


if __name__ == "__main__":
    run_verb(main)
