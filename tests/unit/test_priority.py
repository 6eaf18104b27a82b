"""Ray's processes do not interrupt the training that has all cores."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from small_runs import small_config

from nuciseg.distributed.priority import in_background
from nuciseg.distributed.worker import FINISHED_FILE, Job, run_worker
from nuciseg.engine.inference import Place
from nuciseg.tracking import RunIdentity

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has SCHED_BATCH")


def policy_of_a_child() -> int:
    ask = [sys.executable, "-c", "import os; print(os.sched_getscheduler(0))"]
    return int(subprocess.run(ask, capture_output=True, text=True, check=True).stdout)


def test_what_is_started_waits_for_its_turn() -> None:
    with in_background():
        assert policy_of_a_child() == os.SCHED_BATCH
    assert policy_of_a_child() == os.sched_getscheduler(0) == os.SCHED_OTHER


def test_a_worker_trains_in_the_foreground(tmp_path: Path) -> None:
    (tmp_path / FINISHED_FILE).write_text("{}", encoding="utf-8")
    job = Job(small_config(), tmp_path, RunIdentity("run", "run", "tests", "train"))

    def policies() -> tuple[int, int]:
        before = os.sched_getscheduler(0)
        run_worker(job, Place(), lambda _: None)
        return before, os.sched_getscheduler(0)

    with in_background(), ThreadPoolExecutor(1) as worker:  # its thread has the policy of the one that starts it
        assert worker.submit(policies).result() == (os.SCHED_BATCH, os.SCHED_OTHER)
