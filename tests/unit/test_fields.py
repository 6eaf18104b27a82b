"""Fields are predicted window by window: the same nuclei as at once, each reported once, at the image's resolution."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawn_fields import draw_discs, hand_made_network
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from skimage.measure import label

from nuciseg.engine import fields
from nuciseg.engine.fields import OVERLAP, TILE_PX, ArrayPixels, Grid, assembled, find_nuclei
from nuciseg.engine.nucleus_size import estimated_diameter, known_sizes, scale_for
from nuciseg.engine.prediction import loaded_predictor
from nuciseg.images import read_image
from nuciseg.labels import median_diameter
from nuciseg.metrics import score_image
from nuciseg.types import Diameters, Instances

NETWORK = hand_made_network()
KNOWN = Diameters(10.0, 20.0, 40.0)


def found(image_HW: NDArray[np.generic], grid: Grid | None = None) -> Instances:
    return assembled(find_nuclei(NETWORK, ArrayPixels(image_HW), grid), (image_HW.shape[0], image_HW.shape[1]))


def same_partition(a_HW: NDArray[np.int32], b_HW: NDArray[np.int32]) -> bool:
    pairs = np.unique(np.stack([a_HW.ravel(), b_HW.ravel()]), axis=1)
    return len(pairs[0]) == len(np.unique(a_HW)) == len(np.unique(b_HW))


def num_matched(labels_HW: NDArray[np.int32], true_HW: NDArray[np.int32], percent_index: int = 0) -> int:
    nothing_HW = np.zeros(true_HW.shape, bool)
    return score_image("drawn", labels_HW, true_HW, nothing_HW, nothing_HW).true_positives[percent_index]


@pytest.mark.parametrize(("diameter_px", "least_gap"), [(14, 1.1), (30, 0.8)])
def test_a_tiled_image_has_the_nuclei_of_an_untiled_one(diameter_px: float, least_gap: float) -> None:
    image_HW, _ = draw_discs((700, 820), diameter_px, least_gap=least_gap)
    whole, tiled = found(image_HW), found(image_HW, Grid.at(1.0, 256))
    assert len(whole.confidences_N) > 100
    assert same_partition(whole.labels_HW, tiled.labels_HW)
    assert sorted(whole.confidences_N) == pytest.approx(sorted(tiled.confidences_N))


def test_each_nucleus_is_reported_once_and_whole() -> None:
    image_HW, labels_HW = draw_discs((600, 600), 25)
    windows = list(find_nuclei(NETWORK, ArrayPixels(image_HW), Grid.at(1.0, 256)))
    ids = np.concatenate([window.ids_N[window.ids_N > 0] for window in windows])
    assert ids.tolist() == list(range(1, labels_HW.max() + 1))
    for window in windows:
        top, left = window.top_px, window.left_px
        assert np.array_equal(
            window.image_HW, image_HW[top : top + window.image_HW.shape[0], left : left + window.image_HW.shape[1]]
        )
        bottom, right = top + window.labels_HW.shape[0], left + window.labels_HW.shape[1]
        cut = set()
        for at_edge, edge in ((top > 0, 0), (bottom < 600, -1)):
            cut |= set(window.labels_HW[edge]) if at_edge else set()
        for at_edge, edge in ((left > 0, 0), (right < 600, -1)):
            cut |= set(window.labels_HW[:, edge]) if at_edge else set()
        assert not any(window.ids_N[label - 1] for label in cut if label)


@pytest.mark.parametrize(("diameter_px", "scale"), [(60, 1 / 3), (110, 0.21), (7, 3.0), (11, 1.7)])
@pytest.mark.parametrize("network_px", [256, 2048])
def test_labels_come_back_at_the_resolution_of_the_image(diameter_px: float, scale: float, network_px: int) -> None:
    side = int(14 * diameter_px)
    image_HW, labels_HW = draw_discs((side, side + 13), diameter_px, least_gap=1.5, share=0.2)
    instances = found(image_HW, Grid.at(scale, network_px))
    assert instances.labels_HW.shape == image_HW.shape
    large = np.bincount(labels_HW.ravel())[1:] > 0.2 * np.pi * diameter_px**2 / 4  # not cut off by the image's edge
    assert num_matched(instances.labels_HW, labels_HW) >= np.count_nonzero(large)
    assert num_matched(instances.labels_HW, labels_HW, percent_index=4) >= 0.9 * np.count_nonzero(large)  # IoU >= .7


def test_a_nucleus_that_was_reduced_takes_no_rejected_foreground_beside_it() -> None:
    labels_HW = np.zeros((14, 14), np.int32)
    labels_HW[4:11, 3:11] = 1
    foreground_HW = np.where(labels_HW > 0, 1, 0.2).astype(np.float32)
    foreground_HW[2:5, 5:8] = np.array([1, 0.4, 0.6])[:, None]  # too small a region to be a nucleus, a gap, the edge
    found_HW = fields._at_image_resolution(labels_HW, foreground_HW, 0.5, Grid(1024, 256), (56, 56))
    assert label(found_HW, connectivity=2).max() == found_HW.max() == 1
    assert not found_HW[:14].any()
    assert found_HW[18:42, 14:42].all()


def test_the_outline_of_a_nucleus_that_was_reduced_is_its_own() -> None:
    """Not that of a neighbour, whose number is higher."""
    labels_HW = np.zeros((12, 12), np.int32)
    labels_HW[3:9, 2:6] = 1
    labels_HW[2:9, 6:10] = 2
    foreground_HW = (labels_HW > 0).astype(np.float32)
    foreground_HW[2, 2:6] = 0.4
    found_HW = fields._at_image_resolution(labels_HW, foreground_HW, 0.5, Grid(2048, 256), (96, 96))
    assert found_HW[21:24, 20:44].all(), "beyond the last whole pixel"
    assert set(np.unique(found_HW[:, :44])) == {0, 1}


@given(scale=st.floats(0.05, 8.0), network_px=st.sampled_from([256, 512, 1024]), length=st.integers(1, 5000))
def test_tiles_begin_on_whole_pixels_at_both_resolutions(scale: float, network_px: int, length: int) -> None:
    grid = Grid.at(scale, network_px)
    assert grid.tile_px % OVERLAP == 0
    assert grid.scale == pytest.approx(scale, rel=0.35)
    spans = grid.spans(length)
    assert spans[0].start_px == 0
    assert spans[-1].stop_px == length
    for span in spans:
        assert span.start_px * grid.network_px % grid.tile_px == 0
        assert span.start_px <= span.index * grid.tile_px < span.stop_px
        assert span.seen_px >= (span.stop_px - span.start_px) * grid.scale - 1e-6
    points = np.arange(span.seen_px)
    owned = [
        span.owns(points - span.start_px * grid.network_px // grid.tile_px, np.ones_like(points)) for span in spans
    ]
    assert (np.sum(owned, axis=0) == 1).all()


@pytest.mark.parametrize("shape", [(1, 1), (10, 3000), (3000, 10), (17, 40)])
def test_images_of_any_shape(shape: tuple[int, int]) -> None:
    image_HW = np.random.default_rng(0).integers(0, 5000, shape).astype(np.uint16)
    assert found(image_HW).labels_HW.shape == shape


@pytest.mark.parametrize("value", [0, 7, 65535])
def test_an_image_of_one_value_has_no_nuclei(value: int) -> None:
    instances = found(np.full((64, 80), value, np.uint16))
    assert not instances.labels_HW.any()
    assert instances.confidences_N.shape == (0,)


@pytest.mark.parametrize(("shape", "scale"), [((128, 128), 0.02), ((40, 3000), 0.005), ((300, 200), 0.1)])
def test_a_small_image_is_not_filled_up_to_many_times_its_size(shape: tuple[int, int], scale: float) -> None:
    grid = Grid.at(scale, 256)
    assert max(shape) < grid.rim_px
    rows_HW, columns_HW = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
    seen_HW = fields._rescaled(rows_HW + columns_HW, grid)
    height, width = (int(np.ceil(length * grid.scale - 1e-9)) for length in shape)
    assert seen_HW.shape == (height, width)
    middles_H, middles_W = ((np.arange(length) + 0.5) / grid.scale - 0.5 for length in (height, width))
    expected_HW = middles_H[:, None] + middles_W
    inside = np.s_[: height - 1, : width - 1]  # beyond, the image ends
    assert seen_HW[inside] == pytest.approx(expected_HW[inside], abs=2)


@dataclass
class Slide:
    """An image of 20,000 x 20,000 pixels that repeats one of 500 x 500, and remembers how much of it was asked for."""

    tile_HW: NDArray[np.uint16]
    shape: tuple[int, int] = (20_000, 20_000)
    asked_px: list[int] = field(default_factory=list)

    def read(self, top: int, left: int, height: int, width: int) -> NDArray[np.uint16]:
        self.asked_px.append(height * width)
        rows, columns = np.arange(top, top + height) % 500, np.arange(left, left + width) % 500
        return self.tile_HW[rows[:, None], columns]


def test_a_slide_is_never_read_whole() -> None:
    slide = Slide(draw_discs((500, 500), 20)[0])
    windows = find_nuclei(NETWORK, slide)
    for _ in range(3):
        next(windows)
    assert max(slide.asked_px) <= 2560**2
    assert sum(slide.asked_px) < 4.5e7


def test_nuclei_between_the_sampled_windows_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mosaic, padded with zeros around a small piece of tissue; the limits are those of a small image here."""
    monkeypatch.setattr(fields, "BOUNDS_SAMPLE_PX", 64**2)
    monkeypatch.setattr(fields, "_SAMPLE_SIDE_PX", 16)
    monkeypatch.setattr("nuciseg.engine.nucleus_size.SAMPLE_PX", 200)
    tissue_HW, labels_HW = draw_discs((180, 180), 60, least_gap=1.1)
    mosaic_HW = np.zeros((1500, 1600), np.uint16)
    mosaic_HW[210:390, 215:395] = tissue_HW
    bounds = fields.bounds_of(ArrayPixels(mosaic_HW), NETWORK)
    assert bounds is not None
    assert bounds[0] < tissue_HW.min() + 1
    assert bounds[1] == pytest.approx(tissue_HW.max(), rel=0.05)
    estimate = estimated_diameter(NETWORK, ArrayPixels(mosaic_HW), KNOWN)
    assert estimate == pytest.approx(median_diameter(labels_HW), rel=0.3)
    grid = Grid.at(scale_for(60, KNOWN), 256)
    assert num_matched(found(mosaic_HW, grid).labels_HW[210:390, 215:395], labels_HW) == labels_HW.max()


@pytest.mark.parametrize("diameter_px", [5, 8, 15, 30, 70, 140])
def test_the_size_of_nuclei_is_estimated(diameter_px: float) -> None:
    side = int(max(400, 8 * diameter_px))
    image_HW, labels_HW = draw_discs((side, side), diameter_px, least_gap=0.95)
    estimate = estimated_diameter(NETWORK, ArrayPixels(image_HW), KNOWN)
    assert estimate is not None
    assert 1 / 1.4 < estimate / median_diameter(labels_HW) < 1.4
    if not 8 < diameter_px < 50:
        seen_px = diameter_px * scale_for(estimate, KNOWN)
        assert KNOWN.low_px <= seen_px <= KNOWN.high_px


def test_without_nuclei_there_is_no_size() -> None:
    assert estimated_diameter(NETWORK, ArrayPixels(np.zeros((100, 100), np.uint8)), KNOWN) is None
    assert median_diameter(np.zeros((5, 5), np.int32)) is None


def test_sizes_within_what_the_network_knows_are_not_rescaled() -> None:
    assert scale_for(10, KNOWN) == scale_for(40, KNOWN) == 1
    assert scale_for(80, KNOWN) == pytest.approx(0.25)
    assert scale_for(5, KNOWN) == pytest.approx(4)
    wider = known_sizes(KNOWN, NETWORK.config.augment.model_copy(update={"scale": 0.44}))
    assert (wider.low_px, wider.typical_px, wider.high_px) == pytest.approx((10 / 1.2, 20, 40))


@settings(max_examples=5)
@given(seed=st.integers(0, 1000))
def test_windows_do_not_depend_on_the_type_of_the_pixels(seed: int) -> None:
    image_HW, _ = draw_discs((300, 300), 20, seed=seed)
    assert same_partition(found(image_HW).labels_HW, found(image_HW.astype(np.float32)).labels_HW)


def test_a_nucleus_of_which_nothing_is_left_is_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    image_HW, _ = draw_discs((120, 120), 14, least_gap=1.5, share=0.2)
    num_nuclei = len(found(image_HW, Grid.at(2.0, 256)).confidences_N)
    shrink = fields._at_image_resolution

    def without_the_third(labels_HW: NDArray[np.int32], *others: Any) -> NDArray[np.int32]:
        return shrink(np.where(labels_HW == 3, 0, labels_HW), *others)

    monkeypatch.setattr(fields, "_at_image_resolution", without_the_third)
    instances = found(image_HW, Grid.at(2.0, 256))
    assert np.unique(instances.labels_HW).tolist() == list(range(num_nuclei))
    assert len(instances.confidences_N) == num_nuclei - 1


@pytest.mark.slow
def test_the_shipped_network_finds_the_same_nuclei_in_tiles(dsb2018_root: Path) -> None:
    """A mosaic of real fields, as one window and in two tiles of the default size: identical to the pixel."""
    predictor = loaded_predictor(Path("nuciseg/fields"))
    fields = [read_image(path) for path in sorted((dsb2018_root / "train" / "images").iterdir())]
    fields = [image_HW for image_HW in fields if image_HW.shape == (520, 696)][:12]
    mosaic_HW = np.vstack([np.hstack(fields[start : start + 4]) for start in (0, 4, 8)])
    whole, tiled = (
        assembled(find_nuclei(predictor.network, ArrayPixels(mosaic_HW), Grid.at(1.0, side)), mosaic_HW.shape[:2])
        for side in (3072, TILE_PX)
    )
    assert len(whole.confidences_N) > 1000
    assert same_partition(whole.labels_HW, tiled.labels_HW)
