"""Look at a data set before training on it: figures, faults, leaks, the ceiling, and what to train with.

python -m nuciseg.explore DATA --out explore.html
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nuciseg.cli import Parser, run_verb
from nuciseg.errors import ConfigError

if TYPE_CHECKING:
    from nuciseg.exploring.findings import Findings

# numpy and all that needs it are imported where they are used, so that --help answers at once.

DESCRIPTION = """\
Look at a data set before training on it.

Writes one HTML page that needs no network: sizes, light and nuclei; examples; faults in the labels, each with
its file; near-duplicates and groups that would leak across a split; the ceiling, which is the score of a perfect
network for each target; what trivial methods score; and a recommendation that ends in a command. Files that
cannot be used are reported on the page, and the exit code is 0.
"""
STDOUT = "-"


def main(argv: Sequence[str] | None = None) -> None:
    """Explore and write the page; raises NucisegError where there is no data or nothing can be written."""
    args = _parser().parse_args(argv)
    if args.data is None and args.data_format != "synthetic":
        raise ConfigError("no data was named; give the folder of a data set, as in python -m nuciseg.explore DATA")

    from nuciseg.config import load_config
    from nuciseg.exploring.findings import explore, to_json
    from nuciseg.exploring.page import write_findings
    from nuciseg.exploring.reading import open_data
    from nuciseg.images import require_writable, write_bytes

    flags = {"root": args.data, "format": args.data_format, "cache_dir": args.data_cache_dir}
    given = {key: str(value) for key, value in flags.items() if value is not None}
    config = load_config(overrides={"data": given}).data
    data = open_data(config)
    to_stdout = args.json == STDOUT
    for path in [args.out] if to_stdout or args.json is None else [args.out, Path(args.json)]:
        require_writable(path.parent)
    findings = explore(data, config, say=lambda what: print(what, file=sys.stderr, flush=True))
    if args.json is not None:
        text = json.dumps(to_json(findings), indent=1, allow_nan=False) + "\n"
        if to_stdout:
            sys.stdout.write(text)
        else:
            write_bytes(Path(args.json), text.encode())
    write_findings(findings, args.out)
    print(summary(findings, args.out), file=sys.stderr if to_stdout else sys.stdout)


def summary(findings: Findings, out: Path) -> str:
    """What the command prints at its end."""
    counts = findings.counts()
    by_split = ", ".join(f"{len(findings.of(split))} {split}" for split in findings.splits) or "none readable"
    lines = [f"{counts['images']} images ({by_split}), {counts['nuclei']} nuclei"]
    kinds = ", ".join(f"{kind} {found}" for kind, (found, _) in findings.fault_counts.items())
    lines.append(f"faults: {kinds or 'none'}")
    leaks = findings.leaks
    lines.append(
        f"near-duplicates: {len(findings.pairs)}, of them {len(leaks.train_test)} in train and test, "
        f"{len(leaks.train_validation)} in train and validation; groups in train and test: {len(leaks.groups)}"
    )
    for target, scores in findings.ceiling_totals:
        flat = scores.flat_summary()
        lines.append(
            f"ceiling of {target.kind}, {target.width_px} px: "
            f"{scores.clusters_separated} of {scores.clusters} separated, "
            f"AP .5 / .7 / .9 {flat['ap50_pooled']:.3f} / {flat['ap70_pooled']:.3f} / {flat['ap90_pooled']:.3f}"
        )
    if findings.recommendation:
        lines.append(f"recommended:\n  {findings.recommendation.command}")
    return "\n".join([*lines, f"page: {out}"])


def _parser() -> argparse.ArgumentParser:
    parser = Parser("explore", DESCRIPTION, usage="%(prog)s DATA [--out FILE] [--json FILE] [--data.format NAME]")
    add = parser.add_argument
    add("data", nargs="?", metavar="DATA", help="folder of the data set, s3:// and gs:// too (path, required)")
    add(
        "--out", type=Path, default=Path("explore.html"), metavar="FILE",
        help="page to write (path, default: explore.html)",
    )  # fmt: skip
    add("--json", metavar="FILE", help="write the figures there too, - for standard output (path, default: nowhere)")
    add(
        "--data.format", dest="data_format", metavar="NAME",
        help="layout of the data, a name that train --help lists; synthetic needs no DATA (default: auto)",
    )  # fmt: skip
    add(
        "--data.cache_dir", dest="data_cache_dir", type=Path, metavar="DIR",
        help="folder for decoded images (path, default: the user's cache folder)",
    )  # fmt: skip
    return parser


if __name__ == "__main__":
    run_verb(main)
