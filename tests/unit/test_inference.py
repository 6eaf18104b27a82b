"""One way from samples to probabilities, nuclei and scores; the same for any number of workers and any size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nuciseg.data.cache import CachedSamples
from nuciseg.engine.datasets import open_samples
from nuciseg.engine.inference import (
    Place,
    forward_views,
    predict_instances,
    predict_probabilities,
    score_probabilities,
    score_samples,
)
from nuciseg.engine.network import Network, load_network
from nuciseg.metrics import Scores


@pytest.fixture(scope="module")
def network(tiny_checkpoint: Path) -> Network:
    return load_network(tiny_checkpoint, torch.device("cpu"))[0]


@pytest.fixture(scope="module")
def samples(network: Network) -> CachedSamples:
    return open_samples(network.config.data, "train")


INDICES = tuple(range(1, 20))  # two whole batches and a short one


def test_every_image_once_at_its_own_size(network: Network, samples: CachedSamples) -> None:
    found = list(predict_probabilities(network, samples, INDICES))
    assert sorted(each.index for each in found) == list(INDICES)
    for each in found:
        assert each.id == samples.ids[each.index]
        assert each.maps_KHW.shape == (2, *samples.shapes[each.index])
        assert each.maps_KHW.dtype == np.float32
        assert 0 <= each.maps_KHW.min() <= each.maps_KHW.max() <= 1
    assert len({max(samples.shapes[each.index]) % network.stride for each in found}) > 1, "sizes need padding"


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_workers_share_the_images_and_see_the_same(network: Network, samples: CachedSamples, world_size: int) -> None:
    alone = {each.index: each.maps_KHW for each in predict_probabilities(network, samples, INDICES)}
    shares = [
        list(predict_probabilities(network, samples, INDICES, Place(rank, world_size))) for rank in range(world_size)
    ]
    together = [each for share in shares for each in share]
    assert sorted(each.index for each in together) == list(INDICES), "none twice, none left out"
    for each in together:
        assert np.array_equal(each.maps_KHW, alone[each.index]), "to the last digit"


def test_scores_are_those_of_the_decoded_maps_in_the_order_of_ids(network: Network, samples: CachedSamples) -> None:
    scores = score_samples(network, samples, INDICES)
    assert [each.id for each in scores] == sorted(samples.ids[index] for index in INDICES)
    by_hand = [
        score_probabilities(network.target, each, samples[each.index].labels_HW)
        for each in predict_probabilities(network, samples, INDICES)
    ]
    assert sorted(by_hand, key=lambda each: each.id) == scores
    assert Scores.total(scores).num_predicted > len(INDICES), "the tiny network finds nuclei"


def test_the_order_in_which_images_are_asked_for_changes_nothing(network: Network, samples: CachedSamples) -> None:
    assert score_samples(network, samples, INDICES) == score_samples(network, samples, INDICES[::-1])


def test_the_border_is_what_reaches_its_threshold(network: Network, samples: CachedSamples) -> None:
    (found,) = predict_probabilities(network, samples, [3])
    threshold = network.target.config.decode.border_threshold
    mask = network.target.border_found(found.maps_KHW)
    assert mask.dtype == bool
    assert np.array_equal(mask, found.maps_KHW[1] >= threshold)


def test_instances_are_the_decoded_maps(network: Network, samples: CachedSamples) -> None:
    for found, instances in predict_instances(network, samples, INDICES[:5]):
        assert np.array_equal(instances.labels_HW, network.target.decode(found.maps_KHW).labels_HW)
        assert instances.labels_HW.max() == len(instances.confidences_N)


@pytest.mark.parametrize(("num_views", "turn_matters"), [(1, True), (4, False), (8, False)])
def test_turned_views_make_the_answer_independent_of_the_orientation(
    network: Network, num_views: int, turn_matters: bool
) -> None:
    network = replace(network, num_views=num_views)
    images_BCHW = torch.rand((1, 1, 64, 96), generator=torch.Generator().manual_seed(0))
    upright_KHW = forward_views(network, images_BCHW)[0]
    turned_KHW = forward_views(network, torch.rot90(images_BCHW, 1, (2, 3)).contiguous())[0]
    turned_back_KHW = np.rot90(turned_KHW, -1, (1, 2))
    assert (np.abs(upright_KHW - turned_back_KHW).max() > 1e-4) == turn_matters
