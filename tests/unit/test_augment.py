"""Augmentation: the same for image and labels, decided by the seed, exact where prediction is exact."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest

from nuciseg.data.augment import FREE, SATURATED, ZEROED, AugmentConfig, Augmenter, NormalizedSample, Placed

GEOMETRY = {"brightness": 0, "contrast": 0, "gamma": 0, "background": 0, "blur_px": 0, "noise": 0}
NOTHING = {**GEOMETRY, "flips": False, "rotation_deg": 0, "scale": 0, "elastic_px": 0}


def nuclei(height: int = 100, width: int = 90) -> NormalizedSample:
    """Two discs of different brightness on zeroed background, their outline drawn; nothing is symmetric."""
    labels = np.zeros((height, width), np.int32)
    cv2.circle(labels, (35, 40), 22, 70_000, -1)
    cv2.ellipse(labels, (55, 68), (25, 14), 30, 0, 360, 7, -1)
    inside = (labels > 0).astype(np.uint8)
    line = inside.astype(bool) & (cv2.erode(inside, np.ones((5, 5), np.uint8)) == 0)
    kind = np.where(line, SATURATED, np.where(inside > 0, FREE, ZEROED)).astype(np.uint8)
    image = np.select([kind == ZEROED, line, labels == 7], [-0.5, 3.0, 0.8], 0.3).astype(np.float32)[..., None]
    return NormalizedSample(image, labels, kind, -0.5, 3.0)


def field(size: int = 200) -> NormalizedSample:
    """A plain image whose values are its labels."""
    labels = cv2.resize(np.random.default_rng(0).integers(0, 2, (8, 8)).astype(np.uint8), (size, size), interpolation=0)
    image = labels.astype(np.float32)[..., None]
    return NormalizedSample(image, labels.astype(np.int32), np.zeros((size, size), np.uint8), 0.0, 9.0)


def same(a: Placed, b: Placed) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_image_and_labels_move_together() -> None:
    augment = Augmenter(AugmentConfig(**GEOMETRY, elastic_px=4, probability=1))
    for seed in range(10):
        placed = augment(field(), 224, seed)
        edges = cv2.dilate(placed.labels_SS.astype(np.uint8), np.ones((5, 5))) != cv2.erode(
            placed.labels_SS.astype(np.uint8), np.ones((5, 5))
        )
        # At the image's edge the interpolation takes up to half a pixel of what lies outside.
        edges |= cv2.erode(np.pad(placed.valid_SS.astype(np.uint8), 1), np.ones((3, 3)))[1:-1, 1:-1] == 0
        away = ~edges
        assert away.mean() > 0.3
        np.testing.assert_allclose(placed.image_SSC[..., 0][away], placed.labels_SS[away], atol=0.02)


def test_same_seed_same_result_whatever_came_before_and_in_any_thread() -> None:
    augment = Augmenter(AugmentConfig(probability=1))
    first = [augment(nuclei(), 128, seed) for seed in range(6)]
    with ThreadPoolExecutor(4) as pool:
        again = list(pool.map(lambda seed: augment(nuclei(), 128, seed), reversed(range(6))))
    copy = pickle.loads(pickle.dumps(augment))
    for seed in range(6):
        assert same(first[seed], again[5 - seed])
        assert same(first[seed], copy(nuclei(), 128, seed))
    assert not same(first[0], first[1])


@pytest.mark.parametrize("config", [AugmentConfig(enabled=False), AugmentConfig(**NOTHING)])
def test_no_strength_changes_nothing_but_the_canvas(config: AugmentConfig) -> None:
    sample = nuclei()
    placed = Augmenter(config)(sample, 128, 5)
    top, left = (128 - 100) // 2, (128 - 90) // 2
    inside = placed.image_SSC[top : top + 100, left : left + 90]
    np.testing.assert_allclose(inside, sample.image_HWC, atol=1e-6)
    assert np.array_equal(placed.labels_SS[top : top + 100, left : left + 90], sample.labels_HW)
    assert placed.valid_SS.sum() == placed.valid_SS[top : top + 100, left : left + 90].sum() == 100 * 90
    assert (placed.image_SSC[~placed.valid_SS] == -0.5).all()


@pytest.mark.parametrize(
    "part",
    [
        "flips",
        "rotation_deg",
        "scale",
        "elastic_px",
        "brightness",
        "contrast",
        "gamma",
        "background",
        "blur_px",
        "noise",
    ],
)
def test_every_part_alone_changes_the_image(part: str) -> None:
    value = AugmentConfig.model_fields[part].default or 0.2
    plain = Augmenter(AugmentConfig(**NOTHING))
    augment = Augmenter(AugmentConfig(**{**NOTHING, part: value, "probability": 1}))
    changed = [
        not np.allclose(augment(nuclei(), 128, s).image_SSC, plain(nuclei(), 128, s).image_SSC, atol=1e-4)
        for s in range(8)
    ]
    assert any(changed)
    if part not in ("flips", "rotation_deg", "scale", "elastic_px"):
        assert all(
            np.array_equal(augment(nuclei(), 128, s).labels_SS, plain(nuclei(), 128, s).labels_SS) for s in range(3)
        )


def test_background_and_drawn_border_stay_exact() -> None:
    augment = Augmenter(AugmentConfig(probability=1))
    for seed in range(10):
        placed = augment(nuclei(), 128, seed)
        values = placed.image_SSC[..., 0]
        assert (values[placed.labels_SS == 0] == -0.5).all()
        line = values == 3.0
        assert line.sum() > 200
        inside = values[(placed.labels_SS > 0) & ~line]
        assert inside.max() < 1.3  # neither the line nor the background has bled into the nuclei
        assert np.percentile(inside, 1) > -0.3
        assert np.isfinite(values).all()


def test_added_background_is_smooth_and_light() -> None:
    config = AugmentConfig(**{**NOTHING, "background": 0.5, "probability": 1.0})
    dark = NormalizedSample(
        np.zeros((96, 96, 1), np.float32), np.zeros((96, 96), np.int32), np.zeros((96, 96), np.uint8), 0.0, 1.0
    )
    light_SS = Augmenter(config)(dark, 96, 3).image_SSC[..., 0]
    assert light_SS.min() >= -1e-6
    assert 0.01 < np.ptp(light_SS) <= 0.5
    assert np.abs(np.diff(light_SS)).max() < 0.02


def test_labels_keep_their_ids() -> None:
    augment = Augmenter(AugmentConfig(probability=1))
    for seed in range(10):
        assert set(np.unique(augment(nuclei(), 128, seed).labels_SS)) == {0, 7, 70_000}


def test_ignored_pixels_are_not_valid() -> None:
    sample = nuclei()
    sample.labels_HW[30:60, 20:50] = -1
    placed = Augmenter(AugmentConfig())(sample, 128, 3)
    assert (placed.labels_SS < 0).sum() > 400
    assert not placed.valid_SS[placed.labels_SS < 0].any()


def test_a_crop_has_nuclei_in_it_and_lies_inside_the_image() -> None:
    labels = np.zeros((600, 700), np.int32)
    labels[500:540, 30:60] = 4
    sample = NormalizedSample(np.ones((600, 700, 2), np.float32), labels, np.zeros((600, 700), np.uint8), 0.0, 9.0)
    augment = Augmenter(AugmentConfig(**NOTHING))
    for seed in range(20):
        placed = augment(sample, 128, seed)
        assert (placed.labels_SS == 4).any()
        assert placed.valid_SS.all()
        assert placed.image_SSC.shape == (128, 128, 2)
    empty = NormalizedSample(sample.image_HWC, np.zeros_like(labels), sample.kind_HW, 0.0, 9.0)
    assert augment(empty, 128, 0).valid_SS.all()


def test_turning_is_spread_evenly_and_not_tied_to_the_values() -> None:
    augment = Augmenter(
        AugmentConfig(**{**GEOMETRY, "flips": False, "scale": 0, "elastic_px": 0, "brightness": 0.15}, probability=1)
    )
    ys, xs = np.mgrid[:128, :128]
    angles, brightness = [], []
    for seed in range(150):
        placed = augment(nuclei(), 128, seed)
        a, b = (np.array([ys[placed.labels_SS == i].mean(), xs[placed.labels_SS == i].mean()]) for i in (7, 70_000))
        angles.append(np.arctan2(*(a - b)))
        brightness.append(np.median(placed.image_SSC[placed.labels_SS == 7]))
    assert np.histogram(angles, bins=6, range=(-np.pi, np.pi))[0].min() > 10
    assert abs(np.corrcoef(np.unwrap(np.sort(angles)), np.array(brightness)[np.argsort(angles)])[0, 1]) < 0.3


def scattered(size: int = 160) -> NormalizedSample:
    """Discs of brightness 0.6 and a smaller one of 0.9 on 0.1, in one half of the image."""
    labels = np.zeros((size, size), np.int32)
    for number, (x, y, radius) in enumerate([(20, 22, 12), (50, 30, 12), (30, 90, 12), (60, 140, 8)], start=1):
        cv2.circle(labels, (x, y), radius, number, -1)
    image = np.select([labels == 4, labels > 0], [0.9, 0.6], 0.1).astype(np.float32)[..., None]
    return NormalizedSample(image, labels, np.full((size, size), FREE, np.uint8), 0.0, 3.0)


def test_copies_are_nuclei_of_the_image_that_cover_little() -> None:
    sample = scattered()
    without = Augmenter(AugmentConfig(**NOTHING))(sample, 160, 0)
    areas = set(np.bincount(sample.labels_HW.ravel())[1:])
    augment = Augmenter(AugmentConfig(**NOTHING, copies=1.0))
    most_nuclei = 0
    for seed in range(20):
        placed = augment(sample, 160, seed)
        ids, counts = np.unique(placed.labels_SS, return_counts=True)
        most_nuclei = max(most_nuclei, len(ids) - 1)
        copies = ids > 4
        assert set(counts[copies]) <= areas, "a copy is whole"
        for number in (1, 2, 3, 4):
            assert (placed.labels_SS == number).sum() >= 0.75 * (sample.labels_HW == number).sum()
        was_background = (placed.labels_SS > 4) & (sample.labels_HW == 0)
        assert (placed.image_SSC[was_background] > 0.5).all()
        untouched = placed.labels_SS <= 4
        far = cv2.erode(untouched.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
        assert np.array_equal(placed.image_SSC[far], without.image_SSC[far])
    assert most_nuclei == 8


def test_copies_come_as_often_as_is_said() -> None:
    augment = Augmenter(AugmentConfig(**NOTHING, copies=0.5))
    share = np.mean([augment(scattered(), 160, seed).labels_SS.max() > 4 for seed in range(100)])
    assert 0.35 < share < 0.65


def test_ignored_pixels_count_as_covered_and_are_not_copied() -> None:
    sample = scattered()
    sample.labels_HW[80:] = -1
    augment = Augmenter(AugmentConfig(**NOTHING, copies=1.0))
    for seed in range(10):
        placed = augment(sample, 160, seed)
        assert not (placed.labels_SS[~placed.valid_SS] > 0).any()
        assert (~placed.valid_SS).sum() > 0.45 * 160 * 160
