"""Foreground, border and depth: encoding, decoding by cores, and that a part of a field decodes as the whole does."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage
from skimage.morphology import reconstruction

from nuciseg.metrics import score_image
from nuciseg.targets import DecodeConfig, DepthConfig, build_target, decode_grids, depth

Labels = NDArray[np.int32]
TARGET = build_target(DepthConfig())


def draw_field(seed: int, num_nuclei: int, size: int = 128) -> Labels:
    """Up to `num_nuclei` ellipses of 8 to 40 px, many of which touch; none is covered by more than a tenth."""
    rng = np.random.default_rng(seed)
    rows_HW, columns_HW = np.mgrid[:size, :size]
    labels_HW = np.zeros((size, size), np.int32)
    for id in range(1, num_nuclei + 1):
        row, column = rng.uniform(20, size - 20, 2)
        half_height, half_width = rng.uniform(4, 20, 2)
        ellipse_HW = ((rows_HW - row) / half_height) ** 2 + ((columns_HW - column) / half_width) ** 2 <= 1
        if np.count_nonzero(ellipse_HW & (labels_HW > 0)) <= 0.1 * np.count_nonzero(ellipse_HW):
            labels_HW[ellipse_HW & (labels_HW == 0)] = id
    return labels_HW


def test_depth_rises_from_the_edge_to_one_in_every_nucleus_and_ends_between_two() -> None:
    labels_HW = np.zeros((40, 60), np.int32)
    labels_HW[5:35, 5:30], labels_HW[15:25, 30:40] = 1, 2
    depth_HW = TARGET.encode(labels_HW)[2]
    assert depth_HW[labels_HW == 1].max() == depth_HW[labels_HW == 2].max() == 1
    assert not depth_HW[labels_HW == 0].any()
    assert depth_HW[20, 28:31].tolist() == pytest.approx([2 / 12.5, 1 / 12.5, 1 / 5], abs=0.02)


def test_a_nucleus_that_the_image_cuts_goes_on_outside() -> None:
    labels_HW = np.zeros((40, 40), np.int32)
    labels_HW[10:30, :20] = 1
    assert TARGET.encode(labels_HW)[2][20, 0] == pytest.approx(1, abs=0.01)


def test_ignored_pixels_are_no_edge_and_taught_nothing() -> None:
    labels_HW = np.zeros((40, 40), np.int32)
    labels_HW[10:30, 20:], labels_HW[:, :20] = 1, -1
    maps_KHW = TARGET.encode(labels_HW)
    assert not maps_KHW[:, :, :20].any()
    assert maps_KHW[2, 20, 21] == pytest.approx(1, abs=0.01)


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), num_nuclei=st.integers(1, 12))
@example(seed=0, num_nuclei=7)  # a small nucleus beside a large one
def test_true_maps_give_the_nuclei_back(seed: int, num_nuclei: int) -> None:
    labels_HW = draw_field(seed, num_nuclei)
    maps_KHW = TARGET.encode(labels_HW)
    found_HW = build_target(DepthConfig(decode=DecodeConfig(core_rise=0.2))).decode(maps_KHW).labels_HW
    nothing_HW = np.zeros(labels_HW.shape, bool)
    scores = score_image("drawn", found_HW, labels_HW, nothing_HW, nothing_HW)
    assert scores.true_positives[0] == scores.num_true
    assert np.array_equal(found_HW > 0, labels_HW > 0)  # no pixel of foreground is lost


def test_no_border_is_needed() -> None:
    labels_HW = np.zeros((60, 90), np.int32)
    labels_HW[10:50, 10:45], labels_HW[10:50, 45:80] = 1, 2
    maps_KHW = TARGET.encode(labels_HW)
    maps_KHW[1] = 0
    maps_KHW[2] = ndimage.gaussian_filter(maps_KHW[2], 2)
    found_HW = TARGET.decode(maps_KHW).labels_HW
    assert found_HW.max() == 2
    assert np.mean((found_HW == found_HW[30, 20]) == (labels_HW == 1)) > 0.98


def test_a_nucleus_without_a_core_is_kept_and_a_speck_is_not() -> None:
    maps_KHW = np.zeros((3, 40, 40), np.float32)
    maps_KHW[0, 5:10, 5:10], maps_KHW[0, 30:32, 30:33] = 0.8, 0.9
    instances = TARGET.decode(maps_KHW)
    assert np.array_equal(instances.labels_HW > 0, maps_KHW[0] == np.float32(0.8))
    assert instances.confidences_N == pytest.approx([0.8])


def test_what_is_hardly_foreground_is_no_nucleus() -> None:
    maps_KHW = np.zeros((3, 40, 40), np.float32)
    maps_KHW[0, 5:15, 5:15], maps_KHW[0, 25:35, 25:35] = 0.8, 0.6
    for least, number in ((0.0, 2), (0.59, 2), (0.61, 1), (0.81, 0)):
        instances = build_target(DepthConfig(decode=DecodeConfig(min_confidence=least))).decode(maps_KHW)
        assert len(instances.confidences_N) == instances.labels_HW.max() == number


def test_tops_of_the_depth_are_two_nuclei_where_it_falls_far_enough_between_them() -> None:
    """Two nuclei whose depths do not fall below .6 anywhere between them."""
    columns_W = np.arange(60)
    maps_KHW = np.zeros((3, 30, 60), np.float32)
    maps_KHW[0, 5:25, 5:55] = 1
    maps_KHW[2] = maps_KHW[0] * np.interp(columns_W, [5, 17, 30, 43, 54], [0.1, 0.9, 0.6, 1.0, 0.1])
    for rise, number in ((0.25, 2), (0.35, 1)):
        found_HW = build_target(DepthConfig(decode=DecodeConfig(core_rise=rise))).decode(maps_KHW).labels_HW
        assert found_HW.max() == number
    halves_HW = build_target(DepthConfig(decode=DecodeConfig(core_rise=0.25))).decode(maps_KHW).labels_HW
    assert set(halves_HW[15, 5:29]) | set(halves_HW[15, 32:55]) == {1, 2}
    assert len(set(halves_HW[15, 5:29])) == len(set(halves_HW[15, 32:55])) == 1


def test_the_flood_is_scikit_images_reconstruction() -> None:
    """Up and down a path of more bends than the flood takes steps between two looks."""
    rng = np.random.default_rng(0)
    mask_HW = ndimage.gaussian_filter(rng.integers(0, 256, (90, 120)).astype(np.float32), 2).astype(np.uint8)
    mask_HW[::6, :-3], mask_HW[3::6, 3:] = 0, 0
    marker_HW = np.where(mask_HW > 20, mask_HW - 20, 0).astype(np.uint8)
    marker_HW[60:] = 0
    assert np.array_equal(depth._reconstructed(marker_HW, mask_HW), reconstruction(marker_HW, mask_HW))


def test_nuclei_grow_within_their_own_foreground_alone() -> None:
    maps_KHW = np.zeros((3, 40, 40), np.float32)
    maps_KHW[0, 2:38, 2:18], maps_KHW[2, 30:36, 6:14] = 1, 1  # a core far from most of its nucleus
    maps_KHW[0, 2:12, 19:30], maps_KHW[2, 4:10, 20:26] = 1, 1  # nearer to another nucleus' core
    found_HW = TARGET.decode(maps_KHW).labels_HW
    for part in (np.s_[2:38, 2:18], np.s_[2:12, 19:30]):
        assert len(np.unique(found_HW[part])) == 1
    assert found_HW.max() == 2


@settings(max_examples=20)
@given(seed=st.integers(0, 10**6))
def test_a_part_decodes_as_the_whole_does_where_it_holds_nuclei_whole(seed: int) -> None:
    labels_HW = draw_field(seed, 14, 160)
    maps_KHW = ndimage.gaussian_filter(TARGET.encode(labels_HW), (0, 1, 1))
    maps_KHW += np.random.default_rng(seed).normal(0, 0.05, maps_KHW.shape).astype(np.float32)
    part = np.s_[16:128, 24:150]
    regions_HW, _ = ndimage.label(maps_KHW[0] >= 0.5, np.ones((3, 3)))
    inner_HW = np.zeros(regions_HW.shape, bool)
    inner_HW[18:126, 26:148] = True
    edge = set(regions_HW[~inner_HW])
    whole_HW = ~np.isin(regions_HW, list(edge | {0}))[part]
    of_all_HW, of_part_HW = TARGET.decode(maps_KHW).labels_HW[part], TARGET.decode(maps_KHW[:, *part]).labels_HW
    pairs = set(zip(of_all_HW[whole_HW], of_part_HW[whole_HW], strict=True))
    assert len({a for a, _ in pairs}) == len({b for _, b in pairs}) == len(pairs)


def test_nothing_gives_nothing() -> None:
    instances = TARGET.decode(np.zeros((3, 32, 48), np.float32))
    assert instances.labels_HW.shape == (32, 48)
    assert not instances.labels_HW.any()
    assert instances.confidences_N.shape == (0,)
    assert TARGET.open_borders(np.zeros((3, 32, 48), np.float32)) is None


def test_calibration_changes_decoding_alone_step_by_step() -> None:
    best = DepthConfig(width_px=4)
    for grid_of in decode_grids(best):
        configs = [config for row in grid_of(best) for config in row]
        assert len(set(map(str, configs))) == len(configs) > 20
        assert {config.width_px for config in configs} == {4}
        best = configs[-1]
    assert (best.decode.foreground_threshold, best.decode.core_rise) == (0.55, 0.35), "the next step keeps them"


def test_a_target_names_the_settings_that_its_decoding_heeds() -> None:
    maps_KHW = ndimage.gaussian_filter(TARGET.encode(draw_field(3, 14)), (0, 1, 1))
    changed = {
        "foreground_threshold": 0.8, "border_threshold": 0.9, "core_rise": 0.9, "gap_closing": 0.0, "min_area_px": 400,
        "min_width_share": 0.9, "min_confidence": 0.95, "border_share": 0.1, "min_nuclei": 40,
    }  # fmt: skip
    assert changed.keys() == DecodeConfig.model_fields.keys()
    plain_HW = TARGET.decode(maps_KHW).labels_HW
    heeded = {
        key
        for key, value in changed.items()
        if not np.array_equal(
            build_target(DepthConfig(decode=DecodeConfig(**{key: value}))).decode(maps_KHW).labels_HW, plain_HW
        )
    }
    assert heeded == set(TARGET.decoded_by)
