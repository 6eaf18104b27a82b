"""The values that flow through nuciseg: files -> records -> samples -> batches -> logits -> instances.

Shape legend, used as a suffix throughout the package:
    B images in a batch, C image channels, K target maps, H rows, W columns, N nuclei
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True)
class Record:
    """Where one image and its labels lie.

    `group` names the field an image was cut from: images of one group stay in one split.
    `image_path` is None for drawn (synthetic) images, which are made from `id`.
    """

    id: str
    image_path: Path | None
    label_paths: tuple[Path, ...]
    group: str
    pixel_size_um: float | None = None


@dataclass(frozen=True)
class Sample:
    """One decoded image: `image_HWC` uint8 or uint16, `labels_HW` int32.

    In `labels_HW` 0 is background, positive values are nuclei, negative values are ignored pixels.
    """

    image_HWC: NDArray[np.generic]
    labels_HW: NDArray[np.int32]


@dataclass(frozen=True)
class Batch:
    """What one training step sees.

    `images_BCHW` float32, `targets_BKHW` float32 in [0, 1], `valid_BHW` bool: False where a pixel
    is padding or ignored and so counts in no loss.
    """

    images_BCHW: torch.Tensor
    targets_BKHW: torch.Tensor
    valid_BHW: torch.Tensor
    ids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device, channels_last: bool = False) -> Batch:
        """The same batch on `device`; `channels_last` sets the memory format of the images."""
        memory_format = torch.channels_last if channels_last else torch.preserve_format
        return Batch(
            images_BCHW=self.images_BCHW.to(device, non_blocking=True, memory_format=memory_format),
            targets_BKHW=self.targets_BKHW.to(device, non_blocking=True),
            valid_BHW=self.valid_BHW.to(device, non_blocking=True),
            ids=self.ids,
        )

    def pin_memory(self) -> Batch:
        return Batch(
            self.images_BCHW.pin_memory(), self.targets_BKHW.pin_memory(), self.valid_BHW.pin_memory(), self.ids
        )

    def slice(self, start: int, stop: int) -> Batch:
        """Images `start` to `stop`, for gradient accumulation."""
        return Batch(
            self.images_BCHW[start:stop],
            self.targets_BKHW[start:stop],
            self.valid_BHW[start:stop],
            self.ids[start:stop],
        )


@dataclass(frozen=True)
class Instances:
    """Separated nuclei: `labels_HW` int32 (0 background, 1..N), `confidences_N` float32 in [0, 1].

    `num_open_borders` is how many borders were found that do not close, where that was asked for: a person should look.
    """

    labels_HW: NDArray[np.int32]
    confidences_N: NDArray[np.float32]
    num_open_borders: int | None = None


@dataclass(frozen=True)
class Window:
    """A part of a predicted image, and all nuclei that were found in it.

    Its first pixel is row `top_px`, column `left_px` of the image, `image_HW` the raw pixels there. In `labels_HW`
    (int32) 0 is background and 1..N are nuclei, of which it reports those with a number in `ids_N` (int64: their label
    in the whole image, from 1). They lie whole within the window; where `ids_N` is 0, another window reports the
    nucleus, and it may be cut off here. `confidences_N` float32 in [0, 1]. A small image is one window.
    `num_open_borders` is as in `Instances`.
    """

    top_px: int
    left_px: int
    image_HW: NDArray[np.generic]
    labels_HW: NDArray[np.int32]
    ids_N: NDArray[np.int64]
    confidences_N: NDArray[np.float32]
    num_open_borders: int | None = None


@dataclass(frozen=True)
class Diameters:
    """How large the nuclei of a data set are, in pixels: of the images' median diameters the 5th, 50th and 95th
    percentile.
    """

    low_px: float
    typical_px: float
    high_px: float
