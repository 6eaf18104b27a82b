"""What is heard from a cluster that asks for a token, runs another Ray, has no GPU yet, or a node without nuciseg.

One cluster of two nodes on this machine. The head's autoscaler has a file that allows two GPU nodes; the second node
runs in an environment that has everything but nuciseg.
"""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from small_runs import wait_until

PACKAGES = Path(sysconfig.get_path("purelib"))
RAY = ("-m", "ray.scripts.scripts", "start", "--disable-usage-stats", "--block", "--dashboard-agent-listen-port=0")
LIMITS = ("--num-cpus=2", f"--object-store-memory={128 * 2**20}")
# Ray's own provider for tests, which starts nodes as processes; here nobody asks it to.
AUTOSCALING = {
    "cluster_name": "grows",
    "max_workers": 3,
    "provider": {"type": "fake_multinode"},
    "auth": {},
    "idle_timeout_minutes": 5,
    "upscaling_speed": 1.0,
    "file_mounts": {},
    "cluster_synced_files": [],
    "file_mounts_sync_continuously": False,
    "initialization_commands": [],
    "setup_commands": [],
    "head_setup_commands": [],
    "worker_setup_commands": [],
    "head_start_ray_commands": [],
    "worker_start_ray_commands": [],
    "head_node_type": "ray.head.default",
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 2}, "node_config": {}, "max_workers": 0},
        "gpu": {"resources": {"CPU": 8, "GPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 3},
    },
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(
        (PACKAGES / "nuciseg").is_dir(), reason="nuciseg lies among the packages, not hidden from a node"
    ),
]


@dataclass(frozen=True)
class Client:
    """Runs Python in processes that know the cluster's address, and its token unless `token` is another."""

    address: str
    folder: Path
    token: str

    def says(self, code: str, token: str | None = None) -> str:
        """The last line that `code` prints, or the error that ends it."""
        done = self._run(["-c", code], token)
        return (done.stdout.strip() or done.stderr.strip()).splitlines()[-1]

    def refusal(self, verb: str, *words: str, token: str | None = None) -> str:
        """The one sentence by which a verb refuses."""
        done = self._run(["-m", f"nuciseg.{verb}", *words], token)
        (sentence,) = done.stderr.strip().splitlines()
        assert done.returncode == 2, sentence
        return sentence

    def _run(self, words: Sequence[str], token: str | None) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "RAY_ADDRESS": self.address, "PYTHONPATH": ""}
        given = self.token if token is None else token
        if given:
            environment.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=given)
        # Ray hands the working folder on to its workers as a place to import from.
        return subprocess.run(
            [sys.executable, *words], cwd=self.folder, env=environment, capture_output=True, text=True, timeout=300
        )


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    folder = tmp_path_factory.mktemp("cluster")
    (folder / "autoscaling.yaml").write_text(yaml.safe_dump(AUTOSCALING))
    venv.create(folder / "bare", with_pip=False)
    bare = folder / "bare" / "bin" / "python"
    (Path(sysconfig.get_path("purelib", vars={"base": str(folder / "bare")})) / "base.pth").write_text(str(PACKAGES))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token = secrets.token_hex(32)
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "PYTHONPATH": "",
        "RAY_FAKE_CLUSTER": "1",
    }
    started: list[subprocess.Popen[bytes]] = []

    # Not where Ray looks for a cluster to join: no other test means this one. Short, because sockets lie in it.
    session = tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)

    def start(python: Path | str, *words: str) -> None:
        command = [str(python), *RAY, *LIMITS, *words]
        started.append(subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL))

    start(sys.executable, "--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={session.name}",
          f"--autoscaling-config={folder / 'autoscaling.yaml'}")  # fmt: skip
    found = Client(f"127.0.0.1:{port}", folder, token)
    try:
        wait_until(lambda: _listens(port) and found.says(NUM_NODES) == "1", "the head node")
        start(bare, f"--address=127.0.0.1:{port}")
        wait_until(lambda: found.says(NUM_NODES) == "2", "the second node")
        yield found
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait(60)
        session.cleanup()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


CONNECTED = "from nuciseg.distributed.cluster import *; import ray; connect(verbose=False); "
NUM_NODES = CONNECTED + "print(sum(node['Alive'] for node in ray.nodes()))"


@pytest.mark.parametrize("token", ["", "0" * 64], ids=["none", "another"])
def test_a_missing_token_is_one_sentence(client: Client, token: str) -> None:
    said = client.refusal("tune", token=token)
    assert said.startswith("nuciseg: the Ray cluster at '127.0.0.1:"), said
    assert "copy ~/.ray/auth_token from the machine that started the cluster, and set RAY_AUTH_MODE=token" in said


def test_another_ray_is_one_sentence(client: Client) -> None:
    said = client.says("import ray; ray.__version__ = '2.59.0'; " + CONNECTED)
    assert said.startswith("nuciseg.errors.ResourceError: the cluster runs Ray 2.60."), said
    assert "this process Ray 2.59.0 with Python " in said


def test_gpus_that_the_cluster_may_grow_to_count(client: Client) -> None:
    scale = "from nuciseg.config import ScaleConfig; need = worker_need(ScaleConfig(use_gpu=True), for_trial=True); "
    said = client.says(CONNECTED + scale + "print(gpus_within_reach(), need, require_room(1, need, '--n', ''))")
    assert said == "2 Need(cpus=4, gpus=1) 2"  # three nodes at most, one of which is there
    said = client.refusal("train", "--scale.num_workers", "5", "--scale.use_gpu", "true")
    assert "but the cluster at its largest (CPUs: 20, GPUs: 2) has room for 2 such workers" in said, said


def test_a_node_without_nuciseg_is_named(client: Client) -> None:
    ask = "from nuciseg.distributed.nodes import *; from nuciseg.distributed.node_facts import versions; "
    said = client.says(CONNECTED + ask + "print([each.failure for each in on_every_node(versions).values()])")
    assert said.startswith("[None, 'cannot import nuciseg; install it there in the same version"), said
    said = client.refusal("tune", "--scale.cpus_per_worker", "1")
    assert "cannot import nuciseg; install it there in the same version" in said, said
