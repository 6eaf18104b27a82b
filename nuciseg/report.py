"""A page of runs and searches from their own records: `python -m nuciseg.report RUN_OR_SEARCH... [--out FILE]`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nuciseg.cli import Parser, folder_or_bucket, run_verb

DESCRIPTION = """\
Write one HTML page of runs and searches from what lies in their folders; no account, no network.

A search: its trials ranked, learning curves, parallel coordinates and importance of its parameters, the best and
worst clusters, what failed. Several runs or searches are compared as far as they were scored on the same images.
A run that goes on, or was killed, is shown as far as it got.
"""
PAGE_FILE = "report.html"


def main(argv: Sequence[str] | None = None) -> None:
    """Read the folders, write the page, say where it lies. Raises NucisegError."""
    args = _parser().parse_args(argv)

    from nuciseg.distributed.mirror import fetched_to_read
    from nuciseg.distributed.trials import searches_in
    from nuciseg.reporting.page import write_report
    from nuciseg.reporting.records import read_folder

    locations: list[Path | str] = list(dict.fromkeys(args.folders))
    named = [fetched_to_read(location, lambda name: not name.endswith(".safetensors")) for location in locations]
    in_folder = len(locations) == 1 and isinstance(locations[0], Path)
    out = args.out or (named[0] / PAGE_FILE if in_folder else Path(PAGE_FILE))
    folders = [folder for name in named for folder in searches_in(name) or [name]]
    write_report([read_folder(folder) for folder in folders], out)
    print(f"report: {out}")


def _parser() -> Parser:
    parser = Parser("report", DESCRIPTION, usage="%(prog)s RUN_OR_SEARCH [RUN_OR_SEARCH ...] [--out FILE]")
    parser.add_argument(
        "folders",
        type=folder_or_bucket,
        nargs="+",
        metavar="RUN_OR_SEARCH",
        help="folder that train or tune printed, s3:// and gs:// too (path)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE",
        help=f"page to write (path, default: {PAGE_FILE} in the folder; of several folders, or one in a bucket, in "
        "this one)",
    )  # fmt: skip
    return parser


if __name__ == "__main__":
    run_verb(main)
