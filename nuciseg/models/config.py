"""The configuration of each network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from nuciseg.models.timm_library import check_encoder_name
from nuciseg.models.weights import check_weights_package
from nuciseg.section import Section

Norm = Literal["batch", "group", "none"]
ChannelPolicy = Literal["copy", "zero", "learned", "averaged"]
MAX_STAGES = 6


class UnetConfig(Section):
    """U-Net trained from scratch (Ronneberger et al. 2015, arXiv:1505.04597), 3x3 convolutions that keep the size."""

    kind: Literal["unet"] = "unet"
    depth: int = Field(
        default=4, ge=1, le=6, description="Number of down-samplings by two; the stride is 2**depth pixels."
    )
    width: int = Field(default=16, ge=1, le=256, description="Channels at full resolution.")
    width_growth: float = Field(default=2.0, ge=1, le=4, description="Factor on the channels at each down-sampling.")
    max_width: int = Field(default=256, ge=1, le=2048, description="Upper bound of the channels at any resolution.")
    num_convs: int = Field(
        default=2, ge=1, le=4, description="Convolutions at each resolution, on the way down and up."
    )
    norm: Norm = Field(default="batch", description="Normalisation after each convolution.")
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="Share of channels dropped at the two deepest resolutions."
    )


class TimmConfig(Section):
    """U-Net decoder on an encoder of the timm library (https://github.com/huggingface/pytorch-image-models).

    With `input_normalization`, the network's input is stretched from `input_range` to 0..1, clipped, and then
    normalised as the encoder's weights were trained. Without, the encoder sees the image as it comes.

    The channels of the head's convolutions are a factor, not a list: the number of convolutions stays in one key, and a
    search can vary both.
    """

    kind: Literal["timm"] = "timm"
    encoder: str = Field(
        default="resnet18", description="Any timm encoder that gives features at growing strides, by name."
    )
    stages: int = Field(
        default=4,
        ge=1,
        le=MAX_STAGES,
        description="How many of the encoder's feature levels are used, from the finest; 4 of ResNet: stride 16.",
    )
    decoder_channels: tuple[PositiveInt, ...] = Field(
        default=(128, 96, 64, 32, 16),
        min_length=1,
        description="Channels of the decoder, coarse to fine; the last is at full resolution. "
        "If there are more than the encoder has down-samplings, the finest are used.",
    )
    decoder_convs: int = Field(default=2, ge=1, le=4, description="Convolutions at each resolution of the decoder.")
    head_convs: int = Field(
        default=0, ge=0, le=4, description="Extra convolutions at full resolution before the output."
    )
    head_width_factor: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Factor on the channels at each extra convolution before the output: 0.5 halves them each time, so "
        "that they fall to the maps in steps.",
    )
    norm: Norm = Field(default="batch", description="Normalisation after each convolution of the decoder.")
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="Share of the encoder's deepest channels that is dropped."
    )
    pretrained: str | None = Field(
        default=None,
        description="Weights to start from: none, 'hub' (needs a network), 'package' (an installed weights package), "
        "or the path of a .safetensors or .pth file for this encoder.",
    )
    channel_policy: ChannelPolicy = Field(
        default="copy",
        description="How an image of other than 3 channels is given to the encoder: 'copy' repeats it, 'zero' leaves "
        "the other channels 0, 'learned' mixes channels by a trained 1x1 convolution that starts as 'copy', 'averaged' "
        "changes the first convolution to the image's channels, its kernels summed.",
    )
    input_normalization: bool | None = Field(
        default=None,
        description="Whether the input is normalised as timm's weights of this encoder were trained; none: with "
        "pretrained weights only.",
    )
    input_range: tuple[float, float] = Field(
        (-0.5, 1.5),
        description="With input normalisation: the values of the normalised image that become black and white. Nuclei "
        "lie in 0 to 1, zeroed background below, a drawn border above.",
    )

    @field_validator("encoder")
    @classmethod
    def _known_encoder(cls, name: str) -> str:
        return check_encoder_name(name)

    @field_validator("input_range")
    @classmethod
    def _black_before_white(cls, input_range: tuple[float, float]) -> tuple[float, float]:
        black, white = input_range
        if black >= white:
            raise ValueError(f"black {black} is not below white {white}: give the smaller number first")
        return input_range

    @property
    def weights_file(self) -> Path | None:
        """The file that `pretrained` names, if it names one."""
        return Path(self.pretrained) if self.pretrained not in (None, "hub", "package") else None

    @property
    def normalizes_input(self) -> bool:
        """What `input_normalization` comes to."""
        return self.pretrained is not None if self.input_normalization is None else self.input_normalization

    @model_validator(mode="after")
    def _package_exists_for_encoder(self) -> TimmConfig:
        if self.pretrained == "package":
            check_weights_package(self.encoder)
        return self


class BaselineConfig(Section):
    """The network the `nucleus` data set came with: 5x5 convolutions of 32-64-128-256 channels with sigmoid
    activations and 2x2 pooling, and a mirrored decoder without skip connections."""

    kind: Literal["baseline"] = "baseline"
    widths: tuple[PositiveInt, ...] = Field(
        default=(32, 64, 128, 256),
        min_length=2,
        description="Channels of the encoder, fine to coarse; pooling lies between them.",
    )
    kernel_px: int = Field(
        default=5, ge=1, le=15, description="Side of the square convolution kernels, in pixels, odd."
    )

    @field_validator("kernel_px")
    @classmethod
    def _odd(cls, kernel_px: int) -> int:
        if kernel_px % 2 == 0:
            raise ValueError(f"kernel_px is {kernel_px}: give an odd number, so that the output keeps the image's size")
        return kernel_px


ModelConfig = Annotated[UnetConfig | TimmConfig | BaselineConfig, Field(discriminator="kind")]
