"""A page of what a study found, from its searches: `python -m nuciseg.study [SEARCHES ...] [--final EVALUATION]`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from nuciseg.cli import Parser, run_verb

DESCRIPTION = """\
Write docs/study.md from the records of finished searches.

Each search is one question: a grid of arms, each with the same seeds or the same folds, whose YAML begins with a line
`# Question   How much ...?`. Of each search named a small record is kept in OUT/study; the page, its picture and the
`# Answer` of each YAML are made of all records there, so without SEARCHES they are just written again.
A search that is not finished is left out.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Keep what the searches found, write the page and the answers, say where they lie. Raises NucisegError."""
    args = _parser().parse_args(argv)

    from nuciseg.reporting.study import write_study

    result = write_study(args.searches, args.final, args.out, args.questions)
    for folder in result.unfinished:
        resume = f"python -m nuciseg.tune --resume {shlex.quote(str(folder))}"
        print(f"not finished, so left out: {folder}; if it is not running, go on with: {resume}")
    for path in result.records:
        print(f"record: {path}")
    for path in result.answers:
        print(f"answer: {path}")
    print(f"study:  {result.page}")


def _parser() -> Parser:
    parser = Parser(
        "study", DESCRIPTION, usage="%(prog)s [SEARCHES ...] [--final EVALUATION] [--out DIR] [--questions DIR]"
    )
    parser.add_argument(
        "searches", type=Path, nargs="*", metavar="SEARCHES",
        help="folder of a search that tune printed, or of several (path; default: none, only what is kept already)",
    )  # fmt: skip
    parser.add_argument(
        "--final", type=Path, metavar="EVALUATION",
        help="folder that evaluate wrote for the recommended model (path; default: the one kept already, if any)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=Path("docs"), metavar="DIR",
        help="folder of study.md, of study/ with the records, and of images/study.png (path, default: docs)",
    )  # fmt: skip
    parser.add_argument(
        "--questions", type=Path, default=Path("tune_configs"), metavar="DIR",
        help="folder of the searches' YAML files, NAME.yaml for the search in a folder NAME (path, default: "
        "tune_configs)",
    )  # fmt: skip
    return parser


if __name__ == "__main__":
    run_verb(main)
