"""Networks: images (B, C, H, W) to logits (B, K, H, W)."""

from __future__ import annotations

from torch import nn

from nuciseg.models.baseline import Baseline
from nuciseg.models.config import BaselineConfig, ModelConfig, TimmConfig, UnetConfig
from nuciseg.models.timm_unet import TimmUnet
from nuciseg.models.unet import Unet

__all__ = ["BaselineConfig", "ModelConfig", "TimmConfig", "UnetConfig", "build_model"]


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
