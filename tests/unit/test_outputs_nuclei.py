"""What is measured of nuclei, held against scikit-image, and their outlines, filled again."""

from __future__ import annotations

import time

import numpy as np
import pytest
from predicted_windows import PITCH_PX, draw
from skimage.draw import polygon2mask
from skimage.measure import regionprops_table

from nuciseg.outputs.nuclei import COLUMNS, ReportedNuclei, count_neighbours, trace_outline
from nuciseg.types import Window


def _filled(corners_P2: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The pixels whose middle, half a pixel from its corners, lies within."""
    return np.asarray(polygon2mask(shape, corners_P2[:, ::-1] - 0.5))


def _measured(labels_HW: np.ndarray, image_HW: np.ndarray | None = None, **window: object) -> list[dict]:
    num_nuclei = int(labels_HW.max())
    image_HW = np.ones(labels_HW.shape, np.uint8) if image_HW is None else image_HW
    values = {
        "top_px": 0,
        "left_px": 0,
        "ids_N": np.arange(1, num_nuclei + 1),
        "confidences_N": np.ones(num_nuclei, np.float32),
        **window,
    }
    shape = (values["top_px"] + labels_HW.shape[0], values["left_px"] + labels_HW.shape[1])
    return ReportedNuclei(Window(image_HW=image_HW, labels_HW=labels_HW, **values), shape, None).measurements


def test_figures_are_those_of_scikit_image() -> None:
    drawn = draw()
    names = ("label", "area", "centroid", "equivalent_diameter_area", "eccentricity", "solidity", "intensity_mean")
    expected = regionprops_table(drawn.labels_HW, drawn.image_HW, properties=names)
    found = ReportedNuclei(drawn.whole(), drawn.labels_HW.shape, None).measurements
    assert all(tuple(row) == COLUMNS for row in found)
    for column, name in (
        ("label", "label"),
        ("area_px", "area"),
        ("centroid_row_px", "centroid-0"),
        ("centroid_column_px", "centroid-1"),
        ("diameter_px", "equivalent_diameter_area"),
        ("eccentricity", "eccentricity"),
        ("mean_intensity", "intensity_mean"),
    ):
        np.testing.assert_allclose([row[column] for row in found], expected[name], rtol=1e-6, err_msg=column)
    np.testing.assert_allclose([row["solidity"] for row in found], expected["solidity"], atol=0.02)
    integrated = expected["intensity_mean"] * expected["area"]
    np.testing.assert_array_equal([row["integrated_intensity"] for row in found], np.rint(integrated))
    np.testing.assert_allclose([row["confidence"] for row in found], 1 / (1 + expected["label"]), rtol=1e-6)


def test_solidity_tells_a_notched_nucleus_from_a_whole_one() -> None:
    labels_HW = np.zeros((40, 90), np.int32)
    labels_HW[5:35, 5:35] = 1
    labels_HW[5:35, 45:75] = 2
    labels_HW[5:20, 50:70] = 0
    whole, notched = _measured(labels_HW)
    assert whole["solidity"] == 1
    assert notched["solidity"] == pytest.approx((30 * 30 - 15 * 20) / 900, abs=0.01)


def test_neighbours_are_counted_over_sides_and_corners_and_among_all_nuclei() -> None:
    labels_HW = np.array(
        [
            [1, 1, 2, 2, 0, 0],
            [1, 1, 2, 2, 0, 5],
            [0, 0, 3, 3, 0, 0],
            [0, 0, 3, 3, 0, 0],
            [4, 4, 0, 0, 0, 0],
        ],
        np.int32,
    )
    assert count_neighbours(labels_HW)[1:].tolist() == [2, 2, 3, 1, 0]
    found = _measured(labels_HW, ids_N=np.array([7, 0, 9, 0, 0]))
    assert [(row["label"], row["touching_neighbours"]) for row in found] == [(7, 2), (9, 3)]


def test_an_empty_window_has_no_neighbours() -> None:
    assert count_neighbours(np.zeros((3, 3), np.int32)).sum() == 0


def test_only_the_edge_of_the_image_counts_as_edge() -> None:
    labels_HW = np.zeros((10, 10), np.int32)
    labels_HW[0:2, 4:6] = 1
    labels_HW[4:6, 0:2] = 2
    labels_HW[8:10, 2:4] = 3
    labels_HW[4:6, 8:10] = 4
    edge = [row["touches_image_edge"] for row in _measured(labels_HW)]
    assert edge == [1, 1, 1, 1]
    moved = _measured(labels_HW, top_px=5, left_px=7)
    assert [row["touches_image_edge"] for row in moved] == [0, 0, 1, 1]
    assert (moved[0]["centroid_row_px"], moved[0]["centroid_column_px"]) == (5.5, 11.5)


@pytest.mark.parametrize(("size", "eccentricity"), [((1, 1), 0), ((1, 5), 1), ((3, 3), 0)])
def test_thin_nuclei_have_figures(size: tuple[int, int], eccentricity: float) -> None:
    labels_HW = np.zeros((7, 7), np.int32)
    labels_HW[1 : 1 + size[0], 1 : 1 + size[1]] = 1
    [row] = _measured(labels_HW)
    assert row["eccentricity"] == eccentricity
    assert row["solidity"] == 1


def test_negative_labels_are_no_nuclei() -> None:
    labels_HW = np.full((6, 6), -1, np.int32)
    labels_HW[2:4, 2:4] = 1
    [row] = _measured(labels_HW)
    assert (row["area_px"], row["touching_neighbours"]) == (4, 0)


def test_intensities_keep_the_type_of_the_image() -> None:
    labels_HW = np.ones((2, 2), np.int32)
    [whole] = _measured(labels_HW, np.full((2, 2), 65535, np.uint16))
    [real] = _measured(labels_HW, np.full((2, 2), 0.25, np.float32))
    assert (whole["integrated_intensity"], whole["mean_intensity"]) == (4 * 65535, 65535)
    assert isinstance(whole["integrated_intensity"], int)
    assert (real["integrated_intensity"], real["mean_intensity"]) == (1, 0.25)


def test_an_outline_filled_again_is_the_nucleus() -> None:
    drawn = draw()
    nuclei = ReportedNuclei(drawn.whole(), drawn.labels_HW.shape, None)
    for label, corners_P2 in enumerate(nuclei.outlines, start=1):
        np.testing.assert_array_equal(_filled(corners_P2, drawn.labels_HW.shape), drawn.labels_HW == label)


@pytest.mark.parametrize(
    "rows",
    [
        ["#"],
        ["###"],
        ["##.", "###", ".##"],
        ["#..", "###", "#.."],
        ["#.#", "###", "#.#"],
        ["#..#", "#..#", "####"],
        [".#.", "###", ".#."],
        ["####", "...#", "####", "#..."],
        ["##..", "##..", "..##"],
    ],
)
def test_outlines_of_small_shapes_are_exact(rows: list[str]) -> None:
    mask_HW = np.pad(np.array([[cell == "#" for cell in row] for row in rows]), 1)
    corners_P2 = trace_outline(mask_HW)
    np.testing.assert_array_equal(_filled(corners_P2, mask_HW.shape), mask_HW)
    steps_P2 = np.roll(corners_P2, -1, axis=0) - corners_P2
    assert (np.count_nonzero(steps_P2, axis=1) == 1).all()  # along the sides of pixels, no corner twice
    x, y = corners_P2.T
    twice_the_area = np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y)
    assert twice_the_area == 2 * mask_HW.sum()  # positive: the direction that GeoJSON asks for


def test_an_outline_of_a_square_has_its_four_corners() -> None:
    mask_HW = np.zeros((5, 6), bool)
    mask_HW[1:3, 2:5] = True
    assert {tuple(corner) for corner in trace_outline(mask_HW)} == {(2, 1), (5, 1), (5, 3), (2, 3)}


def test_the_largest_piece_is_outlined_and_holes_are_filled() -> None:
    mask_HW = np.zeros((8, 12), bool)
    mask_HW[1:6, 1:6] = True
    mask_HW[3, 3] = False
    mask_HW[2:4, 9:11] = True
    filled_HW = _filled(trace_outline(mask_HW), mask_HW.shape)
    assert filled_HW[3, 3]
    assert filled_HW.sum() == 25


def test_a_thousand_nuclei_take_less_than_a_second_or_so() -> None:
    drawn = draw(32, 32)
    assert drawn.num_nuclei == 1024
    start = time.process_time()
    nuclei = ReportedNuclei(drawn.whole(), drawn.labels_HW.shape, None)
    assert len(nuclei.measurements) == len(nuclei.outlines) == 1024
    assert time.process_time() - start < 1.5  # a third of it on a busy core; regionprops_table takes three seconds


def test_two_windows_report_what_one_does() -> None:
    drawn = draw()
    shape = drawn.labels_HW.shape
    whole = ReportedNuclei(drawn.whole(), shape, 0.5)
    halves = [ReportedNuclei(window, shape, 0.5) for window in drawn.halves()]
    assert all(0 < len(half) < len(half.window.ids_N) for half in halves), "both have nuclei that the other reports"
    assert max(window.labels_HW.shape[1] for window in drawn.halves()) < shape[1] - PITCH_PX
    parts = sorted((row for half in halves for row in half.measurements), key=lambda row: row["label"])
    assert parts == whole.measurements
