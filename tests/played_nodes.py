"""A Ray cluster whose nodes are processes of this machine: their power can be cut, and spares join.

Every node has a raylet and workers of its own, the head also the GCS. A power cut is SIGKILL to all of them at once, so
that nobody says goodbye. All have the same address and files, as nodes with a network's folder have.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray._common.utils import reset_ray_address
from ray._private import services
from ray._private.node import Node
from ray.cluster_utils import Cluster
from small_runs import wait_until

START_S = 240.0  # Ray itself gives a node 30 s to start, which is short where tests of several kinds share a machine
HELD_RUNS = Path(__file__).with_name("held_runs.py")
_EVERY_NODE: dict[str, Any] = {"object_store_memory": 80 * 2**20, "dashboard_agent_listen_port": 0}


class PlayedCluster:
    """A head without CPUs and the nodes that were added; `address` is what drivers join."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._cluster = Cluster()
        self._drivers: list[psutil.Popen] = []
        self._start_head()

    def _start_head(self) -> None:
        self._add(num_cpus=0, include_dashboard=False, include_log_monitor=False, no_monitor=True)
        reset_ray_address()  # it is nobody else's
        self.address: str = self._cluster.address

    def add_node(self, num_cpus: int = 1) -> Node:
        """A node more; it has joined when this returns."""
        return self._add(num_cpus=num_cpus)

    def _add(self, **arguments: Any) -> Node:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(services, "get_node", _patiently(services.get_node))
            return self._cluster.add_node(**_EVERY_NODE, **arguments)

    def have_nodes(self, num_nodes: int) -> list[Node]:
        """So many nodes of one CPU beside the head: those that are there, and new ones."""
        nodes = sorted(self._cluster.worker_nodes, key=lambda node: str(node.node_id))
        for node in nodes[num_nodes:]:
            self.cut_power(node)
        return nodes[:num_nodes] + [self.add_node() for _ in range(num_nodes - len(nodes))]

    def cut_power(self, *nodes: Node) -> float:
        """SIGKILL to every process of the nodes at once; returns when, by `time.time`."""
        family: set[psutil.Process] = set()
        while found := set().union(*map(processes_of, nodes)) - family:  # some may be starting others
            for process in found:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGSTOP)
            family |= found
        at_s = time.time()
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for node in nodes:
            self._cluster.remove_node(node, allow_graceful=False)
        return at_s

    def lose_head(self, *drivers: psutil.Popen) -> float:
        """No power for the drivers, the head and all nodes, which without a head are of no use, and a new head.

        Returns when it was cut, by `time.time`.
        """
        at_s = time.time()
        for driver in drivers:
            driver.kill()
            driver.wait()
        self.cut_power(*self._cluster.list_all_nodes())
        self._start_head()
        return at_s

    def drain(self, node: Node, deadline_s: int) -> None:
        """What is run on a machine that was told that it has to go."""
        reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        command = [str(Path(sys.executable).with_name("ray")), "drain-node", "--address", self.address, *reason]
        command += ["--node-id", str(node.node_id), "--deadline-remaining-seconds", str(deadline_s)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr

    def drive(self, verb: str, *words: object, step_s: float = 0.0) -> psutil.Popen:
        """`python -m nuciseg.VERB` as a process of its own that joins the cluster; what it says is in `driver.log`.

        A step takes `step_s` longer, and waits where it is told to by `hold`.
        """
        command = [sys.executable, str(HELD_RUNS), verb, str(step_s), *map(str, words)]
        with self.log.open("a") as log:
            driver = psutil.Popen(
                command,
                cwd=self.folder,
                env={**os.environ, "RAY_ADDRESS": self.address},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self._drivers.append(driver)
        return driver

    @property
    def log(self) -> Path:
        return self.folder / "driver.log"

    def await_end(self, driver: psutil.Popen, limit_s: float = 400.0) -> None:
        """The driver has ended well."""
        assert driver.wait(timeout=limit_s) == 0, self.log.read_text()

    def end_drivers(self) -> None:
        """Nothing runs on the cluster any more: what a test that failed has left would hold its nodes."""
        for driver in self._drivers:
            if driver.poll() is None:
                driver.kill()
                driver.wait()

    def end(self) -> None:
        """All processes of the cluster and its drivers are gone."""
        self.end_drivers()
        self.cut_power(*self._cluster.list_all_nodes())


def can_hide_a_folder() -> bool:
    return shutil.which("unshare") is not None and subprocess.run(["unshare", "--mount", "true"]).returncode == 0


@contextlib.contextmanager
def node_without(folder: Path, address: str) -> Iterator[None]:
    """A node of one CPU that joins the cluster and sees an empty folder of its own in place of `folder`."""
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--address={address}", "--block", "--num-cpus=1"]
    start += [f"--object-store-memory={128 * 2**20}", "--dashboard-agent-listen-port=0"]
    hide = f'mount -t tmpfs none "{folder}" && exec "$@"'
    node = subprocess.Popen(["unshare", "--mount", "sh", "-c", hide, "sh", *start], stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        family = [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]
        node.terminate()
        for process in psutil.wait_procs(family, timeout=30)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        node.wait()
        reset_ray_address()


@contextlib.contextmanager
def played_cluster(folder: Path) -> Iterator[PlayedCluster]:
    """A cluster in a Ray that lets in whoever knows the port, whatever tokens this machine has."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_AUTH_MODE", "disabled")
        environment.setenv("RAY_raylet_start_wait_time_s", str(round(START_S)))
        environment.setenv("RAY_prestart_worker_first_driver", "0")  # processes that may never be used
        cluster = PlayedCluster(folder)
        try:
            yield cluster
        finally:
            cluster.end()


def processes_of(node: Node) -> set[psutil.Process]:
    """The processes of a node that are there now, those that its raylet started among them."""
    found: set[psutil.Process] = set()
    for pid in [info.process.pid for infos in node.all_processes.values() for info in infos]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            found |= {process, *process.children(recursive=True)}
    return found


def has_worker(node: Node) -> bool:
    """Whether a worker of Ray Train runs on the node."""
    names = []
    for process in processes_of(node):
        with contextlib.suppress(psutil.NoSuchProcess):
            names.append(" ".join(process.cmdline()))
    return any("RayTrainWorker" in name for name in names)


def hold(run_dir: Path, step: int) -> None:
    """Have every worker of the run, which may not have begun, wait before the step (counted from 0)."""
    _hold(run_dir, step).parent.mkdir(parents=True, exist_ok=True)
    _hold(run_dir, step).touch()


def await_held(run_dir: Path, step: int) -> None:
    """Until a worker waits there, one that is still there."""
    held = _hold(run_dir, step).with_suffix(".held")
    held.unlink(missing_ok=True)  # who waits makes it again
    wait_until(held.exists, f"step {step} of {run_dir.name}")


def release(run_dir: Path, step: int) -> None:
    """Let the workers go on."""
    _hold(run_dir, step).unlink()


def _hold(run_dir: Path, step: int) -> Path:
    return run_dir.with_name(f"{run_dir.name}-holds") / str(step)


def _patiently(ask: Callable[..., Any]) -> Callable[..., Any]:
    def asking(*arguments: Any) -> Any:
        deadline = time.monotonic() + START_S
        while True:
            try:
                return ask(*arguments)
            except RuntimeError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    return asking
