"""Write a network for other programs: as ONNX, or as a bioimage.io model package.

python -m nuciseg.export nuciseg/separator --out separator.onnx
python -m nuciseg.export runs/RUN --format bioimageio --out model.zip --author NAME --license CC-BY-4.0
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nuciseg.cli import Parser, run_verb
from nuciseg.engine.shipped import describe_shipped, is_shipped
from nuciseg.errors import ConfigError

if TYPE_CHECKING:
    from nuciseg.engine.checkpoint import Checkpoint
    from nuciseg.engine.model_zoo import Credits

# torch and all that needs it are imported where they are used, so that --help answers at once.

ENDINGS = {"onnx": ".onnx", "bioimageio": ".zip"}

DESCRIPTION = """\
Write a network for other programs.

  onnx        one file: normalised images to probabilities; stride, names of the maps, normalisation and thresholds of
              the decoding stand in its metadata
  bioimageio  a package of the bioimage.io model zoo: the same with preprocessing, test images, cover and README

An ONNX file is written if it answers as PyTorch does, a package if it passes bioimage.io's own test. Nothing is fetched
or uploaded. Needs pip install 'nuciseg[export]'.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Export one checkpoint and print what was checked; raises NucisegError, and then nothing is written."""
    args = _parser().parse_args(argv)
    _refuse_out(args.out, args.format)

    import torch

    from nuciseg.engine.checkpoint import find_checkpoint
    from nuciseg.engine.exporting import MAX_DIFFERENCE, ONNX_PACKAGES, OPSET, export_onnx, require_packages
    from nuciseg.engine.model_zoo import pack_for_model_zoo, require_model_zoo_packages
    from nuciseg.engine.network import load_network
    from nuciseg.images import require_writable, write_bytes

    checkpoint_path = find_checkpoint(args.checkpoint)
    if args.format == "bioimageio":
        require_model_zoo_packages()
    else:
        require_packages(ONNX_PACKAGES)
    network, checkpoint = load_network(checkpoint_path, torch.device("cpu"))
    require_writable(args.out.parent)
    onnx = export_onnx(network)
    print(
        f"ONNX, opset {OPSET}: probabilities differ from PyTorch's by {onnx.max_difference:.1e} at most "
        f"(allowed: {MAX_DIFFERENCE:g}; 2 sizes, batches of 1 and 2)"
    )
    data = onnx.data
    if args.format == "bioimageio":
        data, said = pack_for_model_zoo(network, onnx, _credits(args, checkpoint_path, checkpoint))
        print(f"bioimage.io test: {said}")
        if network.config.data.normalization.ignore_extremes:
            print(
                "beware: zeroed background and saturated pixels are marks to this network, and the package's "
                "preprocessing cannot say so; on images with such pixels it may take background for nuclei (its README)"
            )
    write_bytes(args.out, data)
    print(f"written to {args.out}, {len(data) / 1e6:.1f} MB (checkpoint {checkpoint_path})")


def _refuse_out(out: Path, format_: str) -> None:
    if out.is_dir():
        raise ConfigError(f"--out {out} is a folder; name a file in it, as {out / ('model' + ENDINGS[format_])}")
    if out.suffix != ENDINGS[format_]:
        raise ConfigError(
            f"--out {out} does not end in {ENDINGS[format_]}, as files of --format {format_} do; rename it"
        )


def _credits(args: argparse.Namespace, folder: Path, checkpoint: Checkpoint) -> Credits:
    """A shipped checkpoint has its card, authors and licence; of another one only its user can know them."""
    from nuciseg.engine.model_zoo import Credits

    if is_shipped(folder):
        card = (folder / "README.md").read_text(encoding="utf-8")
        authors, license_ = args.author or ["nuciseg contributors"], args.license or "BSD-3-Clause"
        return Credits(f"nuciseg {folder.name}", card, authors, license_)
    title = f"nuciseg {args.out.stem}"
    metric = checkpoint.config.train.metric
    score = (
        f", {metric} {checkpoint.scores[metric]:.3f} on its validation images" if metric in checkpoint.scores else ""
    )
    card = f"# {title}\n\nA network that was trained with nuciseg{score}: epoch {checkpoint.progress.epoch}."
    return Credits(title, card, args.author, args.license)


def _parser() -> argparse.ArgumentParser:
    parser = Parser("export", DESCRIPTION, usage="%(prog)s CHECKPOINT --out FILE [--format onnx|bioimageio] [...]")
    add = parser.add_argument
    add(
        "checkpoint", type=Path, metavar="CHECKPOINT",
        help="a run's folder (its best checkpoint is taken), one checkpoint's, or the name of weights that come with "
        f"nuciseg: {describe_shipped()} (path or name)",
    )  # fmt: skip
    add(
        "--out", type=Path, required=True, metavar="FILE",
        help="the file to write, .onnx or .zip; one of the same name is replaced (path, required)",
    )  # fmt: skip
    add("--format", choices=tuple(ENDINGS), default="onnx", help="what to write (default: onnx)")
    add(
        "--author", action="append", default=[], metavar="NAME",
        help="an author of the weights, for bioimageio; may be given several times (default: nuciseg contributors for "
        "weights that come with nuciseg, else none)",
    )  # fmt: skip
    add(
        "--license", metavar="SPDX",
        help="the licence of the weights, for bioimageio, as CC-BY-4.0 (default: BSD-3-Clause for weights that come "
        "with nuciseg, else none)",
    )  # fmt: skip
    return parser


if __name__ == "__main__":
    run_verb(main)
