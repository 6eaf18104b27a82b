"""Networks: images (B, C, H, W) to logits (B, K, H, W)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from nuciseg.models.baseline import Baseline
from nuciseg.models.config import BaselineConfig, ModelConfig, TimmConfig, UnetConfig
from nuciseg.models.timm_unet import TimmUnet
from nuciseg.models.unet import Unet

__all__ = [
    "BaselineConfig",
    "ModelConfig",
    "TimmConfig",
    "UnetConfig",
    "build_model",
    "freeze_encoder",
    "set_initial_probabilities",
]


def build_model(config: ModelConfig, in_channels: int, num_maps: int, load_weights: bool = True) -> nn.Module:
    """The network of `config`, for images of `in_channels` and targets of `num_maps` maps.

    Its attribute `stride` is what the height and width of its images must be multiples of (DataError otherwise).
    `load_weights=False` leaves `pretrained` weights out, for a network whose own checkpoint is loaded next.

    Raises:
        ConfigError: the parts do not fit each other, or pretrained weights are not to be had.
        CheckpointError: the weights file cannot be read or belongs to another network.
    """
    match config:
        case UnetConfig():
            return Unet(config, in_channels, num_maps)
        case TimmConfig():
            return TimmUnet(config, in_channels, num_maps, load_weights)
        case BaselineConfig():
            return Baseline(config, in_channels, num_maps)


def freeze_encoder(model: nn.Module, frozen: bool) -> None:
    """Freeze or thaw the encoder of a `model` that `TimmConfig` describes; see `Encoder.freeze`."""
    assert isinstance(model, TimmUnet)
    model.encoder.freeze(frozen)


def set_initial_probabilities(model: nn.Module, probabilities_K: Sequence[float]) -> None:
    """Let a fresh `model` of `build_model` answer about `probabilities_K[k]` everywhere on map k.

    A bias moves by about a learning rate a step: from a wrong start a frequent map takes hundreds of steps to get to
    its frequency, and until then the loss teaches little else (Lin et al. 2017, arXiv:1708.02002, section 4.1).
    """
    head = model.head if isinstance(model.head, nn.Conv2d) else model.get_submodule("head")[-1]  # type: ignore[index]
    assert isinstance(head, nn.Conv2d)
    assert head.bias is not None
    with torch.no_grad():
        head.bias.copy_(torch.tensor([math.log(p / (1 - p)) for p in probabilities_K]))
