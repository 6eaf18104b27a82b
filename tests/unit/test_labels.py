"""Label operations on small drawings whose answer can be seen."""

from __future__ import annotations

import numpy as np

from nuciseg.labels import enclosed_regions, regrow, relabel


def test_relabel_closes_holes_in_the_numbering_and_keeps_ignored_pixels() -> None:
    labels_HW = np.array([[0, 7, 3], [-1, 900_000, -2]], np.int32)
    result_HW = relabel(labels_HW)
    assert result_HW.dtype == np.int32
    assert result_HW.tolist() == [[0, 2, 1], [-1, 3, -2]]


def test_regrow_gives_each_pixel_to_the_nearest_nucleus_in_reach() -> None:
    labels_HW = np.array([[1, 0, 0, 0, 0, 2, 0, 0, -1, 0]], np.int32)
    everywhere = np.ones(labels_HW.shape, bool)
    assert regrow(labels_HW, everywhere).tolist() == [[1, 1, 1, 2, 2, 2, 2, 2, -1, 2]]
    assert regrow(labels_HW, everywhere, max_distance_px=1).tolist() == [[1, 1, 0, 0, 2, 2, 2, 0, -1, 0]]
    assert regrow(labels_HW, labels_HW > 0).tolist() == labels_HW.tolist()


def test_regrow_without_a_nucleus_changes_nothing() -> None:
    labels_HW = np.array([[0, -1, 0]], np.int32)
    result_HW = regrow(labels_HW, np.ones((1, 3), bool))
    assert result_HW.tolist() == labels_HW.tolist()
    assert result_HW is not labels_HW


def test_enclosed_regions_leave_out_the_outside_and_specks() -> None:
    border_HW = np.zeros((12, 20), bool)
    border_HW[[2, 9], 2:16] = border_HW[2:10, [2, 8, 15]] = True
    border_HW[4:7, 4:7] = True
    border_HW[5, 5] = False  # a speck of one pixel within the first region
    border_HW[5, 0:2] = True
    regions_HW = enclosed_regions(border_HW, min_area_px=2)
    assert regions_HW.max() == 2
    assert regions_HW[3, 3] == 1
    assert regions_HW[3, 9] == 2
    assert regions_HW[5, 5] == 0
    assert regions_HW[0, 0] == regions_HW[11, 19] == 0
    assert enclosed_regions(border_HW).max() == 3


def test_diagonal_steps_of_a_thin_line_are_closed() -> None:
    border_HW = np.array([[0, 0, 1, 0, 0], [0, 1, 0, 1, 0], [1, 0, 0, 0, 1], [0, 1, 0, 1, 0], [0, 0, 1, 0, 0]], bool)
    assert enclosed_regions(border_HW)[2].tolist() == [0, 1, 1, 1, 0]
