"""What both launches share: a search of seconds, how a user submits it and reads what came of it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from hosts import Host, wait_for
from small_runs import QUICK_TO_LEARN

from nuciseg.config import merged

JOBS = "http://127.0.0.1:8265"  # where `ray dashboard` forwards the cluster's dashboard to
RAY_FOLDER = Path("/tmp") / "ray"  # on each node
OBJECT_STORE_BYTES = 128 * 2**20


def write_search(path: Path, num_trials: int, epochs: int, **scale: Any) -> None:
    """A search of `num_trials` learning rates, each to its end."""
    rates = [0.05 / 2**number for number in range(num_trials)]
    search = {
        "train": {"epochs": epochs},
        "scale": scale,
        "search": {"sampler": "grid", "scheduler": "none", "space": {"optim.lr": {"choice": rates}}},
    }
    path.write_text(yaml.safe_dump(merged(QUICK_TO_LEARN, search)))


def limit_nodes(config: dict[str, Any], limits: str = "") -> None:
    """Add to `ray start` of a cluster file what all nodes of one machine have to do with, and further `limits`."""
    limits = f" --object-store-memory={OBJECT_STORE_BYTES} {limits}"
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        [place] = [number for number, command in enumerate(commands) if "ray start" in command]
        commands[place] = commands[place].rstrip() + limits.rstrip()


def open_dashboard(laptop: Host, cluster_file: str, log: Path) -> subprocess.Popen[bytes]:
    """Keep `ray dashboard` running on the laptop, as somebody does who submits jobs."""
    forwarding = laptop.start(f"ray dashboard {cluster_file}", log)
    wait_for(lambda: laptop.listens(8265) or forwarding.poll() is not None, "the dashboard", 120)
    assert forwarding.poll() is None, log.read_text()
    return forwarding


def close_dashboard(forwarding: subprocess.Popen[bytes]) -> None:
    """End `ray dashboard` by Ctrl+C."""
    os.killpg(forwarding.pid, signal.SIGINT)
    forwarding.wait(60)


def submit(laptop: Host, words: Sequence[str], *, timeout_s: float) -> str:
    """Submit a job that goes on by itself; returns its id."""
    command = f"ray job submit --address {JOBS} --no-wait -- {' '.join(words)}"
    said = laptop.run(command, timeout_s=timeout_s).stdout
    [job] = set(re.findall(r"raysubmit_\w+", said))
    return str(job)


def printed_by(job: str, head: Host, inside: str = "") -> str:
    """What a job has printed up to now, as the head keeps it; `inside` comes before a command of its container."""
    command = f"{inside} sh -c 'cat {RAY_FOLDER}/session_*/logs/job-driver-{job}.log'"
    return head.run(command, timeout_s=60, check=False).stdout


def wait_for_end(job: str, laptop: Host, *, limit_s: float) -> str:
    """Wait for the end of a job; returns what it printed. Raises AssertionError where it failed."""
    said = laptop.run(f"ray job logs --address {JOBS} --follow {job}", timeout_s=limit_s).stdout
    status = laptop.run(f"ray job status --address {JOBS} {job}", timeout_s=120).stdout
    assert "succeeded" in status.lower(), f"{status}\n{said}"
    return said


def trials_in(search_dir: Path) -> list[dict[str, Any]]:
    trials: list[dict[str, Any]] = json.loads((search_dir / "results.json").read_text())
    return trials


def hosts_with(process: str, hosts: Sequence[Host]) -> set[str]:
    """The names of the hosts on which a process runs whose command line holds `process`."""
    return {host.name for host in hosts if any(process in line for line in host.processes())}
