"""Optimizers, schedules and averaged weights, against PyTorch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from nuciseg.models import TimmConfig, UnetConfig, build_model
from nuciseg.optim import (
    AveragedWeights,
    OptimConfig,
    ScheduleConfig,
    build_optimizer,
    learning_rate_at,
    set_learning_rate,
)

KINDS = ["adamw", "adam", "sgd", "rmsprop"]


def torch_rates(scheduler_class: Any, num_steps: int, **options: Any) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = scheduler_class(optimizer, **options)
    rates = []
    for step in range(num_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step + 1 < num_steps:
            scheduler.step()
    return rates


def our_rates(schedule: ScheduleConfig, num_steps: int) -> list[float]:
    return [learning_rate_at(schedule, 0.1, step, num_steps) for step in range(num_steps)]


def test_cosine_is_torchs() -> None:
    expected = torch_rates(torch.optim.lr_scheduler.CosineAnnealingLR, 50, T_max=50, eta_min=0.1 * 0.02)
    assert our_rates(ScheduleConfig(kind="cosine", warmup_share=0, final_share=0.02), 50) == pytest.approx(expected)


@pytest.mark.parametrize(("num_steps", "share"), [(50, 0.3), (40, 0.05), (100, 0.25)])
def test_one_cycle_is_torchs(num_steps: int, share: float) -> None:
    expected = torch_rates(
        torch.optim.lr_scheduler.OneCycleLR, num_steps, max_lr=0.1, total_steps=num_steps, pct_start=share,
        final_div_factor=4.0, cycle_momentum=False,
    )  # fmt: skip
    rates = our_rates(ScheduleConfig(kind="one_cycle", warmup_share=share, final_share=0.01), num_steps)
    assert rates == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("kind", ["cosine", "constant"])
def test_warm_up_is_torchs(kind: Any) -> None:
    rates = our_rates(ScheduleConfig(kind=kind, warmup_share=0.2), 50)
    expected = torch_rates(torch.optim.lr_scheduler.LinearLR, 10, start_factor=0.1, total_iters=9)
    assert rates[:10] == pytest.approx(expected)
    if kind == "constant":
        assert rates[10:] == [0.1] * 40
    else:
        assert rates[10] == 0.1
        assert rates[-1] == pytest.approx(0.1 * 0.01, rel=0.2)
        assert rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.parametrize("kind", ["cosine", "constant", "one_cycle"])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.99])
@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_short_runs_and_steps_past_the_end(kind: Any, share: float, num_steps: int) -> None:
    schedule = ScheduleConfig(kind=kind, warmup_share=share)
    rates = [learning_rate_at(schedule, 0.1, step, num_steps) for step in range(num_steps + 3)]
    assert all(0 < rate <= 0.1 + 1e-12 for rate in rates)
    assert rates[-1] == rates[-2]


@pytest.mark.parametrize("kind", KINDS)
def test_every_optimizer_lowers_the_loss(kind: Any) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    inputs, targets = torch.randn(32, 4), torch.randn(32, 1)
    optimizer = build_optimizer(OptimConfig(kind=kind, lr=0.01), model)
    losses = []
    for _ in range(60):
        loss = nn.functional.mse_loss(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert type(optimizer).__name__.lower() == kind
    assert losses[-1] < 0.8 * losses[0]


def test_weights_decay_and_biases_and_norms_do_not() -> None:
    model = build_model(UnetConfig(depth=1, width=4), 1, 1)
    optimizer = build_optimizer(OptimConfig(lr=0.1, weight_decay=0.5), model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 0.95 if parameter.ndim == 4 else 1.0
        torch.testing.assert_close(parameter.detach(), factor * before[name], msg=name)


def test_encoder_has_its_own_learning_rate() -> None:
    model = build_model(TimmConfig(encoder="resnet10t", stages=2, decoder_channels=(8, 8)), 1, 1)
    optimizer = build_optimizer(OptimConfig(lr=1.0, encoder_lr_factor=0.1), model)
    set_learning_rate(optimizer, 0.5)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates.keys() == {id(p) for p in model.parameters()}
    for name, parameter in model.named_parameters():
        assert rates[id(parameter)] == pytest.approx(0.05 if name.startswith("encoder.") else 0.5), name


def test_averaged_weights_warm_up_and_follow_buffers() -> None:
    model = nn.BatchNorm1d(1)
    averaged = AveragedWeights(model, decay=0.5)
    expected_weight, expected_mean = None, None
    for step in range(12):
        with torch.no_grad():
            model.weight.fill_(step)
            model.running_mean.fill_(10 * step)  # type: ignore[union-attr]
            model.num_batches_tracked.fill_(step)  # type: ignore[union-attr]
        averaged.update()
        decay = 0.0 if step == 0 else min(0.5, (1 + step) / (10 + step))
        expected_weight = step if expected_weight is None else decay * expected_weight + (1 - decay) * step
        expected_mean = 10 * expected_weight
    found = averaged.module.state_dict()
    assert found["weight"].item() == pytest.approx(expected_weight)
    assert found["running_mean"].item() == pytest.approx(expected_mean)
    assert found["running_mean"].item() < model.running_mean.item()  # type: ignore[union-attr]
    assert found["num_batches_tracked"].item() == 11
    assert averaged.n_averaged.item() == 12
