"""The drawn border of a cluster can be erased without a trace, moved, and left out of what a network sees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

from nuciseg.config import Config
from nuciseg.data.dataset import evaluation_images
from nuciseg.data.joining import join_clusters
from nuciseg.data.markings import disturb_marking, erase_marking, shift_marking
from nuciseg.data.synthetic import SyntheticConfig, cluster_seed, draw_cluster, outer_border, write_labels_folder
from nuciseg.engine.datasets import open_training_set
from nuciseg.engine.dependence import scores_by_marking
from nuciseg.engine.network import build_network
from nuciseg.errors import ConfigError
from nuciseg.types import Sample

CONFIG = SyntheticConfig()


def cluster(index: int) -> Sample:
    return draw_cluster(CONFIG, cluster_seed(CONFIG, "train", index))


@pytest.mark.parametrize("index", range(6))
def test_erasing_leaves_no_trace_of_the_line(index: int) -> None:
    sample = cluster(index)
    erased = erase_marking(sample.image_HWC)
    inside = sample.labels_HW > 0
    line = sample.image_HWC[..., 0] == 255
    np.testing.assert_array_equal(erased[~line], sample.image_HWC[~line])
    np.testing.assert_array_equal(erased[..., 0] > 0, inside)
    # Where the line was nothing is brighter or darker than the light within 8 px of it, and no edge is left: the step
    # from the erased pixels to those beside them is no larger than steps between pixels that were never covered.
    light = erased[..., 0].astype(float)
    seen = inside & ~line
    highest = ndimage.maximum_filter(np.where(seen, light, 0), 17)
    lowest = ndimage.minimum_filter(np.where(seen, light, 255), 17)
    assert np.all((light <= highest + 1)[line] & (light >= lowest - 1)[line])
    steps = np.abs(np.diff(light, axis=1))
    both = inside[:, 1:] & inside[:, :-1]
    across = both & (line[:, 1:] != line[:, :-1])
    untouched = both & ~line[:, 1:] & ~line[:, :-1]
    assert steps[across].mean() <= steps[untouched].mean()


def test_an_image_without_a_line_comes_back_as_it_is() -> None:
    image_HWC = np.full((8, 8, 1), 90, np.uint8)
    assert erase_marking(image_HWC) is image_HWC
    assert shift_marking(image_HWC, 2, 2) is image_HWC


@pytest.mark.parametrize(("rows", "columns"), [(3, -2), (-3, 2), (0, 4), (-1, 0)])
def test_a_moved_line_is_the_same_line_elsewhere(rows: int, columns: int) -> None:
    image_HWC = np.pad(cluster(0).image_HWC, ((5, 5), (5, 5), (0, 0)))
    moved = shift_marking(image_HWC, rows, columns)
    expected = np.roll(image_HWC == 255, (rows, columns), (0, 1))
    np.testing.assert_array_equal(moved == 255, expected)
    np.testing.assert_array_equal(moved[~expected], erase_marking(image_HWC)[~expected])


def test_sixteen_bit_images_keep_their_depth() -> None:
    eight_bit = cluster(0).image_HWC
    image_HWC = np.where(eight_bit == 255, 65535, eight_bit.astype(np.uint16) * 200)
    assert erase_marking(image_HWC).dtype == np.uint16
    assert 256 < erase_marking(image_HWC).max() < 65535


def test_training_drops_and_moves_as_often_and_as_far_as_it_is_told() -> None:
    image_HWC = np.pad(cluster(0).image_HWC, ((5, 5), (5, 5), (0, 0)))
    rng = np.random.default_rng(0)
    dropped = [not (disturb_marking(image_HWC, 0.5, 0, rng) == 255).any() for _ in range(60)]
    assert 0.3 < np.mean(dropped) < 0.7
    first = np.argwhere(image_HWC[..., 0] == 255)[0]
    shifts = [np.argwhere(disturb_marking(image_HWC, 0, 2, rng)[..., 0] == 255)[0] - first for _ in range(60)]
    assert np.abs(shifts).max() == 2
    assert disturb_marking(image_HWC, 0, 0, rng) is image_HWC


def test_a_network_for_erased_markings_never_sees_a_line() -> None:
    config = Config().replaced({"data.marking": "erased", "data.synthetic.num_train": 12})
    training = open_training_set(config, 16)
    for planned in training.training_data.plan(0, 4):
        batch = training.training_data.load(planned, 0).batch
        assert batch is not None
        assert batch.images_BCHW.max() < 3
    shown = evaluation_images(training.samples, [0, 1], config.data.normalization, 16, config.data.marking)
    assert shown.max() < 3
    assert evaluation_images(training.samples, [0, 1], config.data.normalization, 16).max() == 3


def test_the_dependence_on_the_marking_is_measured_on_other_markings() -> None:
    class ReadsTheLine(torch.nn.Module):
        """Finds foreground wherever the input is not padding, and a border wherever the input is saturated."""

        stride = 16

        def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
            image = images_BCHW[:, :1]
            return torch.cat([20 * (image > -0.99).float() - 10, 20 * (image > 2.9).float() - 10], dim=1)

    config = Config().replaced({"data.synthetic.num_train": 12, "train.precision": "fp32"})
    training = open_training_set(config, 16)
    network = build_network(config, 1, torch.device("cpu"))
    scores = scores_by_marking(
        type(network)(ReadsTheLine(), network.target, config, network.precision, 1), training.samples, [0, 1, 2]
    )
    assert list(scores) == ["erased", "shifted by 3 px"]
    assert scores["erased"].flat_summary()["border_dice"] == 0
    assert all(each.images == 3 for each in scores.values())
    assert scores["erased"] != scores["shifted by 3 px"]


@pytest.mark.parametrize("key", ["augment.marking_dropped", "augment.marking_shift_px", "data.marking"])
def test_whole_fields_have_no_marking(key: str, tmp_path: Path) -> None:
    write_labels_folder(SyntheticConfig(num_train=4, num_test=1), tmp_path, 64, 64)
    value = "erased" if key == "data.marking" else 1
    config = Config().replaced({"data.root": str(tmp_path), key: value})
    with pytest.raises(ConfigError, match=rf"{key} is .* for data in the 'labels' layout"):
        open_training_set(config, 16)


def test_the_line_of_a_drawn_cluster_is_its_outer_border() -> None:
    sample = cluster(0)
    np.testing.assert_array_equal(sample.image_HWC[..., 0] == 255, outer_border(sample.labels_HW))


@pytest.mark.parametrize("seed", range(4))
def test_augmentation_draws_no_line_on_clusters_that_have_none(seed: int) -> None:
    first, second = (
        Sample(erase_marking(sample.image_HWC), sample.labels_HW)
        for sample in (cluster(2 * seed), cluster(2 * seed + 1))
    )
    joined = join_clusters(first, second, np.random.default_rng(seed))
    assert joined.labels_HW.max() > first.labels_HW.max()
    assert joined.image_HWC.max() < 255
    np.testing.assert_array_equal(joined.image_HWC[..., 0] > 0, joined.labels_HW > 0)
