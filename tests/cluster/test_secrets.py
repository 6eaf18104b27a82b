"""The W&B key reaches a job's workers by ~/.netrc alone: in the end it is nowhere that anybody else would read."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml
from small_runs import SMALL
from wandb.sdk.lib.wbauth.wbnetrc import write_netrc_auth

from nuciseg.config import merged

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

WANDB_URL = "http://127.0.0.1:9"  # nobody listens there
# What the dashboard's pages show, and what its API tells beyond them.
DASHBOARD_PAGES = (
    "api/jobs/", "nodes?view=summary",
    *(f"api/v0/{kind}?detail=1" for kind in ("actors", "tasks", "workers", "nodes", "runtime_envs", "jobs")),
)  # fmt: skip
# A job of one task, which tells the key that it found without telling it.
FIND_KEY = """
import hashlib, logging, ray
from wandb.sdk.lib.wbauth import read_netrc_auth

def digest(url):
    return hashlib.sha256(read_netrc_auth(host=url).encode()).hexdigest()

ray.init(logging_level=logging.ERROR)
print("digest", ray.get(ray.remote(digest).remote("URL")))
"""


@dataclass(frozen=True)
class Head:
    """A Ray head as cluster.yaml starts it: with a token, at addresses of its own."""

    home: Path
    ray_dir: Path
    dashboard: str
    token: str
    environment: dict[str, str]

    def submit(self, *entrypoint: str, options: tuple[str, ...] = ()) -> str:
        """Run a job to its end as a user does; returns all that was printed."""
        command = ["ray", "job", "submit", "--address", self.dashboard, *options, "--", *entrypoint]
        result = subprocess.run(
            [sys.executable, "-m", "ray.scripts.scripts", *command[1:]],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
        )
        assert result.returncode == 0, result.stdout
        return result.stdout

    def page(self, name: str) -> str:
        headers = {"Authorization": f"Bearer {self.token}"}
        request = urllib.request.Request(f"{self.dashboard}/{name}", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return str(answer.read().decode())
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{name}: {error.code} {error.read().decode()}") from None

    def processes(self) -> list[psutil.Process]:
        """All of this Ray, known by its folder, and what they started."""
        found = set()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess):
                if str(self.ray_dir) in " ".join(process.cmdline()):
                    found |= {process, *process.children(recursive=True)}
        return list(found)

    def places_of(self, secret: str, *folders: Path) -> list[str]:
        """Where `secret` can be read: dashboard, command lines, environments, files of Ray and of `folders`."""
        places = [f"dashboard {name}" for name in DASHBOARD_PAGES if secret in self.page(name)]
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):  # ended meanwhile
                name, command, environment = process.name(), " ".join(process.cmdline()), str(process.environ())
                places += [f"command line of {name}"] * (secret in command)
                places += [f"environment of {name}"] * (secret in environment)
        for folder in (self.ray_dir, *folders):
            files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
            places += [f"file {path}" for path in files if secret.encode() in path.read_bytes()]
        return places


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@pytest.fixture(scope="module")
def wandb_key() -> str:
    return secrets.token_hex(20)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory, wandb_key: str) -> Iterator[Head]:
    home = tmp_path_factory.mktemp("home")
    token = secrets.token_hex(32)
    (home / ".ray").mkdir()
    token_file = home / ".ray" / "auth_token"
    token_file.touch(mode=0o600)
    token_file.write_text(token)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NETRC", str(home / ".netrc"))
        write_netrc_auth(host=WANDB_URL, api_key=wandb_key)  # what `wandb login` does
    # Ports of its own for all that has a fixed one: other Rays may run on the machine.
    names = ("port", "ray-client-server-port", "dashboard-port", "dashboard-agent-listen-port")
    names += ("dashboard-agent-grpc-port", "metrics-export-port", "runtime-env-agent-port")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "RAY_ADDRESS"))}
    environment |= {
        "HOME": str(home),
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_raylet_start_wait_time_s": "300",  # Ray's agents take long to come up on a busy machine
        "RAY_agent_register_timeout_ms": "300000",
        "WANDB_BASE_URL": WANDB_URL,
        "NUCISEG_CACHE": str(home / "cache"),
    }
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as ray_dir:  # short: it holds sockets
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
        command += [f"--{name}={port}" for name, port in ports.items()]
        command += ["--dashboard-host=127.0.0.1", "--node-ip-address=127.0.0.1", f"--temp-dir={ray_dir}"]
        command += ["--num-cpus=2", "--num-gpus=0", "--object-store-memory=100000000"]
        with (home / "start.log").open("w") as log:
            started = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        dashboard = f"http://127.0.0.1:{ports['dashboard-port']}"
        found = Head(home, Path(ray_dir), dashboard, token, environment)
        try:
            wait_until_up(found, started)
            yield found
        finally:
            end(started, found)


def wait_until_up(head: Head, started: subprocess.Popen[bytes], patience_s: float = 400) -> None:
    deadline = time.monotonic() + patience_s
    log = head.home / "start.log"
    while "Ray runtime started" not in log.read_text() or not answers(head):
        alive = started.poll() is None and time.monotonic() < deadline
        assert alive, log.read_text()
        time.sleep(0.5)


def answers(head: Head) -> bool:
    try:
        head.page("api/jobs/")
    except (urllib.error.URLError, OSError, AssertionError):
        return False
    return True


def end(started: subprocess.Popen[bytes], head: Head) -> None:
    """End this Ray alone: others may run on the machine."""
    everything = head.processes()
    started.terminate()
    for process in psutil.wait_procs(everything, timeout=30)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    started.wait(10)


def test_search_finds_a_key_that_was_given_away(head: Head) -> None:
    """Were the key handed over as an environment variable, the tests below would find it."""
    given_away = secrets.token_hex(20)
    runtime_env = json.dumps({"env_vars": {"WANDB_API_KEY": given_away}})
    head.submit("true", options=("--runtime-env-json", runtime_env))
    places = head.places_of(given_away)
    assert any(place.startswith("dashboard api/jobs") for place in places), places


def test_key_reaches_the_workers_and_nothing_else(head: Head, wandb_key: str, tmp_path: Path) -> None:
    settings = tmp_path / "small.yaml"
    tracked = {"tracking": {"kind": "wandb"}, "train": {"epochs": 1}, "run": {"storage_path": str(tmp_path / "runs")}}
    settings.write_text(yaml.safe_dump(merged(SMALL, tracked)), encoding="utf-8")
    printed = head.submit(sys.executable, "-m", "nuciseg.train", "--config", str(settings))
    assert list((tmp_path / "runs").rglob("run-*.wandb")), "the run was tracked"
    found = head.submit(sys.executable, "-c", FIND_KEY.replace("URL", WANDB_URL))
    assert f"digest {hashlib.sha256(wandb_key.encode()).hexdigest()}" in found, "what the worker found is the key"
    assert wandb_key not in printed + found
    assert head.places_of(wandb_key, tmp_path) == []


def test_nobody_is_let_in_without_the_token(head: Head) -> None:
    for headers in ({}, {"Authorization": f"Bearer {secrets.token_hex(32)}"}):
        request = urllib.request.Request(f"{head.dashboard}/api/jobs/", headers=headers)
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=60)
        assert refused.value.code in (401, 403)
    assert head.places_of(head.token) == []
