"""Search for the best network: `python -m nuciseg.tune [--config FILE] [--any.key value] [--resume DIR]`.

With nothing else it draws synthetic clusters and searches a small U-Net on them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nuciseg.cli import Parser, run_verb

if TYPE_CHECKING:
    from nuciseg.config import Config
    from nuciseg.distributed.search import Trial

# What a search without --config does: a small network, so that two CPU cores end in about five minutes.
DEFAULT_SEARCH: dict[str, Any] = {
    "data": {"synthetic": {"num_train": 320, "num_test": 24}, "crop_px": 128},
    "model": {"kind": "unet", "depth": 3, "width": 12},
    "train": {"epochs": 20},
    "search": {
        "num_trials": 6,
        "trial_epochs": 8,
        "space": {
            "optim.lr": {"loguniform": [2e-3, 1e-2]},
            "data.batch_size": {"choice": [8, 16]},
            "loss.weights.dice": {"uniform": [0.2, 2.0]},
        },
    },
}


def main(argv: Sequence[str] | None = None) -> None:
    """Read the configuration, search, print the ranked trials, train and evaluate the winner."""
    from nuciseg.config import add_config_flags, config_from_args

    parser = Parser("tune", __doc__ or "")
    parser.add_argument("--resume", type=Path, metavar="DIR", help="go on with the interrupted search in this folder")
    parser.add_argument("--no-final", action="store_true", help="do not train and evaluate the winner")
    parser.add_argument("--verbose", action="store_true", help="show what Ray and W&B say")
    flags = add_config_flags(parser)
    args = parser.parse_args(argv)

    from nuciseg.distributed.runs import describe_disk_need, new_run_dir, refuse_other_settings
    from nuciseg.distributed.search import check_search, resume_search, start_search
    from nuciseg.engine.datasets import check_data

    if args.resume is not None:
        refuse_other_settings(flags(parsed_args=args)(), args.config)
        folder: Path = args.resume
        print(f"search folder: {folder}", flush=True)
        config, trials = resume_search(folder, verbose=args.verbose)
    else:
        base = DEFAULT_SEARCH if args.config is None else {}
        config = config_from_args(flags, args, base)
        if args.no_final:
            config = config.replaced({"search.final": False})
        check_data(config)
        check_search(config, verbose=args.verbose)
        folder = new_run_dir(config, f"search-{time.strftime('%Y%m%d-%H%M%S')}")
        print(f"search folder: {folder}\n{describe_disk_need(config)}", flush=True)
        trials = start_search(config, folder, verbose=args.verbose)
    _print_trials(trials, config)
    with_final = config.search.final and not args.no_final
    _print_conclusion(trials, config, folder, with_final=with_final, verbose=args.verbose)


def _print_trials(trials: Sequence[Trial], config: Config) -> None:
    from rich.console import Console
    from rich.table import Table

    from nuciseg.distributed.space import describe

    table = Table(title=f"{len(trials)} trials, ranked by validation {config.train.metric}")
    for heading in ("rank", "trial", "score", "mean AP", "epochs", "s"):
        table.add_column(heading, no_wrap=True)
    table.add_column("settings")
    for rank, trial in enumerate(trials, start=1):
        scores = ["-" if score is None else f"{score:.3f}" for score in (trial.score, trial.tie_break)]
        if trial.failure is not None:
            scores = ["failed", ""]
        spent = (str(trial.epochs), f"{trial.seconds:.0f}")
        table.add_row(str(rank), trial.id, *scores, *spent, describe(trial.sample))
    Console().print(table)
    failed = [trial for trial in trials if trial.failure is not None]
    if failed:
        print(f"{len(failed)} of {len(trials)} trials failed:")
        for trial in failed:
            print(f"  {trial.id}: {trial.failure}")


def _print_conclusion(
    trials: Sequence[Trial], config: Config, folder: Path, *, with_final: bool, verbose: bool
) -> None:
    import yaml

    from nuciseg.distributed.final import evaluate_final, train_final
    from nuciseg.distributed.search import winner
    from nuciseg.engine.checkpoint import CheckpointStore
    from nuciseg.errors import TrainingError
    from nuciseg.evaluate import print_result
    from nuciseg.tracking import describe_run

    best = winner(trials, config)
    if best is None:
        raise TrainingError(f"every trial failed; the reasons stand above and in {folder}")
    sample = yaml.safe_dump({key: best.value(key) for key in trials[0].sample}, sort_keys=False).strip()
    print(f"best configuration (whole: {folder / trials[0].id / 'config.yaml'}):\n{sample}")
    if with_final:
        print(f"\ntraining the winner for {best.train.epochs} epochs", flush=True)
        final_dir = train_final(best, folder, verbose=verbose)
        print_result(evaluate_final(final_dir, best))
    else:
        final_dir = folder / trials[0].id
    print(f"best checkpoint: {CheckpointStore(final_dir).best}")
    print(f"trials: {describe_run(folder)}")
    print(f"winner: {describe_run(final_dir)}")


if __name__ == "__main__":
    run_verb(main)
