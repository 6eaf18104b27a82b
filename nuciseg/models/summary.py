"""What a network is made of: stage by stage its stride, channels, parameters and operations; no weights, no data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nuciseg.errors import ConfigError
from nuciseg.models import build_model
from nuciseg.models.baseline import Baseline
from nuciseg.models.config import MAX_STAGES, ModelConfig, TimmConfig
from nuciseg.models.encoders import Encoder, num_feature_levels
from nuciseg.models.timm_unet import TimmUnet
from nuciseg.models.unet import Unet
from nuciseg.models.weights import describe_weights, input_normalization


@dataclass(frozen=True)
class Stage:
    """One stage of a network. `flops` are those of convolutions and matrix products, forward, for one image.

    `role` says what becomes of its features. Stages of an encoder that the configuration leaves out are listed with
    what they would add; `is_used` is False for them.
    """

    name: str
    stride: int
    channels: int
    parameters: int
    flops: int
    role: str = ""
    is_used: bool = True


@dataclass(frozen=True)
class ModelSummary:
    """The stages in the order of computation, for one image of `side_px` x `side_px` pixels, and what else to know."""

    name: str
    side_px: int
    stages: tuple[Stage, ...]
    notes: tuple[str, ...]

    @property
    def parameters(self) -> int:
        return sum(stage.parameters for stage in self.stages if stage.is_used)

    @property
    def flops(self) -> int:
        return sum(stage.flops for stage in self.stages if stage.is_used)


@dataclass(frozen=True)
class _Part:
    """Modules of a network, by their dotted names, that make one stage."""

    name: str
    stride: int
    channels: int
    modules: tuple[str, ...]
    role: str = ""


def summarize(config: ModelConfig, in_channels: int, num_maps: int, side_px: int) -> ModelSummary:
    """The network of `config` for images of `in_channels`, at the least multiple of its stride from `side_px` on.

    Pretrained weights need not be there. Raises ConfigError where the parts do not fit each other.
    """
    with torch.device("meta"):
        model = build_model(config, in_channels, num_maps, load_weights=False).eval()
    stride = int(model.stride)  # type: ignore[arg-type]  # every model of nuciseg has it
    side_px = -(-side_px // stride) * stride
    stages = list(_measured(model, _parts(model, num_maps), in_channels, side_px))
    if isinstance(config, TimmConfig):
        stages = [*_encoder_stages(config, in_channels, side_px), *stages]
        name = f"{config.kind} {config.encoder}, {config.stages} stages, stride {stride}"
        return ModelSummary(name, side_px, tuple(stages), tuple(_notes(config, in_channels)))
    notes = ("weights: from scratch", "input: as it comes")
    return ModelSummary(f"{config.kind}, stride {stride}", side_px, tuple(stages), notes)


def _measured(model: nn.Module, parts: list[_Part], in_channels: int, side_px: int) -> Iterator[Stage]:
    flops = _flops(model, in_channels, side_px)
    for part in parts:
        parameters = sum(_num_parameters(model.get_submodule(module)) for module in part.modules)
        operations = sum(flops.get(module, 0) for module in part.modules)
        yield Stage(part.name, part.stride, part.channels, parameters, operations, part.role)


def _flops(model: nn.Module, in_channels: int, side_px: int) -> dict[str, int]:
    """The operations of each module of `model`, which lies on the meta device, by its dotted name; '' is all."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, in_channels, side_px, side_px, device="meta"))
    root = type(model).__name__
    counts = {
        name.removeprefix(root).removeprefix("."): sum(count.values())
        for name, count in counter.get_flop_counts().items()
    }
    return {**counts, "": counter.get_total_flops()}


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _encoder_stages(config: TimmConfig, in_channels: int, side_px: int) -> Iterator[Stage]:
    """What each stage adds to an encoder cut before it; of those beyond `stages`, what it would add."""
    parameters = flops = 0
    for stages in range(1, min(num_feature_levels(config.encoder), MAX_STAGES) + 1):
        is_used = stages <= config.stages
        try:
            with torch.device("meta"):
                encoder = Encoder(config.model_copy(update={"stages": stages}), in_channels, load_weights=False).eval()
        except ConfigError:
            if is_used:
                raise
            return  # deeper stages that cannot be used are no choice
        stride = max(encoder.channels)
        cut_parameters, cut_flops = _num_parameters(encoder), _flops(encoder, in_channels, side_px)[""]
        role = "skip" if stages < config.stages else "deepest" if is_used else "left out"
        own = cut_parameters - parameters, cut_flops - flops
        yield Stage(f"encoder {stages}", stride, encoder.channels[stride], *own, role, is_used)
        parameters, flops = cut_parameters, cut_flops


def _parts(model: nn.Module, num_maps: int) -> list[_Part]:
    """All of a network but a timm encoder."""
    match model:
        case Unet():
            last = len(model.down) - 1
            return [
                *(
                    _Part(f"encoder {n + 1}", 2**n, _width(block), (f"down.{n}",), "skip" if n < last else "deepest")
                    for n, block in enumerate(model.down)
                ),
                *_decoder_parts(model.decoder.blocks, model.stride),
                _Part("output", 1, num_maps, ("head",)),
            ]
        case TimmUnet():
            stem = [] if model.stem is None else [_Part("stem", 1, _width(model.stem), ("stem",), "skip")]
            return [
                *stem,
                *_decoder_parts(model.decoder.blocks, model.stride),
                *_head_parts(model.head[0]),
                _Part("output", 1, num_maps, ("head.1",)),
            ]
        case Baseline():
            return [*_baseline_parts(model), _Part("output", 1, num_maps, ("head",))]
    raise AssertionError(f"no summary of {type(model).__name__}")


def _decoder_parts(blocks: nn.ModuleList, stride: int) -> Iterator[_Part]:
    for index, block in enumerate(blocks):
        yield _Part(f"decoder {index + 1}", stride >> (index + 1), _width(block), (f"decoder.blocks.{index}",))


def _head_parts(head: nn.Module) -> Iterator[_Part]:
    """One for each extra convolution, together with the layers up to the next."""
    layers = list(head.children())
    starts = [index for index, layer in enumerate(layers) if isinstance(layer, nn.Conv2d)]
    for number, (start, end) in enumerate(pairwise([*starts, len(layers)]), start=1):
        modules = tuple(f"head.0.{index}" for index in range(start, end))
        yield _Part(f"head {number}", 1, _width(layers[start]), modules)


def _baseline_parts(model: Baseline) -> Iterator[_Part]:
    stride, part, number = 1, "encoder", 0
    for index, layer in enumerate(model.layers):
        if isinstance(layer, nn.MaxPool2d):
            stride *= 2
        elif isinstance(layer, nn.Upsample):
            stride //= 2
            if part == "encoder":
                part, number = "decoder", 0
        elif isinstance(layer, nn.Conv2d):
            number += 1
            yield _Part(f"{part} {number}", stride, layer.out_channels, (f"layers.{index}",))


def _width(block: nn.Module) -> int:
    """The output channels of the last convolution."""
    return [module for module in block.modules() if isinstance(module, nn.Conv2d)][-1].out_channels


def _notes(config: TimmConfig, in_channels: int) -> Iterator[str]:
    yield f"weights: {describe_weights(config.encoder, config.pretrained)}"
    what = {
        "copy": "given to the encoder three times",
        "zero": "given to the encoder with channels of zeros to make three",
        "learned": "mixed to the encoder's three channels by a trained 1x1 convolution that starts with copies",
        "averaged": "given to an encoder whose first convolution takes as many channels, its kernels summed",
    }[config.channel_policy]
    if in_channels == 3 and config.channel_policy != "learned":
        what = "given to the encoder as they are"
    images = "the grey image is" if in_channels == 1 else f"the {in_channels} channels are"
    yield f"channels: {images} {what} (model.channel_policy {config.channel_policy})"
    if not config.normalizes_input:
        yield "input: as it comes, not normalised for the encoder"
        return
    low, high = config.input_range
    expected = input_normalization(config.encoder, config.pretrained)
    mean, std = (" ".join(f"{value:.3f}" for value in values) for values in (expected.mean, expected.std))
    yield f"input: {low:g} to {high:g} stretched to 0 to 1, then normalised for the encoder (mean {mean}, std {std})"
