"""The machine that holds a run's folder loses its power while the run writes into it, and comes back."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from hosts import HOME, Host, Lan, wait_for, why_no_hosts
from small_runs import QUICK_TO_LEARN, assert_same_run, logged_epochs, run, show_seconds
from wandb_offline import assert_one_wandb_run, read_offline_runs

from nuciseg.config import load_config, merged
from nuciseg.distributed.trials import RESULTS_FILE

AWAY_S = 30
NUM_EPOCHS = 6


def why_no_network_folder() -> str | None:
    """Why a folder of one host cannot be mounted on another, with the cure; None where it can."""
    if why_no_hosts() is not None:
        return why_no_hosts()
    if shutil.which("sshfs") is None:
        return "a folder is mounted over the network by sshfs, which is missing: apt-get install sshfs"
    return None if Path("/dev/fuse").exists() else "this machine has no /dev/fuse, which sshfs mounts by"


pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(why_no_network_folder() is not None, reason=str(why_no_network_folder())),
]


@dataclass(frozen=True)
class Work:
    """A host that trains into `runs`, which it mounts from another host."""

    lan: Lan
    storage: Host
    trainer: Host
    log: Path

    @property
    def runs(self) -> Path:
        return self.storage.home / "runs"

    def start(self, verb: str, **more: Any) -> subprocess.Popen[bytes]:
        self.trainer_file("work.yaml").write_text(yaml.safe_dump(settings(**more)))
        return self.trainer.start(f"python -m nuciseg.{verb} --config work.yaml", self.log)

    def trainer_file(self, name: str) -> Path:
        return self.trainer.home / name

    def lose_storage_for_a_while(self, run_dir: Path, working: subprocess.Popen[bytes]) -> None:
        """Once an epoch of the run has ended; it goes on afterwards."""
        wait_for(lambda: len(logged_epochs(run_dir)) >= 2, "the second epoch", 120, step_s=0.02, told=self.printed)
        self.storage.power_off()
        before = logged_epochs(run_dir)
        assert before[-1] < NUM_EPOCHS - 2
        time.sleep(AWAY_S)
        assert working.poll() is None, self.printed()
        assert logged_epochs(run_dir) == before
        self.lan.power_on(self.storage)
        back_s = time.time()
        wait_for(lambda: logged_epochs(run_dir) > before, "the next epoch", 120, step_s=0.02, told=self.printed)
        show_seconds("storage away, from its return to the next epoch", time.time() - back_s)

    def printed(self) -> str:
        return self.log.read_text()

    def await_end(self, working: subprocess.Popen[bytes]) -> None:
        wait_for(lambda: working.poll() is not None, "the end", 200, told=self.printed)
        assert working.returncode == 0, self.printed()
        assert "Traceback" not in self.printed()


def settings(**more: Any) -> dict[str, Any]:
    here = {
        "run": {"storage_path": f"{HOME}/runs", "name": "work"},
        "data": {"synthetic": {"num_train": 300}},  # epochs of seconds
        "train": {"epochs": NUM_EPOCHS},
        "tracking": {"kind": "offline"},
    }
    return merged(merged(QUICK_TO_LEARN, here), more)


@pytest.fixture
def work(tmp_path: Path) -> Iterator[Work]:
    with Lan(tmp_path / "lan") as lan:
        storage = lan.add("storage", 1)
        trainer = lan.add("trainer", 2, has_key=True, login=["export OMP_NUM_THREADS=1 RAY_USAGE_STATS_ENABLED=0"])
        (storage.home / "runs").mkdir()
        # What is asked of it fails after some seconds, until it is back: a network's file system that gives up.
        patience = "reconnect,ServerAliveInterval=2,ServerAliveCountMax=2,ConnectTimeout=2"
        secure = "StrictHostKeyChecking=no,UserKnownHostsFile=/dev/null"
        there = f"{storage.address}:{HOME}/runs"
        trainer.run(f"mkdir ~/runs && sshfs {there} ~/runs -o {patience},{secure}", timeout_s=60)
        yield Work(lan, storage, trainer, tmp_path / "work.log")


def assert_undisturbed(run_dir: Path, folder: Path, **changes: Any) -> None:
    """All epochs once, in W&B's files too, and every bit as in a run of this process."""
    assert logged_epochs(run_dir) == list(range(1, NUM_EPOCHS + 1))
    assert_one_wandb_run(run_dir)
    assert read_offline_runs(run_dir)[-1].artifacts, "the checkpoint is in the file that is whole"
    folder.mkdir()
    (folder / "work.yaml").write_text(yaml.safe_dump(settings()))
    run(load_config(folder / "work.yaml").replaced(changes), folder / "run")
    assert_same_run(run_dir, folder / "run")


def test_a_run_waits_for_its_storage(work: Work, tmp_path: Path) -> None:
    training = work.start("train")
    work.lose_storage_for_a_while(work.runs / "work", training)
    work.await_end(training)
    assert_undisturbed(work.runs / "work", tmp_path / "undisturbed")


def test_a_search_waits_for_its_storage(work: Work, tmp_path: Path) -> None:
    rates = [0.02, 0.03]
    space = {"optim.lr": {"choice": rates}}
    searching = work.start(
        "tune",
        search={"sampler": "grid", "scheduler": "none", "final": False, "max_concurrent": 1, "space": space},
        scale={"cpus_per_worker": 1},
    )
    search_dir = work.runs / "work"
    wait_for(lambda: [*search_dir.glob("*/metrics.jsonl")] != [], "the first trial", 120, told=work.printed)
    [first] = search_dir.glob("*/metrics.jsonl")
    work.lose_storage_for_a_while(first.parent, searching)
    work.await_end(searching)
    trials = json.loads((search_dir / RESULTS_FILE).read_text())
    assert [trial["failure"] for trial in trials] == [None, None]
    for trial in trials:
        rate = trial["sample"]["optim.lr"]
        assert_undisturbed(search_dir / trial["id"], tmp_path / f"{rate}", **{"optim.lr": rate})
