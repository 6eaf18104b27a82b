"""The U-Net on a timm encoder."""

from __future__ import annotations

import torch
from torch import nn

from nuciseg.errors import ConfigError
from nuciseg.models.blocks import Decoder, check_size, conv_block, output_head
from nuciseg.models.config import TimmConfig
from nuciseg.models.encoders import Encoder

# A multiple of 8: with the image's one channel joined as it is, all channels at full resolution were copied between
# memory layouts in every step.
_STEM_CHANNELS = 8


class TimmUnet(nn.Module):
    """See `TimmConfig`. Images (B, C, H, W), H and W multiples of `stride`, to logits (B, K, H, W).

    The first timm features have half the resolution or less, so one convolution of the image joins the decoder at
    full resolution: borders are one or two pixels wide.
    """

    def __init__(self, config: TimmConfig, in_channels: int, num_maps: int, load_weights: bool) -> None:
        super().__init__()
        self.encoder = Encoder(config, in_channels, load_weights)
        self.stride = max(self.encoder.channels)
        num_doublings = self.stride.bit_length() - 1
        if len(config.decoder_channels) < num_doublings:
            raise ConfigError(
                f"model.decoder_channels has {len(config.decoder_channels)} widths, but {config.stages} stages of "
                f"'{config.encoder}' reach stride {self.stride}: give {num_doublings} or more"
            )
        self.dropout = nn.Dropout2d(config.dropout)
        widths = config.decoder_channels[len(config.decoder_channels) - num_doublings :]
        self.stem = None if 1 in self.encoder.channels else conv_block(in_channels, [_STEM_CHANNELS], config.norm)
        self.decoder = Decoder({1: _STEM_CHANNELS, **self.encoder.channels}, widths, config.decoder_convs, config.norm)
        num_channels = self.decoder.out_channels
        head_widths = [
            max(num_maps, round(num_channels * config.head_width_factor**n)) for n in range(1, config.head_convs + 1)
        ]
        self.head = nn.Sequential(
            conv_block(num_channels, head_widths, config.norm), output_head([num_channels, *head_widths][-1], num_maps)
        )

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        check_size(images_BCHW, self.stride)
        features = self.encoder(images_BCHW)
        features[self.stride] = self.dropout(features[self.stride])
        if self.stem is not None:
            features[1] = self.stem(images_BCHW)
        logits_BKHW: torch.Tensor = self.head(self.decoder(features))
        return logits_BKHW
