"""An encoder that is frozen for some epochs and then thawed: nothing of it moves, then it learns, resumed or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gloo_workers import on_workers
from small_runs import SMALL, assert_same_run, last_checkpoint, open_data, run

from nuciseg.config import Config, load_config, merged
from nuciseg.engine.checkpoint import CheckpointStore
from nuciseg.engine.inference import Place
from nuciseg.engine.loop import EpochReport, Trainer
from nuciseg.engine.network import build_network
from nuciseg.errors import ConfigError
from nuciseg.models import TimmConfig, build_model, freeze_encoder
from nuciseg.optim import OptimConfig, build_optimizer

ENCODER = {"kind": "timm", "encoder": "resnet10t", "stages": 2, "decoder_channels": (8, 8)}
FROZEN_EPOCHS = 2


def frozen_config(**changes: Any) -> Config:
    small = {**SMALL, "model": {**ENCODER, "channel_policy": "learned"}}
    frozen = {"optim": {"frozen_encoder_epochs": FROZEN_EPOCHS, "lr": 0.01, "weight_decay": 0.1}}
    return load_config(overrides=merged(small, frozen)).replaced(changes)


def encoder_tensors(weights: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in weights.items() if name.startswith("encoder.")}


def beginning(config: Config) -> dict[str, torch.Tensor]:
    """The encoder's weights and statistics before the first step of a run."""
    torch.manual_seed(config.seed)
    return encoder_tensors(build_network(config, 1, torch.device("cpu")).model.state_dict())


def changed(now: dict[str, torch.Tensor], before: dict[str, torch.Tensor]) -> list[str]:
    assert now.keys() == before.keys()
    return sorted(name for name, tensor in now.items() if not torch.equal(tensor, before[name]))


@pytest.mark.parametrize(
    "changes",
    [
        {"optim.kind": "adamw", "train.ema_decay": None},
        {"optim.kind": "adam"},
        {"optim.kind": "sgd", "optim.lr": 0.1, "schedule.kind": "constant", "train.accumulate": 2},
        {"optim.kind": "rmsprop"},
    ],
    ids=lambda changes: str(changes["optim.kind"]),
)
def test_nothing_of_a_frozen_encoder_changes_and_all_of_a_thawed_one_does(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    config = frozen_config(**changes, **{"train.epochs": FROZEN_EPOCHS + 1})
    before = beginning(config)
    assert any("running_var" in name for name in before)
    assert any("adapter" in name for name in before)

    def on_epoch(report: EpochReport) -> None:
        checkpoint = last_checkpoint(tmp_path)
        raw = {name.removeprefix("model."): tensor for name, tensor in checkpoint.training.items()}
        moved = [changed(encoder_tensors(weights), before) for weights in (raw, checkpoint.weights)]
        if report.progress.epoch <= FROZEN_EPOCHS:
            assert moved == [[], []]
            names = [name for name, _ in report.network.model.named_parameters()]
            gathered = {name.split(".")[1] for name in checkpoint.training if name.startswith("optimizer.")}
            assert len(gathered) == sum(not name.startswith("encoder.") for name in names)  # no momentum waits
        else:
            assert moved == [sorted(before), sorted(before)]

    run(config, tmp_path, on_epoch=on_epoch)


def test_the_rest_learns_while_the_encoder_is_frozen(tmp_path: Path) -> None:
    config = frozen_config(**{"train.epochs": 1})
    torch.manual_seed(config.seed)
    before = build_network(config, 1, torch.device("cpu")).model.state_dict()
    run(config, tmp_path)
    weights = last_checkpoint(tmp_path).weights
    kept = {name for name in weights if torch.equal(weights[name], before[name])}
    assert kept == set(encoder_tensors(before))


@pytest.mark.parametrize("interrupted_after", [1, FROZEN_EPOCHS, FROZEN_EPOCHS + 1])
def test_resumed_is_undisturbed_whether_frozen_or_thawed(interrupted_after: int, tmp_path: Path) -> None:
    config = frozen_config()

    def interrupt(report: EpochReport) -> None:
        if report.progress.epoch == interrupted_after:
            raise InterruptedError

    run(config, tmp_path / "undisturbed")
    with pytest.raises(InterruptedError):
        run(config, tmp_path / "resumed", on_epoch=interrupt)
    run(config, tmp_path / "resumed")
    assert_same_run(tmp_path / "resumed", tmp_path / "undisturbed")


def _encoder_after_each_epoch(place: Place, config: Config, run_dir: Path) -> list[dict[str, torch.Tensor]]:
    trainer = Trainer(config, open_data(config), place, CheckpointStore(run_dir))
    seen = [encoder_tensors(trainer.network.model.state_dict())]
    while not trainer.finished:
        trainer.run_epoch()
        seen.append(encoder_tensors(trainer.network.model.state_dict()))
    trainer.close()
    return seen


def test_two_workers_freeze_thaw_and_train_what_one_trains(tmp_path: Path) -> None:
    """An uneven last batch, too: the worker that has no image of it still joins the gradients' sum."""
    uneven = {"data.batch_size": 5, "train.accumulate": 2, "train.epochs": FROZEN_EPOCHS + 1}
    config = frozen_config(**uneven, **{"model.norm": "none"})
    first, second = on_workers(2, tmp_path / "rendezvous", _encoder_after_each_epoch, config, tmp_path / "2")
    assert [changed(tensors, first[0]) for tensors in first[1:-1]] == [[]] * FROZEN_EPOCHS
    assert changed(first[-1], first[0]) == sorted(first[0])
    assert [changed(mine, theirs) for mine, theirs in zip(first, second, strict=True)] == [[]] * len(first)
    # A frozen encoder normalises as in evaluation, so how a batch is spread does not matter.
    alone = run(config, tmp_path / "1").history[:FROZEN_EPOCHS]
    together = last_checkpoint(tmp_path / "2").progress.history[:FROZEN_EPOCHS]
    assert [row["train_loss"] for row in together] == pytest.approx([row["train_loss"] for row in alone], rel=1e-3)


def test_a_network_without_an_encoder_is_refused() -> None:
    for model in ({"kind": "unet"}, {"kind": "baseline"}):
        with pytest.raises(ConfigError, match=r"epochs is 2, but .* model\.kind '\w+' has no encoder") as e:
            load_config(overrides={"model": model, "optim": {"frozen_encoder_epochs": 2}})
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("kind", ["adamw", "adam", "sgd", "rmsprop"])
def test_a_learning_rate_factor_of_0_keeps_weights_to_the_last_bit(kind: Any) -> None:
    torch.manual_seed(0)
    model = build_model(TimmConfig(**ENCODER), 1, 1)
    optimizer = build_optimizer(OptimConfig(kind=kind, encoder_lr_factor=0, weight_decay=1.0), model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    kept = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert kept == [name for name in before if name.startswith("encoder.")]


def test_a_frozen_encoder_computes_no_gradient() -> None:
    model = build_model(TimmConfig(**{**ENCODER, "encoder": "mobilenetv3_small_050"}), 1, 1)
    freeze_encoder(model.train(), True)
    inner = [module for module in model.modules() if module.training]
    assert inner
    assert not any(module.training for module in model.encoder.modules())  # type: ignore[union-attr]
    features = model.encoder(torch.rand(1, 1, 8, 8))  # type: ignore[operator]
    assert not any(feature.requires_grad for feature in features.values())
    freeze_encoder(model, False)
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
