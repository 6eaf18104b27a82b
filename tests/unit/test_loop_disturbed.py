"""What disturbs a run without ending it: a worker that is slow."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from gloo_workers import on_workers
from small_runs import assert_same_run, last_checkpoint, run, small_config

from nuciseg.config import Config
from nuciseg.engine.inference import Place
from nuciseg.engine.loop import Trainer

SLOWER_S = 0.4  # a step


def _train_with_a_slow_second_worker(place: Place, config: Config, run_dir: Path, slower_s: float) -> None:
    """In a process of its own, so that nothing has to be put back."""
    step = Trainer._step

    def slow_step(self: Trainer, *arguments: Any) -> Any:
        time.sleep(slower_s * place.rank)
        return step(self, *arguments)

    Trainer._step = slow_step  # type: ignore[method-assign]
    run(config, run_dir, place)


def test_a_slow_worker_changes_nothing_but_the_rate_that_is_reported(tmp_path: Path) -> None:
    config = small_config(**{"train.epochs": 2})
    for name, slower_s in (("undisturbed", 0.0), ("slow", SLOWER_S)):
        on_workers(2, tmp_path / f"meet-{name}", _train_with_a_slow_second_worker, config, tmp_path / name, slower_s)
    assert_same_run(tmp_path / "slow", tmp_path / "undisturbed")
    last = last_checkpoint(tmp_path / "slow").progress.history[-1]
    assert last["train_s"] >= 4 * SLOWER_S
    assert last["images_per_s"] == pytest.approx(16 / last["train_s"])
