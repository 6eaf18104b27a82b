"""Drawn nuclei: by seed, in the formats that they imitate, and each setting with its effect."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from pydantic import ValidationError

from nuciseg.data.formats import detect_format
from nuciseg.data.formats import labels as labels_format
from nuciseg.data.formats import nucleus as nucleus_format
from nuciseg.data.formats import synthetic as synthetic_format
from nuciseg.data.synthetic import (
    SyntheticConfig,
    cluster_seed,
    draw_cluster,
    draw_field,
    solution_border,
    write_labels_folder,
    write_nucleus_folder,
)
from nuciseg.errors import DataError
from nuciseg.types import Sample


def clusters(num: int = 12, **settings: object) -> list[Sample]:
    config = SyntheticConfig.model_validate(settings)
    return [draw_cluster(config, cluster_seed(config, "train", index)) for index in range(num)]


def num_regions(mask_HW: np.ndarray) -> int:
    return cv2.connectedComponents(mask_HW.astype(np.uint8), connectivity=4)[0] - 1


def inner(sample: Sample) -> np.ndarray:
    """The visible values of the nuclei."""
    values = sample.image_HWC[..., 0]
    return values[(values > 0) & (values < 255)].astype(float)


def test_a_cluster_has_the_nucleus_format() -> None:
    for sample in clusters(20):
        image, labels = sample.image_HWC[..., 0], sample.labels_HW
        assert (image.dtype, labels.dtype) == (np.uint8, np.int32)
        assert ((image == 0) == (labels == 0)).all()
        assert num_regions(labels > 0) == 1
        count = int(labels.max())
        assert 2 <= count <= 4
        assert all(num_regions(labels == label) == 1 for label in range(1, count + 1))
        # Cut tightly; the line lies all along the background, at least 3 px wide, and nowhere else.
        padded = np.pad(labels > 0, 4)
        distance = cv2.distanceTransform(padded.astype(np.uint8), cv2.DIST_L2, 5)[4:-4, 4:-4]
        assert (image[(labels > 0) & (distance <= 2.5)] == 255).all()
        assert (image[distance > 4.5] < 255).all()
        assert all(edge.any() for edge in (labels[0], labels[-1], labels[:, 0], labels[:, -1]))


def test_the_seed_decides_everything() -> None:
    for a, b in zip(clusters(4, seed=1), clusters(4, seed=1), strict=True):
        assert np.array_equal(a.image_HWC, b.image_HWC)
        assert np.array_equal(a.labels_HW, b.labels_HW)
    assert not np.array_equal(clusters(1, seed=1)[0].image_HWC, clusters(1, seed=2)[0].image_HWC)
    config = SyntheticConfig()
    assert not np.array_equal(
        draw_cluster(config, cluster_seed(config, "train", 0)).image_HWC,
        draw_cluster(config, cluster_seed(config, "test", 0)).image_HWC,
    )


def test_clusters_look_like_the_real_ones_in_numbers() -> None:
    """Bounds from the 555 training pictures of the nucleus data set (5th and 95th percentile), made wider by a half."""
    drawn = clusters(40)
    sides = np.array([sample.labels_HW.shape for sample in drawn])
    assert 60 < np.median(sides) < 150
    assert 25 < np.median([np.median(inner(sample)) for sample in drawn]) < 76
    assert 0.07 < np.median([(sample.image_HWC == 255).mean() for sample in drawn]) < 0.21
    assert max(inner(sample).max() for sample in drawn) < 255


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("texture", 0.0, 0.3), ("brightness_variation", 0.0, 0.6), ("brightness", 0.1, 0.4), ("read_noise", 0.0, 0.05)],
)
def test_each_setting_of_light_has_its_effect(name: str, low: float, high: float) -> None:
    def measure(value: float) -> float:
        drawn = clusters(10, **{name: value})
        if name == "brightness":
            return float(np.mean([np.median(inner(sample)) for sample in drawn]))
        return float(np.mean([inner(sample).std() / inner(sample).mean() for sample in drawn]))

    assert measure(high) > 1.15 * measure(low)


def test_shot_noise_and_blur() -> None:
    def roughness(**settings: object) -> float:
        shares = []
        for sample in clusters(8, **settings):
            image = sample.image_HWC[..., 0].astype(np.float32)
            deep = cv2.erode(((image > 0) & (image < 255)).astype(np.uint8), np.ones((7, 7))) > 0
            shares.append(float((image - cv2.blur(image, (3, 3)))[deep].std() / image[deep].mean()))
        return float(np.mean(shares))

    assert roughness(photons=300) > 1.5 * roughness(photons=30_000)
    assert roughness(blur_sigma_px=0.3, photons=1e6, read_noise=0) > 1.5 * roughness(
        blur_sigma_px=3, photons=1e6, read_noise=0
    )


def test_each_setting_of_shape_has_its_effect() -> None:
    def mean(measure: object, **settings: object) -> float:
        assert callable(measure)
        return float(np.mean([measure(sample) for sample in clusters(10, **settings)]))

    def contact_px(sample: Sample) -> float:
        labels = sample.labels_HW
        return sum(
            int(((a != b) & (a > 0) & (b > 0)).sum())
            for a, b in ((labels[1:], labels[:-1]), (labels[:, 1:], labels[:, :-1]))
        )

    def roundness(sample: Sample) -> float:
        shares = []
        for label in range(1, sample.labels_HW.max() + 1):
            contour = cv2.findContours(
                (sample.labels_HW == label).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE
            )[0][0]
            shares.append(4 * np.pi * cv2.contourArea(contour) / cv2.arcLength(contour, True) ** 2)
        return float(np.mean(shares))

    assert mean(contact_px, overlap=0.4) > 1.4 * mean(contact_px, overlap=0.05)
    assert mean(roundness, elongation=1) > mean(roundness, elongation=2) + 0.05
    assert mean(roundness, outline_roughness=0) > mean(roundness, outline_roughness=0.12) + 0.03
    diameter = mean(lambda s: 2 * np.sqrt((s.labels_HW > 0).sum() / s.labels_HW.max() / np.pi), mean_diameter_px=40)
    assert 36 < diameter < 44
    assert {int(s.labels_HW.max()) for s in clusters(6, nuclei_per_cluster=(5, 5))} == {5}
    with pytest.raises(ValidationError, match="in order"):
        SyntheticConfig(nuclei_per_cluster=(4, 2))


def test_a_field_has_clusters_and_single_nuclei_on_background() -> None:
    sample = draw_field(SyntheticConfig(), np.random.SeedSequence(3), 300, 400)
    assert sample.image_HWC.shape == (300, 400, 1)
    labels, image = sample.labels_HW, sample.image_HWC[..., 0]
    assert np.array_equal(np.unique(labels), np.arange(labels.max() + 1))
    assert 2 <= num_regions(labels > 0) < labels.max()  # some touch
    assert np.median(image[labels > 0]) > 1.5 * np.median(image[labels == 0])
    assert image.min() > 0
    assert image.max() < 255
    again = draw_field(SyntheticConfig(), np.random.SeedSequence(3), 300, 400)
    assert np.array_equal(again.image_HWC, sample.image_HWC)


def test_a_nucleus_folder_is_read_back_with_the_same_nuclei(tmp_path: Path) -> None:
    config = SyntheticConfig(num_train=8, num_test=2)
    write_nucleus_folder(config, tmp_path)
    assert detect_format(tmp_path).NAME == nucleus_format.NAME
    assert len(nucleus_format.read(tmp_path, "test")) == 2
    for index, record in enumerate(nucleus_format.read(tmp_path, "train")):
        drawn, read = draw_cluster(config, cluster_seed(config, "train", index)), nucleus_format.load(record)
        assert np.array_equal(read.image_HWC, drawn.image_HWC)
        assert read.labels_HW.max() == drawn.labels_HW.max()
        for label in range(1, drawn.labels_HW.max() + 1):
            own = drawn.labels_HW == label
            there = read.labels_HW == np.bincount(read.labels_HW[own]).argmax()
            assert (own & there).sum() / (own | there).sum() > 0.9


def test_the_border_between_any_number_of_nuclei() -> None:
    """A tiling of 300 boxes, of which some have numbers that are equal in 8 bit."""
    labels_HW = np.kron(np.arange(1, 301, dtype=np.int32).reshape(15, 20), np.ones((16, 16), np.int32))
    inner_HW = ~solution_border(labels_HW)
    assert num_regions(inner_HW) == 300
    assert len(np.unique(labels_HW[inner_HW])) == 300


def test_a_labels_folder_is_read_back_as_it_was_drawn(tmp_path: Path) -> None:
    config = SyntheticConfig(num_train=2, num_test=1)
    write_labels_folder(config, tmp_path, 96, 128)
    assert detect_format(tmp_path).NAME == labels_format.NAME
    records = labels_format.read(tmp_path, "train")
    assert len(records) == 2
    drawn, read = draw_field(config, cluster_seed(config, "train", 1), 96, 128), labels_format.load(records[1])
    assert np.array_equal(read.image_HWC, drawn.image_HWC)
    assert np.array_equal(read.labels_HW, drawn.labels_HW)


def test_records_need_no_folder_and_name_what_is_drawn() -> None:
    config = SyntheticConfig(num_train=3, num_test=2)
    records = synthetic_format.read(config, "train")
    assert len(records) == 3
    assert len(synthetic_format.read(config, "test")) == 2
    assert len({record.id for record in records} | {record.group for record in records}) == 3
    drawn = draw_cluster(config, cluster_seed(config, "train", 2))
    assert np.array_equal(synthetic_format.load(records[2], config).image_HWC, drawn.image_HWC)
    # More of the same keep their names; other pictures get others.
    assert synthetic_format.read(SyntheticConfig(num_train=4), "train")[:3] == records
    other = {record.id for record in synthetic_format.read(SyntheticConfig(num_train=3, overlap=0.3), "train")}
    assert not other & {record.id for record in records}
    with pytest.raises(DataError, match="no split 'dev'"):
        synthetic_format.read(config, "dev")
