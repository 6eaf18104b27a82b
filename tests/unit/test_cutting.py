"""Clusters cut out of labelled fields: which nuclei are one cluster, how they are drawn, what is left out and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from nuciseg.data.cutting import CutSettings, LeftOut, cluster_numbers, cut_field, median_diameter_px, reads_back
from nuciseg.data.formats import labels
from nuciseg.data.formats.nucleus import labels_from_solution
from nuciseg.data.synthetic import SyntheticConfig, cluster_seed, draw_field, outer_border, solution_border
from nuciseg.types import Sample

DRAWING = SyntheticConfig(mean_diameter_px=32.0)
DRAWN = CutSettings()
RAW = CutSettings(marking="none")


def drawn_field(seed: int) -> Sample:
    return draw_field(DRAWING, cluster_seed(DRAWING, "train", seed), 256, 256)


def disks(*places: tuple[int, int], radius: int = 12, shape: tuple[int, int] = (100, 140)) -> Sample:
    """A field of bright disks at (x, y) on grey background; of two that overlap the later one is on top."""
    labels_HW = np.zeros(shape, np.int32)
    for label, place in enumerate(places, start=1):
        cv2.circle(labels_HW, place, radius, label, -1)
    image_HW = np.where(labels_HW > 0, 100 + labels_HW, 20).astype(np.uint8)
    return Sample(image_HW[..., None], labels_HW)


PAIR = ((40, 50), (60, 50))


def iou(first: np.ndarray, second: np.ndarray) -> float:
    return float((first & second).sum() / (first | second).sum())


# ----------------------------------------------------------------------------------------- which nuclei belong together
def test_nuclei_that_touch_are_one_cluster_diagonally_too() -> None:
    labels_HW = np.zeros((8, 12), np.int32)
    labels_HW[0:2, 0:2], labels_HW[2:4, 2:4], labels_HW[0:2, 4:6] = 1, 2, 3  # 1 and 2, 2 and 3 meet at a corner
    labels_HW[6:8, 0:2], labels_HW[6:8, 2:4], labels_HW[6:8, 8:10] = 4, 5, 6
    first, second, third, fourth, fifth, sixth = cluster_numbers(labels_HW)[1:]
    assert first == second == third
    assert fourth == fifth
    assert len({first, fourth, sixth}) == 3
    assert cluster_numbers(labels_HW)[0] == 0


@pytest.mark.parametrize("background_px", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("is_upright", [False, True])
def test_the_gap_is_the_number_of_background_pixels_between(background_px: int, is_upright: bool) -> None:
    labels_HW = np.zeros((5, 20), np.int32)
    labels_HW[:, 2:5] = 1
    labels_HW[:, 5 + background_px : 9 + background_px] = 2
    if is_upright:
        labels_HW = labels_HW.T.copy()
    assert cluster_numbers(labels_HW, background_px)[1:].tolist() == [1, 1]
    assert cluster_numbers(labels_HW, background_px - 0.5)[1:].tolist() == [1, 2]


def test_a_field_without_nuclei_has_no_clusters() -> None:
    empty = Sample(np.ones((40, 40, 1), np.uint8), np.zeros((40, 40), np.int32))
    for gap_px in (0.0, 3.0):
        cuts = cut_field(empty, replace(DRAWN, gap_px=gap_px))
        assert cuts.clusters == []
        assert not cuts.left_out
    assert median_diameter_px([empty]) is None


# --------------------------------------------------------------------------------------------------- how they are drawn
@pytest.mark.parametrize("settings", [DRAWN, RAW, replace(DRAWN, scale=2.2), replace(RAW, scale=0.8)])
def test_what_is_written_reads_back_as_the_same_nuclei(settings: CutSettings) -> None:
    num_clusters = 0
    for seed in range(4):
        for cluster in cut_field(drawn_field(seed), settings).clusters:
            num_clusters += 1
            solution_HW = solution_border(cluster.labels_HW).astype(np.uint8) * 255
            read_HW = labels_from_solution(cluster.image_HWC[..., 0], solution_HW)
            assert read_HW.max() == cluster.labels_HW.max() >= 2
            for label in range(1, cluster.labels_HW.max() + 1):
                own_HW = cluster.labels_HW == label
                there_HW = read_HW == np.bincount(read_HW[own_HW]).argmax()
                assert iou(own_HW, there_HW) >= 0.9
    assert num_clusters >= 8


def test_the_light_of_8_bit_stays_and_only_the_line_is_255() -> None:
    field = disks(*PAIR)
    field.image_HWC[48:52, 36:40] = 255  # saturated in the middle of a nucleus
    (cluster,), (raw,) = cut_field(field, DRAWN).clusters, cut_field(field, RAW).clusters
    rows, columns = slice(38, 63), slice(28, 73)  # tightly around both
    inside_HW = field.labels_HW[rows, columns] > 0
    line_HW = outer_border(cluster.labels_HW)
    expected_HW = np.where(inside_HW, np.minimum(field.image_HWC[rows, columns, 0], 254), 0)
    margin = (raw.labels_HW.shape[0] - 25) // 2  # padded to what every network takes
    assert raw.labels_HW.shape == (32, 45)
    np.testing.assert_array_equal(raw.image_HWC[margin : margin + 25, :, 0], expected_HW)
    assert not raw.image_HWC[:margin].any()
    np.testing.assert_array_equal(cluster.image_HWC[..., 0] == 255, line_HW)
    np.testing.assert_array_equal(cluster.image_HWC[~line_HW], raw.image_HWC[~line_HW])


def test_16_bit_is_stretched_to_all_of_8_bit() -> None:
    eight = drawn_field(0)
    wide = Sample(eight.image_HWC.astype(np.uint16) * 40 + 3000, eight.labels_HW)
    narrow = Sample(eight.image_HWC.astype(np.uint16) + 3000, eight.labels_HW)
    for field in (wide, narrow):
        for cluster, like in zip(cut_field(field, RAW).clusters, cut_field(eight, RAW).clusters, strict=True):
            assert cluster.image_HWC.dtype == np.uint8
            inside = cluster.labels_HW > 0
            values, light = cluster.image_HWC[inside, 0], like.image_HWC[inside, 0]
            assert (values.min(), values.max()) == (1, 254)
            assert np.corrcoef(values, light)[0, 1] > 0.99
            assert not cluster.image_HWC[~inside].any()


def test_only_the_cluster_is_seen() -> None:
    """A single nucleus within the box of a cluster that curves around it is not cut out with it."""
    ring = [(30, 30), (50, 30), (70, 30), (30, 50), (30, 70)]
    field = disks(*ring, (62, 62), radius=11)
    (cluster,) = cut_field(field, DRAWN).clusters
    assert cluster.labels_HW.max() == 5
    assert not cluster.image_HWC[62 - 19, 62 - 19]


@pytest.mark.parametrize("scale", [0.6, 1.7, 3.0])
def test_resizing_keeps_light_and_shapes(scale: float) -> None:
    field = disks((40, 50), (70, 50), radius=18)
    (cluster,) = cut_field(field, replace(RAW, scale=scale)).clusters
    for label in (1, 2):
        own_HW = cluster.labels_HW == label
        assert own_HW.sum() == pytest.approx(scale**2 * (field.labels_HW == label).sum(), rel=0.06)
        assert np.median(cluster.image_HWC[own_HW]) == 100 + label
    (contour,), _ = cv2.findContours(
        (cluster.labels_HW == 2).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE
    )
    outline_px = cv2.arcLength(contour, closed=True)
    assert outline_px < 1.2 * 2 * np.pi * 18 * scale, "stairs of whole field pixels would make it longer"


def test_pixels_that_were_missed_inside_a_cluster_belong_to_it() -> None:
    field = disks((40, 50), (70, 50), radius=18)
    field.labels_HW[50, 75] = 0
    (cluster,) = cut_field(field, DRAWN).clusters
    np.testing.assert_array_equal(cluster.image_HWC[..., 0] == 255, outer_border(cluster.labels_HW))
    assert cv2.connectedComponents((cluster.image_HWC[..., 0] == 255).astype(np.uint8))[0] == 2, "no ring within"


# ----------------------------------------------------------------------------------------------------- what is left out
def left_out(field: Sample, settings: CutSettings = DRAWN) -> Counter[LeftOut]:
    cuts = cut_field(field, settings)
    assert not cuts.clusters
    return cuts.left_out


def test_single_nuclei_and_too_many() -> None:
    assert left_out(disks((40, 50), (90, 50))) == {LeftOut.FEW: 2}
    assert left_out(disks(*PAIR), replace(DRAWN, min_nuclei=3)) == {LeftOut.FEW: 1}
    assert left_out(disks(*PAIR, (80, 50)), replace(DRAWN, max_nuclei=2)) == {LeftOut.MANY: 1}
    assert len(cut_field(disks((40, 50)), replace(DRAWN, min_nuclei=1)).clusters) == 1


@pytest.mark.parametrize("places", [((11, 50), (31, 50)), ((40, 88), (60, 88)), ((128, 50), (108, 50))])
def test_clusters_that_the_edge_cuts(places: tuple[tuple[int, int], ...]) -> None:
    assert left_out(disks(*places)) == {LeftOut.EDGE: 1}
    (kept,) = cut_field(disks(*places), replace(DRAWN, keep_edge=True)).clusters
    assert kept.labels_HW.max() == 2


def test_clusters_beside_ignored_pixels() -> None:
    field = disks(*PAIR, (110, 50), (110, 70))
    field.labels_HW[36, 60] = -1  # 2 px above a nucleus
    assert len(cut_field(field, DRAWN).clusters) == 2
    field.labels_HW[37, 60] = -1
    cuts = cut_field(field, DRAWN)
    assert cuts.left_out == {LeftOut.IGNORED: 1}
    assert len(cuts.clusters) == 1


def test_small_nuclei_and_long_sides() -> None:
    area_px = int(np.bincount(disks(*PAIR).labels_HW.ravel())[1:].min())
    assert left_out(disks(*PAIR), replace(DRAWN, min_area_px=area_px + 1)) == {LeftOut.SMALL: 1}
    assert len(cut_field(disks(*PAIR), replace(DRAWN, min_area_px=area_px)).clusters) == 1
    assert left_out(disks(*PAIR), replace(DRAWN, max_side_px=44)) == {LeftOut.LARGE: 1}
    assert left_out(disks(*PAIR), replace(DRAWN, max_side_px=45, scale=2)) == {LeftOut.LARGE: 1}
    assert len(cut_field(disks(*PAIR), replace(DRAWN, max_side_px=45)).clusters) == 1


def test_nuclei_that_the_line_would_hide_are_left_out_until_they_are_enlarged() -> None:
    tiny = disks((40, 50), (46, 50), radius=3)
    assert left_out(tiny) == {LeftOut.NARROW: 1}
    assert len(cut_field(tiny, replace(DRAWN, scale=5)).clusters) == 1


def test_one_nucleus_that_would_read_back_as_two_is_noticed() -> None:
    dumbbell = disks((30, 50), (60, 50), (80, 50))
    dumbbell.labels_HW[48:53, 30:60] = 1
    dumbbell.labels_HW[dumbbell.labels_HW == 2] = 1  # 1 is both disks and a waist that the line fills
    dumbbell.labels_HW[dumbbell.labels_HW == 3] = 2
    assert left_out(dumbbell) == {LeftOut.NARROW: 1}
    cv2.circle(dumbbell.labels_HW, (80, 50), 12, 0, -1)
    cv2.circle(dumbbell.labels_HW, (68, 50), 2, 2, -1)  # the line hides it: two are read, but others
    assert left_out(dumbbell) == {LeftOut.NARROW: 1}
    (pair,) = cut_field(disks(*PAIR), DRAWN).clusters
    assert reads_back(pair, 2)
    assert not reads_back(pair, 3), "one was lost when it was resized"


# ------------------------------------------------------------------------------------------------------------ measuring
def test_the_median_diameter_leaves_out_what_the_edge_cuts() -> None:
    field = disks((40, 50), (90, 50), radius=20, shape=(100, 160))
    cv2.circle(field.labels_HW, (0, 0), 30, 3, -1)
    cv2.circle(field.labels_HW, (159, 99), 30, 4, -1)
    assert median_diameter_px([field]) == pytest.approx(40, abs=1.5)


def test_real_fields_are_cut_where_their_nuclei_touch(dsb2018_root: Path) -> None:
    fields = [labels.load(record) for record in labels.read(dsb2018_root, "test")[:20]]
    settings = replace(DRAWN, scale=3.0)
    cuts = [cut_field(field, settings) for field in fields]
    num_clusters = sum(len(each.clusters) for each in cuts)
    left_out = sum((each.left_out for each in cuts), Counter[LeftOut]())
    assert num_clusters > 50
    assert left_out[LeftOut.NARROW] < 0.1 * num_clusters
    assert num_clusters + left_out.total() == sum(
        int(cluster_numbers(np.maximum(field.labels_HW, 0)).max()) for field in fields
    )
