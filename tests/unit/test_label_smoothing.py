"""Smoothed lines: the same nuclei on the same pixels, and lines that are smoother."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

from nuciseg.label_smoothing import smooth_lines

Labels = NDArray[np.int32]


def num_pieces(labels_HW: Labels) -> dict[int, int]:
    return {int(id): ndimage.label(labels_HW == id)[1] for id in np.unique(labels_HW[labels_HW > 0])}


def line_length(labels_HW: Labels) -> int:
    """Sides of pixels between two nuclei."""
    return sum(
        int(np.count_nonzero((a != b) & (a > 0) & (b > 0)))
        for a, b in ((labels_HW[:, 1:], labels_HW[:, :-1]), (labels_HW[1:], labels_HW[:-1]))
    )


def two_with_a_jagged_line() -> Labels:
    """A disk, divided by a saw tooth of 4 px."""
    y, x = np.mgrid[:80, :80]
    labels_HW = np.where(x < 40 + 4 * ((y // 4) % 2), 1, 2)
    return np.where(np.hypot(x - 40, y - 40) < 35, labels_HW, 0).astype(np.int32)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    num_nuclei=st.integers(1, 40),
    sigma_px=st.floats(0.3, 12),
    roughness=st.floats(0, 1),
)
def test_no_nucleus_and_no_foreground_is_lost_gained_broken_or_joined(
    seed: int, num_nuclei: int, sigma_px: float, roughness: float
) -> None:
    """On cells of any size around random points, frayed, with background, ignored pixels and pieces."""
    rng = np.random.default_rng(seed)
    centres = rng.uniform(0, 60, (num_nuclei, 2))
    y, x = np.mgrid[:60, :60]
    distances = np.hypot(y - centres[:, 0, None, None], x - centres[:, 1, None, None])
    distances = distances + roughness * rng.uniform(0, 6, distances.shape)
    ids = rng.permutation(np.arange(1, 200))[:num_nuclei]
    labels_HW = np.where(distances.min(axis=0) < 14, ids[distances.argmin(axis=0)], 0).astype(np.int32)
    labels_HW[rng.random(labels_HW.shape) < 0.02] = -1
    before = labels_HW.copy()
    smoothed_HW = smooth_lines(labels_HW, sigma_px)
    assert np.array_equal(labels_HW, before)
    assert np.array_equal(smoothed_HW[labels_HW <= 0], labels_HW[labels_HW <= 0])
    assert np.all(smoothed_HW[labels_HW > 0] > 0)
    assert num_pieces(smoothed_HW) == num_pieces(labels_HW)
    assert smoothed_HW.dtype == labels_HW.dtype


def test_a_jagged_line_becomes_shorter_and_stays_where_it_was() -> None:
    labels_HW = two_with_a_jagged_line()
    smoothed_HW = smooth_lines(labels_HW, 4.0)
    assert line_length(smoothed_HW) < 0.75 * line_length(labels_HW)
    changed = np.nonzero(smoothed_HW != labels_HW)[1]
    assert changed.min() >= 36
    assert changed.max() <= 48


def test_a_corner_is_rounded() -> None:
    """A line drawn as two straight strokes: its corner moves back, the middle of a stroke does not."""
    y, x = np.mgrid[:100, :100]
    labels_HW = np.where(x < 30 + np.abs(y - 50), 1, 2).astype(np.int32)
    smoothed_HW = smooth_lines(labels_HW, 5.0)
    assert labels_HW[50, 31] == 2
    assert smoothed_HW[50, 31] == 1
    assert np.array_equal(smoothed_HW[20], labels_HW[20])


def test_a_straight_line_between_nuclei_of_one_shape_stays() -> None:
    labels_HW = np.zeros((60, 90), np.int32)
    labels_HW[10:50, 10:45], labels_HW[10:50, 45:80] = 7, 3
    assert np.array_equal(smooth_lines(labels_HW, 6.0), labels_HW)


def test_a_nucleus_that_would_vanish_keeps_its_pixels() -> None:
    """A sliver of 2 px between two large ones; their own line is smoothed all the same."""
    labels_HW = two_with_a_jagged_line()
    labels_HW[39:41, 30:50][labels_HW[39:41, 30:50] > 0] = 3
    smoothed_HW = smooth_lines(labels_HW, 5.0)
    assert np.array_equal(smoothed_HW == 3, labels_HW == 3)
    assert line_length(smoothed_HW) < 0.9 * line_length(labels_HW)


def test_a_waist_does_not_break_a_nucleus() -> None:
    """A dumb-bell with a bridge of 2 px through another nucleus: blurred, the bridge would belong to the other."""
    labels_HW = np.zeros((60, 80), np.int32)
    labels_HW[10:50, 10:70] = 2
    labels_HW[20:40, 10:28] = labels_HW[20:40, 52:70] = labels_HW[29:31, 28:52] = 1
    smoothed_HW = smooth_lines(labels_HW, 4.0)
    assert num_pieces(smoothed_HW) == num_pieces(labels_HW)


def test_ids_are_only_names() -> None:
    labels_HW = two_with_a_jagged_line()
    ids = np.array([0, 70_000, 5], np.int32)
    assert np.array_equal(smooth_lines(ids[labels_HW], 3.0), ids[smooth_lines(labels_HW, 3.0)])


@pytest.mark.parametrize(
    "labels_HW", [np.zeros((9, 9), np.int32), np.full((9, 9), -1, np.int32)], ids=["none", "ignored"]
)
def test_nothing_stays_nothing(labels_HW: Labels) -> None:
    assert np.array_equal(smooth_lines(labels_HW, 2.0), labels_HW)


def test_no_smoothing_returns_the_labels() -> None:
    labels_HW = two_with_a_jagged_line()
    assert np.array_equal(smooth_lines(labels_HW, 0.0), labels_HW)
