"""What `nuciseg plan` takes ASHA for is what Ray's ASHA does. Needs Ray's classes, not a session."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
from ray.tune.schedulers import TrialScheduler
from ray.tune.schedulers.async_hyperband import _Bracket

from nuciseg.engine.planning import _epochs_of_one_search, _rungs


def epochs_with_rays_own(quality: list[int], grace: int, reduction_factor: int, epochs: int) -> int:
    """One trial after the other through the bracket that `search._scheduler` makes."""
    bracket = _Bracket(grace, epochs + 1, reduction_factor, 0)
    total = 0
    for score in quality:
        trial = SimpleNamespace(trial_id=str(score))
        for epoch in range(1, epochs + 1):
            total += 1
            if bracket.on_result(trial, epoch, score) == TrialScheduler.STOP:
                break
    return total


@pytest.mark.parametrize(
    ("grace", "reduction_factor", "epochs"), [(1, 2, 8), (2, 3, 20), (5, 3, 45), (3, 4, 3), (1, 3, 9)]
)
def test_the_planned_epochs_are_those_of_rays_scheduler(grace: int, reduction_factor: int, epochs: int) -> None:
    rng = random.Random(grace)
    for _ in range(3):
        quality = rng.sample(range(40), 40)
        planned = _epochs_of_one_search(quality, _rungs(grace, reduction_factor, epochs), reduction_factor, epochs)
        assert planned == epochs_with_rays_own(quality, grace, reduction_factor, epochs)
