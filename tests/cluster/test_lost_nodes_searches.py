"""Nodes of a cluster lose their power while a search goes on, the head's too: no trial is lost, and none differs.

Each test prints the seconds (`pytest -rP`); docs/reliability.md has those of one machine.
"""

from __future__ import annotations

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from played_nodes import PlayedCluster, await_held, can_hide_a_folder, hold, node_without, release
from played_runs import STEPS, write_settings
from small_runs import assert_same_run, logged_epochs, run, seconds_until_epoch, show_seconds, wait_until
from wandb_offline import assert_one_wandb_run

from nuciseg.config import Config
from nuciseg.distributed.trials import RESULTS_FILE
from nuciseg.distributed.worker import CONFER_S, FINISHED_FILE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def write_search(folder: Path, name: str, rates: list[float], epochs: int) -> Config:
    """One trial of one worker a learning rate, in their order."""
    return write_settings(
        folder,
        name,
        train={"epochs": epochs},
        scale={"num_workers": 1},
        run={"max_failures": 5},  # in a row: a trial may lose its node several times while its process starts
        search={
            "sampler": "grid",
            "scheduler": "none",
            "final": False,
            "space": {"optim.lr": {"choice": rates}},
        },
    )


def run_calmly(config: Config, rates: list[float], folder: Path) -> None:
    """The trials of a search as runs of this process, which nothing happens to."""
    for rate in rates:
        run(config.replaced({"optim.lr": rate, "search.space": {}}), folder / f"{rate}")


def assert_calm_results(config: Config, rates: list[float], folder: Path) -> None:
    """Every trial in `runs/NAME` ended as the calm run of its rate in `folder`, in every bit."""
    search_dir = config.run.storage_path / str(config.run.name)
    trials = json.loads((search_dir / RESULTS_FILE).read_text())
    assert sorted(trial["sample"]["optim.lr"] for trial in trials) == sorted(rates)
    assert [trial["failure"] for trial in trials] == [None] * len(rates)
    for trial in trials:
        assert_same_run(search_dir / trial["id"], folder / str(trial["sample"]["optim.lr"]))
        assert logged_epochs(search_dir / trial["id"]) == list(range(1, config.train.epochs + 1))
        assert_one_wandb_run(search_dir / trial["id"])


def trial_dirs(search_dir: Path, *, finished: bool) -> list[Path]:
    begun = [path.parent for path in search_dir.glob("*/metrics.jsonl")]
    return [run_dir for run_dir in begun if (run_dir / FINISHED_FILE).exists() == finished]


def test_a_trial_whose_node_is_to_go_leaves_a_checkpoint(cluster: PlayedCluster, tmp_path: Path) -> None:
    config = write_search(cluster.folder, "announced", [0.02], epochs=2)
    (going,) = cluster.have_nodes(1)
    driver = cluster.drive("tune", "--config", "announced.yaml", step_s=2.0)
    search_dir = cluster.folder / "runs" / "announced"
    wait_until(lambda: bool(trial_dirs(search_dir, finished=False)), "the first epoch")
    (run_dir,) = trial_dirs(search_dir, finished=False)
    in_mid_epoch, later = STEPS + 1, STEPS + 2
    for step in (in_mid_epoch, later):
        hold(run_dir, step)
    await_held(run_dir, in_mid_epoch)
    cluster.drain(going, deadline_s=60)
    time.sleep(CONFER_S)
    assert not [*run_dir.glob("checkpoints/epoch-0001-batch-*")]
    release(run_dir, in_mid_epoch)
    await_held(run_dir, later)
    assert [*run_dir.glob("checkpoints/epoch-0001-batch-*")]
    cluster.cut_power(going)
    release(run_dir, later)
    cluster.have_nodes(1)
    cluster.await_end(driver)
    run_calmly(config, [0.02], tmp_path)
    assert_calm_results(config, [0.02], tmp_path)


def test_a_search_outlives_its_head_node(cluster: PlayedCluster, tmp_path: Path) -> None:
    rates = [0.01, 0.02, 0.03]
    config = write_search(cluster.folder, "headless", rates, epochs=4)
    search_dir = cluster.folder / "runs" / "headless"
    cluster.have_nodes(1)
    driver = cluster.drive("tune", "--config", "headless.yaml", step_s=0.3)
    wait_until(
        lambda: bool(trial_dirs(search_dir, finished=True) and trial_dirs(search_dir, finished=False)),
        "a finished and a running trial",
    )
    kept = {run_dir: (run_dir / "metrics.jsonl").stat() for run_dir in trial_dirs(search_dir, finished=True)}
    (running,) = trial_dirs(search_dir, finished=False)
    next_epoch = max(logged_epochs(running)) + 1
    cut_s = cluster.lose_head(driver)
    cluster.have_nodes(1)
    driver = cluster.drive("tune", "--resume", search_dir)
    show_seconds("head lost, from the cut to the next epoch", seconds_until_epoch(running, next_epoch, cut_s))
    cluster.await_end(driver)
    for run_dir, before in kept.items():
        assert (run_dir / "metrics.jsonl").stat() == before, "a finished trial was trained again"
    run_calmly(config, rates, tmp_path)
    assert_calm_results(config, rates, tmp_path)


@pytest.mark.timeout(1500)
@pytest.mark.skipif(not can_hide_a_folder(), reason="needs root and unshare, to hide a folder from a node")
@pytest.mark.parametrize(
    ("verb", "said"),
    [
        (
            "tune",
            r"the search lies in \S+-tune, but node .* does not see what is written there; set run\.storage_path",
        ),
        ("train", r"node \S+ does not see \S+/newcomer-train/\.started; mount there what the other nodes share"),
    ],
)
def test_a_node_that_joins_without_the_folder_ends_what_runs_in_one_sentence(
    cluster: PlayedCluster, verb: str, said: str
) -> None:
    name = f"newcomer-{verb}"
    if verb == "tune":
        write_search(cluster.folder, name, [0.02, 0.03], epochs=3)
    else:
        write_settings(cluster.folder, name)
    run_dir = cluster.folder / "runs" / name
    _, lost = cluster.have_nodes(2)
    told = len(cluster.log.read_text()) if cluster.log.exists() else 0
    driver = cluster.drive(verb, "--config", f"{name}.yaml", step_s=1.0)
    wait_until(lambda: bool([*run_dir.rglob("metrics.jsonl")]), "the first epoch")
    cluster.cut_power(lost)
    with node_without(cluster.folder / "runs", cluster.address):
        assert driver.wait(timeout=300) == 2, cluster.log.read_text()
    last = cluster.log.read_text()[told:].strip().splitlines()[-1]
    assert re.match("nuciseg: " + said, last), last
    cluster.have_nodes(2)
    cluster.await_end(cluster.drive(verb, "--resume", str(run_dir)))


def test_a_search_ends_as_a_calm_one_while_nodes_die_one_after_the_other(
    cluster: PlayedCluster, tmp_path: Path
) -> None:
    """Eight trials on three nodes; every 20 s for three minutes a node dies, and another one comes up."""
    rates = [0.01, 0.015, 0.02, 0.025, 0.03, 0.035, 0.04, 0.05]
    config = write_search(cluster.folder, "chaos", rates, epochs=20)
    cluster.have_nodes(3)
    driver = cluster.drive("tune", "--config", "chaos.yaml", step_s=0.4)  # 32 s a trial at least
    wait_until(lambda: bool(trial_dirs(cluster.folder / "runs" / "chaos", finished=False)), "a trial")
    num_cut = 0
    until_s = time.monotonic() + 180
    with ThreadPoolExecutor() as beside:
        calm = beside.submit(run_calmly, config, rates, tmp_path)
        while time.monotonic() < until_s and driver.poll() is None:
            next_s = time.monotonic() + 20
            cluster.cut_power(cluster.have_nodes(3)[0])
            num_cut += 1
            cluster.add_node()
            time.sleep(max(0.0, next_s - time.monotonic()))
        calm.result()
    print(f"nodes that were cut: {num_cut}")
    cluster.await_end(driver, limit_s=900)
    assert num_cut >= 7  # 9 where nodes start at once
    assert_calm_results(config, rates, tmp_path)
