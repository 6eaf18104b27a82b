"""Print the names of the images that StarDist's example notebooks hold out for validation, one a line.

    python scripts/stardist_split.py DATA > validation.txt
    python -m nuciseg.train --config tune_configs/fields.yaml --data.root DATA --data.validation_list validation.txt

DATA is a folder in the `labels` layout.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from nuciseg.cli import run_verb
from nuciseg.data.formats import labels
from nuciseg.data.splits import held_out_by_stardist


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA", help="folder with train/images and train/masks")
    args = parser.parse_args()
    print("\n".join(held_out_by_stardist([record.id for record in labels.read(args.data, "train")])))


if __name__ == "__main__":
    run_verb(main)
