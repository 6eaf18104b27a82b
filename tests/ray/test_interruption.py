"""A search or run whose driver is killed or interrupted goes on by `--resume` as if nothing had happened.

Each driver starts its own Ray.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from played_nodes import HELD_RUNS, await_held, hold, release
from ray.tune.search.optuna import OptunaSearch
from small_runs import (
    QUICK_TO_LEARN,
    assert_same_run,
    figures,
    last_checkpoint,
    logged_epochs,
    recovery_shown,
    run,
    wait_until,
)
from wandb_offline import assert_one_wandb_run, read_offline_runs

from nuciseg.cli import INTERRUPTED
from nuciseg.config import load_config, merged
from nuciseg.distributed.failures import STOP_FILE
from nuciseg.distributed.trials import RESULTS_FILE
from nuciseg.distributed.worker import FINISHED_FILE, LOOK_S
from nuciseg.errors import StoppedError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

NUM_EPOCHS = 10
LAST_EPOCH = 24 * (NUM_EPOCHS - 1)  # its first step: 48 images are 24 batches
SEARCH = {
    "train": {"epochs": NUM_EPOCHS},
    "scale": {"cpus_per_worker": 1},
    "tracking": {"kind": "offline"},
    "run": {"storage_path": "runs", "name": "search"},
    "search": {
        "sampler": "optuna",
        "scheduler": "none",
        "max_concurrent": 2,
        "space": {"optim.lr": {"loguniform": [0.01, 0.1]}},
    },
}


class Driver:
    """`python -m nuciseg.VERB` as a process whose own processes can be told from those of any other.

    Where it `can_hold`, its steps wait where they are told to by `hold`.
    """

    def __init__(self, folder: Path, verb: str, *words: str, can_hold: bool = False) -> None:
        self.log = folder / "driver.log"
        with self.log.open("a") as log:
            program = [str(HELD_RUNS), verb, "0"] if can_hold else ["-m", f"nuciseg.{verb}"]
            command = [sys.executable, *program, *words]
            # Whoever runs the tests in the background ignores SIGINT, and so would all that it starts.
            self.process = psutil.Popen(
                command,
                cwd=folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )
        self.family: list[psutil.Process] = []

    def interrupt(self, by: signal.Signals) -> int:
        """A signal to the driver alone. Ray ends what trains; agents of its own may stay and are ended here."""
        self.family = self.process.children(recursive=True)
        self.process.send_signal(by)
        returncode = self.process.wait(timeout=60)
        _, left = psutil.wait_procs(self.family, timeout=20)
        assert not [process for process in left if "ImplicitFunc" in process.name()], "trials outlive their driver"
        self.end()
        return returncode

    def end(self) -> None:
        """After a test, however it went: nothing of this driver stays, and nothing else is touched."""
        if self.process.is_running() and self.process.status() != psutil.STATUS_ZOMBIE:
            self.family += self.process.children(recursive=True)
            self.family.append(self.process)
        for process in self.family:
            if process.is_running():
                process.kill()


@pytest.fixture
def drivers() -> Iterator[list[Driver]]:
    started: list[Driver] = []
    yield started
    for driver in started:
        driver.end()


def files_of(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("by", "num_trials", "final"),
    [(signal.SIGKILL, 4, True), (signal.SIGINT, 3, False), (signal.SIGTERM, 3, False)],
    ids=["SIGKILL", "SIGINT", "SIGTERM"],
)
def test_an_interrupted_search_goes_on_where_it_was(
    by: signal.Signals, num_trials: int, final: bool, tmp_path: Path, drivers: list[Driver]
) -> None:
    size = {"search": {"num_trials": num_trials, "final": final}}
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(merged(merged(QUICK_TO_LEARN, SEARCH), size)))
    folder = tmp_path / "runs" / "search"

    def trial_dirs() -> list[Path]:
        return [path.parent for path in folder.glob("*/metrics.jsonl") if path.parent.name != "final"]

    def finished() -> list[Path]:
        return [run_dir for run_dir in trial_dirs() if (run_dir / FINISHED_FILE).exists()]

    def running() -> list[Path]:
        return [run_dir for run_dir in trial_dirs() if run_dir not in finished() and len(logged_epochs(run_dir)) >= 2]

    def in_their_first_half() -> list[Path]:
        return [run_dir for run_dir in running() if len(logged_epochs(run_dir)) <= NUM_EPOCHS // 2]

    drivers.append(Driver(tmp_path, "tune", "--config", "search.yaml", can_hold=True))
    wait_until(
        lambda: bool(finished() and in_their_first_half()) or not drivers[0].process.is_running(),
        "a finished and a running trial",
    )
    for run_dir in running():
        hold(run_dir, LAST_EPOCH)  # or it might come to its end while the driver does
    expected = {signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: INTERRUPTED, signal.SIGTERM: StoppedError.exit_code}
    assert drivers[0].interrupt(by) == expected[by]
    if by == signal.SIGTERM:
        last = drivers[0].log.read_text().splitlines()[-1]
        assert re.fullmatch(
            r"nuciseg: asked to stop; .* goes on by `python -m nuciseg\.tune --resume \S*runs/search`", last
        )
    assert not (folder / "final").exists()
    kept = {run_dir: (files_of(run_dir / "checkpoints"), files_of(run_dir / "wandb")) for run_dir in finished()}
    interrupted = {run_dir: (run_dir / "metrics.jsonl").read_text().split("\n")[0] for run_dir in running()}
    assert kept, drivers[0].log.read_text()
    assert interrupted, drivers[0].log.read_text()
    assert len(kept) < num_trials

    with recovery_shown(f"a search ended by {by.name}, from --resume", lambda: max(interrupted)):
        drivers.append(Driver(tmp_path, "tune", "--resume", "runs/search"))
        drivers[1].process.wait(timeout=500)
    log = drivers[1].log.read_text()
    assert drivers[1].process.returncode == 0, log
    assert "Traceback" not in log

    trials = json.loads((folder / RESULTS_FILE).read_text())
    assert len(trials) == num_trials
    assert [(trial["epochs"], trial["failure"]) for trial in trials] == [(NUM_EPOCHS, None)] * num_trials
    for run_dir, (checkpoints, wandb) in kept.items():
        assert files_of(run_dir / "checkpoints") == checkpoints, "a finished trial was trained again"
        assert files_of(run_dir / "wandb") == wandb
    for run_dir, first_line in interrupted.items():
        # Not begun anew: the first epoch that the checkpoint remembers is the one that ran before the kill.
        assert last_checkpoint(run_dir).progress.history[0]["train_s"] == json.loads(first_line)["train_s"]
    for trial in trials:
        run_dir = folder / trial["id"]
        assert logged_epochs(run_dir) == list(range(1, NUM_EPOCHS + 1))
        legs = read_offline_runs(run_dir)
        # W&B had written nothing yet in the file of a process that was killed at once.
        assert {leg.run["id"] for leg in legs if leg.run} == {f"search-{trial['id']}"}
        assert_one_wandb_run(run_dir)
        if run_dir in interrupted:
            calm = load_config(tmp_path / "search.yaml").replaced({**trial["sample"], "search.space": {}})
            run(calm, tmp_path / "calm" / trial["id"])
            assert_same_run(run_dir, tmp_path / "calm" / trial["id"])
        assert len(legs) == (2 if run_dir in interrupted else 1) or run_dir not in {*interrupted, *kept}

    studied = [sorted(folder.glob("searcher-state-*.pkl"))[-1]]
    sampler = OptunaSearch(metric="score", mode="max")
    sampler.restore(str(studied[0]))
    told = [trial.value for trial in sampler._ot_study.trials if trial.value is not None]
    assert len(told) == num_trials, "the sampler forgot what it had learned"
    assert sorted(told) == pytest.approx(sorted(trial["score"] for trial in trials))

    assert "best checkpoint: " in log
    if final:
        assert logged_epochs(folder / "final") == list(range(1, NUM_EPOCHS + 1))
        assert (folder / "final" / FINISHED_FILE).exists()


def test_a_run_of_two_workers_that_is_asked_to_end_goes_on_where_it_was(tmp_path: Path, drivers: list[Driver]) -> None:
    of_two = {
        "train": {"epochs": 4},
        "scale": {"num_workers": 2, "cpus_per_worker": 1},
        "tracking": {"kind": "offline"},
        "run": {"storage_path": "runs"},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(merged(QUICK_TO_LEARN, of_two)))
    calm, stopped = (tmp_path / "runs" / name for name in ("calm", "stopped"))

    def start(*words: str, can_hold: bool = False) -> Driver:
        drivers.append(Driver(tmp_path, "train", *words, can_hold=can_hold))
        return drivers[-1]

    def release_when_asked_to_end() -> None:
        wait_until((stopped / STOP_FILE).exists, "what the workers are told by")
        time.sleep(LOOK_S)  # so long after its last look the first worker looks again in the step that is held
        release(stopped, middle_of_epoch_3)

    assert start("--config", "run.yaml", "--run.name", "calm").process.wait(timeout=200) == 0
    middle_of_epoch_3 = 2 * 24 + 12
    hold(stopped, middle_of_epoch_3)  # or the run might come to its end before its driver tells it
    driver = start("--config", "run.yaml", "--run.name", "stopped", can_hold=True)
    await_held(stopped, middle_of_epoch_3)
    threading.Thread(target=release_when_asked_to_end, daemon=True).start()
    assert driver.interrupt(signal.SIGTERM) == StoppedError.exit_code, driver.log.read_text()
    last = driver.log.read_text().splitlines()[-1]
    assert re.fullmatch(
        r"nuciseg: asked to stop in epoch \d+, after a checkpoint; go on with --resume \S*runs/stopped", last
    )
    assert logged_epochs(stopped) == [1, 2]
    assert start("--resume", "runs/stopped").process.wait(timeout=200) == 0
    assert logged_epochs(stopped) == [1, 2, 3, 4]
    assert_one_wandb_run(stopped)
    found, expected = last_checkpoint(stopped), last_checkpoint(calm)
    for mine, theirs in ((found.weights, expected.weights), (found.training, expected.training)):
        assert mine.keys() == theirs.keys()
        assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
    for row, calm_row in zip(figures(found.progress.history), figures(expected.progress.history), strict=True):
        # The workers' sums of the losses meet twice in the epoch that was cut, so their mean rounds otherwise.
        assert row == pytest.approx(calm_row, rel=1e-6)
