"""One way from samples to probabilities, nuclei and scores; the same for any number of workers and any size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from nuciseg.data.cache import CachedSamples
from nuciseg.engine.datasets import open_samples
from nuciseg.engine.inference import (
    Place,
    predict_instances,
    predict_probabilities,
    score_probabilities,
    score_samples,
)
from nuciseg.engine.network import Network, load_network
from nuciseg.engine.prediction import OneImage, predict_image
from nuciseg.errors import DataError
from nuciseg.metrics import Scores
from nuciseg.types import Sample


@pytest.fixture(scope="module")
def network(tiny_checkpoint: Path) -> Network:
    return load_network(tiny_checkpoint, torch.device("cpu"))[0]


@pytest.fixture(scope="module")
def samples(network: Network) -> CachedSamples:
    return open_samples(network.config.data, "train")


INDICES = tuple(range(1, 20))  # two whole batches and a short one


def grey(height: int, width: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(1, 255, (height, width), dtype=np.uint8)


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


# ----------------------------------------------------------------------------------- an image that is in no data set
def test_an_image_alone_gets_what_it_gets_in_a_data_set(network: Network, samples: CachedSamples) -> None:
    ((_, expected),) = predict_instances(network, samples, [4])
    found = predict_image(network, samples[4].image_HWC[..., 0], "x")
    assert np.array_equal(found.labels_HW, expected.labels_HW)
    assert expected.labels_HW.any()


@pytest.mark.parametrize("shape", [(8, 8), (8, 131), (57, 9), (201, 64)])
def test_any_size_from_the_stride_on(network: Network, shape: tuple[int, int]) -> None:
    instances = predict_image(network, grey(*shape), "x")
    assert instances.labels_HW.shape == shape
    assert instances.labels_HW.dtype == np.int32


def test_16_bit_of_the_same_picture_gives_the_same_nuclei(network: Network, samples: CachedSamples) -> None:
    image_HW = samples[4].image_HWC[..., 0]
    eight = predict_image(network, image_HW, "x").labels_HW
    sixteen = predict_image(network, image_HW.astype(np.uint16) * 257, "x").labels_HW
    assert np.mean(eight != sixteen) < 0.01


@pytest.mark.parametrize("shape", [(7, 100), (100, 7), (1, 1)])
def test_smaller_than_the_stride_is_refused(network: Network, shape: tuple[int, int]) -> None:
    with pytest.raises(
        DataError, match=rf"'small\.png' has {shape[0]}x{shape[1]} pixels, the network needs at least 8"
    ):
        predict_image(network, grey(*shape), "small.png")


@pytest.mark.parametrize(("num_views", "turn_matters"), [(1, True), (4, False), (8, False)])
def test_turned_views_make_the_answer_independent_of_the_orientation(
    network: Network, num_views: int, turn_matters: bool
) -> None:
    network = replace(network, num_views=num_views)
    image_HW = grey(64, 96)
    upright = _maps(network, image_HW)
    turned_back = np.rot90(_maps(network, np.ascontiguousarray(np.rot90(image_HW))), -1, (1, 2))
    assert (np.abs(upright - turned_back).max() > 1e-4) == turn_matters


def _maps(network: Network, image_HW: NDArray[np.uint8]) -> NDArray[np.float32]:
    image = OneImage("x", Sample(image_HW[..., None], np.zeros(image_HW.shape, np.int32)))
    ((found, _),) = predict_instances(network, image, [0])
    return found.maps_KHW
