"""The machine that holds a run's folder loses its power while the run writes into it, and comes back."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from hosts import HOME, Host, Lan, wait_for, why_no_hosts
from small_runs import QUICK_TO_LEARN, assert_same_run, logged_epochs, run, show_seconds
from wandb_offline import read_offline_runs

from nuciseg.config import load_config, merged

AWAY_S = 30
NUM_EPOCHS = 8


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


def mount(folder: str, of: Host, on: Host) -> None:
    """Like a network's file system that gives up: what is asked of it fails after some seconds, until it is back."""
    patience = "reconnect,ServerAliveInterval=2,ServerAliveCountMax=2,ConnectTimeout=2"
    secure = "StrictHostKeyChecking=no,UserKnownHostsFile=/dev/null"
    on.run(f"mkdir {folder} && sshfs {of.address}:{folder} {folder} -o {patience},{secure}", timeout_s=60)


def test_a_run_waits_for_its_storage(tmp_path: Path) -> None:
    here = {
        "run": {"storage_path": f"{HOME}/runs", "name": "run"},
        "data": {"synthetic": {"num_train": 400}},
        "tracking": {"kind": "offline"},
    }
    settings = merged(merged(QUICK_TO_LEARN, {"train": {"epochs": NUM_EPOCHS}}), here)
    with Lan(tmp_path / "lan") as lan:
        storage = lan.add("storage", 1)
        trainer = lan.add("trainer", 2, has_key=True, login=["export OMP_NUM_THREADS=1"])
        (storage.home / "runs").mkdir()
        mount(f"{HOME}/runs", of=storage, on=trainer)
        (trainer.home / "run.yaml").write_text(yaml.safe_dump(settings))
        log = tmp_path / "train.log"
        training = trainer.start("python -m nuciseg.train --config run.yaml", log)
        run_dir = storage.home / "runs" / "run"

        def printed() -> str:
            return log.read_text()

        wait_for(lambda: len(logged_epochs(run_dir)) >= 2, "the second epoch", 120, step_s=0.02, told=printed)
        storage.power_off()
        assert logged_epochs(run_dir)[-1] < NUM_EPOCHS - 2
        before = logged_epochs(run_dir)
        time.sleep(AWAY_S)
        assert training.poll() is None, printed()
        assert logged_epochs(run_dir) == before
        lan.power_on(storage)
        back_s = time.time()
        wait_for(lambda: len(logged_epochs(run_dir)) > len(before), "the next epoch", 120, step_s=0.02, told=printed)
        show_seconds("storage away, from its return to the next epoch", time.time() - back_s)
        try:
            assert training.wait(120) == 0, printed()
        except subprocess.TimeoutExpired:
            raise AssertionError(printed()) from None
    assert logged_epochs(run_dir) == list(range(1, NUM_EPOCHS + 1))
    legs = read_offline_runs(run_dir)
    assert len({leg.run["id"] for leg in legs}) == 1
    assert sorted(epoch for leg in legs for epoch in leg.epochs) == logged_epochs(run_dir)
    assert legs[-1].artifacts, "the checkpoint is in the file that is whole"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    run(load_config(tmp_path / "run.yaml"), tmp_path / "undisturbed")
    assert_same_run(run_dir, tmp_path / "undisturbed")
