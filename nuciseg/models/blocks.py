"""What the networks share: convolution blocks, the U-Net decoder, the output head, the check of the image's size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from nuciseg.errors import DataError


def conv_block(in_channels: int, widths: Sequence[int], norm: Literal["batch", "group", "none"]) -> nn.Sequential:
    """For each of `widths` (output channels): 3x3 convolution, normalisation, ReLU; keeps height and width."""
    layers: list[nn.Module] = []
    for num_inputs, out_channels in pairwise([in_channels, *widths]):
        layers.append(nn.Conv2d(num_inputs, out_channels, 3, padding=1, bias=norm == "none"))
        if norm == "batch":
            layers.append(nn.BatchNorm2d(out_channels))
        elif norm == "group":
            layers.append(nn.GroupNorm(math.gcd(8, out_channels), out_channels))
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


class Decoder(nn.Module):
    """Doubles the resolution (nearest neighbour, convolutions) until it is full, taking in the features on its way.

    `skip_channels` gives the channels of the features by their stride; the largest stride is the start. A resolution
    without features is passed through without.
    """

    def __init__(
        self,
        skip_channels: Mapping[int, int],
        widths: Sequence[int],
        num_convs: int,
        norm: Literal["batch", "group", "none"],
    ) -> None:
        """`widths` are the channels coarse to fine, one for each doubling."""
        super().__init__()
        stride = max(skip_channels)
        num_channels = skip_channels[stride]
        self.blocks = nn.ModuleList()
        for width in widths:
            stride //= 2
            self.blocks.append(conv_block(num_channels + skip_channels.get(stride, 0), [width] * num_convs, norm))
            num_channels = width
        assert stride == 1, f"{len(widths)} widths do not lead from stride {max(skip_channels)} to full resolution"
        self.out_channels = num_channels

    def forward(self, features: dict[int, torch.Tensor]) -> torch.Tensor:
        """`features` by stride, each (B, C, H/stride, W/stride), to (B, out_channels, H, W)."""
        stride = max(features)
        x = features[stride]
        for block in self.blocks:
            stride //= 2
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            if stride in features:
                x = torch.cat([x, features[stride].to(x.dtype)], dim=1)
            x = block(x)
        return x


def output_head(in_channels: int, num_maps: int, kernel_px: int = 1) -> nn.Conv2d:
    """The last convolution, to logits."""
    return nn.Conv2d(in_channels, num_maps, kernel_px, padding=kernel_px // 2)


def check_size(images_BCHW: torch.Tensor, stride: int) -> None:
    """Refuse images whose height or width is no multiple of `stride`.

    Raises:
        DataError: names the size to pad to.
    """
    height, width = images_BCHW.shape[-2:]
    if height % stride or width % stride or height == 0 or width == 0:
        padded = [max(stride, -(-size // stride) * stride) for size in (height, width)]
        raise DataError(
            f"images of {height}x{width} pixels do not fit a network of stride {stride}: "
            f"pad them to {padded[0]}x{padded[1]} (height x width)"
        )
