"""Put a trained checkpoint into the package, so that everybody who installs it can name it: `nuciseg/NAME`.

    python scripts/ship.py runs/RUN separator

Run it in the repository's folder, after `python -m nuciseg.evaluate` has scored the checkpoint with --split
validation and with --split test. It reads the data once more, to say on the model card what they are; the card's words
are those of scripts/model_cards/NAME.md, its figures come from the checkpoint, the scores and the data. At most 10 MB.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from nuciseg.cli import run_verb

STUDY = Path("docs") / "study" / "crossvalidation.json"


def main() -> None:
    """Ship, say where. Raises NucisegError."""
    args = _parser().parse_args()

    from nuciseg.reporting.shipping import CardSources, ship

    sources = CardSources(
        words=args.words or Path("scripts") / "model_cards" / f"{args.name}.md",
        recipe=args.recipe or Path("tune_configs") / f"{args.name}.yaml",
        scores=args.scores,
        crossvalidation=args.crossvalidation or (STUDY if STUDY.exists() else None),
        data_root=args.data_root,
    )
    folder = ship(args.checkpoint, args.name, sources)
    print(f"written to {folder}; read its README.md, then commit it")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="a run's folder (its best checkpoint is taken) or one's own"
    )
    add("name", metavar="NAME", help="what it is called from now on, without nuciseg/")
    add(
        "--scores", type=Path, action="append", default=[], metavar="FILE",
        help="scores.json of an evaluation, once for each split (default: those in the run's folder)",
    )  # fmt: skip
    add(
        "--data.root", dest="data_root", type=Path, metavar="DIR",
        help="folder of the data (default: what the checkpoint was trained on)",
    )  # fmt: skip
    add("--recipe", type=Path, metavar="FILE", help="what it was trained with (default: tune_configs/NAME.yaml)")
    add("--words", type=Path, metavar="FILE", help="words of the card (default: scripts/model_cards/NAME.md)")
    add(
        "--crossvalidation", type=Path, metavar="FILE",
        help=f"scores of a cross-validation, for the card (default: {STUDY}, where it is there)",
    )  # fmt: skip
    return parser


if __name__ == "__main__":
    run_verb(main)
