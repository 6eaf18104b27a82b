"""Tune's bound on a trial's deaths rises with the epochs that it reports, also in what Tune stores of the trial."""

from __future__ import annotations

import json

import pytest
from ray import tune
from ray.tune.experiment import Trial

from nuciseg.distributed.forgiveness import Forgiveness


@pytest.fixture
def trial() -> Trial:
    tune.register_trainable("nothing", lambda config: None)
    return Trial("nothing", stub=True, max_failures=3)


def die(trial: Trial, times: int) -> None:
    trial.run_metadata.num_failures += times


def test_an_epoch_makes_good_for_the_deaths_before_it(trial: Trial) -> None:
    die(trial, 3)
    assert trial.should_recover()
    trial.get_json_state()  # Tune stores it from time to time, and keeps what it stored
    Forgiveness(3).on_trial_result(1, [trial], trial, {"epoch": 1})
    stored, _ = trial.get_json_state()
    assert json.loads(stored)["max_failures"] == 6
    die(trial, 3)
    assert trial.should_recover()
    die(trial, 1)
    assert not trial.should_recover()


def test_a_failed_trial_that_is_resumed_begins_with_its_own_bound(trial: Trial) -> None:
    die(trial, 12)
    Forgiveness(3).on_trial_result(1, [trial], trial, {"epoch": 1})
    again = trial.reset()
    Forgiveness(3).on_trial_start(1, [again], again)
    assert (again.num_failures, again.max_failures) == (0, 3)
