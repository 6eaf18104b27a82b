"""Normalisation, the plan of an epoch, and loaded batches."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from nuciseg.config import Config
from nuciseg.data.augment import AugmentConfig, Augmenter
from nuciseg.data.dataset import (
    LoadedBatch,
    NormalizationConfig,
    PlannedBatch,
    TrainingData,
    TrainingLoader,
    canvas_side,
    epoch_batches,
    evaluation_batches,
    evaluation_images,
    normalization_bounds,
    normalize,
    repeated_by_area,
)
from nuciseg.data.synthetic import SyntheticConfig, cluster_seed, draw_cluster
from nuciseg.engine.datasets import open_training_set
from nuciseg.targets import FullBorderConfig, build_target
from nuciseg.types import Sample

SYNTHETIC = SyntheticConfig(nuclei_per_cluster=(2, 2))


class ForegroundTarget:
    """The smallest target there is."""

    map_names = ("foreground",)

    def encode(self, labels_HW: np.ndarray) -> np.ndarray:
        return (labels_HW > 0)[None].astype(np.float32)


class Store:
    """Samples in memory: value i + 20 in a bright block, on zeros."""

    def __init__(self, shapes: list[tuple[int, int]], broken: int | None = None) -> None:
        self.shapes, self.ids, self.broken = shapes, [f"image{i}" for i in range(len(shapes))], broken

    def __getitem__(self, index: int) -> Sample:
        if index == self.broken:
            raise OSError("unreadable")
        rng = np.random.default_rng(index)
        image = np.zeros((*self.shapes[index], 1), np.uint8)
        image[4:-4, 4:-4] = rng.integers(30, 90, image[4:-4, 4:-4].shape)
        labels = (image[..., 0] > 0).astype(np.int32)
        return Sample(image, labels)


def sizes(num: int) -> list[tuple[int, int]]:
    """Like the nucleus data set: 54 to 380 px, median 127."""
    drawn = np.clip(np.random.default_rng(1).lognormal(np.log(127), 0.27, (num, 2)), 54, 380).astype(int)
    return [(int(h), int(w)) for h, w in drawn]


def training_data(store: Store, indices: tuple[int, ...] | None = None) -> TrainingData:
    chosen = tuple(range(len(store.shapes))) if indices is None else indices
    return TrainingData(
        store, chosen, NormalizationConfig(), Augmenter(AugmentConfig()), ForegroundTarget(), 128, 3, 32
    )


class Clusters:
    """Drawn clusters."""

    def __init__(self, num: int) -> None:
        self.drawn = [draw_cluster(SYNTHETIC, cluster_seed(SYNTHETIC, "train", index)) for index in range(num)]
        self.shapes, self.ids = [sample.labels_HW.shape for sample in self.drawn], [f"drawn{i}" for i in range(num)]

    def __getitem__(self, index: int) -> Sample:
        return self.drawn[index]


# ---------------------------------------------------------------------------------------------- normalisation
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_bounds_are_percentiles_of_what_is_neither_zero_nor_saturated(dtype: type) -> None:
    image = np.zeros((100, 100, 1), dtype)
    image[20:80, 20:80, 0] = np.random.default_rng(0).integers(40, 110, (60, 60))
    inside = image[20:80, 20:80].copy()
    if dtype is not np.float32:
        image[18:20] = np.iinfo(dtype).max
    low, high = normalization_bounds(image, NormalizationConfig())
    expected = np.percentile(inside, [1, 99.8])
    assert abs(low - expected[0]) <= 1
    assert abs(high - expected[1]) <= 1
    normalized = normalize(image, NormalizationConfig())
    assert normalized.dtype == np.float32
    assert normalized.shape == image.shape
    np.testing.assert_allclose(normalized[20:80, 20:80], (inside - low) / (high - low), atol=1e-5)
    assert normalized[0, 0, 0] == -1
    if dtype is not np.float32:
        assert normalized[18, 0, 0] == 3
        plain = normalize(image, NormalizationConfig(ignore_extremes=False))
        assert plain[0, 0, 0] == 0
        assert normalization_bounds(image, NormalizationConfig(ignore_extremes=False))[0] == 0


@pytest.mark.parametrize(("value", "expected"), [(0, -1), (7, 0)])
def test_a_constant_image_becomes_constant(value: int, expected: float) -> None:
    for dtype in (np.uint8, np.uint16, np.float32):
        assert (normalize(np.full((20, 20, 1), value, dtype), NormalizationConfig()) == expected).all()


def test_a_binary_image_uses_all_its_pixels() -> None:
    image = np.zeros((20, 20, 1), np.uint8)
    image[5:15, 5:15] = 255
    assert normalization_bounds(image, NormalizationConfig()) == (0.0, 255.0)


# ----------------------------------------------------------------------------------------------------- planning
def test_canvas_fits_the_image_but_not_more_than_a_crop() -> None:
    assert canvas_side((100, 90), 256, 32) == 128
    assert canvas_side((128, 30), 256, 32) == 160
    assert canvas_side((500, 30), 256, 32) == 256
    assert canvas_side((500, 30), 250, 32) == 256
    assert canvas_side((1, 1), 256, 16) == 16


def test_each_index_once_an_epoch_and_little_padding() -> None:
    shapes = sizes(444)
    sides = [canvas_side(shape, 256, 32) for shape in shapes]
    batches = epoch_batches(range(444), sides, 16, 0, 0)
    assert Counter(i for batch in batches for i in batch.indices) == Counter(range(444))
    assert [len(batch.indices) for batch in batches] == [16] * 27 + [12]
    assert padding_share(batches, sides) < 0.15
    assert all(batch.canvas_px == max(sides[i] for i in batch.indices) for batch in batches)
    assert np.argsort([batch.canvas_px for batch in batches]).tolist() != list(range(28))
    shuffled_only = padding_share_without_sorting(sides)
    assert padding_share(batches, sides) < shuffled_only / 3


def padding_share(batches: list[PlannedBatch], sides: list[int]) -> float:
    used = sum(sides[index] ** 2 for batch in batches for index in batch.indices)
    return 1 - used / sum(len(batch.indices) * batch.canvas_px**2 for batch in batches)


def padding_share_without_sorting(sides: list[int]) -> float:
    groups = [sides[i : i + 16] for i in range(0, len(sides), 16)]
    return 1 - sum(s**2 for s in sides) / sum(len(g) * max(g) ** 2 for g in groups)


def test_plan_depends_on_seed_and_epoch() -> None:
    plan = epoch_batches(range(50), [32] * 50, 8, 1, 2)
    assert plan == epoch_batches(range(50), [32] * 50, 8, 1, 2)
    assert plan != epoch_batches(range(50), [32] * 50, 8, 1, 3)
    assert plan != epoch_batches(range(50), [32] * 50, 8, 2, 2)


# ------------------------------------------------------------------------------------------------------ loading
def epoch_images(loaded: list[LoadedBatch]) -> dict[str, torch.Tensor]:
    return {
        name: image
        for part in loaded
        if part.batch
        for name, image in zip(part.batch.ids, part.batch.images_BCHW, strict=True)
    }


def test_any_number_of_workers_and_threads_sees_the_same_images() -> None:
    data = training_data(Store(sizes(19)))
    with TrainingLoader(data, 6, num_threads=0) as loader:
        alone = list(loader.epoch(1))
    expected = epoch_images(alone)
    assert len(expected) == 19
    parts = []
    for rank in range(3):
        with TrainingLoader(data, 6, rank, 3, num_threads=2) as loader:
            parts.append(list(loader.epoch(1)))
    assert [len(part) for part in parts] == [4, 4, 4]
    seen = [epoch_images(part) for part in parts]
    assert sum(len(part) for part in seen) == 19
    for name, image in expected.items():
        assert any(name in part and torch.equal(part[name], image) for part in seen)
    for step in range(4):
        here = [part[step] for part in parts]
        assert len({p.global_size for p in here}) == 1
        assert sum(len(p.batch) for p in here if p.batch) == here[0].global_size
        assert len({p.batch.images_BCHW.shape[-1] for p in here if p.batch}) == 1
    # The short last batch has one image: two workers have nothing to do, and must know how large it is.
    assert [part[3].batch is None for part in parts] == [False, True, True]


def test_epochs_differ() -> None:
    data = training_data(Store(sizes(12)))
    with TrainingLoader(data, 4, num_threads=1) as loader:
        first, second = list(loader.epoch(0)), list(loader.epoch(1))
    assert any(
        not torch.equal(image, epoch_images(second)[name])
        for name, image in epoch_images(first).items()
        if image.shape == epoch_images(second)[name].shape
    )


def test_batch_types_and_padding() -> None:
    store = Store([(60, 60), (90, 118)])
    data = training_data(store)
    batch = data.load(data.plan(0, 2)[0], 0).batch
    assert batch is not None
    assert batch.images_BCHW.shape == (2, 1, 128, 128)
    assert batch.targets_BKHW.shape == (2, 1, 128, 128)
    assert (batch.images_BCHW.dtype, batch.targets_BKHW.dtype, batch.valid_BHW.dtype) == (
        torch.float32,
        torch.float32,
        torch.bool,
    )
    small = batch.ids.index("image0")
    assert not batch.valid_BHW[small, :32].any()  # beyond its own canvas of 64 px
    assert batch.valid_BHW[small].any()
    assert batch.targets_BKHW[small].sum() > 0
    zero = batch.images_BCHW[small][:, ~batch.valid_BHW[small]]
    assert zero.unique().numel() == 1
    assert zero.max() < 0


class LabelsTarget(ForegroundTarget):
    """The labels themselves."""

    def encode(self, labels_HW: np.ndarray) -> np.ndarray:
        return labels_HW[None].astype(np.float32)


def nuclei_of(join: float, world_size: int = 1, epoch: int = 0) -> dict[str, int]:
    """Nuclei of each training picture; of 12 clusters of two nuclei 8 are for training."""
    augmenter = Augmenter(AugmentConfig(scale=0, elastic_px=0, join=join))
    data = TrainingData(Clusters(12), tuple(range(8)), NormalizationConfig(), augmenter, LabelsTarget(), 256, 3)
    loaded = [
        data.load(planned, epoch, rank, world_size).batch
        for planned in data.plan(epoch, 4)
        for rank in range(world_size)
    ]
    return {
        id: np.unique(labels_SS[labels_SS > 0]).size
        for batch in loaded
        if batch is not None
        for id, labels_SS in zip(batch.ids, batch.targets_BKHW[:, 0].numpy(), strict=True)
    }


def test_joined_clusters_have_the_nuclei_of_both() -> None:
    assert set(nuclei_of(0.0).values()) == {2}
    assert max(nuclei_of(1.0).values()) == 4
    assert len(nuclei_of(1.0)) == 8
    half = list(nuclei_of(0.5).values())
    assert 0 < sum(num > 2 for num in half) < 8


def test_joining_depends_on_seed_epoch_and_index_alone() -> None:
    assert nuclei_of(0.5, world_size=3) == nuclei_of(0.5)
    assert nuclei_of(0.5, epoch=1) != nuclei_of(0.5)


@pytest.mark.parametrize("stride", [8, 32, 64])
def test_one_small_image_is_more_than_a_pixel_of_the_deepest_map(stride: int) -> None:
    config = Config().replaced(
        {"data.crop_px": 32, "data.synthetic.num_train": 4, "data.synthetic.mean_diameter_px": 70}
    )
    assert open_training_set(config, stride).training_data.canvas_px(0, 0) >= max(32, 2 * stride)


def test_only_training_clusters_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(Clusters, "__getitem__", lambda self, index: asked.append(index) or self.drawn[index])
    nuclei_of(1.0)
    assert len(asked) > 16
    assert set(asked) == set(range(8))


def test_an_exception_of_a_thread_reaches_the_caller() -> None:
    with (
        TrainingLoader(training_data(Store(sizes(12), broken=5)), 4, num_threads=2) as loader,
        pytest.raises(OSError, match="unreadable"),
    ):
        list(loader.epoch(0))


def test_a_loop_left_early_leaves_no_work_behind() -> None:
    with TrainingLoader(training_data(Store(sizes(40))), 4, num_threads=1) as loader:
        batches = loader.epoch(0)
        next(batches)
        batches.close()  # type: ignore[attr-defined]
        assert len(list(loader.epoch(0))) == loader.num_batches() == 10


def test_evaluation_takes_whole_images_of_like_size() -> None:
    shapes = sizes(30)
    batches = evaluation_batches(range(30), shapes, 8)
    assert sorted(i for batch in batches for i in batch) == list(range(30))
    assert batches == evaluation_batches(list(reversed(range(30))), shapes, 8)
    store = Store(shapes)
    images_BCHW = evaluation_images(store, batches[0], NormalizationConfig(), 32)
    assert images_BCHW.shape[2] % 32 == images_BCHW.shape[3] % 32 == 0
    assert images_BCHW.shape[:2] == (8, 1)
    for image_HW, index in zip(images_BCHW[:, 0].numpy(), batches[0], strict=True):
        rows, columns = shapes[index]
        expected = normalize(store[index].image_HWC, NormalizationConfig())[..., 0]
        np.testing.assert_array_equal(image_HW[:rows, :columns], expected)
        assert (image_HW[rows:] == expected[0, 0]).all()
        assert (image_HW[:, columns:] == expected[0, 0]).all()


def test_the_edge_of_an_image_is_no_outline_in_training_nor_in_evaluation() -> None:
    class Filled(Store):
        def __getitem__(self, index: int) -> Sample:
            return Sample(np.full((40, 50, 1), 90, np.uint8), np.ones((40, 50), np.int32))

    store, target = Filled([(40, 50)]), build_target(FullBorderConfig())
    data = TrainingData(store, (0,), NormalizationConfig(), Augmenter(AugmentConfig()), target, 128, 3, 32)
    [loaded] = TrainingLoader(data, 1, num_threads=0).epoch(1)
    assert loaded.batch is not None
    trained = loaded.batch.targets_BKHW[0][:, loaded.batch.valid_BHW[0]].numpy()
    scored = target.encode(store[0].labels_HW)
    for foreground, outline in (trained, scored):
        assert foreground.any()
        assert not outline.any()


def test_large_images_are_cropped_as_often_as_fills_them() -> None:
    shapes = [(64, 64), (200, 100), (10, 10)]
    assert repeated_by_area([0, 1, 2], shapes, 64) == (0, 1, 4, 7, 10, 13, 2)
    assert repeated_by_area([2], shapes, 64) == (2,)


def test_the_crops_of_one_image_differ() -> None:
    store = Store([(100, 120), (90, 80)])
    data = training_data(store, indices=(0, 2))
    assert data.canvas_px(2, 0) == data.canvas_px(0, 0)
    (planned,) = data.plan(0, 2)
    batch = data.load(planned, 0).batch
    assert batch is not None
    assert batch.ids == ("image0", "image0")
    assert not torch.equal(batch.images_BCHW[0], batch.images_BCHW[1])


def test_fields_are_cropped_by_area_if_asked_for() -> None:
    changes = {"data.synthetic.num_train": 12, "data.crop_px": 32}
    plain = open_training_set(Config().replaced(changes), 16)
    repeated = open_training_set(Config().replaced({**changes, "data.crops": "by_area"}), 16)
    assert plain.training_data.indices == plain.split.train == repeated.split.train
    assert len(repeated.training_data.indices) > 2 * len(plain.split.train)
