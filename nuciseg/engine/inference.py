"""From samples to probabilities, nuclei and scores: one way for validation, evaluation and prediction."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from nuciseg.data.dataset import SampleStore, evaluation_batches, evaluation_images
from nuciseg.engine.network import Network
from nuciseg.engine.refinement import refined
from nuciseg.metrics import ImageScores, score_image
from nuciseg.targets import Target
from nuciseg.types import Instances

EVALUATION_BATCH_SIZE = 8  # fixed: with another composition of batches the last digits of floats may differ


@dataclass(frozen=True)
class Place:
    """Which worker this is, of how many, and what it computes on."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@dataclass(frozen=True)
class Probabilities:
    """What a network says of one whole image: `maps_KHW` float32 in [0, 1]."""

    index: int
    id: str
    maps_KHW: NDArray[np.float32]


def predict_probabilities(
    network: Network, samples: SampleStore, indices: Sequence[int], place: Place | None = None
) -> Iterator[Probabilities]:
    """The probabilities of the samples at `indices`, or of this worker's share of them, largest images first."""
    place = place or Place(device=network.precision.device)
    data = network.config.data
    batches = evaluation_batches(indices, samples.shapes, EVALUATION_BATCH_SIZE)
    for batch_indices in batches[place.rank :: place.world_size]:
        images_BCHW = evaluation_images(samples, batch_indices, data.normalization, network.stride, data.marking)
        shapes = [(samples.shapes[index][0], samples.shapes[index][1]) for index in batch_indices]
        forward = partial(forward_views, network)
        probabilities_BKHW = refined(forward, images_BCHW, shapes, network.target, network.rounds)
        for row, (index, (height, width)) in enumerate(zip(batch_indices, shapes, strict=True)):
            yield Probabilities(index, samples.ids[index], probabilities_BKHW[row, :, :height, :width])


def score_samples(
    network: Network, samples: SampleStore, indices: Sequence[int], place: Place | None = None
) -> list[ImageScores]:
    """The scores of every sample at `indices`, in the order of their ids; every worker scores its share once and
    all workers get the whole list."""
    place = place or Place(device=network.precision.device)
    own = [
        score_probabilities(network.target, found, samples[found.index].labels_HW)
        for found in predict_probabilities(network, samples, indices, place)
    ]
    if place.world_size > 1:
        gathered: list[list[ImageScores] | None] = [None] * place.world_size
        dist.all_gather_object(gathered, own)
        own = [scores for part in gathered if part is not None for scores in part]
    return sorted(own, key=lambda scores: scores.id)


def score_probabilities(target: Target, found: Probabilities, labels_HW: NDArray[np.int32]) -> ImageScores:
    """The scores of one image's decoded nuclei and thresholded border."""
    return score_instances(target, found, target.decode(found.maps_KHW), labels_HW)


def score_instances(
    target: Target, found: Probabilities, instances: Instances, labels_HW: NDArray[np.int32]
) -> ImageScores:
    """`score_probabilities` where the nuclei are decoded already."""
    return score_image(
        found.id,
        instances.labels_HW,
        labels_HW,
        target.border_found(found.maps_KHW),
        target.border_of(labels_HW),
    )


def predict_instances(
    network: Network, samples: SampleStore, indices: Sequence[int]
) -> Iterator[tuple[Probabilities, Instances]]:
    """The separated nuclei of the samples at `indices`, largest images first."""
    for found in predict_probabilities(network, samples, indices):
        yield found, network.target.decode(found.maps_KHW)


@torch.inference_mode()
def forward_views(network: Network, images_BCHW: torch.Tensor) -> NDArray[np.float32]:
    """Probabilities (B, K, H, W) of normalised images, their sides multiples of the stride; the mean of all views."""
    images_BCHW = images_BCHW.to(network.precision.device)
    views = [_turned(images_BCHW, view) for view in range(network.num_views)]
    found = [_turned_back(_probabilities(network, turned_BCHW), view) for view, turned_BCHW in enumerate(views)]
    probabilities: NDArray[np.float32] = torch.stack(found).mean(dim=0).cpu().numpy()
    return probabilities


def _probabilities(network: Network, images_BCHW: torch.Tensor) -> torch.Tensor:
    if network.precision.channels_last:
        images_BCHW = images_BCHW.contiguous(memory_format=torch.channels_last)
    with network.precision.autocast():
        logits_BKHW: torch.Tensor = network.model(images_BCHW)
    return logits_BKHW.float().sigmoid()


def _turned(images_BCHW: torch.Tensor, view: int) -> torch.Tensor:
    """Of 8 views the first 4 are quarter turns, the others the same mirrored; 0 is the image itself."""
    turned = torch.rot90(images_BCHW, view % 4, (2, 3))
    return turned.flip(3) if view >= 4 else turned


def _turned_back(maps_BKHW: torch.Tensor, view: int) -> torch.Tensor:
    maps_BKHW = maps_BKHW.flip(3) if view >= 4 else maps_BKHW
    return torch.rot90(maps_BKHW, -(view % 4), (2, 3))
