"""Each planted fault is found and named, and clean drawn data have none."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import pytest

from nuciseg.data.formats.nucleus import labels_from_solution
from nuciseg.data.synthetic import SyntheticConfig, cluster_seed, draw_cluster, draw_field, solution_border
from nuciseg.exploring.faults import Finding
from nuciseg.exploring.label_faults import (
    broken_nuclei,
    dark_nuclei,
    line_of,
    straight_contacts,
    straight_outlines,
    tiny_nuclei,
)
from nuciseg.exploring.line_faults import line_faults
from nuciseg.exploring.shapes import find_contacts, measure_nuclei, nuclei_per_cluster

CONFIG = SyntheticConfig(seed=3)


def disk(shape: tuple[int, int], row: int, column: int, radius_px: float) -> np.ndarray:
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    return np.hypot(rows - row, columns - column) <= radius_px


def two_disks() -> tuple[np.ndarray, np.ndarray]:
    """A field of two nuclei that stand apart: image and labels."""
    labels_HW = np.zeros((80, 120), np.int32)
    labels_HW[disk((80, 120), 40, 30, 18)] = 1
    labels_HW[disk((80, 120), 40, 80, 18)] = 2
    return np.where(labels_HW > 0, 120, 20).astype(np.uint8), labels_HW


def drawn_pair() -> tuple[np.ndarray, np.ndarray]:
    """A cut-out cluster of two nuclei: image with its outer border, and solution."""
    image_HW, solution_HW = np.zeros((2, 100, 140), np.uint8)
    cv2.ellipse(image_HW, (70, 50), (55, 35), 0, 0, 360, 90, -1)
    for canvas in (image_HW, solution_HW):
        cv2.ellipse(canvas, (70, 50), (55, 35), 0, 0, 360, 255, 3)
    cv2.ellipse(solution_HW, (20, 50), (50, 60), 0, -45, 45, 255, 3)
    solution_HW[image_HW == 0] = 0
    return image_HW, solution_HW


def all_label_faults(image_HW: np.ndarray, labels_HW: np.ndarray, median_area_px: float = 1000) -> list[Finding]:
    nuclei = measure_nuclei(labels_HW)
    return [
        *straight_contacts(find_contacts(labels_HW)),
        *straight_outlines(labels_HW),
        *broken_nuclei(labels_HW),
        *tiny_nuclei(labels_HW, nuclei, median_area_px),
        *dark_nuclei(image_HW, labels_HW, nuclei),
    ]


def drawn_faults(image_HW: np.ndarray, solution_HW: np.ndarray) -> list[Finding]:
    return list(line_faults(image_HW, solution_HW, labels_from_solution(image_HW, solution_HW)))


def kinds(findings: list[Finding]) -> list[str]:
    return [finding.kind for finding in findings]


# ------------------------------------------------------------------------------------------------- nothing is invented
def test_clean_fields_have_no_fault() -> None:
    for index in range(30):
        sample = draw_field(CONFIG, cluster_seed(CONFIG, "train", index), 200, 200)
        assert all_label_faults(sample.image_HWC[..., 0], sample.labels_HW) == [], index


def test_clean_clusters_have_no_fault() -> None:
    for index in range(30):
        sample = draw_cluster(CONFIG, cluster_seed(CONFIG, "train", index))
        solution_HW = solution_border(sample.labels_HW).astype(np.uint8) * 255
        assert drawn_faults(sample.image_HWC[..., 0], solution_HW) == [], index
        assert list(straight_contacts(find_contacts(sample.labels_HW))) == [], index


def test_the_plain_pictures_of_these_tests_are_clean() -> None:
    assert all_label_faults(*two_disks()) == []
    assert drawn_faults(*drawn_pair()) == []


# -------------------------------------------------------------------------------------------------------- label images
def in_pieces(labels_HW: np.ndarray) -> None:
    labels_HW[5:10, 50:55] = 1


def stray(labels_HW: np.ndarray) -> None:
    labels_HW[5, 50:52] = 1


def hole(labels_HW: np.ndarray) -> None:
    labels_HW[38:41, 28:33] = 0


def nested(labels_HW: np.ndarray) -> None:
    labels_HW[disk(labels_HW.shape, 40, 30, 7)] = 3


def tiny(labels_HW: np.ndarray) -> None:
    labels_HW[10:14, 55:60] = 3


def straight_side(labels_HW: np.ndarray) -> None:
    labels_HW[:, :31][labels_HW[:, :31] == 1] = 0


@pytest.mark.parametrize(
    ("plant", "kind", "row", "column"),
    [
        (in_pieces, "nucleus in several pieces", 5, 50),
        (stray, "stray pixels", 5, 50),
        (hole, "hole in a nucleus", 38, 28),
        (nested, "nucleus within another", 33, 23),
        (tiny, "tiny nucleus", 10, 55),
        (straight_side, "straight border", 22, 30),
    ],
)
def test_a_fault_in_labels(plant: Callable[[np.ndarray], None], kind: str, row: int, column: int) -> None:
    image_HW, labels_HW = two_disks()
    plant(labels_HW)
    image_HW[labels_HW > 0] = 120
    (finding,) = all_label_faults(image_HW, labels_HW)
    assert finding.kind == kind
    assert finding.box is not None
    top, left, bottom, right = finding.box
    assert top - 1 <= row <= bottom
    assert left - 1 <= column <= right


def test_a_label_without_light() -> None:
    image_HW, labels_HW = two_disks()
    image_HW[labels_HW == 2] = 20
    (finding,) = all_label_faults(image_HW, labels_HW)
    assert finding.kind == "dark nucleus"
    assert finding.box == (22, 62, 59, 99)


def test_pieces_that_the_edge_may_join_and_small_nuclei_there_are_no_fault() -> None:
    image_HW, labels_HW = two_disks()
    labels_HW[0:3, 20:35] = 1
    labels_HW[77:, 60:64] = 3
    image_HW[labels_HW > 0] = 120
    assert all_label_faults(image_HW, labels_HW) == []


@pytest.mark.parametrize("degrees", [0, 17, 44, 71])
def test_a_straight_cut_between_two_nuclei_is_found_at_any_angle(degrees: float) -> None:
    rows, columns = np.mgrid[:120, :120] - 59.5
    side_HW = rows * np.cos(np.radians(degrees)) > columns * np.sin(np.radians(degrees))
    labels_HW = np.where(np.hypot(rows, columns) < 40, 1 + side_HW, 0).astype(np.int32)
    (finding,) = straight_contacts(find_contacts(labels_HW))
    assert finding.kind == "straight border"
    assert finding.severity == pytest.approx(80, abs=3)


def test_a_bent_line_between_two_nuclei_is_not_straight() -> None:
    rows, columns = np.mgrid[:120, :120] - 59.5
    labels_HW = np.where(np.hypot(rows, columns) < 40, 1 + (rows > 2e-3 * columns**2), 0).astype(np.int32)
    (contact,) = find_contacts(labels_HW)
    assert line_of(contact).bend_px == pytest.approx(2e-3 * 40**2, rel=0.2)
    assert list(straight_contacts([contact])) == []


# ------------------------------------------------------------------------------------------------------------ solutions
def test_a_line_that_ends_within_a_nucleus() -> None:
    image_HW, solution_HW = drawn_pair()
    solution_HW[40:55, 60:75] = 0  # a gap in the line between the two
    findings = drawn_faults(image_HW, solution_HW)
    assert set(kinds(findings)) == {"unclosed border"}
    assert len(findings) == 2, "either end is loose"


def test_an_outline_that_does_not_close() -> None:
    image_HW, solution_HW = drawn_pair()
    solution_HW[30:70, 110:] = 0
    findings = drawn_faults(image_HW, solution_HW)
    assert "unclosed border" in kinds(findings)
    assert any("light" in finding.what for finding in findings)


def test_specks_beside_the_lines() -> None:
    image_HW, solution_HW = drawn_pair()
    solution_HW[48:51, 95:98] = 255
    (finding,) = drawn_faults(image_HW, solution_HW)
    assert (finding.kind, finding.box) == ("stray pixels", (48, 95, 51, 98))


def test_a_line_that_encloses_nothing() -> None:
    image_HW, solution_HW = drawn_pair()
    solution_HW[35:65, 95:98] = 255
    (finding,) = drawn_faults(image_HW, solution_HW)
    assert (finding.kind, finding.box) == ("unclosed border", (35, 95, 65, 98))


def test_a_solution_that_lies_elsewhere_than_the_drawn_border() -> None:
    image_HW, solution_HW = drawn_pair()
    findings = drawn_faults(image_HW, np.roll(solution_HW, 6, axis=1))
    assert "lines disagree" in kinds(findings)


def test_saturated_spots_are_no_drawn_border() -> None:
    image_HW, solution_HW = drawn_pair()
    image_HW[45:50, 90:97] = 255
    assert drawn_faults(image_HW, solution_HW) == []


# --------------------------------------------------------------------------------------------------------------- shapes
def test_area_elongation_and_edges() -> None:
    labels_HW = np.zeros((60, 100), np.int32)
    cv2.ellipse(labels_HW, (50, 30), (40, 20), 0, 0, 360, 1, -1)
    labels_HW[0:4, 0:4] = 2
    nuclei = measure_nuclei(labels_HW)
    assert nuclei.area_px.tolist() == [int((labels_HW == 1).sum()), 16]
    assert nuclei.elongation == pytest.approx([2, 1], rel=0.02)
    assert nuclei.at_edge.tolist() == [False, True]


def test_contacts_and_the_clusters_they_make() -> None:
    labels_HW = np.zeros((40, 60), np.int32)
    labels_HW[10:30, 5:15], labels_HW[10:30, 15:25], labels_HW[10:30, 40:50] = 1, 2, 3
    (contact,) = find_contacts(labels_HW)
    assert (contact.first, contact.second) == (1, 2)
    assert contact.length_px == pytest.approx(20 * np.pi / 4)
    assert sorted(nuclei_per_cluster(3, [contact])) == [1, 2]
    assert nuclei_per_cluster(0, []) == []
    assert find_contacts(np.zeros((5, 5), np.int32)) == []
