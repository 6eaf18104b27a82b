"""The U-Net that is trained from scratch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from nuciseg.models.blocks import Decoder, check_size, conv_block, output_head
from nuciseg.models.config import UnetConfig


class Unet(nn.Module):
    """See `UnetConfig`. Images (B, C, H, W), H and W multiples of `stride`, to logits (B, K, H, W)."""

    def __init__(self, config: UnetConfig, in_channels: int, num_maps: int) -> None:
        super().__init__()
        self.stride = 2**config.depth
        widths = [
            min(config.max_width, round(config.width * config.width_growth**level)) for level in range(config.depth + 1)
        ]
        self.down = nn.ModuleList(
            conv_block(num_inputs, [width] * config.num_convs, config.norm)
            for num_inputs, width in zip([in_channels, *widths], widths, strict=False)
        )
        self.dropout = nn.Dropout2d(config.dropout)
        skip_channels = {2**level: width for level, width in enumerate(widths)}
        self.decoder = Decoder(skip_channels, widths[-2::-1], config.num_convs, config.norm)
        self.head = output_head(self.decoder.out_channels, num_maps)

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        check_size(images_BCHW, self.stride)
        x = images_BCHW
        features: dict[int, torch.Tensor] = {}
        for level, block in enumerate(self.down):
            x = block(x if level == 0 else F.max_pool2d(x, 2))
            if level >= len(self.down) - 2:
                x = self.dropout(x)
            features[2**level] = x
        logits_BKHW: torch.Tensor = self.head(self.decoder(features))
        return logits_BKHW
