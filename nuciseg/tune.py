"""Search for the best network: `python -m nuciseg.tune [--config FILE ...] [--any.key value] [--resume DIR]`.

With nothing else it draws synthetic clusters and searches a small U-Net on them. With several files, or a folder of
them, it makes one search after the other; interrupted, it goes on with --resume. A search that comes to --max-hours or
--max-disk keeps and prints what it has found, leaves with exit code 3, and goes on with --resume and a higher bound.
"""

from __future__ import annotations

import argparse
import re
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nuciseg.cli import Parser, folder_or_bucket, run_verb
from nuciseg.errors import ConfigError, LimitReachedError, StoppedError

if TYPE_CHECKING:
    from pydantic_settings import CliSettingsSource

    from nuciseg.config import Config
    from nuciseg.distributed.mirror import Mirror
    from nuciseg.distributed.trials import Trial

# What a search without --config does: a small network, so that two CPU cores end in about five minutes.
DEFAULT_SEARCH: dict[str, Any] = {
    "data": {"synthetic": {"num_train": 280, "num_test": 24}, "crop_px": 128},
    "model": {"kind": "unet", "depth": 3, "width": 12},
    "train": {"epochs": 12},
    "search": {
        "num_trials": 6,
        "trial_epochs": 6,
        "space": {
            "optim.lr": {"loguniform": [2e-3, 1e-2]},
            "data.batch_size": {"choice": [8, 16]},
            "loss.weights.dice": {"uniform": [0.2, 2.0]},
        },
    },
}


def main(argv: Sequence[str] | None = None) -> None:
    """Read the configurations, search, print the ranked trials, train and evaluate the winners."""
    from nuciseg.config import add_config_flags

    parser = Parser("tune", __doc__ or "")
    parser.add_argument(
        "--resume",
        type=folder_or_bucket,
        metavar="DIR",
        help="go on with the search in this folder, s3:// and gs:// too",
    )
    parser.add_argument("--max-hours", type=float, metavar="HOURS", help="search.max_hours; also with --resume")
    parser.add_argument("--max-disk", type=float, metavar="GB", help="search.max_disk_gb; also with --resume")
    parser.add_argument("--no-final", action="store_true", help="do not train and evaluate the winner")
    parser.add_argument("--verbose", action="store_true", help="show what Ray and W&B say")
    flags = add_config_flags(parser, several=True)
    args = parser.parse_args(argv)
    if args.resume is not None:
        _resume(args.resume, flags(parsed_args=args)(), args)
        return
    files = config_files(args.config or [])
    if len(files) > 1:
        _search_each(files, flags, args)
        return
    config = _read(flags, args, files[0] if files else None)
    _check(config, final=config.search.final and not args.no_final, verbose=args.verbose)
    from nuciseg.distributed.runs import new_run

    _search(config, new_run(config, f"search-{time.strftime('%Y%m%d-%H%M%S')}", below=False), args)


def config_files(paths: Sequence[Path]) -> list[Path]:
    """The YAML files that `paths` name, of folders all that lie in them, by name. Raises ConfigError."""
    from nuciseg.config import RUN_NAME

    files: list[Path] = []
    for path in paths:
        inside = sorted(path.glob("*.yaml")) if path.is_dir() else [path]
        if not inside:
            raise ConfigError(f"--config {path} is a folder without a .yaml file; give the path of a YAML file")
        files += inside
    by_name: dict[str, Path] = {}
    for file in files:
        if len(files) > 1 and not re.fullmatch(RUN_NAME, file.stem):
            raise ConfigError(
                f"--config {file}: its search would lie in a folder {file.stem!r}; rename it, with letters, digits and "
                "._- alone"
            )
        other = by_name.setdefault(file.stem, file)
        if other != file:
            raise ConfigError(f"--config {other} and {file} would both be searched in a folder {file.stem}; rename one")
    return list(by_name.values())


def _read(flags: CliSettingsSource[Any], args: argparse.Namespace, file: Path | None) -> Config:
    from nuciseg.config import config_from_args

    return _bounded(config_from_args(flags, args, DEFAULT_SEARCH if file is None else {}, file=file), args)


def _bounded(config: Config, args: argparse.Namespace) -> Config:
    """With the bounds that the command line gives, if any."""
    bounds = {"search.max_hours": args.max_hours, "search.max_disk_gb": args.max_disk}
    given = {key: bound for key, bound in bounds.items() if bound is not None}
    return config.replaced(given) if given else config


def _search_each(files: Sequence[Path], flags: CliSettingsSource[Any], args: argparse.Namespace) -> None:
    """Several searches, each in a folder of its file's name within one, and in one W&B group.

    All are checked before the first begins, and written down, so that `--resume` needs nothing but the folder.
    """
    from nuciseg.config import write_config
    from nuciseg.distributed.runs import new_run

    configs = {file.stem: _read(flags, args, file) for file in files}
    for name, config in configs.items():
        print(f"checking {name}", flush=True)
        _check(config, final=config.search.final and not args.no_final, verbose=args.verbose)
    first = next(iter(configs.values()))
    searches = new_run(first, f"searches-{time.strftime('%Y%m%d-%H%M%S')}", below=False)
    for name, config in configs.items():
        group = config.run.group or searches.folder.name
        storage = searches.uri or str(searches.folder.resolve())
        run = {"run.storage_path": storage, "run.name": name, "run.group": group}
        write_config(config.replaced(run), searches.folder / f"{name}.yaml")
    searches.push()
    _go_through(searches, args)


def _go_through(searches: Mirror, args: argparse.Namespace) -> None:
    """Begin or resume each search whose configuration lies in the folder `searches`."""
    from nuciseg.config import load_config
    from nuciseg.distributed.trials import searches_in
    from nuciseg.distributed.worker import CONFIG_FILE

    search_dirs = searches_in(searches.folder)
    ended: list[LimitReachedError] = []
    for number, search_dir in enumerate(search_dirs, start=1):
        print(f"\n{search_dir.name}, search {number} of {len(search_dirs)}", flush=True)
        search_dir.mkdir(exist_ok=True)
        search = searches.inner(search_dir.name, below=False)
        search.fetch()
        resumed = (search_dir / CONFIG_FILE).exists()
        # Its own has the bounds that an earlier resumption gave.
        file = search_dir / CONFIG_FILE if resumed else search_dir.with_name(f"{search_dir.name}.yaml")
        try:
            _search(load_config(file), search, args, resumed=resumed)
        except LimitReachedError as error:  # its own bound: the others have theirs
            print(error, flush=True)
            ended.append(error)
        except StoppedError:
            resume = f"python -m nuciseg.tune --resume {shlex.quote(str(searches))}"
            raise StoppedError(f"asked to stop; the searches go on by `{resume}`") from None
    print(f"\nall {len(search_dirs)} searches: {searches}")
    if ended:
        raise LimitReachedError(
            f"{len(ended)} of {len(search_dirs)} searches ended at a bound, as said above; go on with "
            f"`python -m nuciseg.tune --resume {shlex.quote(str(searches))}` and higher bounds"
        )


def _resume(location: Path | str, flags: Mapping[str, Any], args: argparse.Namespace) -> None:
    from nuciseg.distributed.mirror import opened
    from nuciseg.distributed.runs import refuse_other_settings
    from nuciseg.distributed.search import read_search_config
    from nuciseg.distributed.trials import searches_in

    refuse_other_settings(flags, args.config)
    folder = opened(location, below=False)
    if searches_in(folder.folder):
        _go_through(folder, args)
    else:
        _search(read_search_config(folder), folder, args, resumed=True)


def _search(config: Config, search: Mirror, args: argparse.Namespace, *, resumed: bool = False) -> None:
    """One search from its first trial to its winner.

    Raises LimitReachedError where it came to a bound before, StoppedError at SIGTERM.
    """
    from nuciseg.distributed.cluster import connect
    from nuciseg.distributed.failures import sigterm_raises

    connect(args.verbose)  # it has a handler of its own for SIGTERM
    resume = f"python -m nuciseg.tune --resume {shlex.quote(str(search))}"
    with sigterm_raises(StoppedError(f"asked to stop; what was finished is kept, and the rest goes on by `{resume}`")):
        _search_to_the_end(config, search, args, resumed)


def _search_to_the_end(config: Config, search: Mirror, args: argparse.Namespace, resumed: bool) -> None:
    from nuciseg.config import write_config
    from nuciseg.distributed.limits import SearchEndedError, refuse_late_winner
    from nuciseg.distributed.runs import describe_disk_need
    from nuciseg.distributed.search import resume_search, start_search
    from nuciseg.distributed.worker import CONFIG_FILE

    config = _bounded(config, args)
    if resumed:
        write_config(config, search.folder / CONFIG_FILE)
        search.push()
    print(f"search folder: {search}\n{describe_disk_need(config, search.folder)}\n{describe_arms(config)}", flush=True)
    begin = resume_search if resumed else start_search
    final = config.search.final and not args.no_final
    try:
        trials = begin(config, search, verbose=args.verbose)
        if final:
            refuse_late_winner(trials, config, search)
    except SearchEndedError as ended:
        if ended.trials:
            _print_trials(ended.trials, config)
        if any(trial.failure is None for trial in ended.trials):
            _print_conclusion(ended.trials, config, search, final=False, verbose=args.verbose)
        raise
    _print_trials(trials, config)
    _print_conclusion(trials, config, search, final=final, verbose=args.verbose)


def describe_arms(config: Config) -> str:
    """What differs between the trials of a search, and what is the same by construction."""
    epochs = config.search.trial_epochs or config.train.epochs
    stopped = "" if config.search.scheduler == "none" else f" at most ({config.search.scheduler} decides)"
    differs = ", ".join(config.search.space)
    seeds = "" if "seed" in config.search.space else f", seed {config.seed}"
    split = config.data.split_seed if config.data.validation_list is None else config.data.validation_list.name
    return f"differs: {differs}; same: images, split {split}, {epochs} epochs{stopped}{seeds}"


def _check(config: Config, *, final: bool, verbose: bool) -> None:
    """Raise NucisegError for what would end the search, a trial or the evaluation, before a folder is made."""
    from nuciseg.distributed.final import check_test_images
    from nuciseg.distributed.runs import check_precision, check_settings, check_storage
    from nuciseg.distributed.search import check_search
    from nuciseg.distributed.space import build_space, variants
    from nuciseg.engine.datasets import check_augmentation, check_beginning, check_data
    from nuciseg.engine.network import stride_of

    build_space(config)
    trial_epochs = config.search.trial_epochs
    if trial_epochs is not None and trial_epochs > config.train.epochs:
        raise ConfigError(
            f"search.trial_epochs is {trial_epochs}, but train.epochs, for the winner, is {config.train.epochs}: set "
            "search.trial_epochs to that or less"
        )
    check_settings(config, verbose=verbose)
    largest_stride = max(variants(config, "model"), key=stride_of)
    check_data(largest_stride)
    for variant in variants(config, "data"):
        check_beginning(variant)
    for variant in variants(config, "augment"):
        check_augmentation(variant)
    if final:
        check_test_images(largest_stride)
    check_search(config, verbose=verbose)
    check_precision(config)
    check_storage(config)


def _print_trials(trials: Sequence[Trial], config: Config) -> None:
    from rich.console import Console
    from rich.table import Table

    from nuciseg.distributed.trials import describe

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


def _print_conclusion(trials: Sequence[Trial], config: Config, search: Mirror, *, final: bool, verbose: bool) -> None:
    import yaml

    from nuciseg.distributed.final import evaluate_final, num_epochs, train_final
    from nuciseg.distributed.search import winner
    from nuciseg.distributed.worker import CONFIG_FILE
    from nuciseg.engine.checkpoint import CheckpointStore, load_checkpoint
    from nuciseg.errors import TrainingError
    from nuciseg.evaluate import log_result, print_result
    from nuciseg.tracking import describe_run

    best = winner(trials, config)
    if best is None:
        raise TrainingError(f"every trial failed; the reasons stand above and in {search}")
    sample = yaml.safe_dump({key: best.value(key) for key in trials[0].sample}, sort_keys=False).strip()
    print(f"best configuration:\n{sample}")
    trial = search.inner(trials[0].id)
    if final:
        missing = best.train.epochs - num_epochs(trial.folder)
        print(f"\ntraining the winner for {best.train.epochs} epochs" + (", as its trial was" if missing <= 0 else ""))
        run, what = train_final(best, search, trial, verbose=verbose), "whole configuration"
    else:
        run, what = trial, "configuration of this trial, its decoding not calibrated"
    checkpoint = CheckpointStore(run.folder).best
    assert checkpoint is not None  # it was trained
    print(f"{what}: {run.shown(run.folder / CONFIG_FILE)}")
    print(f"best checkpoint: {run.shown(checkpoint)}")
    print(f"trials: {describe_run(search.folder)}")
    print(f"winner: {describe_run(run.folder)}")
    print(f"a page of all this: python -m nuciseg.report {shlex.quote(str(search))}", flush=True)
    if final:  # last: all else is found by now, should the evaluation fail
        result = evaluate_final(run.folder, best)
        print_result(result)
        log_result(result, load_checkpoint(result.checkpoint).config)
        run.push()


if __name__ == "__main__":
    run_verb(main)
