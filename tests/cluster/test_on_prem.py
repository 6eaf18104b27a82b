"""`ray up docs/clusters/on-prem.yaml` over SSH onto three hosts, a search on it, and `ray down`."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from gloo_workers import on_workers
from hosts import HOME, REPOSITORY, Host, Lan, wait_for, why_no_hosts
from launches import (
    JOBS,
    close_dashboard,
    hosts_with,
    limit_nodes,
    open_dashboard,
    printed_by,
    submit,
    trials_in,
    wait_for_end,
    write_search,
)
from small_runs import (
    QUICK_TO_LEARN,
    last_checkpoint,
    logged_epochs,
    run,
    seconds_until_epoch,
    show_seconds,
)
from wandb_offline import assert_one_wandb_run

from nuciseg.config import Config, load_config, merged
from nuciseg.data.synthetic import SyntheticConfig, write_nucleus_folder
from nuciseg.engine.checkpoint import find_checkpoint
from nuciseg.engine.inference import Place

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(why_no_hosts() is not None, reason=str(why_no_hosts())),
]

CLUSTER = f"{HOME}/on-prem.yaml"
OWN_NETRC = "machine example.org login somebody password something\n"
AS_RAY = "export $(tr '\\0' '\\n' < /proc/$(pgrep -n -x raylet)/environ | grep ^NETRC=)"  # as its processes have it
WANDB_HOST = "wandb.lan"  # a W&B server of one's own, so that without WANDB_BASE_URL nobody asks for it


@dataclass(frozen=True)
class OnPrem:
    """A cluster of three hosts that `ray up` has started from a laptop, and a folder that all of them share."""

    lan: Lan
    laptop: Host
    nodes: list[Host]
    shared: Path


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OnPrem]:
    folder = tmp_path_factory.mktemp("on_prem")
    shared = folder / "shared"
    shared.mkdir()
    with Lan(folder / "lan", shared=[shared]) as lan:
        login = ["export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0"]
        login_of_nodes = [
            "export RAY_prestart_worker_first_driver=0",  # processes that may never be used
            # A node whose head is gone gives up after 15 s, not 60, a silent node counts as lost after 20 s, not 65:
            # the last tests wait for it.
            "export RAY_gcs_rpc_server_reconnect_timeout_s=15 RAY_health_check_period_ms=1000",
            "export RAY_health_check_timeout_ms=3000 RAY_health_check_failure_threshold=5",
        ]
        laptop = lan.add("laptop", 1, has_key=True, login=login)
        nodes = [
            lan.add(name, number, login=login_of_nodes) for number, name in enumerate(("head", "one", "two"), start=2)
        ]
        for node in nodes:
            (node.home / ".netrc").write_text(OWN_NETRC)
        (laptop.home / "on-prem.yaml").write_text(filled_in(nodes))
        write_nucleus_folder(SyntheticConfig(num_train=8, num_test=1), laptop.home / "clusters")
        netrc = f"machine {WANDB_HOST} login user password {secrets.token_hex(20)}"
        laptop.run(
            "umask 077 && ray get-auth-token --generate > /dev/null"
            f" && echo {netrc} > ~/.ray/wandb_netrc && ray up --yes --no-config-cache {CLUSTER}",
            timeout_s=400,
            cwd=REPOSITORY,
        )
        wait_for(lambda: len(hosts_with("raylet/raylet", nodes)) == 3, "Ray on all hosts", 240)
        open_dashboard(laptop, CLUSTER, folder / "dashboard.log")
        yield OnPrem(lan, laptop, nodes, shared)


def filled_in(nodes: list[Host]) -> str:
    """The cluster file that comes with nuciseg, with the addresses and the user that it asks for."""
    config = yaml.safe_load((REPOSITORY / "docs/clusters/on-prem.yaml").read_text())
    config["provider"] |= {"head_ip": nodes[0].address, "worker_ips": [node.address for node in nodes[1:]]}
    config["auth"]["ssh_user"] = "root"
    config["file_mounts"]["~/clusters"] = "~/clusters"  # data of the laptop
    limit_nodes(config, "--num-cpus=2")
    return yaml.safe_dump(config)


def test_status_shows_all_hosts(cluster: OnPrem) -> None:
    said = ""

    def all_are_there() -> bool:
        nonlocal said
        said = cluster.laptop.run(f"ray exec {CLUSTER} 'ray status'", timeout_s=200).stdout
        return "0.0/6.0 CPU" in said

    wait_for(all_are_there, "three hosts of two CPUs", 300, told=lambda: said)
    assert "no pending nodes" in said.lower()


def test_doctor_asks_all_hosts(cluster: OnPrem) -> None:
    began_s = time.monotonic()
    words = ["python -m nuciseg.doctor --json", f"--run.storage_path {cluster.shared}/doctor"]
    words += [f"--data.root {HOME}/clusters"]
    said = wait_for_end(submit(cluster.laptop, words, timeout_s=200), cluster.laptop, limit_s=200)
    show_seconds("doctor on three hosts, with the job's start", time.monotonic() - began_s)
    start = said.index("[\n")
    checks = json.loads(said[start : said.rindex("\n]") + 2])
    assert [check["said"] for check in checks if not check["passed"]] == []
    answers = {check["name"]: check["said"] for check in checks}
    assert answers["nodes"].startswith("3 nodes"), answers["nodes"]
    assert answers["all-reduce"].startswith("gloo over "), answers["all-reduce"]
    assert answers["data"] == "8 training images, readable on 3 nodes"
    assert not (cluster.shared / "doctor").exists()


def test_secrets_are_for_their_owner_alone_on_every_host(cluster: OnPrem) -> None:
    token = (cluster.laptop.home / ".ray/auth_token").read_text()
    for node in cluster.nodes:
        assert (node.home / ".ray/auth_token").read_text() == token
        for secret in (".ray/auth_token", ".ray/wandb_netrc"):
            assert (node.home / secret).stat().st_mode & 0o777 == 0o600, f"{node.name}: {secret}"
        assert (node.home / ".netrc").read_text() == OWN_NETRC, "what the user of the machine had there"


def test_client_without_the_token_is_refused(cluster: OnPrem) -> None:
    head = cluster.nodes[0]
    job = f"ray job submit --address {JOBS} -- touch {cluster.shared}/intruder"
    for intruder in ("RAY_AUTH_MODE=disabled", f"RAY_AUTH_TOKEN={'0' * 64}"):
        refused = cluster.laptop.run(f"{intruder} {job}", timeout_s=200, check=False)
        assert refused.returncode != 0, refused.stdout
        assert "token" in refused.stdout.lower()
    refused = cluster.laptop.run(
        f"RAY_AUTH_MODE=disabled timeout 60 ray status --address {head.address}:6379", timeout_s=200, check=False
    )
    assert refused.returncode != 0, refused.stdout
    assert "CPU" not in refused.stdout
    assert not (cluster.shared / "intruder").exists()


def test_search_of_two_hosts_a_trial_goes_on_while_the_laptop_is_closed(cluster: OnPrem, tmp_path: Path) -> None:
    write_search(cluster.shared / "search.yaml", num_trials=2, epochs=3, num_workers=2, cpus_per_worker=2)
    where = f"--config {cluster.shared}/search.yaml --run.storage_path {cluster.shared}/runs --run.name search"
    job = submit(cluster.laptop, ["python -m nuciseg.tune", where], timeout_s=200)
    seen: set[frozenset[str]] = set()

    def trains_on_two() -> bool:
        seen.add(frozenset(hosts_with("RayTrainWorker", cluster.nodes)))
        return any(len(each) == 2 for each in seen)

    def printed() -> str:
        return printed_by(job, cluster.nodes[0])

    wait_for(trains_on_two, "a trial on two hosts", 400, told=printed)
    cluster.laptop.power_off()
    search_dir = cluster.shared / "runs" / "search"
    wait_for(lambda: (search_dir / "results.json").exists(), "the end of the trials", 400, told=printed)
    cluster.lan.power_on(cluster.laptop)
    forwarding = open_dashboard(cluster.laptop, CLUSTER, tmp_path / "dashboard.log")
    said = wait_for_end(job, cluster.laptop, limit_s=400)
    close_dashboard(forwarding)

    trials = trials_in(search_dir)
    assert [trial["failure"] for trial in trials] == [None, None]
    for trial in trials:
        assert logged_epochs(search_dir / trial["id"]) == [1, 2, 3]
        assert last_checkpoint(search_dir / trial["id"]).config.scale.num_workers == 2
        assert trial["id"] in said
    [best] = [line.split(": ", 1)[1] for line in said.splitlines() if line.startswith("best checkpoint: ")]
    assert find_checkpoint(Path(best)).is_relative_to(search_dir)


def test_wandb_key_has_reached_every_host_and_is_in_no_log_or_command_line(cluster: OnPrem) -> None:
    key = (cluster.laptop.home / ".ray/wandb_netrc").read_text().split()[-1]
    find = f'from wandb.sdk.lib.wbauth import read_netrc_auth; print(read_netrc_auth(host="http://{WANDB_HOST}"))'
    folders = [cluster.shared]
    for node in cluster.nodes:
        assert node.run(f"{AS_RAY}; python -c '{find}'", timeout_s=100).stdout.split()[-1] == key
        assert [line for line in node.processes() if key in line] == []
        sessions = list((node.folder / "tmp" / "ray").glob("session_2*"))
        assert sessions, node.name
        folders += sessions
    written = [path for folder in folders for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert [path for path in written if key.encode() in path.read_bytes()] == []
    jobs = cluster.laptop.run(f"ray job list --address {JOBS}", timeout_s=100).stdout
    assert "submission_id" in jobs
    assert key not in jobs


def _train(place: Place, config: Config, run_dir: Path) -> None:
    torch.set_num_threads(2)  # as many as Ray gives to a worker of two CPUs
    run(config, run_dir, place)


def test_run_goes_on_elsewhere_when_a_host_of_its_two_falls_silent(cluster: OnPrem, tmp_path: Path) -> None:
    """Its connections stay open: nobody tells the other worker that it waits in vain."""
    settings = merged(
        QUICK_TO_LEARN,
        {
            "data": {"batch_size": 12},  # 4 steps an epoch
            "optim": {"lr": 0.02},
            "train": {"epochs": 24, "calibrate": False},  # enough to go when the host has been found and cut off
            "scale": {"num_workers": 2, "cpus_per_worker": 2},
            "run": {"storage_path": str(cluster.shared / "runs"), "name": "silent"},
            "tracking": {"kind": "offline"},
        },
    )
    (cluster.shared / "silent.yaml").write_text(yaml.safe_dump(settings))
    forwarding = open_dashboard(cluster.laptop, CLUSTER, tmp_path / "dashboard.log")
    job = submit(cluster.laptop, [f"python -m nuciseg.train --config {cluster.shared}/silent.yaml"], timeout_s=200)
    run_dir = cluster.shared / "runs" / "silent"
    told = partial(printed_by, job, cluster.nodes[0])
    wait_for(lambda: logged_epochs(run_dir) != [], "the first epoch", 200, told=told)
    silent = next(node for node in cluster.nodes[1:] if hosts_with("RayTrainWorker", [node]))
    cluster.lan.cut_off(silent)
    try:
        cut_s, num_before = time.time(), len(logged_epochs(run_dir))
        assert num_before < 16
        # One might have been on its way into the file.
        show_seconds("a host silent, to the next epoch", seconds_until_epoch(run_dir, num_before + 2, cut_s))
        wait_for_end(job, cluster.laptop, limit_s=200)
    finally:
        cluster.lan.plug_in(silent)
        close_dashboard(forwarding)
    assert logged_epochs(run_dir) == list(range(1, 25))
    assert_one_wandb_run(run_dir)
    undisturbed = tmp_path / "undisturbed"
    on_workers(2, tmp_path / "rendezvous", _train, load_config(overrides=settings), undisturbed)
    history, expected = (last_checkpoint(each).progress.history for each in (run_dir, undisturbed))
    assert [row["learning_rate"] for row in history] == [row["learning_rate"] for row in expected]
    # Ray's threads round otherwise than those here, which grows from epoch to epoch.
    for mine, theirs in zip(history[:10], expected[:10], strict=True):
        assert mine["train_loss"] == pytest.approx(theirs["train_loss"], rel=0.02)


def test_down_leaves_no_process(cluster: OnPrem) -> None:
    said = cluster.laptop.run(f"ray down --yes {CLUSTER}", timeout_s=300).stdout

    def left() -> str:
        return "\n".join(f"{node.name}: {line[:120]}" for node in cluster.nodes for line in node.processes())

    wait_for(lambda: not left(), "the end of Ray on all hosts", 150, told=lambda: f"{said}\n{left()}")
