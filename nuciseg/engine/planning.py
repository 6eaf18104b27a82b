"""What a training or a search takes, on paper: epochs, seconds, dollars, and what of a step becomes the limit.

Plain arithmetic over figures that were measured or given; `engine/pace.py` measures them, `nuciseg plan` prints the
result. Rates of machines are their makers' figures, prices a day's list prices: the command says so.
"""

from __future__ import annotations

import bisect
import random
from collections.abc import Mapping
from dataclasses import dataclass

from nuciseg.config import SearchConfig
from nuciseg.errors import ConfigError

GRADIENT_BYTES = 4  # a parameter's gradient is summed in fp32, whatever the autocast
BACKWARD_FACTOR = 3  # forward, and backward with twice its operations
VALIDATION_SHARE = 1 / 3  # of a training image's time, where it was not measured: forward alone
OPERATIONS_PER_BYTE = 25.0  # of a GPU's memory traffic, in convolutions of few channels: an assumption, see the docs
LEAST_GPU_STEP_S = 0.01  # launching a thousand kernels at 10 us: an assumption
LOADING_S = 2e-3  # of one core to make a training image: CPU time, drawn clusters, crop 192, see docs/scaling.md
DECODING_S = 5e-3  # of one core to decode and score a validation image of one cluster, likewise
STORAGE_BYTES_PER_S = 200e6  # of a shared file system, for checkpoints: an assumption
MESSAGE_S = 50e-6  # latency of one message of an all-reduce between machines
TRIAL_START_S = {1: 11.0, 2: 30.0}  # a trial of one worker, of several: benchmarks/scaling.py, two threads of one core
HEAD = "m6i.xlarge"
_DRAWS = 100


@dataclass(frozen=True)
class Machine:
    """A machine type. `gpu_memory_gb_per_s` is one GPU's, `gpu_link_gbps` what an all-reduce gets between the GPUs of
    one machine, gigabits; `network_gbps` is what lasts, not what bursts."""

    num_gpus: int
    num_cpus: int
    dollars_per_hour: float
    network_gbps: float
    gpu: str = ""
    gpu_memory_gb_per_s: float = 0.0
    gpu_link_gbps: float = 0.0


# Prices: Linux on demand in us-east-1 and us-west-2 as published by AWS, early 2026 (p5 after the cut of June 2025).
# Networks: EC2's instance specifications, baseline; p5's 3200 Gbps need EFA, without it one card of 100 carries it.
# Memory: NVIDIA's data sheets. Links: PCIe 4.0 x8 at the two thirds that an all-reduce reaches, NVLink 4 likewise.
MACHINES: Mapping[str, Machine] = {
    "g5.xlarge": Machine(1, 4, 1.006, 2.5, "A10G", 600),
    "g5.12xlarge": Machine(4, 48, 5.672, 40, "A10G", 600, 80),
    "g5.48xlarge": Machine(8, 192, 16.288, 100, "A10G", 600, 80),
    "g6.xlarge": Machine(1, 4, 0.8048, 2.5, "L4", 300),
    "g6.12xlarge": Machine(4, 48, 4.6016, 40, "L4", 300, 80),
    "g6.48xlarge": Machine(8, 192, 13.3504, 100, "L4", 300, 80),
    "p5.48xlarge": Machine(8, 192, 55.04, 100, "H100", 3350, 2400),
    "c7i.8xlarge": Machine(0, 32, 1.428, 12.5),
    HEAD: Machine(0, 4, 0.192, 1.562),
}


@dataclass(frozen=True)
class Work:
    """What is trained. `num_crops` are those of an epoch, `num_validation` whole images after each."""

    num_crops: int
    num_validation: int
    batch_size: int
    num_parameters: int
    forward_operations: float

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_crops // self.batch_size)

    @property
    def gradient_bytes(self) -> int:
        return GRADIENT_BYTES * self.num_parameters


@dataclass(frozen=True)
class Pace:
    """How fast one worker is, in seconds: for one training image, for one image of validation, for what else an epoch
    has (its checkpoint above all), for making one image of a batch in one thread, and for the shortest step."""

    image_s: float
    validation_image_s: float
    rest_of_epoch_s: float
    loading_s: float
    least_step_s: float = 0.0


@dataclass(frozen=True)
class Step:
    """Seconds of a step of several workers. What is loaded ahead takes no time until it takes longer than the rest."""

    compute_s: float
    all_reduce_s: float
    loading_s: float

    @property
    def seconds(self) -> float:
        return max(self.compute_s + self.all_reduce_s, self.loading_s)

    @property
    def limit(self) -> str:
        """What most of the step's time is."""
        if self.loading_s > self.compute_s + self.all_reduce_s:
            return "data loading"
        return "gradients" if self.all_reduce_s > self.compute_s else "network"


def machine(name: str, dollars_per_hour: Mapping[str, float]) -> Machine:
    """The machine type `name`, at the price that was given for it, if any. Raises ConfigError for an unknown one."""
    if name not in MACHINES:
        raise ConfigError(f"--machine {name}: not one that is known; choose among {', '.join(MACHINES)}")
    known = MACHINES[name]
    price = dollars_per_hour.get(name, known.dollars_per_hour)
    return Machine(**{**known.__dict__, "dollars_per_hour": price})


def assumed_pace(image_s: float, checkpoint_bytes: float, least_step_s: float = 0.0) -> Pace:
    """The pace of which only the time of a training image is known."""
    return Pace(
        image_s,
        VALIDATION_SHARE * image_s + DECODING_S,
        checkpoint_bytes / STORAGE_BYTES_PER_S,
        LOADING_S,
        least_step_s,
    )


def estimated_image_s(work: Work, on: Machine) -> float:
    """Seconds of one training image on one GPU that nobody measured: its memory is the limit of so small networks."""
    return BACKWARD_FACTOR * work.forward_operations / (on.gpu_memory_gb_per_s * 1e9 * OPERATIONS_PER_BYTE)


def ring_all_reduce_s(num_bytes: float, num_workers: int, gbps: float, message_s: float = MESSAGE_S) -> float:
    """Seconds of summing `num_bytes` over a ring: every worker sends 2 (n - 1) messages of a part of n.

    Patarasuk and Yuan 2009, doi:10.1016/j.jpdc.2008.09.002. `gbps` is the slowest link, gigabits a second.
    """
    if num_workers == 1:
        return 0.0
    rounds = 2 * (num_workers - 1)
    return rounds * (num_bytes / num_workers * 8 / (gbps * 1e9) + message_s)


def step_of(work: Work, pace: Pace, num_workers: int, gbps: float, num_loader_threads: int) -> Step:
    """A step of the whole batch on `num_workers` that are joined by links of `gbps`.

    None of the all-reduce is hidden behind the backward pass, as DDP does in part: the step is at most so long.
    """
    images = -(-work.batch_size // num_workers)  # of the worker that has the most
    all_reduce_s = ring_all_reduce_s(work.gradient_bytes, num_workers, gbps)
    compute_s = max(images * pace.image_s, pace.least_step_s)
    return Step(compute_s, all_reduce_s, images * pace.loading_s / max(1, num_loader_threads))


def epoch_s(work: Work, pace: Pace, step: Step, num_workers: int) -> float:
    """Seconds of an epoch: its steps, validation divided among the workers, its checkpoint by the first of them."""
    validation_s = -(-work.num_validation // num_workers) * pace.validation_image_s
    return work.steps_per_epoch * step.seconds + validation_s + pace.rest_of_epoch_s


def link_gbps(on: Machine, num_workers: int) -> float:
    """The slowest link between so many workers, placed on as few machines as can be."""
    per_machine = max(1, on.num_gpus)
    if num_workers <= per_machine:
        return on.gpu_link_gbps or on.network_gbps
    return min(on.network_gbps, on.gpu_link_gbps or on.network_gbps)


# --------------------------------------------------------------------------------------------------- a search
def expected_epochs(search: SearchConfig, num_trials: int, epochs: int) -> float:
    """Epochs of all trials together, none of at most `epochs` failing.

    With ASHA trials come to each rung one after the other in random order, and one is as good at every rung as it will
    be: the mean over 100 such searches with a fixed seed. Others and `none` train every trial to its end.
    """
    if search.scheduler != "asha":
        return float(num_trials * epochs)
    rungs = _rungs(min(search.grace_epochs, epochs), search.reduction_factor, epochs)
    rng = random.Random(0)
    total = 0
    for _ in range(_DRAWS):
        quality = list(range(num_trials))
        rng.shuffle(quality)
        total += _epochs_of_one_search(quality, rungs, search.reduction_factor, epochs)
    return total / _DRAWS


def _rungs(grace_epochs: int, reduction_factor: int, epochs: int) -> list[int]:
    """Epochs after which a trial may be stopped; after the last one there is nothing left to save."""
    rungs = []
    rung = grace_epochs
    while rung < epochs:
        rungs.append(rung)
        rung *= reduction_factor
    return rungs


def _epochs_of_one_search(quality: list[int], rungs: list[int], reduction_factor: int, epochs: int) -> int:
    recorded: dict[int, list[int]] = {rung: [] for rung in rungs}
    total = 0
    for trial in quality:
        total += epochs
        for rung in rungs:
            cutoff = _quantile(recorded[rung], 1 - 1 / reduction_factor)
            bisect.insort(recorded[rung], trial)
            if cutoff is not None and trial < cutoff:
                total += rung - epochs
                break
    return total


def _quantile(ascending: list[int], share: float) -> float | None:
    """Linear between neighbours, as numpy's and so ASHA's; None of nothing."""
    if not ascending:
        return None
    place = share * (len(ascending) - 1)
    low = int(place)
    high = min(low + 1, len(ascending) - 1)
    return ascending[low] + (place - low) * (ascending[high] - ascending[low])


@dataclass(frozen=True)
class SearchTime:
    """A search on so many places for trials at once: wall-clock hours, hours of all workers together."""

    hours: float
    worker_hours: float


def search_time(
    trial_epochs: float, num_trials: int, epochs: int, final_epochs: int, epoch_s: float, at_once: int, num_workers: int
) -> SearchTime:
    """`trial_epochs` are those of all trials together, `epochs` of the longest, `final_epochs` the winner's.

    Trials that are begun as soon as there is a place end at most one trial later than work divided evenly would (Graham
    1969, doi:10.1137/0117039); half of that is added.
    """
    start_s = TRIAL_START_S[min(num_workers, 2)]
    work_s = trial_epochs * epoch_s + num_trials * start_s
    places = max(1, min(at_once, num_trials))
    longest_s = epochs * epoch_s + start_s if num_trials else 0.0
    uneven_s = (1 - 1 / places) * longest_s / 2
    final_s = final_epochs * epoch_s
    wall_s = max(work_s / places + uneven_s, longest_s) + final_s
    return SearchTime(wall_s / 3600, (work_s + final_s) * num_workers / 3600)
