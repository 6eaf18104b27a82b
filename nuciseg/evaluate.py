"""Score a checkpoint on images with known nuclei, beside what no network at all would score.

python -m nuciseg.evaluate --checkpoint runs/RUN --data.root DIR --split test
python -m nuciseg.evaluate --checkpoint nuciseg/separator --data.root DIR
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nuciseg.cli import Parser, folder_or_bucket, run_verb
from nuciseg.engine.shipped import describe_shipped, is_shipped
from nuciseg.errors import ConfigError

if TYPE_CHECKING:
    from nuciseg.config import Config
    from nuciseg.engine.evaluation import EvaluationResult
    from nuciseg.metrics import Scores

# torch and all that needs it are imported where they are used, so that --help answers at once.

DESCRIPTION = """\
Score a checkpoint on one split of a data set, beside trivial baselines.

Prints the scores and writes to --out
  scores.json         all figures, how they were averaged, and what they were obtained with
  images.csv          one row for each image, worst first
  contact_sheet.png   input, truth and prediction of up to 100 images, failures marked
  overlays/           the same for every image, larger, worst first
  labels/             the predicted labels, int32 TIFF
"""
SPLITS = ("test", "train", "validation")


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate, print, log. Raises NucisegError."""
    args = _parser().parse_args(argv)

    from nuciseg.distributed.mirror import fetched_checkpoint
    from nuciseg.engine.checkpoint import load_checkpoint
    from nuciseg.engine.evaluation import default_out, evaluate_checkpoint, run_of
    from nuciseg.engine.precision import local_device

    checkpoint = fetched_checkpoint(args.checkpoint)
    if is_shipped(checkpoint) and args.data_root is None:
        raise ConfigError(f"{args.checkpoint} comes without images; give the folder of yours with --data.root DIR")
    config = _with_flags(load_checkpoint(checkpoint).config, args)
    in_bucket = isinstance(args.checkpoint, str)
    here = Path(f"evaluation-{run_of(checkpoint).name}-{args.split}") if in_bucket else None
    out = args.out or here or default_out(checkpoint, args.split)
    _check_log(out, config)
    result = evaluate_checkpoint(checkpoint, config.data, args.split, out, device=local_device())
    print_result(result)
    log_result(result, config)


def print_result(result: EvaluationResult) -> None:
    """The scores as a table, one column for the network and one for each baseline, and what they come from."""
    from rich.console import Console
    from rich.table import Table

    columns = {"network": result.scores, **result.baselines}
    table = Table(title=f"{result.split}: {result.scores.images} images", title_justify="left")
    table.add_column("score")
    for name in columns:
        table.add_column(name.replace("_", " "), justify="right", no_wrap=True)
    figures = [_figures(scores) for scores in columns.values()]
    for name in figures[0]:
        table.add_row(name, *(each[name] for each in figures))
    Console().print(table)
    decode = ", ".join(f"{key} {getattr(result.target.config.decode, key)}" for key in result.target.decoded_by)
    for name, scores in result.by_marking.items():
        print(f"drawn border {name}: {scores.clusters_separated} of {scores.clusters} clusters separated")
    print("mean AP: over IoU .50 to .95; pooled: all nuclei together; per image: mean of the images' own APs")
    print(f"checkpoint: {result.checkpoint} (epoch {result.epoch}, trained on split {result.split_hash})")
    print(f"decoding:   {result.target.config.kind}, {decode}")
    print(f"written to: {result.out}")


AP_ROWS = {
    "ap50": "AP .5", "ap70": "AP .7", "ap90": "AP .9", "ap_mean_to_90": "mean AP .5:.9", "ap_mean": "mean AP"
}  # fmt: skip


def _check_log(out: Path, config: Config) -> None:
    """Raise ConfigError, before anything is scored, where the result could not be logged."""
    from nuciseg.tracking import read_identity, wandb_mode

    earlier = read_identity(out)
    if earlier is not None and earlier.job_type != "evaluate":
        raise ConfigError(f"--out {out} is the folder of a {earlier.job_type} run; choose another")
    if config.tracking.kind == "wandb":
        wandb_mode(config.tracking, verbose=False)


def log_result(result: EvaluationResult, config: Config) -> None:
    """Log summary and per-image table as a W&B run of job type evaluate, in the group of the run that was evaluated.

    An evaluation repeated into the same folder goes on with the same W&B run. `config` is the run's, its tracking
    section says where to. Raises ConfigError where W&B is demanded without a key.
    """
    from uuid import uuid4

    from nuciseg.engine.evaluation import run_of
    from nuciseg.tracking import RunIdentity, describe_run, open_tracker, read_identity

    run_dir = run_of(result.checkpoint)
    run = read_identity(run_dir)
    run_name = run.name if run else run_dir.name
    identity = read_identity(result.out) or RunIdentity(
        id=f"evaluate-{uuid4().hex[:8]}",
        name=f"evaluate {result.split} {run_name}",
        group=run.group if run else run_name,
        job_type="evaluate",
        tags=(result.split,),
    )
    tracker = open_tracker(config.tracking, identity, result.out, config.model_dump(mode="json"))
    tracker.log_image_scores(result.image_rows)
    figures: dict[str, Any] = dict(result.scores.flat_summary())
    for name, scores in result.baselines.items():
        figures |= {f"{name}/{key}": value for key, value in scores.flat_summary().items()}
    origin = {"split": result.split, "split_hash": result.split_hash, "checkpoint": str(result.checkpoint)}
    tracker.log_summary(figures | origin)
    tracker.finish(0)
    if (result.out / "wandb").is_dir():
        print(describe_run(result.out))


def _figures(scores: Scores) -> dict[str, str]:
    """The table's rows by name."""
    flat = scores.flat_summary()
    figures = {
        "clusters separated": f"{scores.clusters_separated} of {scores.clusters}",
        "nuclei found / true": f"{scores.num_predicted} / {scores.num_true}",
    }
    for average in ("pooled", "per_image"):
        for key, name in AP_ROWS.items():
            figures[f"{name} {average.replace('_', ' ')}"] = f"{flat[f'{key}_{average}']:.3f}"
    return figures | {
        "IoU of matched nuclei": f"{flat['mean_matched_iou']:.3f}",
        "border Dice": f"{flat['border_dice']:.3f}",
    }


def _with_flags(config: Config, args: argparse.Namespace) -> Config:
    """The checkpoint's configuration with the flags that were given. Another folder may have another layout."""
    flags = {
        "data.root": args.data_root,
        "data.format": args.data_format or ("auto" if args.data_root else None),
        "data.cache_dir": args.data_cache_dir and str(args.data_cache_dir),
        "tracking.kind": args.tracking_kind,
    }
    return config.replaced({key: value for key, value in flags.items() if value is not None})


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "evaluate", DESCRIPTION, usage="%(prog)s --checkpoint PATH [--data.root DIR] [--split NAME] [--out DIR]"
    )
    add = parser.add_argument
    add(
        "--checkpoint", type=folder_or_bucket, required=True, metavar="PATH",
        help="a run's folder, s3:// and gs:// too (its best checkpoint is taken), one checkpoint's, or the name of "
        "weights that come with "
        f"nuciseg: {describe_shipped()} (path or name, required)",
    )  # fmt: skip
    add(
        "--split", choices=SPLITS, default="test",
        help="images to score; train and validation: the two sides of the checkpoint's own split (default: test)",
    )  # fmt: skip
    add(
        "--out", type=Path, metavar="DIR",
        help="folder to write to (path, default: evaluation-SPLIT in the run's folder; for one in a bucket, and "
        "weights that come with nuciseg, evaluation-NAME-SPLIT in the current one)",
    )  # fmt: skip
    add(
        "--data.root", dest="data_root", metavar="DIR",
        help="folder of the data, s3:// and gs:// too (path, default: what the checkpoint was trained on; weights that "
        "come with nuciseg have no default)",
    )  # fmt: skip
    add(
        "--data.format", dest="data_format", metavar="NAME",
        help="layout of the data, a name that train --help lists (default: auto with --data.root, else the "
        "checkpoint's)",
    )  # fmt: skip
    add(
        "--data.cache_dir", dest="data_cache_dir", type=Path, metavar="DIR",
        help="folder for decoded images (path, default: the checkpoint's)",
    )  # fmt: skip
    add(
        "--tracking.kind", dest="tracking_kind", metavar="NAME",
        help="where the scores are logged: auto, wandb, offline or none (default: the checkpoint's)",
    )  # fmt: skip
    return parser


if __name__ == "__main__":
    run_verb(main)
