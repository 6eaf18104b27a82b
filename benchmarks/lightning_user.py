"""The training loop a user would write with Lightning, segmentation_models_pytorch and albumentations.

The peer that `throughput.py` measures against, written as the libraries' own examples are: PNG files are read in
`__getitem__`, augmented by `A.Compose`, batched by a `DataLoader` and trained by `L.Trainer`. Where there was a choice
it is the cheaper one: maps made before the augmentation and on the small image, augmentation of 8-bit images, the
approximate elastic deformation, padding that counts in the loss, no averaged weights, no schedule.
Not among a user's defaults and so off unless asked for: `channels_last`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else importing it asks the network for a newer version
import albumentations as A
import cv2
import lightning as L
import numpy as np
import segmentation_models_pytorch as smp
import torch
from lightning.pytorch.callbacks import LambdaCallback
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import DataLoader, Dataset

from nuciseg.data.augment import AugmentConfig


def transforms(strength: AugmentConfig, crop_px: int) -> A.Compose:
    """The same kinds of change at the same strengths as nuciseg's, from albumentations alone."""
    p, turn = strength.probability, strength.rotation_deg
    return A.Compose(
        [
            A.PadIfNeeded(crop_px, crop_px),
            A.RandomCrop(crop_px, crop_px),
            A.HorizontalFlip(),
            A.VerticalFlip(),
            A.Affine(rotate=(-turn, turn), scale=(1 / (1 + strength.scale), 1 + strength.scale), p=1),
            # alpha gives displacements of about `elastic_px` after the smoothing of noise in -1 ... 1 by sigma.
            A.ElasticTransform(alpha=75 * strength.elastic_px, sigma=16, approximate=True, p=p),
            A.RandomBrightnessContrast(strength.brightness, strength.contrast, p=p),
            A.RandomGamma((100 / (1 + strength.gamma), 100 * (1 + strength.gamma)), p=p),
            A.GaussianBlur(blur_limit=0, sigma_limit=(0.0, strength.blur_px), p=p),
            A.GaussNoise(std_range=(0.0, strength.noise), p=p),
        ]
    )


class ClusterPngs(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Pairs of `X.png` and `solutions/X.png`: image (1, S, S) and maps (2, S, S), foreground and touching border."""

    def __init__(self, pairs: Sequence[tuple[Path, Path]], transform: A.Compose) -> None:
        self.pairs, self.transform = list(pairs), transform

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image_path, solution_path = self.pairs[index]
        image = cv2.imread(str(image_path), cv2.IMREAD_GRAYSCALE)
        solution = cv2.imread(str(solution_path), cv2.IMREAD_GRAYSCALE)
        low, high = np.percentile(image[(image > 0) & (image < 255)], (1, 99.8))
        changed = self.transform(image=image, mask=target_maps(solution))
        scaled = ((changed["image"].astype(np.float32) - low) / (high - low)).clip(-1, 3)
        maps = np.ascontiguousarray(changed["mask"].transpose(2, 0, 1), dtype=np.float32)
        return torch.from_numpy(scaled[None].astype(np.float32, copy=False)), torch.from_numpy(maps)


def target_maps(solution_HW: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(H, W, 2), 0 or 1: nuclei with their drawn border, and the line along which nuclei touch.

    The distance transform's own labels are the connected components, grown over the border to the nearest one.
    """
    border = (cv2.copyMakeBorder(solution_HW, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0) > 127).astype(np.uint8)
    _, regions = cv2.distanceTransformWithLabels(border, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_CCOMP)
    labels = np.where(regions == regions[0, 0], 0, regions).astype(np.uint16)
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5))
    largest = cv2.dilate(labels, kernel)
    smallest = cv2.erode(np.where(labels > 0, labels, np.uint16(65535)), kernel)
    foreground, line = (labels > 0) | (border > 0), (largest > 0) & (smallest < largest)
    return np.stack([foreground, line], axis=-1)[1:-1, 1:-1].astype(np.uint8)


class Segmenter(L.LightningModule):
    """Network, losses of segmentation_models_pytorch, AdamW."""

    def __init__(self, network: nn.Module, learning_rate: float, weight_decay: float) -> None:
        super().__init__()
        self.network = network
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.bce = smp.losses.SoftBCEWithLogitsLoss()
        self.dice = smp.losses.DiceLoss(mode="multilabel")

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_index: int) -> torch.Tensor:
        images, maps = batch
        logits = self.network(images)
        loss: torch.Tensor = self.bce(logits, maps) + self.dice(logits, maps)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)


class ChannelsLastSegmenter(Segmenter):
    """The same by a user who knows that convolutions in bf16 want `channels_last`; its network is in that format."""

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_index: int) -> torch.Tensor:
        images, maps = batch
        return super().training_step((images.to(memory_format=torch.channels_last), maps), batch_index)


@dataclass(frozen=True)
class UserLoop:
    """What the loop is run on. `precision` is Lightning's."""

    pairs: tuple[tuple[Path, Path], ...]
    crop_px: int
    batch_size: int
    precision: Literal["bf16-mixed", "32-true"]
    augment: AugmentConfig
    learning_rate: float
    weight_decay: float
    clip_norm: float | None

    def fit(
        self,
        network: nn.Module,
        num_workers: int,
        epochs: int,
        on_epoch_end: Callable[[], None],
        channels_last: bool = False,
    ) -> None:
        """Train `network` for `epochs`, calling `on_epoch_end` before the next epoch asks for its first image."""
        loader = DataLoader(
            ClusterPngs(self.pairs, transforms(self.augment, self.crop_px)),
            batch_size=self.batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
        )
        trainer = L.Trainer(
            accelerator="cpu",
            devices=1,
            precision=self.precision,
            max_epochs=epochs,
            gradient_clip_val=self.clip_norm,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[LambdaCallback(on_train_epoch_end=lambda trainer, module: on_epoch_end())],
        )
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        network = network.to(memory_format=memory_format)  # type: ignore[call-overload]
        module = ChannelsLastSegmenter if channels_last else Segmenter
        trainer.fit(module(network, self.learning_rate, self.weight_decay), loader)
