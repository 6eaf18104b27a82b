"""Normalisation is folded into convolutions where that changes nothing, and left alone where it would."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from nuciseg.engine.folding import folded
from nuciseg.models import build_model
from nuciseg.models.config import TimmConfig, UnetConfig


def lively(model: nn.Module) -> nn.Module:
    """The model with statistics and weights as training leaves them, not those of a fresh one."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low in ((module.running_mean, -0.5), (module.running_var, 0.5), (module.weight.data, 0.5)):
                assert tensor is not None
                tensor.copy_(low + torch.rand(tensor.shape, generator=generator))
    return model.eval()


def num_norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize(
    "config",
    [
        UnetConfig(depth=2, width=4),
        TimmConfig(encoder="resnet18", stages=3),
        TimmConfig(encoder="tf_efficientnet_lite0", stages=4),
    ],
    ids=lambda config: getattr(config, "encoder", config.kind),
)
def test_the_same_answer_without_normalisation(config: Any) -> None:
    model = lively(build_model(config, 1, 3, load_weights=False))
    before = num_norms(model)
    fused = folded(model, 1, int(model.stride))  # type: ignore[arg-type]
    assert num_norms(fused) == 0
    assert num_norms(model) == before > 0
    images = torch.randn(1, 1, 64, 96)
    with torch.inference_mode():
        torch.testing.assert_close(fused(images), model(images), atol=1e-3, rtol=1e-3)


class _NormalizesFirst(nn.Module):
    """The normalisation that was registered after the convolution is applied before it."""

    stride = 8

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        self.norm = nn.BatchNorm2d(1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.conv(self.norm(images).relu())
        return answer


def test_another_order_is_left_alone() -> None:
    model = lively(_NormalizesFirst())
    assert folded(model, 1, 8) is model
