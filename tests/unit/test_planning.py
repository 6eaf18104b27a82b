"""The arithmetic of `nuciseg plan`, and the bounds that a search holds itself to."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nuciseg.config import SearchConfig
from nuciseg.engine.planning import (
    MACHINES,
    MESSAGE_S,
    TRIAL_START_S,
    Pace,
    Work,
    epoch_s,
    estimated_image_s,
    expected_epochs,
    link_gbps,
    machine,
    ring_all_reduce_s,
    search_time,
    step_of,
)
from nuciseg.errors import ConfigError

WORK = Work(num_crops=100, num_validation=10, batch_size=16, num_parameters=1_000_000, forward_operations=1e9)
PACE = Pace(image_s=0.01, validation_image_s=0.02, rest_of_epoch_s=0.5, loading_s=0.002)


def test_a_ring_sends_every_byte_almost_twice_whatever_its_length() -> None:
    assert ring_all_reduce_s(4e6, 1, 8) == 0
    assert ring_all_reduce_s(4e6, 2, 8, message_s=0) == pytest.approx(4e-3)  # 4 MB at 1 GB/s, half each way
    assert ring_all_reduce_s(4e6, 100, 8, message_s=0) == pytest.approx(2 * 0.99 * 4e-3)
    assert ring_all_reduce_s(0, 5, 8) == pytest.approx(8 * MESSAGE_S)


def test_a_step_is_divided_among_workers_but_its_gradients_are_not() -> None:
    alone, four = (step_of(WORK, PACE, workers, gbps=10, num_loader_threads=1) for workers in (1, 4))
    assert (alone.seconds, alone.limit) == (pytest.approx(0.16), "network")
    assert four.compute_s == pytest.approx(0.04)
    assert four.seconds == pytest.approx(0.04 + ring_all_reduce_s(4e6, 4, 10))
    assert step_of(WORK, PACE, 16, gbps=0.1, num_loader_threads=1).limit == "gradients"
    slow = replace(PACE, loading_s=0.02)
    assert step_of(WORK, slow, 1, 10, 1).limit == "data loading"
    assert step_of(WORK, slow, 1, 10, 1).seconds == pytest.approx(0.32)
    assert step_of(WORK, slow, 1, 10, 4).seconds == pytest.approx(0.16), "loaded ahead while the network computes"
    assert step_of(replace(WORK, batch_size=17), PACE, 4, 10, 1).compute_s == pytest.approx(0.05), "the fullest worker"


def test_an_epoch_has_its_last_short_step_its_validation_and_its_checkpoint() -> None:
    assert WORK.steps_per_epoch == 7
    step = step_of(WORK, PACE, 2, 10, 1)
    assert epoch_s(WORK, PACE, step, 2) == pytest.approx(7 * step.seconds + 5 * 0.02 + 0.5)


def test_workers_of_one_machine_are_joined_by_its_own_links() -> None:
    assert link_gbps(MACHINES["g5.12xlarge"], 4) == 80
    assert link_gbps(MACHINES["g5.12xlarge"], 5) == 40
    assert link_gbps(MACHINES["g5.xlarge"], 2) == 2.5


def test_a_price_can_be_given_and_an_unknown_machine_is_named() -> None:
    assert machine("g5.xlarge", {"g5.xlarge": 0.4}).dollars_per_hour == 0.4
    assert machine("g6.xlarge", {"g5.xlarge": 0.4}) == MACHINES["g6.xlarge"]
    with pytest.raises(ConfigError, match=r"--machine g5\.xlarg: .*; choose among g5\.xlarge, "):
        machine("g5.xlarg", {})


def test_a_gpu_that_nobody_measured_is_as_fast_as_its_memory() -> None:
    assert estimated_image_s(WORK, MACHINES["g5.xlarge"]) == pytest.approx(3e9 / (600e9 * 25))


@pytest.mark.parametrize("scheduler", ["none", "pbt"])
def test_without_asha_every_trial_runs_to_its_end(scheduler: str) -> None:
    assert expected_epochs(SearchConfig(scheduler=scheduler), 7, 9) == 63


def test_asha_saves_more_the_harder_it_chooses() -> None:
    def epochs(**changes: int) -> float:
        return expected_epochs(SearchConfig(scheduler="asha", grace_epochs=2).model_copy(update=changes), 100, 20)

    assert 100 * 2 < epochs(reduction_factor=4) < epochs(reduction_factor=2) < 100 * 20
    assert epochs() < epochs(grace_epochs=8) < epochs(grace_epochs=20) == 2000
    assert epochs() == epochs(), "the same every time"


def test_a_search_takes_its_work_divided_by_the_places_and_the_winner() -> None:
    def hours(at_once: int, final_epochs: int = 0) -> float:
        found = search_time(100, 10, 10, final_epochs, epoch_s=36, at_once=at_once, num_workers=1)
        assert found.worker_hours == pytest.approx((36 * (100 + final_epochs) + 10 * TRIAL_START_S[1]) / 3600)
        return found.hours

    assert hours(1) == pytest.approx(1 + 10 * TRIAL_START_S[1] / 3600)
    assert hours(1, final_epochs=100) - hours(1) == pytest.approx(1)
    assert hours(1) / 2 < hours(2) < hours(1) * 0.6
    longest = (10 * 36 + TRIAL_START_S[1]) / 3600
    assert hours(1000) == pytest.approx(longest * 1.45), "not faster than its longest trial, half of one for unevenness"
    assert search_time(0, 0, 10, 10, 36, 4, num_workers=2).worker_hours == pytest.approx(0.2)
