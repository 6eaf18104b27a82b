"""Decoding parameters are chosen where the score is steadily high, not where one image more came out right."""

from __future__ import annotations

import numpy as np

from nuciseg.engine.calibration import steadiest


def test_a_plateau_counts_more_than_a_peak() -> None:
    ranks_RCS = np.zeros((4, 5, 2))
    ranks_RCS[0, 4, 0] = 1.0
    ranks_RCS[1:, :3, 0] = 0.9
    assert steadiest(ranks_RCS) in {(2, 0), (2, 1), (3, 0), (3, 1)}


def test_ties_are_broken_by_the_next_score() -> None:
    ranks_RCS = np.zeros((4, 5, 2))
    ranks_RCS[3, 4, 1] = 0.5
    assert steadiest(ranks_RCS) == (3, 4)
