"""One run on N workers: `python -m nuciseg.train --config FILE [--any.key value] [--resume DIR]`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nuciseg.cli import Parser, folder_or_bucket, run_verb
from nuciseg.engine.shipped import describe_shipped

if TYPE_CHECKING:
    from nuciseg.config import Config


def main(argv: Sequence[str] | None = None) -> None:
    """Read the configuration, train, say where the checkpoint lies."""
    from nuciseg.config import add_config_flags, config_from_args

    parser = Parser("train", "Train one network, data-parallel on scale.num_workers workers.")
    parser.add_argument(
        "--resume", type=folder_or_bucket, metavar="DIR", help="go on with the run in this folder, s3:// and gs:// too"
    )
    parser.add_argument(
        "--init-from",
        type=folder_or_bucket,
        metavar="CHECKPOINT",
        help="train these weights further, with the network, target and recipe they were trained with: a run's folder, "
        f"s3:// and gs:// too, or {describe_shipped()}; settings given count more",
    )
    parser.add_argument("--summary", action="store_true", help="print the network's stages and their cost, then leave")
    parser.add_argument("--verbose", action="store_true", help="show what Ray and W&B say")
    flags = add_config_flags(parser)
    args = parser.parse_args(argv)
    if args.resume is not None:
        if args.summary:
            parser.error(f"--summary is of a configuration: give --config {args.resume}/config.yaml, not --resume")
        if args.init_from is not None:
            parser.error("--resume goes on with a run, --init-from begins one; give one of the two")
    base = _recipe_of(args.init_from) if args.init_from is not None else {}
    if args.summary:
        _print_summary(config_from_args(flags, args, base))
        return

    from nuciseg.distributed.failures import stopped_by_sigterm
    from nuciseg.distributed.mirror import opened
    from nuciseg.distributed.progress import followed
    from nuciseg.distributed.runs import (
        check_precision,
        check_settings,
        check_storage,
        describe_disk_need,
        new_run,
        resumed_config,
        train_identity,
    )
    from nuciseg.distributed.training import check_room, run_training
    from nuciseg.distributed.worker import Job, describe_run_dir
    from nuciseg.engine.checkpoint import CheckpointStore
    from nuciseg.engine.datasets import check_beginning, check_data
    from nuciseg.tracking import describe_run

    if args.resume is not None:
        run = opened(args.resume)
        config = resumed_config(run, flags(parsed_args=args)(), args.config)
        check_room(config, verbose=args.verbose)
        check_storage(config, args.resume, begun=True)
    else:
        config = config_from_args(flags, args, base)
        alone = _without_search(config)
        check_settings(alone, verbose=args.verbose)
        split = check_data(config)
        check_beginning(config)
        check_room(config, verbose=args.verbose)
        check_precision(alone)
        check_storage(config)
        run = new_run(config, f"train-{time.strftime('%Y%m%d-%H%M%S')}")
        describe_run_dir(config, split, run.folder)
    run.push()  # from here on it can be resumed
    print(f"run folder: {run}\n{describe_disk_need(_without_search(config), run.folder)}", flush=True)
    job = Job(config, run.folder.resolve(), train_identity(config, run.folder), args.verbose, run.uri)
    with followed(run.folder, config.train.epochs, config.train.metric), stopped_by_sigterm(run.folder):
        run_training(job)
    best = CheckpointStore(run.folder).best
    assert best is not None  # training has at least one epoch
    print(f"best checkpoint: {run.shown(best)}\n{describe_run(run.folder)}")


def _recipe_of(location: Path | str) -> dict[str, Any]:
    """What `--init-from` sets: the weights, and how the network of a checkpoint was taught."""
    from nuciseg.distributed.mirror import fetched_checkpoint
    from nuciseg.engine.checkpoint import load_checkpoint
    from nuciseg.engine.shipped import is_shipped

    folder = fetched_checkpoint(location)
    start = location if is_shipped(folder) else folder  # the package may lie elsewhere on other nodes
    known = load_checkpoint(folder).config.model_dump(mode="json")
    recipe = {section: known[section] for section in ("augment", "inference", "loss", "model", "optim", "target")}
    taught = {"data": ("batch_size", "crop_px", "crops", "marking", "normalization"), "train": ("ema_decay", "metric")}
    for section, keys in taught.items():
        recipe[section] = {key: known[section][key] for key in keys}
    recipe["train"]["init_from"] = str(start)
    return recipe


def _print_summary(config: Config) -> None:
    """The configured network stage by stage, without its weights and without data."""
    from rich.console import Console
    from rich.table import Table

    from nuciseg.engine.network import summarize_network

    summary = summarize_network(config)
    side = summary.side_px
    table = Table(title=f"{summary.name}, one grey image of {side}x{side} px", title_justify="left")
    table.add_column("stage", no_wrap=True)
    for heading in ("stride", "channels", "parameters", "MFLOP"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("its features")
    for stage in summary.stages:
        figures = (str(stage.stride), str(stage.channels), f"{stage.parameters:,}", f"{stage.flops / 1e6:,.0f}")
        table.add_row(stage.name, *figures, stage.role, style=None if stage.is_used else "dim")
    table.add_section()
    table.add_row("total", "", "", f"{summary.parameters:,}", f"{summary.flops / 1e6:,.0f}", "")
    Console().print(table)
    print("MFLOP: million operations forward, a multiplication and its addition counted as two")
    for note in summary.notes:
        print(note)
    frozen_epochs = config.optim.frozen_encoder_epochs
    if frozen_epochs:
        print(f"training: the encoder is frozen for the first {frozen_epochs} of {config.train.epochs} epochs")


def _without_search(config: Config) -> Config:
    """A configuration may say what a search would vary; one run takes everything else."""
    return config.replaced({"search.space": {}})


if __name__ == "__main__":
    run_verb(main)
