"""How fast this machine trains a configuration: two short epochs of the very network on some of the very images."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from nuciseg.config import Config
from nuciseg.engine.checkpoint import CheckpointStore
from nuciseg.engine.datasets import TrainingSet
from nuciseg.engine.inference import Place
from nuciseg.engine.loop import train
from nuciseg.engine.planning import Pace

MEASURED_STEPS = 4
MEASURED_GPU_STEPS = 32  # the loader's threads run ahead there, and in few steps they only begin to
MEASURED_VALIDATION = 8  # images


def measure_pace(config: Config, data: TrainingSet, device: torch.device) -> Pace:
    """The pace of one worker on `device`, of its second epoch of a few steps; PyTorch has the threads that it has.

    On a CPU images are made in the worker's own thread: where every core trains, none is left to make them beside it.
    Raises what training raises.
    """
    changes: dict[str, object] = {"optim.frozen_encoder_epochs": 0, "train.epochs": 2, "train.patience": None}
    if device.type == "cpu":
        changes["data.num_loader_threads"] = 0
    config = config.replaced(changes)
    num_steps = MEASURED_GPU_STEPS if device.type == "cuda" else MEASURED_STEPS
    part = _part_of(data, config.data.batch_size * num_steps)
    ended: list[tuple[float, Mapping[str, float]]] = []
    with tempfile.TemporaryDirectory(prefix="nuciseg-plan-") as folder:
        train(
            config,
            part,
            Place(device=device),
            CheckpointStore(Path(folder)),
            lambda report: ended.append((time.perf_counter(), report.metrics)),
        )
    # The first is a warm-up: caches, memory, the choice of kernels.
    [(start_s, _), (end_s, measured)] = ended
    seconds = end_s - start_s
    return Pace(
        image_s=measured["train_s"] / len(part.training_data.indices),
        validation_image_s=measured["validation_s"] / len(part.split.validation),
        rest_of_epoch_s=seconds - measured["train_s"] - measured["validation_s"],
        loading_s=_loading_s(part, config.data.batch_size),
    )


def _part_of(data: TrainingSet, num_images: int) -> TrainingSet:
    """Evenly chosen training and validation images."""
    return replace(
        data,
        training_data=replace(data.training_data, indices=_chosen(data.training_data.indices, num_images)),
        split=replace(data.split, validation=_chosen(data.split.validation, MEASURED_VALIDATION)),
    )


def _chosen(indices: tuple[int, ...], most: int) -> tuple[int, ...]:
    return indices[:: max(1, -(-len(indices) // most))]


def _loading_s(data: TrainingSet, batch_size: int) -> float:
    """Seconds of one thread for an image of a batch."""
    [first, *_] = data.training_data.plan(1, batch_size)
    start = time.perf_counter()
    data.training_data.load(first, epoch=1)
    return (time.perf_counter() - start) / len(first.indices)
