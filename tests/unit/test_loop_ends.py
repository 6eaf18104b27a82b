"""How a run of the loop ends: failures are named, patience is kept, and so many checkpoints stay."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import open_data, run, small_config

from nuciseg.data.dataset import TrainingLoader
from nuciseg.engine.checkpoint import MAX_FOLDERS, CheckpointStore
from nuciseg.engine.inference import Place
from nuciseg.engine.loop import EpochReport, Trainer, train
from nuciseg.errors import NonFiniteLossError, OutOfMemoryError

# --- failures --------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_names_step_learning_rate_and_terms(tmp_path: Path) -> None:
    changes = {
        "optim.kind": "sgd",
        "optim.lr": 100.0,
        "train.clip_norm": None,
        "model.norm": "none",
        "optim.weight_decay": 10.0,
        "schedule.warmup_share": 0.0,
        "schedule.kind": "constant",
    }
    with pytest.raises(NonFiniteLossError) as raised:
        run(small_config(**changes), tmp_path)
    message = str(raised.value)
    assert "in step " in message
    assert "at learning rate 100" in message
    for term in ("loss ", "bce ", "dice ", "gradient norm "):
        assert term in message
    assert "lower optim.lr" in message
    assert "\n" not in message


def test_a_step_that_is_not_finite_leaves_the_weights_alone(tmp_path: Path) -> None:
    config = small_config()
    trainer = Trainer(config, open_data(config), Place(), CheckpointStore(tmp_path))
    before = {name: tensor.clone() for name, tensor in trainer.network.model.state_dict().items()}

    def spoil(module: torch.nn.Module, arguments: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits * float("nan")

    trainer.network.model.register_forward_hook(spoil)
    with pytest.raises(NonFiniteLossError, match="in step 0 "):
        trainer.train_epoch(1)
    trainer.close()
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.network.model.state_dict().items())


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ..."),
    ],
    ids=repr,
)
def test_a_batch_that_does_not_fit_is_told_with_the_cure(error: Exception, tmp_path: Path) -> None:
    """The lack of memory is raised by a hook of the network, as its allocator would: no test can fill every machine."""
    config = small_config()
    trainer = Trainer(config, open_data(config), Place(), CheckpointStore(tmp_path))

    def run_out(module: torch.nn.Module, arguments: Any) -> None:
        raise error

    trainer.network.model.register_forward_pre_hook(run_out)
    with pytest.raises(OutOfMemoryError, match=r"data\.batch_size 4 .*raise train\.accumulate"):
        trainer.run_epoch()
    trainer.close()


def test_validation_that_does_not_fit_is_told_too(tmp_path: Path) -> None:
    config = small_config(**{"train.ema_decay": None})
    trainer = Trainer(config, open_data(config), Place(), CheckpointStore(tmp_path))

    def run_out(module: torch.nn.Module, arguments: Any) -> None:
        if not module.training:
            raise MemoryError

    trainer.network.model.register_forward_pre_hook(run_out)
    with pytest.raises(OutOfMemoryError, match="out of memory in validation, which takes whole images"):
        trainer.run_epoch()
    trainer.close()


def test_another_error_keeps_its_own_name(tmp_path: Path) -> None:
    config = small_config()
    trainer = Trainer(config, open_data(config), Place(), CheckpointStore(tmp_path))

    def fail(module: torch.nn.Module, arguments: Any) -> None:
        raise RuntimeError("a mistake of ours")

    trainer.network.model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        trainer.run_epoch()
    trainer.close()


# --- when a run ends, and what it keeps ------------------------------------------------------------------------------


def test_a_run_without_a_better_score_stops_when_patience_is_over_and_stays_stopped(tmp_path: Path) -> None:
    # At this learning rate the weights do not change: the first epoch stays the best.
    still = {"optim.lr": 1e-30, "optim.kind": "sgd", "optim.weight_decay": 0.0, "train.epochs": 9, "train.patience": 2}
    progress = run(small_config(**still), tmp_path)
    assert (progress.epoch, progress.best_epoch) == (3, 1)
    assert run(small_config(**still), tmp_path).epoch == 3


def test_there_are_never_more_than_three_checkpoints_and_best_last_and_the_one_before_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path)
    counts: list[int] = []
    replace_name = os.replace

    def counting(source: Any, target: Any) -> None:
        replace_name(source, target)
        counts.append(len(list(store.folder.iterdir())))

    monkeypatch.setattr(os, "replace", counting)  # the moment with most folders: written, nothing dropped yet
    histories: list[list[tuple[float, float]]] = []

    def on_epoch(report: EpochReport) -> None:
        histories.append([(row["border_dice"], row["ap_mean_per_image"]) for row in report.progress.history])
        scores = histories[-1]
        best_epoch = scores.index(max(scores)) + 1
        assert report.progress.best_epoch == best_epoch
        assert report.is_best == (best_epoch == len(scores))
        kept = {
            json.loads((path / "checkpoint.json").read_text())["progress"]["epoch"] for path in store.folder.iterdir()
        }
        assert kept == {best_epoch, len(scores), max(1, len(scores) - 1)}
        assert store.best is not None
        assert store.best.name == f"epoch-{best_epoch:04d}"

    # A learning rate so high that the score goes up and down.
    config = small_config(**{"optim.lr": 0.3, "train.epochs": 8, "train.ema_decay": None, "model.norm": "batch"})
    train(config, open_data(config), Place(), store, on_epoch)
    assert max(counts) <= MAX_FOLDERS
    scores = histories[-1]
    assert len(set(scores)) > 1, "the score never changed: the test shows nothing"


def test_the_loader_gives_the_same_batches_to_threads_as_without(tmp_path: Path) -> None:
    config = small_config()
    data = open_data(config)
    pixels = []
    for num_threads in (0, 3):
        with TrainingLoader(data.training_data, batch_size=4, num_threads=num_threads) as loader:
            pixels.append([loaded.batch.images_BCHW for loaded in loader.epoch(2) if loaded.batch is not None])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*pixels, strict=True))
