"""Separate the nuclei of images: a label TIFF and a picture with outlined nuclei for each.

python -m nuciseg.predict --checkpoint nuciseg/separator images/*.png --out labels
python -m nuciseg.predict --checkpoint runs/RUN images/*.png --out labels
"""

from __future__ import annotations

import argparse
import glob
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nuciseg.cli import Parser, run_verb
from nuciseg.engine.shipped import describe_shipped
from nuciseg.errors import DataError

if TYPE_CHECKING:
    from nuciseg.engine.network import Network
    from nuciseg.types import Instances

# torch and all that needs it are imported where they are used, so that --help answers at once.

OVERLAY_PX = 384  # small images are enlarged in the picture by a whole factor, so that outlines are seen

DESCRIPTION = f"""\
Separate the nuclei of images.

For each image STEM.* writes to --out
  STEM_masks.tif     labels: int32, rows x columns as the image, 0 background, nuclei 1 to N
  STEM_overlay.png   the image with its nuclei outlined; enlarged where it is smaller than {OVERLAY_PX} pixels

An image that cannot be read is reported and left out, and the exit code is 2.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Predict all inputs; raises NucisegError, for an image that could not be predicted after all others are done."""
    args = _parser().parse_args(argv)
    paths = expand_inputs(args.input, args.out)

    from nuciseg.engine.checkpoint import find_checkpoint
    from nuciseg.engine.network import load_network
    from nuciseg.engine.precision import local_device
    from nuciseg.images import require_writable

    checkpoint_path = find_checkpoint(args.checkpoint)
    network, _ = load_network(checkpoint_path, local_device())
    require_writable(args.out)
    failed = num_nuclei = doubtful = 0
    for path in paths:
        try:
            instances = predict_file(network, path, args.out)
        except DataError as error:
            if len(paths) == 1:
                raise
            failed += 1
            print(f"nuciseg: {error}", file=sys.stderr)
            continue
        num_found = len(instances.confidences_N)
        num_nuclei += num_found
        doubtful += bool(instances.num_open_borders)
        flag = f", open borders: {instances.num_open_borders}, look at it" if instances.num_open_borders else ""
        print(f"{path}: {num_found} nuclei{flag}")
    done = len(paths) - failed
    print(f"{num_nuclei} nuclei in {done} images, written to {args.out} (checkpoint {checkpoint_path})")
    if doubtful:
        print(f"images whose borders do not close, flagged above, may be cut wrongly: {doubtful}")
    if failed:
        raise DataError(f"{failed} of {len(paths)} images could not be predicted (reasons above); the rest is done")


def predict_file(network: Network, path: Path, out: Path) -> Instances:
    """Write labels and picture of the image at `path`; returns its nuclei. Raises DataError."""
    from nuciseg.engine.prediction import predict_image
    from nuciseg.images import read_image, write_labels_tiff, write_png
    from nuciseg.plots import overlay_rgb

    image_HW = read_image(path)
    instances = predict_image(network, image_HW, str(path))
    scale = max(1, OVERLAY_PX // max(image_HW.shape))
    write_labels_tiff(out / f"{path.stem}_masks.tif", instances.labels_HW)
    write_png(out / f"{path.stem}_overlay.png", overlay_rgb(image_HW, instances.labels_HW, scale=scale))
    return instances


def expand_inputs(inputs: Iterable[str], out: Path) -> list[Path]:
    """The image files that `inputs` (files, folders, patterns) name, each once, in order.

    Raises DataError for an input that names none, for two files whose results would have the same name, and where a
    folder is also the one to write to: a second run would take the first one's results for images.
    """
    paths: dict[Path, Path] = {}
    for each in inputs:
        found = _files_of(each, out)
        if not found:
            raise DataError(f"{each} names no image; give an image file, a folder of images or a pattern")
        for path in found:
            paths.setdefault(path.resolve(), path)
    by_stem: dict[str, Path] = {}
    for path in paths.values():
        other = by_stem.setdefault(path.stem, path)
        if other != path:
            raise DataError(f"{other} and {path} would both become {path.stem}_masks.tif; predict them separately")
    return list(paths.values())


def _files_of(text: str, out: Path) -> list[Path]:
    from nuciseg.images import IMAGE_SUFFIXES

    path = Path(text)
    if path.is_dir():
        if path.resolve() == out.resolve():
            raise DataError(f"--out {out} is the folder of the images; choose another for the results")
        return sorted(each for each in path.iterdir() if _is_image(each, IMAGE_SUFFIXES))
    if path.exists():
        return [path]
    return sorted(each for each in map(Path, glob.glob(text, recursive=True)) if _is_image(each, IMAGE_SUFFIXES))


def _is_image(path: Path, suffixes: tuple[str, ...]) -> bool:
    return path.suffix.lower() in suffixes and not path.name.startswith(".") and path.is_file()


def _parser() -> argparse.ArgumentParser:
    parser = Parser("predict", DESCRIPTION, usage="%(prog)s --checkpoint PATH INPUT... [--out DIR]")
    parser.add_argument(
        "input", nargs="+", metavar="INPUT",
        help="image file, folder of images or quoted pattern; 8- or 16-bit grey PNG, TIFF or JPEG of any size",
    )  # fmt: skip
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="PATH",
        help="a run's folder (its best checkpoint is taken), one checkpoint's, or the name of weights that come with "
        f"nuciseg: {describe_shipped()} (path or name, required)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=Path("predictions"), metavar="DIR",
        help="folder for the results; files of the same name are replaced (path, default: predictions)",
    )  # fmt: skip
    return parser


if __name__ == "__main__":
    run_verb(main)
