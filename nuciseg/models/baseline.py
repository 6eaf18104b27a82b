"""The network the `nucleus` data set came with, for comparison."""

from __future__ import annotations

import torch
from torch import nn

from nuciseg.models.blocks import check_size, output_head
from nuciseg.models.config import BaselineConfig


class Baseline(nn.Module):
    """See `BaselineConfig`; the loss applies the last sigmoid. It was trained with MSE and Adam at 5e-4.

    Images (B, C, H, W), H and W multiples of `stride`, to logits (B, K, H, W).
    """

    def __init__(self, config: BaselineConfig, in_channels: int, num_maps: int) -> None:
        super().__init__()
        self.stride = 2 ** (len(config.widths) - 1)
        layers: list[nn.Module] = []
        num_channels = in_channels
        for level, width in enumerate(config.widths):
            layers += [nn.MaxPool2d(2)] if level else []
            layers += [self._conv(num_channels, width, config.kernel_px), nn.Sigmoid()]
            num_channels = width
        for width in config.widths[-2::-1]:
            layers += [nn.Upsample(scale_factor=2.0), self._conv(num_channels, width, config.kernel_px), nn.Sigmoid()]
            num_channels = width
        self.layers = nn.Sequential(*layers)
        self.head = output_head(num_channels, num_maps, config.kernel_px)
        nn.init.xavier_uniform_(self.head.weight)

    @staticmethod
    def _conv(in_channels: int, out_channels: int, kernel_px: int) -> nn.Conv2d:
        conv = nn.Conv2d(in_channels, out_channels, kernel_px, padding=kernel_px // 2)
        # A sigmoid's slope is 1/4 at most, so weights four times as large (Glorot and Bengio 2010) keep the signal
        # alive through the layers: on 8 real clusters the loss fell in 90 steps three times as far as with 1.
        nn.init.xavier_uniform_(conv.weight, gain=4.0)
        assert conv.bias is not None
        nn.init.zeros_(conv.bias)
        return conv

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        check_size(images_BCHW, self.stride)
        logits_BKHW: torch.Tensor = self.head(self.layers(images_BCHW))
        return logits_BKHW
