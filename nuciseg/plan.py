"""What a search or run will take, before it starts: `python -m nuciseg.plan [--config FILE] [--any.key value]`.

Prints hours, GPU-hours (or core-hours), disk and dollars, and what a step's time goes to on more workers, with what is
assumed. The configured networks are trained for a few steps on this machine, unless --seconds-per-step says how fast
they are or --estimate is given.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from nuciseg.cli import Parser, run_verb
from nuciseg.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from nuciseg.config import Config
    from nuciseg.engine.datasets import TrainingSet
    from nuciseg.engine.planning import Machine, Pace, SearchTime, Work

GPU_MACHINES = ("g5.xlarge", "g6.xlarge", "p5.48xlarge")
CPU_MACHINES = ("c7i.8xlarge",)
WORKERS = (1, 2, 4, 8, 16, 32)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the configuration, count, measure or take what was given, print the estimate. Raises NucisegError."""
    from nuciseg.config import add_config_flags, config_from_args

    parser = Parser("plan", __doc__ or "")
    _add_flags(parser)
    flags = add_config_flags(parser)
    args = parser.parse_args(argv)

    from nuciseg.distributed.space import build_space, variants
    from nuciseg.engine.datasets import open_training_set
    from nuciseg.engine.network import stride_of
    from nuciseg.engine.precision import local_device
    from nuciseg.tune import DEFAULT_SEARCH

    config = config_from_args(flags, args, {} if args.config else DEFAULT_SEARCH)
    if config.search.space:
        build_space(config)
    dollars = _prices(args.dollars_per_hour)
    if args.seconds_per_step is not None and not args.seconds_per_step > 0:
        raise ConfigError(f"--seconds-per-step {args.seconds_per_step:g}: give the seconds of a step, more than 0")
    models = variants(config, "model")
    data = open_training_set(config, max(map(stride_of, models)))
    works = [_work(variant, data) for variant in models]
    device = local_device()
    if args.estimate and args.seconds_per_step is not None:
        parser.error("--estimate and --seconds-per-step: give one of them")
    measured = None if args.estimate or args.seconds_per_step is not None else _measured(models, data, device)
    _print_work(config, works, data)
    if measured is not None:
        _print_measured(works, measured, device)
    _print_machines(config, args, works, measured, device, dollars)
    if args.scaling:
        _print_scaling(config, args, works, measured, device, dollars)
    print("assumed:", *_assumptions(config, args, device), sep="\n- ")


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seconds-per-step", type=float, metavar="S", help="of one worker on data.batch_size images; none: measured"
    )
    parser.add_argument("--estimate", action="store_true", help="measure nothing: GPUs by their memory's rate")
    parser.add_argument(
        "--machine", action="append", metavar="TYPE", help="EC2 type to price, more than once (g5.xlarge ...)"
    )
    parser.add_argument("--nodes", type=int, default=4, metavar="N", help="machines of that type (default: 4)")
    parser.add_argument(
        "--dollars-per-hour", action="append", default=[], metavar="TYPE=DOLLARS", help="today's price, or that of spot"
    )
    parser.add_argument("--scaling", action="store_true", help="a step's time on 1 to 32 workers of each type, too")


def _prices(given: Sequence[str]) -> dict[str, float]:
    prices = {}
    for each in given:
        name, _, dollars = each.partition("=")
        try:
            prices[name] = float(dollars)
        except ValueError:
            raise ConfigError(f"--dollars-per-hour {each}: give TYPE=DOLLARS, as g5.xlarge=0.45") from None
    return prices


def _work(config: Config, data: TrainingSet) -> Work:
    from nuciseg.engine.network import count_parameters, summarize_network
    from nuciseg.engine.planning import Work

    return Work(
        num_crops=len(data.training_data.indices),
        num_validation=len(data.split.validation),
        batch_size=config.data.batch_size,
        num_parameters=count_parameters(config),
        forward_operations=summarize_network(config).flops,
    )


def _measured(models: Sequence[Config], data: TrainingSet, device: torch.device) -> list[Pace]:
    """The pace of each network here, with the threads that a worker will have."""
    import torch

    from nuciseg.engine.pace import measure_pace

    print("measuring here: two short epochs of each network ...", file=sys.stderr, flush=True)
    config = models[0]
    threads = config.scale.cpus_per_worker or (1 if config.search.space else None)
    if device.type == "cpu" and threads is not None:
        torch.set_num_threads(threads)
    return [measure_pace(each, data, device) for each in models]


def _print_work(config: Config, works: Sequence[Work], data: TrainingSet) -> None:
    from nuciseg.distributed.runs import disk_need
    from nuciseg.distributed.space import variants
    from nuciseg.distributed.trials import num_trials

    work = works[0]
    print(
        f"data: {work.num_crops} crops an epoch of {len(data.split.train)} training images, at most "
        f"{config.data.crop_px} px, {work.batch_size} a step: {work.steps_per_epoch} steps; {work.num_validation} "
        "validation images"
    )
    for model, each in zip(variants(config, "model"), works, strict=True):
        print(
            f"network {getattr(model.model, 'encoder', model.model.kind)}: {each.num_parameters:,} parameters, "
            f"{each.gradient_bytes / 1e6:.2f} MB of gradient a step, {each.forward_operations / 1e6:,.0f} MFLOP "
            "forward an image"
        )
    if config.search.space:
        trials, epochs = num_trials(config), _trial_epochs(config)
        print(
            f"search: {trials} trials of at most {epochs} epochs; with {config.search.scheduler} about "
            f"{_expected(config):.0f} epochs together instead of {trials * epochs}"
            + (f", then {config.train.epochs} of the winner" if config.search.final else "")
        )
    print(f"disk: at most {disk_need(config) / 1e9:.3g} GB of checkpoints")


def _print_measured(works: Sequence[Work], measured: Sequence[Pace], device: torch.device) -> None:
    for work, pace in zip(works, measured, strict=True):
        print(
            f"measured here, one worker on {device.type}: a step {pace.image_s * work.batch_size:.3g} s, validation "
            f"{pace.validation_image_s * work.num_validation:.3g} s and checkpoint {pace.rest_of_epoch_s:.3g} s an "
            f"epoch, making an image {1e3 * pace.loading_s:.2g} ms of one core"
        )


def _trial_epochs(config: Config) -> int:
    return config.search.trial_epochs or config.train.epochs


def _expected(config: Config) -> float:
    from nuciseg.distributed.trials import num_trials
    from nuciseg.engine.planning import expected_epochs

    if not config.search.space:
        return 0.0
    return expected_epochs(config.search, num_trials(config), _trial_epochs(config))


def _print_machines(
    config: Config,
    args: argparse.Namespace,
    works: Sequence[Work],
    measured: Sequence[Pace] | None,
    device: torch.device,
    dollars: Mapping[str, float],
) -> None:
    from rich.console import Console
    from rich.table import Table

    from nuciseg.engine.planning import HEAD, machine

    table = Table(title="the whole search" if config.search.space else "the run", title_justify="left")
    for heading in ("machines", "trials at a time", "a step, s", "hours", "GPU-hours", "core-hours", "dollars"):
        table.add_column(heading, justify="left" if heading == "machines" else "right", no_wrap=True)
    if measured is not None:
        here, at_once, units = _this_machine(config, device)
        found = _times(config, works, measured, here, at_once)
        table.add_row(f"this one ({units})", *_cells(config, found, at_once, here, works, measured, None))
    for name in _machine_names(args, device):
        on = machine(name, dollars)
        scaled = _paces_on(name, on, works, measured, args, device)
        at_once = _runs_at_once(config, on, args.nodes)
        if not at_once:
            table.add_row(f"{args.nodes} x {name}", "0", "-", "-", "-", "-", "-")
            continue
        found = _times(config, works, scaled, on, at_once)
        price = args.nodes * on.dollars_per_hour + machine(HEAD, dollars).dollars_per_hour
        table.add_row(
            f"{args.nodes} x {name} ({on.gpu or 'CPU'})",
            *_cells(config, found, at_once, on, works, scaled, price * found.hours),
        )
    Console(width=110).print(table)


def _cells(
    config: Config,
    found: SearchTime,
    at_once: int,
    on: Machine,
    works: Sequence[Work],
    paces: Sequence[Pace],
    dollars: float | None,
) -> Iterator[str]:
    from nuciseg.engine.planning import link_gbps, step_of

    workers = config.scale.max_workers
    steps = [
        step_of(work, pace, workers, link_gbps(on, workers), config.data.num_loader_threads).seconds
        for work, pace in zip(works, paces, strict=True)
    ]
    yield str(at_once)
    yield f"{sum(steps) / len(steps):.3g}"
    yield f"{found.hours:.2f}"
    yield f"{found.worker_hours:.2f}" if on.num_gpus else "-"
    yield "-" if on.num_gpus else f"{found.worker_hours:.2f}"
    yield "-" if dollars is None else f"{dollars:.2f}"


def _this_machine(config: Config, device: torch.device) -> tuple[Machine, int, str]:
    """This machine as a type, how many runs fit on it at once, and what it has."""
    import torch

    from nuciseg.engine.planning import Machine

    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    cores = os.cpu_count() or 1
    own_link_gbps = 80.0  # between processes or GPUs of one machine: to be measured by `nuciseg doctor`
    here = Machine(gpus, cores, 0.0, own_link_gbps)
    at_once = max(1, _runs_at_once(config, here, 1))
    return here, at_once if config.search.space else 1, f"{gpus} GPUs" if gpus else f"{cores} cores"


def _runs_at_once(config: Config, on: Machine, num_machines: int) -> int:
    """How many runs the machines have room for, as far as the search lets so many run."""
    workers = num_machines * (on.num_gpus or on.num_cpus // (config.scale.cpus_per_worker or 1))
    runs = workers // config.scale.max_workers
    most = config.search.max_concurrent if config.search.space else None
    return runs if most is None else min(runs, most)


def _machine_names(args: argparse.Namespace, device: torch.device) -> Sequence[str]:
    if args.machine:
        return tuple(args.machine)
    cpus_too = device.type == "cpu" and args.seconds_per_step is None and not args.estimate
    return GPU_MACHINES + CPU_MACHINES if cpus_too else GPU_MACHINES


def _paces_on(
    name: str,
    on: Machine,
    works: Sequence[Work],
    measured: Sequence[Pace] | None,
    args: argparse.Namespace,
    device: torch.device,
) -> list[Pace]:
    """The paces on a machine type: as given, or as measured where it is of the same kind, else estimated."""
    from nuciseg.engine.checkpoint import MAX_FOLDERS, disk_need_bytes
    from nuciseg.engine.planning import LEAST_GPU_STEP_S, assumed_pace, estimated_image_s

    if measured is not None and (device.type == "cuda") == bool(on.num_gpus):
        return list(measured)
    if args.seconds_per_step is not None:
        seconds = [args.seconds_per_step / work.batch_size for work in works]
        least_s = 0.0
    elif on.num_gpus:
        seconds, least_s = [estimated_image_s(work, on) for work in works], LEAST_GPU_STEP_S
    else:
        raise ConfigError(
            f"--machine {name} has no GPU, and no CPU was measured here; give --seconds-per-step of a core"
        )
    return [
        assumed_pace(image_s, disk_need_bytes(work.num_parameters) / MAX_FOLDERS, least_s)
        for image_s, work in zip(seconds, works, strict=True)
    ]


def _times(config: Config, works: Sequence[Work], paces: Sequence[Pace], on: Machine, at_once: int) -> SearchTime:
    """Of the whole search, every one of its networks drawn as often."""
    from nuciseg.distributed.trials import num_trials
    from nuciseg.engine.planning import epoch_s, link_gbps, search_time, step_of

    workers = config.scale.max_workers
    threads = config.data.num_loader_threads
    epochs_s = [
        epoch_s(work, pace, step_of(work, pace, workers, link_gbps(on, workers), threads), workers)
        for work, pace in zip(works, paces, strict=True)
    ]
    searched = bool(config.search.space)
    return search_time(
        trial_epochs=_expected(config),
        num_trials=num_trials(config) if searched else 0,
        epochs=_trial_epochs(config),
        final_epochs=config.train.epochs if config.search.final or not searched else 0,
        epoch_s=sum(epochs_s) / len(epochs_s),
        at_once=at_once,
        num_workers=workers,
    )


def _print_scaling(
    config: Config,
    args: argparse.Namespace,
    works: Sequence[Work],
    measured: Sequence[Pace] | None,
    device: torch.device,
    dollars: Mapping[str, float],
) -> None:
    """A step of the first network on more and more workers: the batch as it is, and as many images each as one has."""
    from dataclasses import replace

    from rich.console import Console
    from rich.table import Table

    from nuciseg.engine.planning import link_gbps, machine, step_of

    threads = config.data.num_loader_threads
    for name in _machine_names(args, device):
        on, work = machine(name, dollars), works[0]
        pace = _paces_on(name, on, works, measured, args, device)[0]
        table = Table(title=f"a step on {name} ({on.gpu or 'CPU'})", title_justify="left")
        headings = ("workers", "images each", "network ms", "gradients ms", "loading ms", "faster", "limit")
        for heading in (*headings, "faster, batch x workers"):
            table.add_column(heading, justify="right", no_wrap=True)
        alone_s = step_of(work, pace, 1, 1.0, threads).seconds
        for workers in WORKERS:
            gbps = link_gbps(on, workers)
            step = step_of(work, pace, workers, gbps, threads)
            grown = replace(work, batch_size=work.batch_size * workers)
            grown_s = step_of(grown, pace, workers, gbps, threads).seconds
            parts = (f"{1e3 * value:.3g}" for value in (step.compute_s, step.all_reduce_s, step.loading_s))
            images = str(-(-work.batch_size // workers))
            share = workers * alone_s / grown_s
            table.add_row(str(workers), images, *parts, f"{alone_s / step.seconds:.2f}", step.limit, f"{share:.2f}")
        Console(width=120).print(table)


def _assumptions(config: Config, args: argparse.Namespace, device: torch.device) -> Iterator[str]:
    from nuciseg.engine.planning import (
        DECODING_S,
        HEAD,
        LEAST_GPU_STEP_S,
        LOADING_S,
        OPERATIONS_PER_BYTE,
        STORAGE_BYTES_PER_S,
        TRIAL_START_S,
    )

    if args.seconds_per_step is not None:
        yield "a step takes as long as was given on every type, the network a third of it in validation"
    elif device.type == "cuda" and not args.estimate:
        yield "every GPU is as fast as this one: give --seconds-per-step of another"
    else:
        yield (
            f"GPUs, which were not measured, are limited by their memory at {OPERATIONS_PER_BYTE:g} operations a byte, "
            f"a step takes {LEAST_GPU_STEP_S:g} s or more: measure one there, or give --seconds-per-step"
        )
    if args.seconds_per_step is not None or args.estimate or device.type == "cpu":
        yield (
            f"what was not measured: {1e3 * LOADING_S:g} ms of one core to make an image, {1e3 * DECODING_S:g} ms to "
            "decode and score one of validation, "
            f"{STORAGE_BYTES_PER_S / 1e6:g} MB/s of storage for checkpoints"
        )
    if config.search.space:
        yield "the networks of the space are drawn alike often, all with the batch size and crops of the configuration"
        yield f"a trial starts in {TRIAL_START_S[1]:g} s ({TRIAL_START_S[2]:g} s with more workers), and none fails"
    if config.scale.min_workers < config.scale.max_workers:
        yield f"there is room for {config.scale.max_workers} workers, the most of scale.num_workers, all the time"
    yield "gradients are not hidden behind the backward pass, machines keep up their baseline network rate"
    yield f"prices are on-demand list prices of early 2026, with one {HEAD} as head; starting machines is not counted"
    yield "the disk holds checkpoints alone: pictures for W&B and the cache of decoded images come to it"
    if config.search.max_hours is not None:
        yield f"search.max_hours {config.search.max_hours:g} is not considered: the search ends there"


if __name__ == "__main__":
    run_verb(main)
