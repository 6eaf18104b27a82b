"""Fields of discs, and a network made by hand that finds them: what tiling and scaling do is seen exactly."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from nuciseg.config import Config
from nuciseg.engine.network import Network
from nuciseg.engine.precision import Precision
from nuciseg.targets import build_target


def draw_discs(
    shape: tuple[int, int], diameter_px: float, *, seed: int = 0, share: float = 0.25, least_gap: float = 1.1
) -> tuple[NDArray[np.uint16], NDArray[np.int32]]:
    """(16-bit image, labels) of discs, a little blurred in their outline; centres `least_gap` diameters apart."""
    rng = np.random.default_rng(seed)
    labels_HW = np.zeros(shape, np.int32)
    image_HW = np.full(shape, 400.0)
    wanted = max(1, round(share * shape[0] * shape[1] / (np.pi * diameter_px**2 / 4)))
    centres: list[tuple[float, float]] = []
    for _ in range(50 * wanted):
        if len(centres) == wanted:
            break
        row, column = rng.uniform(0, shape[0]), rng.uniform(0, shape[1])
        if any((row - r) ** 2 + (column - c) ** 2 < (least_gap * diameter_px) ** 2 for r, c in centres):
            continue
        centres.append((row, column))
        reach = int(diameter_px) + 3
        top, left = max(0, int(row) - reach), max(0, int(column) - reach)
        rows_HW, columns_HW = np.ogrid[top : int(row) + reach, left : int(column) + reach]
        rows_HW, columns_HW = rows_HW[rows_HW[:, 0] < shape[0]], columns_HW[:, columns_HW[0] < shape[1]]
        beyond_HW = np.hypot(rows_HW - row, columns_HW - column) - diameter_px / 2
        part = np.s_[top : top + beyond_HW.shape[0], left : left + beyond_HW.shape[1]]
        labels_HW[part][beyond_HW <= 0] = len(centres)
        light = rng.uniform(3000, 5000)
        image_HW[part] = np.maximum(image_HW[part], 400 + light * np.clip(0.5 - beyond_HW / 2, 0, 1))
    return image_HW.astype(np.uint16), labels_HW


class _BrightAndDeep(nn.Module):
    """Foreground is what is bright; deep is what is bright all around."""

    stride = 16

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        around_BCHW = nn.functional.avg_pool2d(images_BCHW, 5, stride=1, padding=2)
        foreground_BCHW = 30 * (images_BCHW - 0.3)
        return torch.cat([foreground_BCHW, torch.full_like(foreground_BCHW, -20), 30 * (around_BCHW - 0.4)], dim=1)


def hand_made_network() -> Network:
    """A network with the target `depth` that needs no training."""
    config = Config().replaced({"target": {"kind": "depth"}, "data.normalization.ignore_extremes": False})
    precision = Precision(torch.device("cpu"), None, channels_last=False)
    return Network(_BrightAndDeep().eval(), build_target(config.target), config, precision, in_channels=1)
