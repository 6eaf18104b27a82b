"""Encoding and decoding undo each other, and decoding closes the gaps that networks leave in borders."""

from __future__ import annotations

import pickle
import time

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from scipy import ndimage

from nuciseg.metrics import score_image
from nuciseg.targets import (
    DecodeConfig,
    FullBorderConfig,
    Target,
    TargetConfig,
    TouchingBorderConfig,
    build_target,
    decode_grids,
)
from nuciseg.targets.borders import _distance_to_zero

Labels = NDArray[np.int32]
AnyConfig = TouchingBorderConfig | FullBorderConfig
CONFIGS: list[AnyConfig] = [TouchingBorderConfig(), FullBorderConfig()]
both_targets = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.kind)


def draw_labels(seed: int, num_nuclei: int, size: int = 120) -> Labels:
    """Ellipses that overlap; each pixel belongs to the relatively nearest: neighbours touch directly."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    distances = np.full((num_nuclei + 1, size, size), 1.0)
    centres: list[NDArray[np.float64]] = []
    for i in range(num_nuclei):
        centre = rng.uniform(0.2 * size, 0.8 * size, 2)
        if any(np.hypot(*(centre - other)) < 24 for other in centres):
            continue
        centres.append(centre)
        radii, angle = rng.uniform(13, 18, 2), rng.uniform(0, np.pi)
        u = (x - centre[1]) * np.cos(angle) + (y - centre[0]) * np.sin(angle)
        v = (y - centre[0]) * np.cos(angle) - (x - centre[1]) * np.sin(angle)
        distances[i + 1] = np.hypot(u / radii[0], v / radii[1])
    return np.argmin(distances, axis=0).astype(np.int32)


def same_nuclei(predicted: Labels, true: Labels) -> bool:
    nothing = np.zeros(true.shape, bool)
    return score_image("", predicted, true, nothing, nothing).separated


@both_targets
@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), num_nuclei=st.integers(1, 6), width_px=st.integers(2, 5))
def test_decoding_returns_the_labels_up_to_the_border(
    config: AnyConfig, seed: int, num_nuclei: int, width_px: int
) -> None:
    target = build_target(config.model_copy(update={"width_px": width_px}))
    labels_HW = draw_labels(seed, num_nuclei)
    maps_KHW = target.encode(labels_HW)
    decoded = target.decode(maps_KHW)
    assert decoded.labels_HW.dtype == np.int32
    assert np.array_equal(decoded.labels_HW > 0, labels_HW > 0)  # regrown: nothing is lost to the border
    assert same_nuclei(decoded.labels_HW, labels_HW)
    away_from_border = maps_KHW[target.border_index] == 0
    pairs = set(zip(labels_HW[away_from_border], decoded.labels_HW[away_from_border], strict=True))
    assert len(pairs) == len(np.unique(labels_HW))  # one to one: every pixel off the border is right
    assert decoded.confidences_N.shape == (decoded.labels_HW.max(),)
    assert decoded.confidences_N == pytest.approx(1)


@pytest.mark.parametrize(("config", "expected_share"), [(CONFIGS[0], 0.95), (CONFIGS[1], 0.8)])
def test_gaps_in_a_border_are_closed(config: AnyConfig, expected_share: float) -> None:
    """Every line has a hole in its middle: nuclei are apart, and would not be if only closed borders separated."""
    target = build_target(config)
    only_closed = build_target(
        config.model_copy(update={"decode": config.decode.model_copy(update={"gap_closing": 0.0})})
    )
    separated = separated_without = clusters = 0
    for seed in range(50):
        labels_HW = draw_labels(seed, 4)
        maps_KHW = target.encode(labels_HW)
        line_HW = build_target(TouchingBorderConfig(width_px=4)).encode(labels_HW)[1]
        _, pieces_HW = cv2.connectedComponents(line_HW.astype(np.uint8))
        if pieces_HW.max() == 0:
            continue
        clusters += 1
        for piece in range(1, pieces_HW.max() + 1):
            rows, columns = np.nonzero(pieces_HW == piece)
            middle = np.argsort(np.hypot(rows - rows.mean(), columns - columns.mean()))[0]
            radius = max(3, len(rows) // 40)
            cv2.circle(maps_KHW[1], (int(columns[middle]), int(rows[middle])), radius, 0.0, -1)
        blurred_KHW = np.stack([cv2.GaussianBlur(m, (0, 0), 0.7) for m in maps_KHW])
        separated += same_nuclei(target.decode(blurred_KHW).labels_HW, labels_HW)
        separated_without += same_nuclei(only_closed.decode(blurred_KHW).labels_HW, labels_HW)
    assert clusters >= 20
    assert separated >= expected_share * clusters
    assert separated_without <= 0.3 * clusters


def test_a_rim_beyond_the_outline_is_no_nucleus() -> None:
    """Foreground that is predicted two pixels too wide lies outside the outline, cut off by it."""
    labels_HW = np.zeros((60, 100), np.int32)
    labels_HW[8:52, 8:50], labels_HW[8:52, 50:92] = 1, 2
    target = build_target(FullBorderConfig())
    maps_KHW = target.encode(labels_HW)
    maps_KHW[0] = cv2.dilate(maps_KHW[0], np.ones((5, 5), np.uint8))
    assert same_nuclei(target.decode(maps_KHW).labels_HW, labels_HW)
    keep_all = build_target(FullBorderConfig(decode=DecodeConfig(min_width_share=0)))
    assert keep_all.decode(maps_KHW).labels_HW.max() > 2


@both_targets
def test_a_bent_nucleus_is_not_cut(config: AnyConfig) -> None:
    canvas = np.zeros((90, 90), np.uint8)
    cv2.ellipse(canvas, (45, 60), (28, 28), 0.0, 190.0, 350.0, 1, 22)  # a bean of even thickness
    target = build_target(config)
    instances = target.decode(target.encode(canvas.astype(np.int32)))
    assert instances.labels_HW.max() == 1
    assert instances.confidences_N == pytest.approx(1)


@both_targets
def test_a_speck_alone_is_no_nucleus(config: AnyConfig) -> None:
    labels_HW = draw_labels(3, 4)
    target = build_target(config)
    maps_KHW = target.encode(labels_HW)
    maps_KHW[0, 112:116, 2:12] = 1  # 4 px wide, 40 px large: above min_area_px
    assert np.array_equal(target.decode(maps_KHW).labels_HW, target.decode(target.encode(labels_HW)).labels_HW)
    keep_all = build_target(config.model_copy(update={"decode": DecodeConfig(min_width_share=0)}))
    assert keep_all.decode(maps_KHW).labels_HW[113, 5] > 0


@both_targets
@pytest.mark.parametrize("faint", [0.0, 0.004])
def test_a_cluster_without_a_visible_border_is_divided_all_the_same(config: AnyConfig, faint: float) -> None:
    """Two disks that overlap: at the waist by shape alone, or where the border is faint by far."""
    y, x = np.mgrid[:80, :120]
    labels_HW = np.where(np.hypot(x - 42, y - 40) <= np.hypot(x - 78, y - 40), 1, 2)
    labels_HW[np.minimum(np.hypot(x - 42, y - 40), np.hypot(x - 78, y - 40)) > 30] = 0
    maps_KHW = np.stack([(labels_HW > 0).astype(np.float32), np.full(labels_HW.shape, 0.001, np.float32)])
    maps_KHW[1, build_target(TouchingBorderConfig()).encode(labels_HW.astype(np.int32))[1] > 0] += faint
    alone = build_target(config.model_copy(update={"decode": DecodeConfig(gap_closing=0)}))
    assert alone.decode(maps_KHW).labels_HW.max() == 1
    known = build_target(config.model_copy(update={"decode": DecodeConfig(gap_closing=0, min_nuclei=2)}))
    divided = known.decode(maps_KHW)
    assert np.array_equal(divided.labels_HW > 0, labels_HW > 0)
    assert same_nuclei(divided.labels_HW, labels_HW.astype(np.int32))
    assert np.mean(divided.labels_HW == np.where(divided.labels_HW[40, 30] == 1, labels_HW, 3 - labels_HW)) > 0.7
    assert max(divided.confidences_N) < 0.5  # a person should look
    empty = np.zeros_like(maps_KHW)
    assert known.decode(empty).labels_HW.max() == 0


@both_targets
def test_a_border_that_ends_within_a_nucleus_divides_it(config: AnyConfig) -> None:
    """Three nuclei in a row; the second border is drawn half-way only and then fades."""
    labels_HW = np.zeros((60, 150), np.int32)
    labels_HW[8:52, 8:53], labels_HW[8:52, 53:98], labels_HW[8:52, 98:142] = 1, 2, 3
    maps_KHW = np.stack([(labels_HW > 0).astype(np.float32), np.full(labels_HW.shape, 0.001, np.float32)])
    lines_HW = build_target(TouchingBorderConfig()).encode(labels_HW)[1] > 0
    maps_KHW[1, lines_HW] = 1
    maps_KHW[1, 30:, 90:106][lines_HW[30:, 90:106]] = 0.03

    def num_nuclei(border_share: float, maps_KHW: NDArray[np.float32] = maps_KHW) -> int:
        decode = DecodeConfig(gap_closing=0, border_share=border_share)
        target = build_target(config.model_copy(update={"decode": decode}))
        return int(target.decode(maps_KHW).labels_HW.max())

    assert num_nuclei(1.0) == 2
    assert num_nuclei(0.6) == 3
    assert num_nuclei(0.9) == 2
    maps_KHW[1, :, 90:106][lines_HW[:, 90:106]] = 0.03  # nowhere certain: no border ends there
    assert num_nuclei(0.6) == 2


@both_targets
def test_no_cut_leaves_a_part_below_the_smallest_area(config: AnyConfig) -> None:
    """Two nuclei and a bud of 836 px; the border of the bud is drawn half-way only."""
    labels_HW = np.zeros((60, 150), np.int32)
    labels_HW[8:52, 8:53], labels_HW[8:52, 53:98], labels_HW[8:52, 98:117] = 1, 2, 3
    maps_KHW = np.stack([(labels_HW > 0).astype(np.float32), np.full(labels_HW.shape, 0.001, np.float32)])
    maps_KHW[1, build_target(TouchingBorderConfig()).encode(labels_HW)[1] > 0] = 1
    maps_KHW[1, 30:, 90:106] *= 0.03

    def areas_px(min_area_px: int, min_nuclei: int = 1) -> list[int]:
        decode = DecodeConfig(gap_closing=0, border_share=0.6, min_area_px=min_area_px, min_nuclei=min_nuclei)
        target = build_target(config.model_copy(update={"decode": decode}))
        return sorted(np.bincount(target.decode(maps_KHW).labels_HW.ravel())[1:].tolist())

    assert areas_px(700)[0] == pytest.approx(836, rel=0.15)
    assert len(areas_px(700)) == 3
    assert len(areas_px(1200)) == 2
    assert len(areas_px(1200, min_nuclei=3)) == 3
    assert areas_px(1200, min_nuclei=3)[0] >= 1200


def test_a_hole_counts_for_no_part_of_a_cut() -> None:
    """A bud of 836 px with a hole of 400 px: its outline alone would be large enough."""
    labels_HW = np.zeros((60, 120), np.int32)
    labels_HW[8:52, 8:53], labels_HW[8:52, 53:72] = 1, 2
    maps_KHW = np.stack([(labels_HW > 0).astype(np.float32), np.full(labels_HW.shape, 0.001, np.float32)])
    maps_KHW[1, build_target(TouchingBorderConfig()).encode(labels_HW)[1] > 0] = 1
    maps_KHW[1, 30:] *= 0.03
    decode = DecodeConfig(gap_closing=0, border_share=0.6, min_area_px=600, min_width_share=0)
    target = build_target(TouchingBorderConfig(decode=decode))
    assert target.decode(maps_KHW).labels_HW.max() == 2
    maps_KHW[0, 15:45, 57:69] = 0
    assert target.decode(maps_KHW).labels_HW.max() == 1


def test_confidence_falls_with_the_gap() -> None:
    target = build_target(TouchingBorderConfig())
    labels_HW = np.zeros((50, 90), np.int32)
    labels_HW[5:45, 5:45], labels_HW[5:45, 45:85] = 1, 2
    confidences = []
    for gap_px in (0, 6, 14):
        maps_KHW = target.encode(labels_HW)
        maps_KHW[1, 25 : 25 + gap_px] = 0
        instances = target.decode(maps_KHW)
        assert same_nuclei(instances.labels_HW, labels_HW)
        confidences.append(float(instances.confidences_N.min()))
    assert confidences[0] == pytest.approx(1)
    assert confidences[0] > confidences[1] > confidences[2]


@pytest.mark.parametrize("width_px", [1, 2, 3, 4, 7])
def test_the_line_has_its_width_and_the_image_edge_is_no_border(width_px: int) -> None:
    labels_HW = np.zeros((40, 60), np.int32)
    labels_HW[:, :30], labels_HW[:, 30:50] = 1, 2
    touching_HW = build_target(TouchingBorderConfig(width_px=width_px)).encode(labels_HW)[1]
    full_HW = build_target(FullBorderConfig(width_px=width_px)).encode(labels_HW)[1]
    assert set(touching_HW.sum(axis=1)) == {width_px}
    assert abs(np.nonzero(touching_HW[20])[0].mean() - 29.5) <= 0.5
    assert set(full_HW.sum(axis=1)) == {2 * width_px}
    assert np.all(full_HW[:, 50 - width_px : 50] == 1)
    assert not full_HW[:, 50:].any()


@both_targets
def test_ignored_pixels_are_zero_and_no_outside(config: AnyConfig) -> None:
    labels_HW = np.ones((30, 30), np.int32)
    labels_HW[:, 20:] = -1
    maps_KHW = build_target(config).encode(labels_HW)
    assert maps_KHW.shape == (2, 30, 30)
    assert maps_KHW.dtype == np.float32
    assert np.all(maps_KHW[0, :, :20] == 1)
    assert not maps_KHW[0, :, 20:].any()
    assert not maps_KHW[1].any()


@both_targets
def test_ids_are_only_names(config: AnyConfig) -> None:
    """Also ids that fit no 16-bit integer, and any integer type."""
    target = build_target(config)
    labels_HW = draw_labels(3, 5)
    expected_KHW = target.encode(labels_HW)
    ids = np.array([0, 70_000, 65_535, 3, 131_071, 1], np.int32)
    assert np.array_equal(target.encode(ids[labels_HW]), expected_KHW)
    assert np.array_equal(target.encode(labels_HW.astype(np.uint16)), expected_KHW)


@both_targets
def test_nothing_and_specks_give_no_nuclei(config: AnyConfig) -> None:
    target = build_target(config)
    maps_KHW = np.zeros((2, 20, 20), np.float32)
    assert target.decode(maps_KHW).labels_HW.max() == 0
    assert target.decode(maps_KHW).confidences_N.shape == (0,)
    maps_KHW[0, 5:8, 5:8] = 1  # 9 px, below min_area_px
    assert target.decode(maps_KHW).labels_HW.max() == 0


def test_a_nucleus_hidden_by_its_outline_is_kept() -> None:
    labels_HW = np.zeros((30, 30), np.int32)
    labels_HW[4:10, 4:10], labels_HW[15:28, 15:28] = 1, 2
    target = build_target(FullBorderConfig(width_px=4))
    maps_KHW = target.encode(labels_HW)
    assert np.all(maps_KHW[1, 4:10, 4:10] == 1)
    assert same_nuclei(target.decode(maps_KHW).labels_HW, labels_HW)


@both_targets
def test_the_calibration_grid_changes_decoding_alone(config: AnyConfig) -> None:
    known = config.model_copy(update={"decode": DecodeConfig(min_nuclei=2, min_area_px=7)})
    (grid_of,) = decode_grids(known)
    grid = grid_of(known)
    assert len({len(row) for row in grid}) == 1
    candidates = [candidate for row in grid for candidate in row]
    assert 10 <= len(candidates) <= 30
    assert len({candidate.decode for candidate in candidates}) == len(candidates)
    assert all(candidate.model_copy(update={"decode": known.decode}) == known for candidate in candidates)
    assert all(candidate.decode.min_nuclei == 2 and candidate.decode.min_area_px == 7 for candidate in candidates)


def test_configuration_is_chosen_by_kind_and_checked() -> None:
    adapter: TypeAdapter[TouchingBorderConfig | FullBorderConfig] = TypeAdapter(TargetConfig)
    assert adapter.validate_python({"kind": "full_border", "decode": {"gap_closing": 0.4}}) == FullBorderConfig(
        decode=DecodeConfig(gap_closing=0.4)
    )
    for wrong in ({"kind": "inner_border"}, {"kind": "full_border", "width_px": 0}, {"kind": "full_border", "with": 3}):
        with pytest.raises(ValidationError):
            adapter.validate_python(wrong)


@pytest.mark.parametrize("soft_px", [0.0, 1.0, 3.0])
def test_a_soft_border_falls_to_nothing_on_both_sides(soft_px: float) -> None:
    labels_HW = np.zeros((40, 60), np.int32)
    labels_HW[:, 10:30], labels_HW[:, 30:50] = 1, 2
    row = build_target(TouchingBorderConfig(width_px=2, soft_px=soft_px)).encode(labels_HW)[1, 20]
    falling = [1 - distance / (soft_px + 1) for distance in range(1, int(soft_px) + 1)]
    assert row[29:31].tolist() == [1, 1]
    assert row[31 : 31 + len(falling) + 1] == pytest.approx([*falling, 0])
    assert row[28 - len(falling) : 29] == pytest.approx([0, *reversed(falling)])


@both_targets
def test_soft_and_smooth_borders_are_off_by_default_and_change_no_true_border(config: AnyConfig) -> None:
    y, x = np.mgrid[:60, :80]
    labels_HW = np.where(x < 40 + 4 * (y // 4 % 2), 1, 2).astype(np.int32)  # a jagged line
    labels_HW[:, :6], labels_HW[:4] = 0, -1
    plain = build_target(config)
    maps_KHW = plain.encode(labels_HW)
    assert set(np.unique(maps_KHW)) == {0, 1}
    assert np.array_equal(plain.border_of(labels_HW), maps_KHW[1] > 0)
    changed = build_target(config.model_copy(update={"soft_px": 4.0, "smooth_px": 6.0}))
    soft_KHW = changed.encode(labels_HW)
    assert np.array_equal(changed.border_of(labels_HW), plain.border_of(labels_HW))
    assert np.array_equal(soft_KHW[0], maps_KHW[0])
    assert 0 <= soft_KHW.min() < soft_KHW.max() == 1
    assert not soft_KHW[1, labels_HW < 0].any()
    only_soft = build_target(config.model_copy(update={"soft_px": 4.0})).encode(labels_HW)[1]
    assert np.all(only_soft[maps_KHW[1] > 0] == 1)
    assert np.any((only_soft > 0) & (only_soft < 1))
    assert np.any((soft_KHW[1] == 1) != (maps_KHW[1] == 1))  # the line has moved


@both_targets
def test_labels_without_any_border_are_not_softened(config: AnyConfig) -> None:
    target = build_target(config.model_copy(update={"soft_px": 4.0, "smooth_px": 4.0}))
    assert not target.encode(np.ones((20, 20), np.int32))[1].any()
    assert not target.encode(np.zeros((20, 20), np.int32)).any()


@both_targets
@settings(max_examples=20)
@given(seed=st.integers(0, 10**6), num_nuclei=st.integers(1, 6))
def test_soft_and_smooth_maps_decode_to_the_same_nuclei(config: AnyConfig, seed: int, num_nuclei: int) -> None:
    labels_HW = draw_labels(seed, num_nuclei)
    target = build_target(config.model_copy(update={"soft_px": 2.0, "smooth_px": 3.0}))
    assert same_nuclei(target.decode(target.encode(labels_HW)).labels_HW, labels_HW)


@both_targets
def test_target_is_small_to_send_and_quick(config: AnyConfig) -> None:
    target: Target = pickle.loads(pickle.dumps(build_target(config)))
    assert target == build_target(config)
    labels_HW = np.kron(np.arange(16).reshape(4, 4), np.ones((32, 32))).astype(np.int32)
    times_s = []
    for _ in range(20):
        start_s = time.perf_counter()
        target.encode(labels_HW)
        times_s.append(time.perf_counter() - start_s)
    assert min(times_s) < 0.002  # 0.1 ms on an idle core; footprints in scipy took 100 times as long


def test_distances_are_exact_so_that_decoding_is_the_same_each_time() -> None:
    """The last bit of OpenCV's distances depends on where an array lies in memory."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        mask_HW = ndimage.binary_dilation(rng.random((56, 25)) < 0.01, iterations=9)
        expected_HW = ndimage.distance_transform_edt(mask_HW).astype(np.float32)
        assert np.array_equal(_distance_to_zero(mask_HW), expected_HW)
