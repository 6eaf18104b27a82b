"""An outline that gets other notches keeps its nuclei, and is drawn as the data set draws it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage
from skimage.morphology import convex_hull_image

from nuciseg.config import Config
from nuciseg.data import notches
from nuciseg.data.notches import change_notches
from nuciseg.data.synthetic import SyntheticConfig, cluster_seed, draw_cluster, write_labels_folder
from nuciseg.engine.datasets import open_training_set
from nuciseg.errors import ConfigError
from nuciseg.types import Sample

CONFIG = SyntheticConfig()


def cluster(index: int) -> Sample:
    return draw_cluster(CONFIG, cluster_seed(CONFIG, "train", index))


def changed(seed: int) -> tuple[Sample, Sample]:
    sample = cluster(seed)
    return sample, change_notches(sample, np.random.default_rng(seed))


@pytest.mark.parametrize("seed", range(12))
def test_every_nucleus_is_still_there_in_one_piece(seed: int) -> None:
    before, after = changed(seed)
    assert after.labels_HW.dtype == np.int32
    assert after.labels_HW.shape == before.labels_HW.shape
    assert set(np.unique(after.labels_HW)) == set(np.unique(before.labels_HW))
    assert all(ndimage.label(after.labels_HW == label)[1] == 1 for label in range(1, after.labels_HW.max() + 1))


@pytest.mark.parametrize("seed", range(12))
def test_the_outside_is_zero_and_the_drawn_border_closed(seed: int) -> None:
    _, after = changed(seed)
    image, inside = after.image_HWC[..., 0], after.labels_HW > 0
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image > 0, inside)
    line = image == 255
    reached = ndimage.binary_propagation(~np.pad(inside, 1), mask=~np.pad(line, 1))
    assert not np.any(reached[1:-1, 1:-1] & inside)
    assert np.all(ndimage.distance_transform_edt(np.pad(inside, 1))[1:-1, 1:-1][line] <= 7)


def hollowness(sample: Sample) -> float:
    """Share of the convex hull that the cluster leaves empty: its notches."""
    inside = sample.labels_HW > 0
    return 1 - float(inside.sum() / convex_hull_image(inside).sum())


def test_filling_leaves_a_straighter_outline_between_the_same_nuclei(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notches, "FILLED_SHARE", 1.0)
    monkeypatch.setattr(notches, "FILLED_RADIUS_PX", (60.0, 60.0))
    monkeypatch.setattr(notches, "MAX_NEW_NOTCHES", 0)
    pairs = [changed(seed) for seed in range(12)]
    hollow_before, hollow_after = np.array([[hollowness(sample) for sample in pair] for pair in pairs]).T
    assert np.all(hollow_after <= hollow_before)
    assert hollow_after.mean() < 0.7 * hollow_before.mean()
    for before, after in pairs:
        kept = before.labels_HW > 0
        np.testing.assert_array_equal(after.labels_HW[kept], before.labels_HW[kept])


def test_new_notches_are_cut_out_of_the_nuclei(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notches, "FILLED_SHARE", 0.0)
    pairs = [changed(seed) for seed in range(24)]
    assert sum(bool(np.any(before.labels_HW != after.labels_HW)) for before, after in pairs) >= 12
    for before, after in pairs:
        assert np.all((after.labels_HW == before.labels_HW) | (after.labels_HW == 0))
        for label in range(1, before.labels_HW.max() + 1):
            left = np.count_nonzero(after.labels_HW == label) / np.count_nonzero(before.labels_HW == label)
            assert left >= notches.MIN_LEFT_SHARE


def test_light_is_changed_at_the_outline_alone() -> None:
    before, after = changed(5)
    inside = ndimage.distance_transform_edt(np.pad((before.labels_HW > 0) & (after.labels_HW > 0), 1))[1:-1, 1:-1]
    np.testing.assert_array_equal(after.image_HWC[inside > 12], before.image_HWC[inside > 12])


def test_the_same_generator_gives_the_same_outline_and_another_another() -> None:
    sample = cluster(0)
    one, same, other = (change_notches(sample, np.random.default_rng(seed)) for seed in (5, 5, 7))
    np.testing.assert_array_equal(one.image_HWC, same.image_HWC)
    assert np.any(one.image_HWC != other.image_HWC)


def test_sixteen_bit_images_keep_their_depth() -> None:
    eight_bit = cluster(0)
    image_HWC = np.where(eight_bit.image_HWC == 255, 65535, eight_bit.image_HWC.astype(np.uint16) * 200)
    after = change_notches(Sample(image_HWC, eight_bit.labels_HW), np.random.default_rng(0))
    assert after.image_HWC.dtype == np.uint16
    assert after.image_HWC.max() == 65535


def test_a_nucleus_too_small_for_a_notch_stays_whole() -> None:
    labels = np.zeros((9, 9), np.int32)
    labels[3:6, 3:6] = 1
    sample = Sample((labels * 80).astype(np.uint8)[..., None], labels)
    for seed in range(8):
        np.testing.assert_array_equal(change_notches(sample, np.random.default_rng(seed)).labels_HW, labels)


def test_outlines_of_whole_fields_are_not_changed(tmp_path: Path) -> None:
    write_labels_folder(SyntheticConfig(num_train=4, num_test=1), tmp_path, 64, 64)
    config = Config().replaced({"data.root": str(tmp_path), "augment.notches": 0.5})
    with pytest.raises(ConfigError, match=r"augment\.notches is 0\.5, .* set it to 0 for data in the 'labels' layout"):
        open_training_set(config, 16)
    open_training_set(config.replaced({"augment.enabled": False}), 16)


def test_training_changes_the_share_of_outlines_that_was_asked_for() -> None:
    config = Config().replaced({"augment.notches": 0.5, "data.synthetic.num_train": 40})
    data = open_training_set(config, 16).training_data
    shapes_changed = [
        bool(np.any(data._sample(index, 0).labels_HW != data.samples[index].labels_HW)) for index in data.indices
    ]
    assert 0.2 < np.mean(shapes_changed) < 0.7
