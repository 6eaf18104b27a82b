"""Two clusters laid against each other are one cluster, drawn as the data set draws them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from nuciseg import tune
from nuciseg.config import Config
from nuciseg.data.joining import join_clusters
from nuciseg.data.synthetic import SyntheticConfig, cluster_seed, draw_cluster, write_labels_folder
from nuciseg.engine.datasets import open_training_set
from nuciseg.errors import ConfigError
from nuciseg.types import Sample

CONFIG = SyntheticConfig()


def cluster(index: int) -> Sample:
    return draw_cluster(CONFIG, cluster_seed(CONFIG, "train", index))


def joined(seed: int) -> tuple[Sample, Sample, Sample]:
    first, second = cluster(2 * seed), cluster(2 * seed + 1)
    return first, second, join_clusters(first, second, np.random.default_rng(seed))


@pytest.mark.parametrize("seed", range(12))
def test_all_nuclei_are_there_each_in_one_piece_and_hanging_together(seed: int) -> None:
    first, second, both = joined(seed)
    labels = both.labels_HW
    assert labels.dtype == np.int32
    assert set(np.unique(labels)) == set(range(first.labels_HW.max() + second.labels_HW.max() + 1))
    assert all(ndimage.label(labels == label)[1] == 1 for label in range(1, labels.max() + 1))
    assert ndimage.label(labels > 0, np.ones((3, 3)))[1] == 1


@pytest.mark.parametrize("seed", range(12))
def test_the_outside_is_zero_and_the_drawn_border_closed(seed: int) -> None:
    _, _, both = joined(seed)
    image, inside = both.image_HWC[..., 0], both.labels_HW > 0
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image > 0, inside)
    line = image == 255
    # No way from the outside to a nucleus but across the line.
    reached = ndimage.binary_propagation(~np.pad(inside, 1), mask=~np.pad(line, 1))
    assert not np.any(reached[1:-1, 1:-1] & inside)
    assert np.all(ndimage.distance_transform_edt(np.pad(inside, 1))[1:-1, 1:-1][line] <= 7)


def test_light_away_from_the_contact_is_that_of_the_pictures() -> None:
    first, _, both = joined(3)
    found = False
    top, left = np.argwhere(both.labels_HW == 1).min(axis=0) - np.argwhere(first.labels_HW == 1).min(axis=0)
    for label in range(1, first.labels_HW.max() + 1):
        rows, columns = np.nonzero((first.labels_HW == label) & (first.image_HWC[..., 0] < 255))
        there = both.image_HWC[rows + top, columns + left, 0]
        found |= bool(np.mean(there == first.image_HWC[rows, columns, 0]) > 0.95)
    assert found


def contact_px(sample: Sample, num_first: int) -> int:
    """Pixels of the first cluster that lie beside the second."""
    second_HW = ndimage.binary_dilation(sample.labels_HW > num_first)
    return int(np.count_nonzero(second_HW & (sample.labels_HW > 0) & (sample.labels_HW <= num_first)))


def test_nuclei_that_press_against_each_other_touch_along_a_longer_line(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []
    for share in (0.0, 1.0):
        monkeypatch.setattr("nuciseg.data.joining.PRESSED_SHARE", share)
        lengths.append(sum(contact_px(both, first.labels_HW.max()) for first, _, both in map(joined, range(12))))
    assert lengths[1] > 1.15 * lengths[0]


def test_the_same_generator_gives_the_same_cluster_and_another_another() -> None:
    first, second = cluster(0), cluster(1)
    one, same, other = (join_clusters(first, second, np.random.default_rng(seed)) for seed in (5, 5, 6))
    np.testing.assert_array_equal(one.image_HWC, same.image_HWC)
    assert one.image_HWC.shape != other.image_HWC.shape or np.any(one.image_HWC != other.image_HWC)


def test_sixteen_bit_images_keep_their_depth() -> None:
    first, second = (
        Sample(np.where(s.image_HWC == 255, 65535, s.image_HWC.astype(np.uint16) * 200), s.labels_HW)
        for s in (cluster(0), cluster(1))
    )
    both = join_clusters(first, second, np.random.default_rng(0))
    assert both.image_HWC.dtype == np.uint16
    assert both.image_HWC.max() == 65535
    assert np.unique(both.image_HWC).size > 256


def test_the_first_comes_back_where_the_second_would_be_hidden() -> None:
    square = np.zeros((44, 44), np.int32)
    square[2:-2, 2:-2] = 1
    speck = np.zeros((5, 5), np.int32)
    speck[1:4, 1:4] = 1
    first, second = (Sample((labels * 80).astype(np.uint8)[..., None], labels) for labels in (square, speck))
    assert join_clusters(first, second, np.random.default_rng(0)) is first


def test_whole_fields_cannot_be_joined(tmp_path: Path) -> None:
    write_labels_folder(SyntheticConfig(num_train=4, num_test=1), tmp_path, 64, 64)
    config = Config().replaced({"data.root": str(tmp_path), "augment.join": 0.5})
    with pytest.raises(ConfigError, match=r"augment\.join is 0\.5, .* set it to 0 for data in the 'labels' layout"):
        open_training_set(config, 16)
    open_training_set(config.replaced({"augment.enabled": False}), 16)


def test_nuclei_of_clusters_cannot_be_copied() -> None:
    config = Config().replaced({"augment.copies": 0.5})
    with pytest.raises(ConfigError, match=r"augment\.copies is 0\.5, .* for whole fields; set it to 0"):
        open_training_set(config, 16)


def test_a_search_that_would_join_whole_fields_is_refused_before_its_trials(tmp_path: Path) -> None:
    write_labels_folder(SyntheticConfig(num_train=4, num_test=1), tmp_path, 64, 64)
    space = {"augment.join": {"uniform": [0.0, 0.5]}}
    config = Config().replaced({"data.root": str(tmp_path), "search.space": space})
    with pytest.raises(ConfigError, match=r"augment\.join is 0\.5"):
        tune._check(config, final=False, verbose=False)
