"""Cut clusters of touching nuclei out of labelled fields: a data set to train on.

python -m nuciseg.cut FIELDS --out clusters
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nuciseg.cli import Parser, run_verb
from nuciseg.errors import DataError

if TYPE_CHECKING:
    from nuciseg.data.cutting_folders import CutCounts
    from nuciseg.data.synthetic import SplitName

DESCRIPTION = """\
Cut clusters of touching nuclei out of labelled fields, as a data set in the nucleus format.

For each cluster writes to --out
  {train,test}/FIELD_NUMBER.png            8 bit: 0 outside of the nuclei, their outer border drawn in 255
  {train,test}/solutions/FIELD_NUMBER.png  the complete border of every nucleus in 255
  {train,test}/groups.csv                  the field of each cluster: training and validation never share one

8-bit light stays as it is, but for 255, which becomes 254; 16-bit light is stretched to 1 ... 254, each cluster between
its own percentiles 0.1 and 99.9. A cluster whose nuclei would not be read back from the drawn border is left out. A
field that cannot be read is reported and left out, and the exit code is 2.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Cut all fields and print what became of them; raises NucisegError, for bad fields after all others are done."""
    args = _parser().parse_args(argv)

    from nuciseg.data.cutting import CutSettings
    from nuciseg.data.cutting_folders import cut_folder, read_fields, scale_for_diameter
    from nuciseg.data.formats import detect_format, get_format

    layout = detect_format(args.fields) if args.format == "auto" else get_format(args.format)
    fields = read_fields(layout, args.fields)
    scale = args.scale
    if args.diameter is not None:
        scale = scale_for_diameter(layout, fields, args.diameter)
        print(f"scale {scale:.3f}: the median nucleus becomes {args.diameter:g} px wide")
    settings = CutSettings(
        min_nuclei=args.min_nuclei,
        max_nuclei=args.max_nuclei,
        gap_px=args.gap,
        min_area_px=args.min_area,
        max_side_px=args.max_side,
        scale=scale,
        keep_edge=args.keep_edge,
        marking=args.marking,
    )
    counts = cut_folder(
        layout, fields, args.out, settings, lambda error: print(f"nuciseg: {error}", file=sys.stderr, flush=True)
    )
    print(_summary(counts))
    print(f"written to {args.out}")
    if "train" in counts and counts["train"].num_clusters:
        print(f"next: python -m nuciseg.train --data.root {shlex.quote(str(args.out))}")
    if num_bad := sum(each.num_bad_fields for each in counts.values()):
        num_fields = sum(each.num_fields for each in counts.values())
        raise DataError(f"{num_bad} of {num_fields} fields could not be cut (reasons above); the rest is done")


def _summary(counts: Mapping[SplitName, CutCounts]) -> str:
    lines = [
        f"{split}: {each.num_clusters} clusters with {each.num_nuclei} nuclei, from {each.num_fields_with_clusters} of "
        f"{each.num_fields} fields"
        for split, each in counts.items()
    ]
    left_out = sum((each.left_out for each in counts.values()), Counter[str]())
    lines += [f"left out: {number} {reason}" for reason, number in left_out.most_common()]
    if num_16_bit := sum(each.num_16_bit_fields for each in counts.values()):
        lines.append(f"16 bit: the light of {num_16_bit} fields was stretched to 8 bit, each cluster by itself")
    return "\n".join(lines)


def _number(kind: type[int] | type[float], least: float, above: bool = False) -> Callable[[str], float]:
    """An argument's type: a number from `least` on, or above it."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not (value > least if above else value >= least) or value == float("inf"):
            what = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text!r} is not a {what} {'above' if above else 'from'} {least:g}")
        return value

    return parse


def _parser() -> argparse.ArgumentParser:
    parser = Parser("cut", DESCRIPTION, usage="%(prog)s FIELDS --out DIR [--diameter PX] [--marking none] [...]")
    add = parser.add_argument
    add("fields", type=Path, metavar="FIELDS", help="folder of images with labels, in a layout that train reads (path)")
    add(
        "--out", type=Path, required=True, metavar="DIR",
        help="folder for the clusters; a new or empty one (path, required)",
    )  # fmt: skip
    add("--format", default="auto", metavar="NAME", help="layout of FIELDS, as train --help lists them (default: auto)")
    add("--min-nuclei", type=_number(int, 1), default=2, metavar="N", help="fewest nuclei of a cluster (default: 2)")
    add("--max-nuclei", type=_number(int, 1), metavar="N", help="most nuclei of a cluster (default: any number)")
    add(
        "--gap", type=_number(float, 0), default=0.0, metavar="PX",
        help="nuclei with at most this background between them are one cluster, pixels of the field (default: 0: they "
        "touch)",
    )  # fmt: skip
    add(
        "--min-area", type=_number(int, 0), default=0, metavar="PX",
        help="clusters with a smaller nucleus are left out, square pixels of the field (default: 0)",
    )  # fmt: skip
    add(
        "--max-side", type=_number(int, 1), metavar="PX",
        help="clusters with a longer side are left out, pixels as written (default: any length)",
    )  # fmt: skip
    add("--keep-edge", action="store_true", help="also clusters that the field's edge cuts (default: left out)")
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--scale", type=_number(float, 0, above=True), default=1.0, metavar="FACTOR",
        help="resize by this factor (default: 1)",
    )  # fmt: skip
    size.add_argument(
        "--diameter", type=_number(float, 0, above=True), metavar="PX",
        help="resize all by one factor, so that the median nucleus of the training fields becomes as wide as this; "
        "width: of a disk of the same area (default: not resized)",
    )  # fmt: skip
    add(
        "--marking", choices=("drawn", "none"), default="drawn",
        help="the outer border in 255 on the image, or the light alone (default: drawn)",
    )  # fmt: skip
    return parser


if __name__ == "__main__":
    run_verb(main)
