"""A network with all that belongs to it: what goes in, what its maps mean, where and how it computes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn

from nuciseg.config import Config
from nuciseg.engine.checkpoint import Checkpoint, find_checkpoint, load_checkpoint
from nuciseg.engine.precision import Precision, choose_precision
from nuciseg.errors import CheckpointError
from nuciseg.models import ModelConfig, build_model, set_initial_probabilities
from nuciseg.models.summary import ModelSummary, summarize
from nuciseg.targets import Target, TargetConfig, build_target


@dataclass(frozen=True)
class Network:
    """What inference needs, whether in validation, evaluation or prediction."""

    model: nn.Module
    target: Target
    config: Config
    precision: Precision
    in_channels: int
    rounds: int = 0  # times that found borders are drawn on an image whose borders are open, and it is asked again
    num_views: int = 1  # turned and mirrored copies of an image whose probabilities are averaged

    @property
    def stride(self) -> int:
        """Rows and columns of an input must be multiples of this, pixels."""
        return int(self.model.stride)  # type: ignore[arg-type]  # every model of nuciseg has it


def build_network(config: Config, in_channels: int, device: torch.device, *, load_pretrained: bool = True) -> Network:
    """A fresh network on `device`, asked for one view, as training validates it; without `load_pretrained` its weights
    are to be replaced by a checkpoint's."""
    target = build_target(config.target)
    model = build_model(config.model, in_channels, len(target.map_names), load_weights=load_pretrained).to(device)
    set_initial_probabilities(model, target.typical_shares)
    precision = choose_precision(config.train, device)
    if precision.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Network(model, target, config, precision, in_channels, rounds=config.inference.rounds)


def begun_network(config: Config, in_channels: int, device: torch.device) -> Network:
    """What a run begins with: a fresh network, with the weights of `train.init_from` where that is given.

    Raises CheckpointError where there is no such checkpoint, or one of another network.
    """
    start = config.train.init_from
    network = build_network(config, in_channels, device, load_pretrained=start is None)
    if start is not None:
        checkpoint = load_checkpoint(find_checkpoint(start))
        try:
            network.model.load_state_dict(dict(checkpoint.weights))
        except RuntimeError as error:
            fault = str(error).splitlines()[1].strip()
            raise CheckpointError(
                f"train.init_from {start}: its weights are of another network ({fault}); leave out --model and "
                "--target settings, which `nuciseg train --init-from` takes from the checkpoint"
            ) from None
    return network


def stride_of(config: Config) -> int:
    """The stride in pixels of the network that `config` describes."""
    return int(_outline(config).stride)  # type: ignore[arg-type]  # every model of nuciseg has it


def count_parameters(config: Config) -> int:
    """How many numbers training changes in the network that `config` describes, for grey images."""
    return _num_parameters(config.model, len(build_target(config.target).map_names))


def summarize_network(config: Config) -> ModelSummary:
    """Stages, parameters and operations of the network that `config` describes, for a grey crop of `data.crop_px`."""
    num_maps = len(build_target(config.target).map_names)
    return summarize(config.model, in_channels=1, num_maps=num_maps, side_px=config.data.crop_px)


@lru_cache(maxsize=64)  # the hundreds of trials of a study have few networks between them
def _num_parameters(model: ModelConfig, num_maps: int) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_model(model, 1, num_maps, load_weights=False).parameters())


def _outline(config: Config) -> nn.Module:
    with torch.device("meta"):  # no memory, no weights
        return build_model(config.model, 1, len(build_target(config.target).map_names), load_weights=False)


def load_network(folder: Path, device: torch.device, target: TargetConfig | None = None) -> tuple[Network, Checkpoint]:
    """The network of a checkpoint, ready to predict; `target` replaces how it is decoded. Raises CheckpointError.

    One that was trained in fp16 predicts on a CPU in what that computes fastest: its weights are fp32 either way.
    """
    checkpoint = load_checkpoint(folder)
    config = checkpoint.config.model_copy(update={"target": target}) if target is not None else checkpoint.config
    if device.type == "cpu" and config.train.precision == "fp16":
        config = config.replaced({"train.precision": "auto"})
    network = build_network(config, checkpoint.in_channels, device, load_pretrained=False)
    try:
        network.model.load_state_dict(dict(checkpoint.weights))
    except RuntimeError as error:
        raise CheckpointError(f"{folder}: the weights do not fit the configuration beside them ({error})") from None
    network.model.eval()
    return replace(network, num_views=config.inference.num_views), checkpoint
