"""When a search has come to a bound; `tests/ray/test_search_bounds.py` has searches that do."""

from __future__ import annotations

import pickle
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from small_runs import small_config

from nuciseg.config import SearchConfig, write_config
from nuciseg.distributed.limits import (
    PATIENCE_S,
    ClosedError,
    Limits,
    SearchEndedError,
    reached,
    refuse_late_winner,
    reopen,
    spent_seconds,
    trials_within_disk,
)
from nuciseg.distributed.mirror import Mirror
from nuciseg.distributed.runs import trial_disk_bytes
from nuciseg.distributed.trials import Trial
from nuciseg.engine.checkpoint import write_json
from nuciseg.errors import ConfigError


def test_without_bounds_none_is_reached() -> None:
    assert reached(SearchConfig(), 1e9, 1e15, 1e15) is None


@pytest.mark.parametrize(
    ("seconds", "used", "needed", "reason", "ends_running"),
    [
        (7200, 0, 0, "2.00 h of --max-hours 2 are used", True),
        (7199, 3e9, 3e9, "3 GB of --max-disk 3 (GB) are used", True),
        (7199, 1e9, 3.5e9, "with one trial more its folder could take 3.5 GB of --max-disk 3 (GB)", False),
    ],
)
def test_the_bound_that_is_reached_says_how_much_was_used(
    seconds: float, used: float, needed: float, reason: str, ends_running: bool
) -> None:
    search = SearchConfig(max_hours=2, max_disk_gb=3)
    bound = reached(search, seconds, used, needed)
    assert bound is not None
    assert (bound.reason, bound.ends_running) == (reason, ends_running)
    assert reached(search, 7199, 2.9e9, 3e9) is None


def test_no_more_trials_at_a_time_than_the_disk_has_room_for() -> None:
    config = small_config(**{"search.space": {"optim.lr": {"choice": [0.1, 0.2]}}})
    run_gb = trial_disk_bytes(config) / 1e9
    assert trials_within_disk(config) is None
    assert trials_within_disk(config.replaced({"search.max_disk_gb": 4.5 * run_gb})) == 3, "one for the winner"
    with pytest.raises(ConfigError, match=r"the checkpoints of one trial and of the winner take up to .* GB; raise"):
        trials_within_disk(config.replaced({"search.max_disk_gb": 1.9 * run_gb}))


def test_a_winner_is_not_trained_beyond_the_bound(tmp_path: Path) -> None:
    config = small_config(**{"train.epochs": 20, "search.max_hours": 1.0})
    trials = [Trial("t", {"optim.lr": 0.1}, score=0.5, tie_break=0.5, epochs=5, seconds=600.0, failure=None)]
    refuse_late_winner(trials, config, Mirror(tmp_path))  # 20 epochs of 2 minutes
    write_json({"seconds": 1300.0}, tmp_path / "search_time.json")
    assert spent_seconds(tmp_path) == 1300
    with pytest.raises(SearchEndedError, match=r"with the winner's 20 epochs it would take 1\.03 h, more than") as late:
        refuse_late_winner(trials, config, Mirror(tmp_path))
    assert late.value.trials == trials
    refuse_late_winner(trials, config.replaced({"search.max_hours": 1.1}), Mirror(tmp_path))
    refuse_late_winner(trials, config.replaced({"train.epochs": 5}), Mirror(tmp_path))


class PlayedSearch:
    """The steps of Tune's loop as the callback sees them; the loop itself runs in `tests/ray/test_search_bounds.py`."""

    def __init__(self, folder: Path, num_trials: int, **bounds: float) -> None:
        self.folder = folder
        self.config = small_config(**{"search.space": {"optim.lr": {"choice": [0.1]}}, "search.final": False, **bounds})
        write_config(self.config, folder / "config.yaml")
        self.trials = [PlayedTrial(f"t{number}") for number in range(num_trials)]
        self.limits = Limits(Mirror(folder), concurrent=2)
        self.limits.setup(total_num_samples=num_trials)

    def step(self, *ended: int, running: tuple[int, ...] = ()) -> None:
        for number in ended:
            self.trials[number].status = "TERMINATED"
        for number in running:
            self.trials[number].status = "RUNNING"
        self.limits.on_step_end(1, self.trials)

    def report(self, number: int) -> None:
        self.limits.on_trial_result(1, self.trials, self.trials[number], {})

    def write_checkpoint_of(self, number: int, num_bytes: int) -> None:
        (self.folder / f"t{number}").mkdir(exist_ok=True)
        (self.folder / f"t{number}" / "weights").write_bytes(bytes(num_bytes))

    @property
    def is_closed(self) -> bool:
        return (self.folder / ".closed").is_dir()


@dataclass
class PlayedTrial:
    trial_id: str
    status: str = "PENDING"

    def is_finished(self) -> bool:
        return self.status in ("TERMINATED", "ERROR")


def test_the_loop_is_left_when_every_running_trial_has_reported(tmp_path: Path) -> None:
    write_json({"seconds": 3599.0}, tmp_path / "search_time.json")
    search = PlayedSearch(tmp_path, 4, **{"search.max_hours": 1.0})
    search.step(running=(0, 1))
    assert not search.is_closed
    search.limits._earlier_s += 1
    search.limits._next_look_s = 0
    search.step()
    assert search.is_closed
    search.report(0)
    search.step()
    (tmp_path / ".closed" / "t2").touch()  # begun too late, it waits
    search.step(running=(2,))
    with pytest.raises(ClosedError) as closed:
        search.step(1)
    assert closed.value.unfinished == {"t0", "t2", "t3"}
    assert spent_seconds(tmp_path) == pytest.approx(3600, abs=5)
    best = Trial("t1", {}, score=0.5, tie_break=0.5, epochs=5, seconds=600.0, failure=None)
    assert re.search(
        r"of 4 trials 1 ended, 0 can go on from a checkpoint, 3 were", closed.value.describe(Mirror(tmp_path), [best])
    )
    reopen(Mirror(tmp_path))
    assert not search.is_closed


def test_a_trial_that_says_nothing_for_long_is_not_waited_for(tmp_path: Path) -> None:
    """Its node is gone and none takes its place."""
    search = PlayedSearch(tmp_path, 2, **{"search.max_hours": 1e-9})
    search.limits.on_trial_result(1, search.trials, search.trials[0], {"time_this_iter_s": 100.0})
    search.limits._started_s -= 300  # before the bound was reached; the second trial is in its first epoch
    search.step(running=(0, 1))
    search.limits._reached_s -= PATIENCE_S + 2 * 100 + 5
    search.limits._started_s -= PATIENCE_S + 2 * 100 + 5
    search.step()
    assert search.limits._awaited == {"t1"}
    search.limits._reached_s -= 2 * 200 + 10
    search.limits._started_s -= 2 * 200 + 10
    with pytest.raises(ClosedError) as closed:
        search.step()
    assert closed.value.unfinished == {"t0", "t1"}


def test_a_search_that_ended_by_itself_is_not_left(tmp_path: Path) -> None:
    search = PlayedSearch(tmp_path, 1, **{"search.max_hours": 1e-9})
    search.step(running=(0,))
    assert search.is_closed
    search.step(0)


def test_where_only_room_for_another_lacks_running_trials_come_to_their_end(tmp_path: Path) -> None:
    run_bytes = trial_disk_bytes(small_config())
    search = PlayedSearch(tmp_path, 4, **{"search.max_disk_gb": 2.5 * run_bytes / 1e9})
    search.step(running=(0, 1))
    assert not search.is_closed, "both have room for all their checkpoints"
    search.write_checkpoint_of(0, run_bytes)
    search.step(0)
    assert search.is_closed
    search.report(1)
    search.step()
    with pytest.raises(ClosedError, match="with one trial more its folder could take"):
        search.step(1)


def test_a_folder_that_outgrows_its_bound_ends_running_trials_too(tmp_path: Path) -> None:
    run_bytes = trial_disk_bytes(small_config())
    search = PlayedSearch(tmp_path, 4, **{"search.max_disk_gb": 2.5 * run_bytes / 1e9})
    search.step(running=(0, 1))
    search.write_checkpoint_of(0, 3 * run_bytes)
    search.limits._next_look_s = 0
    search.step()
    search.report(0)
    search.step()
    search.report(1)
    with pytest.raises(ClosedError, match=r"GB of --max-disk .* \(GB\) are used"):
        search.step()


def test_the_stored_callback_reads_its_bounds_anew(tmp_path: Path) -> None:
    search = PlayedSearch(tmp_path, 2, **{"search.max_hours": 1.0})
    restored = pickle.loads(pickle.dumps(search.limits))
    write_json({"seconds": 3600.0}, tmp_path / "search_time.json")
    restored.setup(total_num_samples=2)
    with pytest.raises(ClosedError):
        restored.on_step_end(1, search.trials)
    write_config(search.config.replaced({"search.max_hours": 2.0}), tmp_path / "config.yaml")
    restored.setup(total_num_samples=2)
    restored.on_step_end(1, search.trials)
