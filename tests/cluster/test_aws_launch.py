"""`ray up cluster.yaml` for real, against an AWS that is played by `moto_server`, with hosts as its machines.

A search calls spot machines up, one of them is taken back, another comes, and the search ends whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from hosts import HOME, NETWORK, REPOSITORY, Host, Lan, wait_for, why_no_hosts
from launches import limit_nodes, open_dashboard, printed_by, submit, trials_in, wait_for_end, write_search
from small_runs import logged_epochs

pytest.importorskip("flask_cors", reason="moto_server is missing: pip install -e '.[test]'")
pytest.importorskip("boto3", reason="boto3 is missing: pip install -e '.[test]'")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(why_no_hosts() is not None, reason=str(why_no_hosts())),
]

CLUSTER = f"{HOME}/cluster.yaml"
PLAYED_AWS = f"python {Path(__file__).with_name('played_aws.py')}"
METADATA = f"python {Path(__file__).parents[1] / 'metadata_service.py'}"
NUM_DRAINING = (
    'import ray; ray.init(address="auto", logging_level="ERROR"); '
    "from ray._private.state import state; print(len(state.get_draining_nodes()))"
)
LOGIN = [
    f"export AWS_ENDPOINT_URL=http://{NETWORK}.1:5000 AWS_DEFAULT_REGION=us-west-2",
    "export AWS_ACCESS_KEY_ID=none AWS_SECRET_ACCESS_KEY=none",
    "export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0",  # what the container is given by docker.run_options
    # Ray counts a silent machine as lost after 20 s, not 65: else the other one might do all the work in the meantime.
    "export RAY_health_check_period_ms=1000 RAY_health_check_timeout_ms=3000 RAY_health_check_failure_threshold=5",
]
NUM_WORKERS = 2  # machines besides the head
FIRST_HOST = 5  # AWS counts from .4, which the shared file system takes
EPOCHS = 25


@dataclass(frozen=True)
class Aws:
    """A cluster that `ray up` has started from a laptop, and the hosts that are its machines, by address."""

    laptop: Host
    hosts: dict[str, Host]
    shared: Path

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
        [head] = self.machines("head")
        said = self.hosts[head["address"]].run(f"python -c '{NUM_DRAINING}'", timeout_s=120).stdout
        return int(said.splitlines()[-1])

    @staticmethod
    def _has_ray(host: Host) -> bool:
        return any("raylet/raylet" in line for line in host.processes())


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Aws]:
    folder = tmp_path_factory.mktemp("aws")
    shared = folder / "shared"
    shared.mkdir()
    with Lan(folder / "lan", shared=[shared]) as lan:
        laptop = lan.add("laptop", 1, has_key=True, login=LOGIN)
        numbers = range(FIRST_HOST, FIRST_HOST + NUM_WORKERS + 2)  # with the head, and what replaces a lost one
        hosts = [lan.add(f"machine{number}", number, login=LOGIN) for number in numbers]
        shutil.copy(laptop.home / ".ssh/id_ed25519", laptop.home / ".ssh/nuciseg.pem")
        (laptop.home / "cluster.yaml").write_text(filled_in())
        laptop.start(f"moto_server --host {NETWORK}.1 --port 5000", folder / "moto.log")
        wait_for(lambda: laptop.listens(5000), "moto_server", 120)
        laptop.run(f"{PLAYED_AWS} prepare {NETWORK} ~/.ssh/id_ed25519.pub", timeout_s=200)
        laptop.run(
            "umask 077 && ray get-auth-token --generate > /dev/null && touch ~/.ray/wandb_netrc"
            f" && ray up --yes --no-config-cache {CLUSTER}",
            timeout_s=500,
            cwd=REPOSITORY,
        )
        open_dashboard(laptop, CLUSTER, folder / "dashboard.log")
        yield Aws(laptop, {host.address: host for host in hosts}, shared)


def filled_in() -> str:
    """The cluster file that comes with nuciseg, for machines without Docker, GPU, public address and file system."""
    text = (REPOSITORY / "cluster.yaml").read_text(encoding="utf-8")
    config = yaml.safe_load(text.replace("ami-SET-THIS", "ami-0123456789abcdef0"))
    del config["docker"], config["metadata"]
    config["initialization_commands"] = []
    config["auth"]["ssh_user"] = "root"
    config["max_workers"] = NUM_WORKERS
    config["provider"] |= {"use_internal_ips": True, "availability_zone": "us-west-2a"}
    types = config["available_node_types"]
    types["head"]["resources"] = {"CPU": 1, "GPU": 0}
    for name in types.keys() - {"head"}:
        types[name] |= {"max_workers": NUM_WORKERS, "resources": {"CPU": 2, "GPU": 0}}
    types["cpu_spot"]["resources"] = {"CPU": 1, "GPU": 0}  # too small for the trials below
    limit_nodes(config)
    return yaml.safe_dump(config)


def test_the_head_comes_up_alone(cluster: Aws) -> None:
    [head] = cluster.joined("head")
    assert not head["spot"]
    assert not cluster.machines("gpu_spot")


def test_search_survives_the_loss_of_a_spot_machine(cluster: Aws) -> None:
    write_search(cluster.shared / "search.yaml", num_trials=4, epochs=EPOCHS, cpus_per_worker=2)
    where = f"--config {cluster.shared}/search.yaml --run.storage_path {cluster.shared}/runs --run.name search"
    job = submit(cluster.laptop, ["python -m nuciseg.tune", where, "--no-final"], timeout_s=200)

    def printed() -> str:
        return printed_by(job, cluster.hosts[f"{NETWORK}.{FIRST_HOST}"])

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
