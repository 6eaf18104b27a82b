"""Who a run is to W&B, what it takes on disk, and how a search is shown while trials come."""

from __future__ import annotations

import re
import sys
import threading
from pathlib import Path

import pytest
from small_runs import small_config

from nuciseg.distributed.mirror import Mirror
from nuciseg.distributed.progress import SearchProgress
from nuciseg.distributed.runs import describe_disk_need, refuse_other_settings, train_identity
from nuciseg.engine.checkpoint import disk_need_bytes
from nuciseg.engine.network import count_parameters
from nuciseg.errors import ConfigError
from nuciseg.tracking import open_tracker


def test_final_runs_of_searches_of_one_name_are_two_runs(tmp_path: Path) -> None:
    config = small_config()
    first, second = tmp_path / "1" / "final", tmp_path / "2" / "final"
    identity = train_identity(config, first, "search")
    assert (identity.name, identity.group, identity.job_type) == ("final", "search", "train")
    assert identity.id.startswith("search-final-")
    assert train_identity(config, second, "search").id != identity.id
    open_tracker(config.tracking, identity, first, {}).finish(0)
    assert train_identity(config, first, "search") == identity, "a resumed run is who it was"


def test_the_disk_that_a_search_needs_is_that_of_its_largest_network(tmp_path: Path) -> None:
    small, large = (small_config(**{"model.width": width}) for width in (4, 64))
    space = {"model.width": {"choice": [4, 64]}, "optim.lr": {"uniform": [1e-4, 1e-2]}}
    search = small.replaced({"search.space": space, "search.num_trials": 5})

    def stated_mb(config: object) -> float:
        found = re.match(r"disk: at most (\d+) MB", describe_disk_need(config, tmp_path))  # type: ignore[arg-type]
        assert found is not None
        return float(found[1])

    run_mb = disk_need_bytes(count_parameters(large)) / 1e6
    assert stated_mb(large) == pytest.approx(run_mb, abs=1)
    assert stated_mb(search) == pytest.approx(6 * run_mb, abs=1)
    assert stated_mb(search.replaced({"search.final": False})) == pytest.approx(5 * run_mb, abs=1)
    handed_over_mb = 5 * 4 * run_mb / 3  # PBT: four more of each trial, where a run has three
    assert stated_mb(search.replaced({"search.scheduler": "pbt"})) == pytest.approx(6 * run_mb + handed_over_mb, abs=1)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"optim": {"lr": 1e-3}}, "--optim.lr,"),
        ({"search": {"space": {"optim.lr": {"choice": [1]}}}}, "--search.space,"),
        ({"seed": 3}, "--seed,"),
    ],
)
def test_the_flag_that_a_resumed_run_cannot_take_is_named(flags: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=f"leave out {named} or start a new run"):
        refuse_other_settings(flags, None)


def test_the_table_is_drawn_while_trials_are_added(tmp_path: Path) -> None:
    progress = SearchProgress(small_config(), Mirror(tmp_path), concurrent=1)
    failures: list[BaseException] = []
    done = threading.Event()

    def draw() -> None:
        try:
            while not done.is_set():
                progress._table()
        except RuntimeError as error:
            failures.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=draw)
    thread.start()
    try:
        for number in range(3000):
            progress.rows[str(number)] = ("", "", "", "")
            if number % 300 == 0:
                progress.rows.clear()
    finally:
        done.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert not failures
