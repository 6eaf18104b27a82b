"""Optimizers, the learning rate over a run, and the moving average of weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import torch
from pydantic import Field
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from nuciseg.section import Section


class OptimConfig(Section):
    """One section for all optimizers, so that a search can sample `kind` beside the parameters they share."""

    kind: Literal["adamw", "adam", "sgd", "rmsprop"] = Field(default="adamw", description="The optimizer.")
    lr: float = Field(default=1e-3, gt=0, le=100, description="Learning rate at its highest; see the schedule.")
    weight_decay: float = Field(
        default=1e-2,
        ge=0,
        le=10,
        description="Weight decay of the convolutions' weights, none on biases and normalisation: decoupled for adamw, "
        "else added to the gradient.",
    )
    momentum: float = Field(default=0.9, ge=0, lt=1, description="Momentum of sgd (Nesterov's) and rmsprop.")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="Decay of the mean gradient in adamw and adam.")
    beta2: float = Field(
        default=0.999, ge=0, lt=1, description="Decay of the mean squared gradient in adamw and adam; rmsprop's alpha."
    )
    encoder_lr_factor: float = Field(
        default=1.0, ge=0, le=10, description="Factor on the learning rate of a timm encoder; 0 freezes its weights."
    )
    frozen_encoder_epochs: int = Field(
        default=0,
        ge=0,
        description="First epochs in which a timm encoder keeps its weights and its batch normalisation's statistics.",
    )


class ScheduleConfig(Section):
    """The learning rate over a run, set before each optimizer step."""

    kind: Literal["cosine", "constant", "one_cycle"] = Field(
        default="cosine",
        description="cosine: linear warm-up, then half a cosine down; constant: linear warm-up, then level; "
        "one_cycle: half a cosine up from lr / 25, then half a cosine down.",
    )
    warmup_share: float = Field(
        default=0.05, ge=0, lt=1, description="Share of all steps in which the learning rate rises."
    )
    final_share: float = Field(
        default=0.01, ge=0, le=1, description="Learning rate at the end, as a share of lr (not: constant)."
    )


# Smith and Topin 2018 (arXiv:1708.07120) start low; 25 is PyTorch's default `div_factor`.
_ONE_CYCLE_START = 1 / 25


def build_optimizer(config: OptimConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of `config` for the trained parameters of `model`, which may be wrapped for data-parallel training.

    Build it before `freeze_encoder`: it leaves alone what has no gradient, but must know what will have one later.

    Each parameter group has a key `lr_factor`; `set_learning_rate` heeds it.
    """
    network = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    groups = _parameter_groups(config, network)
    betas = (config.beta1, config.beta2)
    # fused: one kernel for all tensors, on CPU too, where the plain loop takes a tenth of a small network's step.
    match config.kind:
        case "adamw":
            return torch.optim.AdamW(groups, lr=config.lr, betas=betas, fused=True)
        case "adam":
            return torch.optim.Adam(groups, lr=config.lr, betas=betas, fused=True)
        case "sgd":
            nesterov = config.momentum > 0
            return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=nesterov, fused=True)
        case "rmsprop":
            return torch.optim.RMSprop(groups, lr=config.lr, momentum=config.momentum, alpha=config.beta2)


def _parameter_groups(config: OptimConfig, network: nn.Module) -> list[dict[str, Any]]:
    """Parameters by (in the encoder?, decayed?), in the order of the network; empty groups left out."""
    encoder = getattr(network, "encoder", None)
    encoder_ids = {id(parameter) for parameter in encoder.parameters()} if encoder is not None else set()
    groups: list[dict[str, Any]] = []
    for in_encoder in (True, False):
        for decayed in (True, False):
            parameters = [
                parameter
                for parameter in network.parameters()
                if parameter.requires_grad
                and (id(parameter) in encoder_ids) == in_encoder
                and (parameter.ndim > 1) == decayed  # biases and normalisation have one dimension
            ]
            if parameters:
                factor = config.encoder_lr_factor if in_encoder else 1.0
                decay = config.weight_decay if decayed else 0.0
                groups.append(
                    {"params": parameters, "lr": config.lr * factor, "lr_factor": factor, "weight_decay": decay}
                )
    return groups


def load_optimizer_state(optimizer: torch.optim.Optimizer, states: Mapping[int, Mapping[str, torch.Tensor]]) -> None:
    """Give an optimizer the state of each of its parameters, counted through all groups, as `state_dict` names it.

    Files keep no memory format. Fused kernels go through the memory of weight and moment side by side: of weights in
    channels_last each would take the moment of another (on CPUs unnoticed), so every moment is laid out as its weight.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    laid_out = {
        index: {
            key: torch.empty_like(parameters[index]).copy_(value) if value.shape == parameters[index].shape else value
            for key, value in state.items()
        }
        for index, state in states.items()
    }
    optimizer.load_state_dict({**optimizer.state_dict(), "state": laid_out})


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets `lr` times the group's `lr_factor` on each parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_factor", 1.0)


def learning_rate_at(schedule: ScheduleConfig, base_lr: float, step: int, num_steps: int) -> float:
    """The learning rate of optimizer step `step`, counted from 0, of `num_steps`; the last value from there on.

    A function of its arguments alone, so a resumed run needs no state. With S = `num_steps` and
    W = round(`warmup_share` S) steps of warm-up:

    - `cosine`: base (step + 1) / W, then base down to base `final_share` as `CosineAnnealingLR(T_max=S - W)`
    - `constant`: base (step + 1) / W, then base
    - `one_cycle`: as `OneCycleLR(pct_start=warmup_share, total_steps=S)`

    >>> learning_rate_at(ScheduleConfig(kind="constant", warmup_share=0.5), base_lr=1.0, step=0, num_steps=8)
    0.25
    """
    if num_steps < 1 or step < 0:
        raise ValueError(f"step {step} of {num_steps}: steps count from 0, and there is one at least")
    step = min(step, num_steps)
    final_lr = base_lr * schedule.final_share
    if schedule.kind == "one_cycle":
        peak = schedule.warmup_share * num_steps - 1
        if step <= peak:
            return _cosine_between(base_lr * _ONE_CYCLE_START, base_lr, step / max(peak, 1e-9))
        return _cosine_between(base_lr, final_lr, (step - max(peak, 0)) / max(num_steps - 1 - max(peak, 0), 1))
    num_warmup = round(schedule.warmup_share * num_steps)
    if step < num_warmup:
        return base_lr * (step + 1) / num_warmup
    if schedule.kind == "constant":
        return base_lr
    return _cosine_between(base_lr, final_lr, (step - num_warmup) / max(num_steps - num_warmup, 1))


def _cosine_between(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * min(share, 1.0))) / 2


class AveragedWeights:
    """An exponential moving average of the weights and buffers of `model`, in `module`; `update` it after each step.

    In update n the decay is min(`decay`, (1 + n) / (10 + n)): a short run's average is not its random beginning
    (the warm-up of TensorFlow's ExponentialMovingAverage). The first update copies. Whole numbers are copied always.

    PyTorch's `AveragedModel` walks through both networks at each update, averages batch normalisation's counts one by
    one and asks the GPU for its own count.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.module = copy.deepcopy(model)
        self.n_averaged = torch.tensor(0)
        averages, currents = _tensors_of(self.module), _tensors_of(model)
        self._averages, self._currents = (
            [each for each in of if each.is_floating_point()] for of in (averages, currents)
        )
        self._counts = [pair for pair in zip(averages, currents, strict=True) if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self) -> None:
        """Average in what the model has now."""
        n = int(self.n_averaged)
        make_update = cast(Callable[[float], Callable[..., None]], get_ema_multi_avg_fn)
        make_update(min(self.decay, (1 + n) / (10 + n)) if n else 0.0)(self._averages, self._currents, None)
        for kept, current in self._counts:
            kept.copy_(current)
        self.n_averaged += 1


def _tensors_of(model: nn.Module) -> list[torch.Tensor]:
    return [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]
