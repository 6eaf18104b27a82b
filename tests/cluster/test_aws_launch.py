"""The Dockerfile is built, and `ray up cluster.yaml` starts its containers for real, on an AWS played by `moto_server`.

Its machines are hosts with a Docker engine. A search calls spot machines up, one of them is taken back, another comes,
and the search ends whole.
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from hosts import HOME, NETWORK, REPOSITORY, Host, Lan, wait_for
from images import OPEN_FILES, USER, Image, built_image, pins, why_no_images
from launches import limit_nodes, open_dashboard, printed_by, submit, trials_in, wait_for_end, write_search
from packaging.utils import canonicalize_name
from small_runs import logged_epochs

pytest.importorskip("flask_cors", reason="moto_server is missing: pip install -e '.[test]'")
pytest.importorskip("boto3", reason="boto3 is missing: pip install -e '.[test]'")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(why_no_images() is not None, reason=str(why_no_images())),
]

CLUSTER = f"{HOME}/cluster.yaml"
PLAYED_AWS = f"python {Path(__file__).with_name('played_aws.py')}"
METADATA = f"python {Path(__file__).parents[1] / 'metadata_service.py'}"
IN_CONTAINER = "docker exec nuciseg"
NUM_DRAINING = (
    'import ray; ray.init(address="auto", logging_level="ERROR"); '
    "from ray._private.state import state; print(len(state.get_draining_nodes()))"
)
FIND_KEY = 'from wandb.sdk.lib.wbauth import read_netrc_auth; print(read_netrc_auth(host="https://api.wandb.ai"))'
# What machines of AWS have from AWS.
ENVIRONMENT = {
    "AWS_ENDPOINT_URL": f"http://{NETWORK}.1:5000",
    "AWS_DEFAULT_REGION": "us-west-2",
    "AWS_ACCESS_KEY_ID": "none",
    "AWS_SECRET_ACCESS_KEY": "none",
}
IN_CONTAINERS = {
    "RAY_prestart_worker_first_driver": "0",  # processes that may never be used
    # Ray counts a silent machine as lost after 20 s, not 65: else the other one might do all the work in the meantime.
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "5",
    "OMP_WAIT_POLICY": "passive",  # as on all hosts
}
SHARED = Path("/shared")  # on all machines
NUM_WORKERS = 2  # machines besides the head
FIRST_HOST = 5  # AWS counts from .4, which the shared file system takes
EPOCHS = 25


@dataclass(frozen=True)
class Aws:
    """A cluster that `ray up` has started from a laptop, and the hosts that are its machines, by address."""

    laptop: Host
    hosts: dict[str, Host]
    shared: Path

    @property
    def head(self) -> Host:
        return self.hosts[f"{NETWORK}.{FIRST_HOST}"]

    def machines(self, kind: str) -> list[dict[str, Any]]:
        """AWS's own list of the machines of a node type that it has not ended."""
        said = self.laptop.run(f"{PLAYED_AWS} instances", timeout_s=120).stdout
        machines: list[dict[str, Any]] = json.loads(said)
        return [machine for machine in machines if machine["kind"] == kind and machine["state"] == "running"]

    def joined(self, kind: str) -> list[dict[str, Any]]:
        """Those of them on whose host Ray runs."""
        return [machine for machine in self.machines(kind) if self._has_ray(self.hosts[machine["address"]])]

    def lose(self, machine: dict[str, Any]) -> None:
        """AWS takes a machine back: it is gone from its list, and without power."""
        self.hosts[machine["address"]].power_off()
        self.laptop.run(f"{PLAYED_AWS} lose {machine['id']}", timeout_s=120)

    def announce(self, machine: dict[str, Any], seconds: int) -> None:
        """The machine's own metadata service says that AWS will take it back."""
        host = self.hosts[machine["address"]]
        host.start(f"{METADATA} {seconds}", host.folder / "metadata.log")

    def num_draining(self) -> int:
        """How many machines have to go, as the head knows."""
        said = self.head.run(f"{IN_CONTAINER} python -c '{NUM_DRAINING}'", timeout_s=120).stdout
        return int(said.splitlines()[-1])

    @staticmethod
    def _has_ray(host: Host) -> bool:
        return any("raylet/raylet" in line for line in host.processes())


@pytest.fixture(scope="module")
def image() -> Iterator[Image]:
    with built_image("nuciseg:0.1.0") as image:
        yield image


@pytest.fixture(scope="module")
def machine(image: Image) -> Iterator[tuple[Host, Host]]:
    """A machine that has the image, by itself, and a laptop from which it is reached."""
    with Lan(image.folder / "lan_of_one") as lan:
        yield image.add_machine(lan, "machine", FIRST_HOST), lan.add("laptop", 1, has_key=True)


@pytest.fixture(scope="module")
def in_image(image: Image, machine: tuple[Host, Host]) -> Callable[..., str]:
    """Runs a command in a container of its own and returns what it printed."""

    def run(command: str, *, timeout_s: float = 120.0) -> str:
        container = f"docker run --rm --network host --shm-size 2g {image.name}"
        return machine[0].run(f"{container} {command}", timeout_s=timeout_s).stdout.strip()

    return run


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, image: Image, wandb_key: str) -> Iterator[Aws]:
    folder = tmp_path_factory.mktemp("aws")
    shared = folder / "shared"
    shared.mkdir()
    with removing_shared(), Lan(folder / "lan", shared=[shared]) as lan:
        login = ["export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0"]
        laptop = lan.add("laptop", 1, has_key=True, login=[*login, f"export {' '.join(set_to(ENVIRONMENT))}"])
        numbers = range(FIRST_HOST, FIRST_HOST + NUM_WORKERS + 2)  # with the head, and what replaces a lost one
        hosts = [image.add_machine(lan, f"machine{number}", number) for number in numbers]
        for host in hosts:  # there is no registry to log in to
            (host.home / ".docker").mkdir()
            (host.home / ".docker/config.json").write_text("{}")
        shutil.copy(laptop.home / ".ssh/id_ed25519", laptop.home / ".ssh/nuciseg.pem")
        (laptop.home / "cluster.yaml").write_text(filled_in(image, shared))
        laptop.start(f"moto_server --host {NETWORK}.1 --port 5000", folder / "moto.log")
        wait_for(lambda: laptop.listens(5000), "moto_server", 120)
        laptop.run(f"{PLAYED_AWS} prepare {NETWORK} ~/.ssh/id_ed25519.pub", timeout_s=200)
        netrc = f"machine api.wandb.ai login user password {wandb_key}"
        laptop.run(
            f"umask 077 && ray get-auth-token --generate > /dev/null && echo {netrc} > ~/.ray/wandb_netrc"
            f" && ray up --yes --no-config-cache {CLUSTER}",
            timeout_s=500,
            cwd=REPOSITORY,
        )
        open_dashboard(laptop, CLUSTER, folder / "dashboard.log")
        yield Aws(laptop, {host.address: host for host in hosts}, shared)


@contextmanager
def removing_shared() -> Iterator[None]:
    """`ray up` makes this folder on the machines, whose root is this machine's."""
    was_there = SHARED.exists()
    try:
        yield
    finally:
        if SHARED.exists() and not was_there:
            SHARED.rmdir()


@pytest.fixture(scope="module")
def wandb_key() -> str:
    return secrets.token_hex(20)


def set_to(environment: dict[str, str]) -> list[str]:
    return [f"{name}={value}" for name, value in environment.items()]


def filled_in(image: Image, shared: Path) -> str:
    """The cluster file that comes with nuciseg, for an AWS without registry, GPU, public address and file system."""
    text = (REPOSITORY / "cluster.yaml").read_text(encoding="utf-8").replace("ami-SET-THIS", "ami-0123456789abcdef0")
    config = yaml.safe_load(text.replace("SET-REGISTRY/nuciseg:0.1.0", image.name))
    [mount] = [line for line in config["initialization_commands"] if "mount -t nfs4" in line]
    place = config["initialization_commands"].index(mount)
    config["initialization_commands"][place] = f"mountpoint -q {SHARED} || sudo mount --bind {shared} {SHARED}"
    del config["metadata"]
    config["docker"]["pull_before_run"] = False
    options = [f"--env={each}" for each in set_to(ENVIRONMENT | IN_CONTAINERS)]
    config["docker"]["run_options"] += [*options, f"--ulimit=nofile={OPEN_FILES}:{OPEN_FILES}"]
    config["max_workers"] = NUM_WORKERS
    config["provider"] |= {"use_internal_ips": True, "availability_zone": "us-west-2a"}
    types = config["available_node_types"]
    types["head"]["resources"] = {"CPU": 1, "GPU": 0}
    for name in types.keys() - {"head"}:
        types[name] |= {"max_workers": NUM_WORKERS, "resources": {"CPU": 2, "GPU": 0}}
    types["cpu_spot"]["resources"] = {"CPU": 1, "GPU": 0}  # too small for the trials below
    limit_nodes(config)
    return yaml.safe_dump(config)


def test_image_is_small_has_what_is_pinned_and_a_user_without_privileges(in_image: Callable[..., str]) -> None:
    assert in_image("id -un") == "nuciseg"
    assert in_image("bash --login -c 'command -v ray'") == "/opt/nuciseg/bin/ray"
    installed = in_image("pip freeze --exclude nuciseg").replace("+cpu", "").splitlines()
    assert {canonicalize_name(name): version for name, version in (line.split("==") for line in installed)} == pins()
    size_gb = int(in_image("sh -c 'du -skx / 2> /dev/null | cut -f 1'")) * 1024 / 1e9
    print(f"the image without CUDA is {size_gb:.2f} GB")
    assert size_gb < 3.5


def test_image_searches(in_image: Callable[..., str]) -> None:
    search = "--search.num_trials 2 --search.trial_epochs 1 --train.epochs 1 --tracking.kind none"
    small = "--data.synthetic.num_train 40 --data.synthetic.num_test 4 --model.width 4"
    assert "best checkpoint: " in in_image(f"python -m nuciseg.tune {search} {small}", timeout_s=400)


def test_up_says_that_the_image_has_no_nuciseg(image: Image, machine: tuple[Host, Host]) -> None:
    host, laptop = machine
    host.run(
        f"docker run --user root --name changed {image.name} rm /opt/nuciseg/bin/nuciseg"
        " && docker commit --change 'USER 1000' changed without",
        timeout_s=100,
    )
    shipped = yaml.safe_load((REPOSITORY / "cluster.yaml").read_text(encoding="utf-8"))
    config = {
        "cluster_name": "without",
        "provider": {"type": "local", "head_ip": host.address, "worker_ips": []},
        "auth": {"ssh_user": USER, "ssh_private_key": "~/.ssh/id_ed25519"},
        "docker": {"image": "without", "container_name": "without", "pull_before_run": False},
        "setup_commands": shipped["setup_commands"],
    }
    (laptop.home / "without.yaml").write_text(yaml.safe_dump(config))
    said = laptop.run(f"ray up --yes --no-config-cache {HOME}/without.yaml", timeout_s=200, check=False)
    assert said.returncode != 0
    assert "The image has no nuciseg on its PATH: build it from the Dockerfile" in said.stdout, said.stdout


def test_the_head_comes_up_alone(cluster: Aws) -> None:
    [head] = cluster.joined("head")
    assert not head["spot"]
    assert not cluster.machines("gpu_spot")


def test_container_is_as_the_cluster_file_says(cluster: Aws, wandb_key: str) -> None:
    def inside(command: str) -> str:
        return cluster.head.run(f"{IN_CONTAINER} {command}", timeout_s=120).stdout.strip()

    assert inside("id -un") == "nuciseg"
    assert "NoNewPrivs:\t1" in inside("cat /proc/self/status")
    modes = inside("stat --format '%a %U' /srv/nuciseg/.ray/auth_token /srv/nuciseg/.netrc")
    assert modes.splitlines() == ["600 nuciseg", "600 nuciseg"]
    assert inside(f"python -c '{FIND_KEY}'") == wandb_key
    assert wandb_key not in cluster.head.run("docker inspect nuciseg", timeout_s=60).stdout


def test_search_survives_the_loss_of_a_spot_machine(cluster: Aws) -> None:
    write_search(cluster.shared / "search.yaml", num_trials=4, epochs=EPOCHS, cpus_per_worker=2)
    where = f"--config {SHARED}/search.yaml --run.storage_path {SHARED}/runs --run.name search"
    job = submit(cluster.laptop, ["python -m nuciseg.tune", where, "--no-final"], timeout_s=200)

    def printed() -> str:
        return printed_by(job, cluster.head, IN_CONTAINER)

    wait_for(lambda: len(cluster.joined("gpu_spot")) == NUM_WORKERS, "spot machines with Ray", 500, told=printed)
    assert all(machine["spot"] for machine in cluster.machines("gpu_spot"))
    search_dir = cluster.shared / "runs" / "search"

    def begun() -> list[Path]:
        runs = [path for path in search_dir.glob("*/") if logged_epochs(path)]
        return [path for path in runs if len(logged_epochs(path)) < EPOCHS]

    wait_for(lambda: len(begun()) >= NUM_WORKERS, "trials on all spot machines", 400, told=printed)
    lost, kept = cluster.machines("gpu_spot")
    cluster.announce(lost, seconds=120)
    wait_for(lambda: cluster.num_draining() == 1, "Ray's having heard of it", 60, told=printed)
    cluster.lose(lost)

    def replaced() -> bool:
        return {machine["id"] for machine in cluster.joined("gpu_spot")} - {lost["id"], kept["id"]} != set()

    wait_for(replaced, "another spot machine with Ray", 300, told=printed)
    wait_for_end(job, cluster.laptop, limit_s=500)
    trials = trials_in(search_dir)
    assert len(trials) == 4
    assert [trial["failure"] for trial in trials] == [None] * 4
    for trial in trials:
        assert logged_epochs(search_dir / trial["id"]) == list(range(1, EPOCHS + 1))
    assert not cluster.machines("gpu_on_demand"), "there were spot machines to be had"


def test_down_ends_every_machine(cluster: Aws) -> None:
    cluster.laptop.run(f"ray down --yes {CLUSTER}", timeout_s=300)
    for kind in ("head", "gpu_spot", "gpu_on_demand", "cpu_spot"):
        assert cluster.machines(kind) == []
