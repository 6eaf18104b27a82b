"""What Ray costs, and what more workers bring, on the cores of this machine.

    python benchmarks/scaling.py [--data.root DIR] [--rounds 3] [--epochs 8] [--trials 8] [--part NAME ...]

Four parts, the runs of each alternating, all with one thread a worker and images made in that thread:

workers   two workers with twice the batch against one: images a second, half of it for each
torchrun  `nuciseg train` on two workers against `torchrun` with the same loop (plain_training.py): seconds an epoch.
          With --spare-core the workers of both share all cores but the last, and Ray's own processes keep to that
search    `nuciseg tune` of one-worker trials, as many at a time as there are cores, against the same trainings as plain
          scripts; how much of the search's time its places do not train
nodes     1, 2, 4 and 8 workers, each on a logical node of its own (logical_nodes.py): do all learn the same?

Prints every run, then as the last line one JSON object. Ratios are medians over the rounds. About 40 minutes on 2 cores
with nothing else to do; without --data.root clusters are drawn.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from alternating import all_cores
from workers import NETWORK
from workers import train as train_workers

from nuciseg.data.synthetic import SyntheticConfig, write_nucleus_folder
from nuciseg.tracking import METRICS_FILE, read_metrics

HERE = Path(__file__).parent
LOOK_S = 0.02
PLACE_S = 2.0  # between two looks at which processes there are
WORKER = "ray::RayTrainWorker"  # what Ray calls the processes that train
NUM_NODES = (1, 2, 4, 8)
LOSS_TOLERANCE = 1e-3  # sums of floats in another order
# Group norm and no dropout: what depends on who has which image of a batch would differ between numbers of workers.
ALIKE = ("--model.norm", "group", "--model.dropout", "0")
PLAIN = ("--data.num_loader_threads", "0", "--train.calibrate", "false", "--tracking.kind", "none")

Cores = tuple[Sequence[int], Sequence[int]]
"""Of Ray Train's workers, and of all other processes."""


@dataclass(frozen=True)
class Timed:
    """A run: seconds in all, until the end of its first epoch, and of each later one."""

    wall_s: float
    first_epoch_s: float
    epoch_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data.root", dest="root", type=Path, metavar="DIR", help="nucleus folder; none: drawn")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind (3)")
    parser.add_argument("--epochs", type=int, default=8, help="epochs of a run and of a trial, at least 2 (8)")
    parser.add_argument("--trials", type=int, default=8, help="trials of the search (8)")
    parser.add_argument("--images", type=int, default=320, help="drawn training images, without --data.root (320)")
    parser.add_argument("--spare-core", action="store_true", help="torchrun: leave a core to Ray's processes (Linux)")
    parser.add_argument("--part", action="append", choices=list(PARTS), help="only this one; may be repeated")
    args = parser.parse_args()
    if args.spare_core and (not hasattr(os, "sched_setaffinity") or len(all_cores()) < 2):
        parser.error("--spare-core needs Linux and two cores: leave it out")
    if args.epochs < 2:
        parser.error(f"--epochs {args.epochs}: the first epoch has the start in it, so give 2 or more")
    busy = os.getloadavg()[0]
    if busy > 0.5:
        print(f"Something else runs on this machine (load {busy:.1f}): its figures count little.")
    with tempfile.TemporaryDirectory(prefix="nuciseg-scaling-") as folder:
        os.environ["NUCISEG_CACHE"] = str(Path(folder) / "cache")
        if args.root is None:
            args.root = Path(folder) / "drawn"
            write_nucleus_folder(SyntheticConfig(num_train=args.images, num_test=1), args.root)
        result: dict[str, Any] = {}
        for name in args.part or PARTS:
            result |= PARTS[name](args, Path(folder) / name)
    shown = {"cores": len(all_cores()), "spare_core": args.spare_core}
    print(json.dumps({**result, **shown, "rounds": args.rounds, "load_before": round(busy, 1)}))


# ------------------------------------------------------------------------------------------------------ the parts
def measure_workers(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Equal work per core: `batch` images a step for each worker."""
    batch, efficiencies = 8, []
    for seed in range(args.rounds):
        rates = {}
        for num_workers in (1, 2):
            _, steps_per_s = train_workers(
                args.root,
                args.epochs,
                seed,
                num_workers,
                folder,
                batch * num_workers,
                ("--data.num_loader_threads", "0"),
            )
            rates[num_workers] = steps_per_s * batch
        efficiencies.append(rates[2] / rates[1])
        print(f"workers: {rates[1]:.2f} images/s of one, {rates[2]:.2f} of each of two", flush=True)
    return {"efficiency_2_workers": median(efficiencies)}


def measure_torchrun(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    flags = (*common(args), "--train.epochs", str(args.epochs), "--data.batch_size", "16")
    *shared, spare = all_cores()
    with_ray_on, without_on = ((shared, [spare]), (shared, shared)) if args.spare_core else (None, None)
    with_ray, without = [], []
    for number in range(args.rounds):
        name = f"ray-{number}"
        words = ("--run.storage_path", str(folder), "--run.name", name, "--scale.num_workers", "2")
        command = [sys.executable, "-m", "nuciseg.train", *flags, *words]
        with_ray.append(timed(command, folder / name / METRICS_FILE, args.epochs, with_ray_on))
        out = folder / f"torchrun-{number}"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += [str(HERE / "plain_training.py"), str(out), *flags]
        without.append(timed(command, out / METRICS_FILE, args.epochs, without_on))
        print(f"torchrun: an epoch {without[-1].epoch_s:.2f} s, with Ray {with_ray[-1].epoch_s:.2f} s", flush=True)
    pairs = list(zip(with_ray, without, strict=True))
    return {
        "vs_torchrun": median(plain.epoch_s / ray.epoch_s for ray, plain in pairs),
        "vs_torchrun_with_start": median(plain.wall_s / ray.wall_s for ray, plain in pairs),
        "ray_s_per_epoch": median(ray.epoch_s - plain.epoch_s for ray, plain in pairs),
        "ray_s_at_start": median(
            (ray.first_epoch_s - ray.epoch_s) - (plain.first_epoch_s - plain.epoch_s) for ray, plain in pairs
        ),
    }


def measure_search(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    places = min(len(all_cores()), args.trials)
    seeds = list(range(args.trials))
    flags = (*common(args), "--train.epochs", str(args.epochs), "--data.batch_size", "8")
    shares, costs, ratios = [], [], []
    for number in range(args.rounds):
        name = f"search-{number}"
        search_s = wall_s([
            *(sys.executable, "-m", "nuciseg.tune", *flags, "--no-final", "--search.scheduler", "none"),
            *("--search.sampler", "grid", "--search.space", json.dumps({"seed": {"choice": seeds}})),
            *("--search.trial_epochs", str(args.epochs), "--search.max_concurrent", str(places)),
            *("--run.storage_path", str(folder), "--run.name", name),
        ])  # fmt: skip
        trials = json.loads((folder / name / "results.json").read_text(encoding="utf-8"))
        assert all(trial["epochs"] == args.epochs for trial in trials), "the scripts train for as many epochs"
        trained_s = sum(trial["seconds"] for trial in trials)
        script = [sys.executable, str(HERE / "plain_training.py")]
        scripts = [[*script, str(folder / f"plain-{number}-{seed}"), *flags, "--seed", str(seed)] for seed in seeds]
        start = time.perf_counter()
        with ThreadPoolExecutor(places) as pool:
            list(pool.map(wall_s, scripts))
        plain_s = time.perf_counter() - start
        shares.append(1 - trained_s / (places * search_s))
        costs.append((places * search_s - trained_s) / args.trials)
        ratios.append(search_s / plain_s)
        print(f"search: {search_s:.1f} s, {shares[-1]:.0%} of it not training; scripts {plain_s:.1f} s", flush=True)
    return {
        "share_outside_training": median(shares),
        "outside_s_per_trial": median(costs),
        "search_vs_scripts": median(ratios),
        "trials_at_a_time": places,
    }


def check_nodes(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    losses, epochs = {}, {}
    for num_nodes in NUM_NODES:
        flags = (*common(args), *ALIKE, "--train.epochs", "2", "--train.precision", "fp32", "--data.batch_size", "16")
        words = ("--run.storage_path", str(folder), "--run.name", str(num_nodes))
        wall_s([sys.executable, str(HERE / "logical_nodes.py"), str(num_nodes), *flags, *words])
        rows = read_metrics(folder / str(num_nodes) / METRICS_FILE)
        losses[num_nodes], epochs[num_nodes] = rows[-1]["train_loss"], [row["epoch"] for row in rows]
        print(f"nodes: {num_nodes}, loss {losses[num_nodes]:.6f}", flush=True)
    difference = max(abs(loss / losses[1] - 1) for loss in losses.values())
    same_epochs = all(each == [1, 2] for each in epochs.values())
    return {
        "nodes": list(NUM_NODES),
        "largest_difference_of_loss": float(f"{difference:.2g}"),
        "nodes_learn_the_same": same_epochs and difference < LOSS_TOLERANCE,
    }


PARTS: dict[str, Callable[[argparse.Namespace, Path], dict[str, Any]]] = {
    "workers": measure_workers,
    "torchrun": measure_torchrun,
    "search": measure_search,
    "nodes": check_nodes,
}


# ------------------------------------------------------------------------------------------------------- the runs
def common(args: argparse.Namespace) -> tuple[str, ...]:
    return ("--data.root", str(args.root), *NETWORK, *PLAIN, "--scale.cpus_per_worker", "1")


def wall_s(command: Sequence[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def timed(command: Sequence[str], metrics: Path, num_epochs: int, cores: Cores | None) -> Timed:
    """Run `command`, which adds a line to `metrics` after each epoch, on all cores or on these."""
    start = time.perf_counter()
    ended: list[float] = []
    placed_s = -PLACE_S
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        found = len(read_metrics(metrics)) if len(ended) < num_epochs else num_epochs
        ended += [time.perf_counter() - start] * (found - len(ended))
        if cores is not None and time.perf_counter() - placed_s >= PLACE_S:
            place(process.pid, cores)
            placed_s = time.perf_counter()
        time.sleep(LOOK_S)
    wall = time.perf_counter() - start
    if process.returncode:
        sys.exit(process.returncode)
    ended += [wall] * (num_epochs - len(ended))
    return Timed(wall, ended[0], (ended[-1] - ended[0]) / (num_epochs - 1))


def place(pid: int, cores: Cores) -> None:
    """Keep a process and what it has started on these cores, thread by thread: the system knows cores of threads."""
    of_workers, of_others = cores
    with contextlib.suppress(psutil.NoSuchProcess):  # ended by itself
        root = psutil.Process(pid)
        for each in (root, *root.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                own = of_workers if " ".join(each.cmdline()).startswith(WORKER) else of_others
                for thread in each.threads():
                    os.sched_setaffinity(thread.id, own)


def median(values: Any) -> float:
    return round(statistics.median(values), 3)


if __name__ == "__main__":
    main()
