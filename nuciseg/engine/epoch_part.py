"""What is known of an epoch that is not over: a checkpoint in its middle holds it, so that no step is done twice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum

import torch

_TERM = "term."
_COUNTS = ("num_images", "wait_s", "train_s")


class Wish(IntEnum):
    """What is wanted of a run after a step; CONFER: that all workers ask at the same time whether one has to go."""

    GO_ON = 0
    CONFER = 1
    CHECKPOINT = 2
    STOP = 3


@dataclass
class EpochPart:
    """Sums over the images of the batches done so far: loss terms (on the device) of this worker, the rest of all."""

    terms: dict[str, torch.Tensor] = field(default_factory=dict)
    num_images: float = 0
    wait_s: float = 0.0
    train_s: float = 0.0

    def add(self, terms: Mapping[str, torch.Tensor], num_images: int, wait_s: float, train_s: float) -> None:
        """One batch more."""
        self.terms = {name: self.terms[name] + value if name in self.terms else value for name, value in terms.items()}
        self.num_images += num_images
        self.wait_s += wait_s
        self.train_s += train_s

    def figures(self, summed_terms: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Every loss term per image, from its sum over all workers, and rates."""
        return {
            **{f"train_{name}": float(value) / self.num_images for name, value in summed_terms.items()},
            "images_per_s": self.num_images / self.train_s,
            "data_wait_share": self.wait_s / self.train_s,
            "train_s": self.train_s,
        }

    def tensors(self, summed_terms: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """For a checkpoint, with the terms summed over all workers."""
        counts = {name: torch.tensor(getattr(self, name), dtype=torch.float64) for name in _COUNTS}
        return counts | {f"{_TERM}{name}": value for name, value in summed_terms.items()}

    @staticmethod
    def of(tensors: Mapping[str, torch.Tensor], device: torch.device, rank: int) -> EpochPart:
        """Back from `tensors`; the first worker takes the sums, the others begin with zeros."""
        terms = {
            name.removeprefix(_TERM): (value if rank == 0 else torch.zeros_like(value)).to(device)
            for name, value in tensors.items()
            if name.startswith(_TERM)
        }
        return EpochPart(terms, **{name: float(tensors[name]) for name in _COUNTS})
