"""Choose how probabilities are decoded, on validation images, without another pass of the network."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter

from nuciseg.data.dataset import SampleStore
from nuciseg.engine.inference import Probabilities, predict_probabilities, score_probabilities
from nuciseg.engine.network import Network
from nuciseg.metrics import Scores, rank
from nuciseg.targets import LabelImage, TargetConfig, build_target, decode_grids


def calibrate(network: Network, samples: SampleStore, indices: Sequence[int], metric: str) -> TargetConfig:
    """The target whose decoding scores best by `metric` on the samples at `indices`.

    The maps are made once. Each decoding counts with the mean over itself and its neighbours on the grid: few images
    differ between decodings, and a single one that does better than all around it owes that to chance.
    """
    found = [(each, samples[each.index].labels_HW) for each in predict_probabilities(network, samples, indices)]
    best = network.config.target
    for grid_of in decode_grids(best):
        grid = grid_of(best)
        row, column = steadiest(np.array([[_rank(config, found, metric) for config in row] for row in grid]))
        best = grid[row][column]
    return best


def steadiest(ranks_RCS: NDArray[np.float64]) -> tuple[int, int]:
    """The place on a grid whose 3 x 3 neighbourhood has the highest mean of the first score, ties by the next."""
    around_RCS = uniform_filter(ranks_RCS, size=(3, 3, 1), mode="nearest").round(9)
    row, column = max(np.ndindex(around_RCS.shape[:2]), key=lambda place: tuple(around_RCS[place]))
    return row, column


def _rank(config: TargetConfig, found: Sequence[tuple[Probabilities, LabelImage]], metric: str) -> tuple[float, float]:
    target = build_target(config)
    scores = Scores.total(score_probabilities(target, each, labels_HW) for each, labels_HW in found).flat_summary()
    return rank(scores, metric)
