"""The order of trials, and how many a search has."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest

from nuciseg.config import Config
from nuciseg.distributed.trials import Trial, best_first, num_trials


def trial(id: str, score: float | None, tie_break: float | None = 0.0, failure: str | None = None) -> Trial:
    return Trial(id, {}, score, tie_break, epochs=1, seconds=1.0, failure=failure)


def test_the_best_comes_first_and_what_failed_last() -> None:
    ordered = [
        trial("c", 0.9, 0.2), trial("d", 0.9, 0.1), trial("b", 0.2), trial("e", 0.0), trial("f", 0.0),
        trial("g", None), trial("a", 1.0, failure="its loss became NaN"),
    ]  # fmt: skip
    for some in permutations(ordered, 5):
        assert best_first(some) == [each for each in ordered if each in some]


@pytest.mark.parametrize(
    ("sampler", "space", "number"),
    [
        ("optuna", {"optim.lr": {"loguniform": [1e-5, 1e-2]}}, 5),
        ("random", {"optim.lr": {"loguniform": [1e-5, 1e-2]}, "data.batch_size": {"grid_search": [4, 8]}}, 10),
        ("grid", {"optim.lr": {"choice": [0.1, 0.2, 0.3]}, "data.batch_size": {"grid_search": [4, 8]}}, 6),
    ],
)
def test_the_number_of_trials(sampler: str, space: dict[str, Any], number: int) -> None:
    config = Config().replaced({"search.space": space, "search.sampler": sampler, "search.num_trials": 5})
    assert num_trials(config) == number
