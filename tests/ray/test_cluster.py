"""What workers inherit from the process that starts Ray."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

import pytest

from nuciseg.distributed.cluster import environment

SCRIPT = """
import os, ray
from nuciseg.distributed.cluster import connect
connect(verbose=False, num_cpus=1, num_gpus=0)
seen = ray.remote(lambda: [os.environ.get(name) for name in ("WANDB_SERVICE", "RAY_API_SERVER_ADDRESS")])
print(*ray.get(seen.remote()), os.environ["WANDB_SERVICE"], os.environ.get("RAY_API_SERVER_ADDRESS"))
"""


def test_workers_are_told_of_the_dashboard_and_of_no_wandb_service_that_ends_before_them() -> None:
    service = "3-1-unix-/nowhere/socket"
    with tempfile.TemporaryDirectory(prefix="ray-") as ray_folder:  # short: sockets lie in it
        environment = {**os.environ, "WANDB_SERVICE": service, "RAY_TMPDIR": ray_folder}
        done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    of_worker, dashboard, here, dashboard_here = done.stdout.split()
    assert (of_worker, here, dashboard_here) == ("None", service, "None")
    assert dashboard.startswith("http://127.0.0.1:")


def test_the_environment_is_as_it_was_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEPT", "before")
    monkeypatch.delenv("ADDED", raising=False)
    with environment({"KEPT": None, "ADDED": "within"}):
        assert "KEPT" not in os.environ
        assert os.environ["ADDED"] == "within"
    assert os.environ["KEPT"] == "before"
    assert "ADDED" not in os.environ
