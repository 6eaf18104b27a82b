"""The order of trials."""

from __future__ import annotations

from itertools import permutations

from nuciseg.distributed.trials import Trial, best_first


def trial(id: str, score: float | None, tie_break: float | None = 0.0, failure: str | None = None) -> Trial:
    return Trial(id, {}, score, tie_break, epochs=1, seconds=1.0, failure=failure)


def test_the_best_comes_first_and_what_failed_last() -> None:
    ordered = [
        trial("c", 0.9, 0.2), trial("d", 0.9, 0.1), trial("b", 0.2), trial("e", 0.0), trial("f", 0.0),
        trial("g", None), trial("a", 1.0, failure="its loss became NaN"),
    ]  # fmt: skip
    for some in permutations(ordered, 5):
        assert best_first(some) == [each for each in ordered if each in some]
