"""Trials that run out of memory, die, hang or are killed: searches through real Ray Tune that end as if undisturbed."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import (
    last_checkpoint,
    logged_epochs,
    recovery_shown,
    truncate_last_checkpoint,
    wait_until,
)
from small_searches import LEARNS, run_search

from nuciseg.distributed import search
from nuciseg.distributed.watchdog import TIMEOUT_VARIABLE
from nuciseg.tracking import read_metrics

pytestmark = pytest.mark.usefixtures("ray_session")


def test_a_trial_without_memory_is_tried_once_more_with_half_the_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch raises is raised by a hook at the edge, in the trial's own process: see `test_workers.py`."""
    run_trial = search._run_trial

    def cramped(sample: dict[str, Any], plan: Any) -> None:
        from nuciseg.engine.loop import Trainer

        backward = Trainer._backward
        parts_that_fit = 2 if sample["optim.lr"] == LEARNS else 4

        def limited(self: Trainer, batch: Any, global_size: int) -> Any:
            if self.config.train.accumulate < parts_that_fit:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return backward(self, batch, global_size)

        Trainer._backward = limited  # type: ignore[method-assign]
        try:
            run_trial(sample, plan)
        finally:
            Trainer._backward = backward  # type: ignore[method-assign]

    monkeypatch.setattr(search, "_run_trial", cramped)
    space = {"optim.lr": {"choice": [LEARNS, 0.001]}}
    _, (mended, failed) = run_search(tmp_path / "search", **{"search.space": space, "search.trial_epochs": 2})
    assert mended.failure is None
    assert mended.epochs == 2
    assert last_checkpoint(tmp_path / "search" / mended.id).config.train.accumulate == 2
    assert failed.failure is not None
    assert "out of memory in step 0 with data.batch_size 2 in train.accumulate 2 parts" in failed.failure


def test_a_trial_that_dies_after_each_epoch_comes_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on spot machines: deaths count in a row, and each epoch makes good for those before it."""
    run_trial = search._run_trial

    def doomed(sample: dict[str, Any], plan: Any) -> None:
        from nuciseg.engine.loop import Trainer

        def num_epochs() -> int:
            return sum(len(read_metrics(path)) for path in plan.folder.glob("*/metrics.jsonl"))

        def doomed_step(*_: Any) -> Any:
            if num_epochs() > num_before:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*_)

        num_before, step = num_epochs(), Trainer._step
        Trainer._step = doomed_step  # type: ignore[method-assign]
        run_trial(sample, plan)

    monkeypatch.setattr(search, "_run_trial", doomed)
    changes = {"search.space": {"optim.lr": {"choice": [LEARNS]}}, "run.max_failures": 1, "train.epochs": 4}
    _, [trial] = run_search(tmp_path / "search", **changes)
    assert trial.failure is None
    assert logged_epochs(tmp_path / "search" / trial.id) == [1, 2, 3, 4]


def test_a_trial_that_hangs_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first epoch's report is its last sign: it halts itself, and does not die."""
    run_trial = search._run_trial

    def halted(sample: dict[str, Any], plan: Any) -> None:
        from nuciseg.engine.loop import Trainer

        os.environ[TIMEOUT_VARIABLE] = "3"

        def halting_step(*_: Any) -> Any:
            begun = [path.parent for path in plan.folder.glob("*/metrics.jsonl")]
            if begun and not (begun[0] / "halted").exists():
                (begun[0] / "halted").touch()
                os.kill(os.getpid(), signal.SIGSTOP)
            return step(*_)

        step = Trainer._step
        Trainer._step = halting_step  # type: ignore[method-assign]
        run_trial(sample, plan)

    monkeypatch.setattr(search, "_run_trial", halted)

    def await_halt() -> Path:
        wait_until(lambda: [*tmp_path.glob("search/*/halted")] != [], "the halt of the trial")
        return next(tmp_path.glob("search/*/halted")).parent

    with recovery_shown("a trial halted, noticed after 3 s", await_halt):
        _, [trial] = run_search(tmp_path / "search", **{"search.space": {"optim.lr": {"choice": [LEARNS]}}})
    assert trial.failure is None
    assert logged_epochs(tmp_path / "search" / trial.id) == [1, 2, 3, 4]


@pytest.mark.parametrize("truncated", [False, True])
def test_a_trial_whose_process_is_killed_goes_on_from_its_checkpoint(
    truncated: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, victim = tmp_path / "search", tmp_path / "victim"
    run_trial = search._run_trial

    def held(sample: dict[str, Any], plan: Any) -> None:
        """After two epochs the trial's first process waits for its end; until Ray has named it all might be over."""
        from nuciseg.engine.loop import Trainer

        step = Trainer._step

        def held_step(trainer: Any, *_: Any) -> Any:
            if trainer.progress.epoch == 2 and not victim.exists():
                victim.with_suffix(".part").write_text(str(os.getpid()))
                victim.with_suffix(".part").rename(victim)
                threading.Event().wait()
            return step(trainer, *_)

        Trainer._step = held_step  # type: ignore[method-assign]
        run_trial(sample, plan)

    monkeypatch.setattr(search, "_run_trial", held)

    def kill_the_trial() -> Path:
        wait_until(victim.exists, "two epochs of a trial")
        [run_dir] = [path.parent for path in folder.glob("*/metrics.jsonl")]
        if truncated:
            truncate_last_checkpoint(run_dir)
        os.kill(int(victim.read_text()), signal.SIGKILL)
        return run_dir

    with recovery_shown("a trial's process killed", kill_the_trial):
        _, [trial] = run_search(folder, **{"search.space": {"optim.lr": {"choice": [LEARNS]}}})
    said = capsys.readouterr().out
    assert " died - its process ended; it is started again " in said
    assert (
        bool(re.search(r"started; epoch-\S+ is truncated: it goes on from \S+/checkpoints/epoch-", said)) == truncated
    )
    assert trial.failure is None
    assert logged_epochs(folder / trial.id) == [1, 2, 3, 4]
    first = json.loads((folder / trial.id / "metrics.jsonl").read_text().split("\n")[0])
    assert last_checkpoint(folder / trial.id).progress.history[0]["train_s"] == first["train_s"]
