"""Borders that do not close: which images have some, and how they are shown to the network again.

The study that this product grew out of completed borders that were only partly drawn. A network that was trained on
partly drawn borders (`augment.drawn_borders`) can do so with its own: what it is sure of is drawn on the image, and it
is asked for the rest.

Shape legend: B images, C channels, K maps, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from nuciseg.data.dataset import NORMALIZED_RANGE
from nuciseg.targets import Target

SURE = 0.5  # a border that is drawn is believed, so doubtful pixels are not drawn

Forward = Callable[[torch.Tensor], NDArray[np.float32]]


def refined(
    forward: Forward, images_BCHW: torch.Tensor, shapes: list[tuple[int, int]], target: Target, rounds: int
) -> NDArray[np.float32]:
    """The probabilities (B, K, H, W) after up to `rounds` more looks at the images whose borders are open.

    `shapes` are heights and widths without the padding at the bottom and the right.
    """
    maps_BKHW = forward(images_BCHW)
    pending = list(range(len(shapes)))
    for _ in range(rounds):
        pending = [row for row in pending if target.open_borders(_cropped(maps_BKHW[row], shapes[row]))]
        if not pending:
            break
        sure_BHW = torch.from_numpy(maps_BKHW[pending, target.border_index] >= SURE)
        shown_BCHW = images_BCHW[pending].masked_fill(sure_BHW[:, None], NORMALIZED_RANGE[1])
        maps_BKHW[pending] = forward(shown_BCHW)
    return maps_BKHW


def _cropped(maps_KHW: NDArray[np.float32], shape: tuple[int, int]) -> NDArray[np.float32]:
    return maps_KHW[:, : shape[0], : shape[1]]
