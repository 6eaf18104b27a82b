"""Nodes of a cluster lose their power while it trains: what goes on, with what, and after how many seconds.

Each test prints the seconds (`pytest -rP`); docs/reliability.md has those of one machine.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from played_nodes import (
    PlayedCluster,
    await_held,
    can_hide_a_folder,
    has_worker,
    hold,
    node_without,
    played_cluster,
    release,
)
from small_runs import (
    QUICK_TO_LEARN,
    assert_same_run,
    last_checkpoint,
    logged_epochs,
    run,
    seconds_until_epoch,
    show_seconds,
    wait_until,
)
from wandb_offline import assert_one_wandb_run

from nuciseg.config import Config, load_config, merged
from nuciseg.distributed.trials import RESULTS_FILE
from nuciseg.distributed.worker import FINISHED_FILE
from nuciseg.engine.checkpoint import CheckpointStore

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# 48 images in batches of 12: 4 steps an epoch, at a rate that lets rounding stay rounding.
RUN = {
    "data": {"batch_size": 12},
    "optim": {"lr": 0.02},
    "train": {"epochs": 5, "calibrate": False},
    "scale": {"num_workers": 2, "cpus_per_worker": 1},
    "tracking": {"kind": "offline"},
}
STEPS = 4
SPREAD = 0.02  # of Dice of the border, between runs whose numbers of workers differ


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PlayedCluster]:
    with played_cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def _nothing_runs_on(cluster: PlayedCluster) -> Iterator[None]:
    yield
    cluster.end_drivers()


def write_settings(folder: Path, name: str, **more: Any) -> Config:
    """`NAME.yaml` of a run or search whose folder is `runs/NAME`."""
    here = {"run": {"storage_path": str(folder / "runs"), "name": name}}
    settings = merged(merged(merged(QUICK_TO_LEARN, RUN), here), more)
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    return load_config(folder / f"{name}.yaml")


@pytest.fixture(scope="module")
def undisturbed(cluster: PlayedCluster) -> Path:
    """The folder of a run by two workers that nothing happened to."""
    cluster.have_nodes(3)  # as many as the first test needs: Ray counts them every 20 seconds
    write_settings(cluster.folder, "undisturbed")
    cluster.await_end(cluster.drive("train", "--config", "undisturbed.yaml"))
    return cluster.folder / "runs" / "undisturbed"


def start_held(cluster: PlayedCluster, name: str, step: int, **more: Any) -> tuple[Any, Path]:
    """A driver whose workers wait before a step by now, and the folder of its run."""
    write_settings(cluster.folder, name, **more)
    run_dir = cluster.folder / "runs" / name
    hold(run_dir, step)
    driver = cluster.drive("train", "--config", f"{name}.yaml")
    await_held(run_dir, step)
    return driver, run_dir


def test_an_elastic_run_shrinks_and_grows(cluster: PlayedCluster, undisturbed: Path) -> None:
    """Three workers, of which two are lost at once; one goes on alone until a spare joins."""
    kept, *lost = cluster.have_nodes(3)
    first, second = STEPS + 2, 3 * STEPS + 2
    driver, run_dir = start_held(cluster, "elastic", first, scale={"num_workers": {"min": 1, "max": 3}})
    # Where Ray had counted its nodes before the third one joined, the run starts with two workers and grows.
    wait_until(lambda: all(map(has_worker, (kept, *lost))), "three workers")
    await_held(run_dir, first)
    hold(run_dir, second)
    cut_s = cluster.cut_power(*lost)
    release(run_dir, first)
    show_seconds("elastic, from the cut to the next epoch", seconds_until_epoch(run_dir, 2, cut_s))
    await_held(run_dir, second)
    assert has_worker(kept)
    assert logged_epochs(run_dir) == [1, 2, 3]
    spare = cluster.add_node()
    joined_s = time.time()
    wait_until(lambda: has_worker(spare), "a second worker")
    release(run_dir, second)
    show_seconds("elastic, from the spare's joining to the next epoch", seconds_until_epoch(run_dir, 4, joined_s))
    cluster.await_end(driver)
    assert logged_epochs(run_dir) == [1, 2, 3, 4, 5]
    assert_one_wandb_run(run_dir)
    mine, theirs = (last_checkpoint(folder).progress for folder in (run_dir, undisturbed))
    assert mine.step == theirs.step == 5 * STEPS
    for row, expected in zip(mine.history, theirs.history, strict=True):
        assert row["learning_rate"] == expected["learning_rate"]
        assert row["train_loss"] == pytest.approx(expected["train_loss"], rel=0.02)
        assert row["border_dice"] == pytest.approx(expected["border_dice"], abs=SPREAD)


def test_a_fixed_number_of_workers_waits_for_a_spare(cluster: PlayedCluster, undisturbed: Path) -> None:
    _, lost = cluster.have_nodes(2)
    in_mid_epoch = STEPS + 2
    driver, run_dir = start_held(cluster, "fixed", in_mid_epoch)
    cut_s = cluster.cut_power(lost)
    release(run_dir, in_mid_epoch)
    wait_until(lambda: time.time() > cut_s + 10, "a while")
    assert logged_epochs(run_dir) == [1], "two workers trained on one CPU"
    first = json.loads((run_dir / "metrics.jsonl").read_text())
    cluster.add_node()
    joined_s = time.time()
    show_seconds("fixed, from the spare's joining to the next epoch", seconds_until_epoch(run_dir, 2, joined_s))
    cluster.await_end(driver)
    assert last_checkpoint(run_dir).progress.history[0]["train_s"] == first["train_s"], "it was begun anew"
    assert logged_epochs(run_dir) == [1, 2, 3, 4, 5]
    assert_same_run(run_dir, undisturbed)
    assert_one_wandb_run(run_dir)


def test_a_node_that_is_to_go_leaves_a_checkpoint(cluster: PlayedCluster, undisturbed: Path) -> None:
    _, going = cluster.have_nodes(2)
    in_mid_epoch, later = STEPS + 1, 2 * STEPS + 1
    driver, run_dir = start_held(cluster, "drained", in_mid_epoch)
    hold(run_dir, later)
    spare = cluster.add_node()
    store = CheckpointStore(run_dir)
    cluster.drain(going, deadline_s=30)
    drained_s = time.time()
    wait_until(lambda: time.time() > drained_s + 10, "Ray's look at its nodes, which it takes every five seconds")
    before = {path.name for path in store.folder.iterdir()}
    release(run_dir, in_mid_epoch)
    await_held(run_dir, later)
    after = {path.name for path in store.folder.iterdir()}
    assert "epoch-0001-batch-000002" not in before
    assert {"epoch-0001-batch-000002", "epoch-0002"} <= after
    wait_until(lambda: has_worker(spare), "a worker on the spare")
    release(run_dir, later)
    show_seconds("drained, from the notice to the next epoch elsewhere", seconds_until_epoch(run_dir, 3, drained_s))
    cluster.await_end(driver)
    cluster.cut_power(going)
    assert logged_epochs(run_dir) == [1, 2, 3, 4, 5]
    assert_same_run(run_dir, undisturbed)
    assert_one_wandb_run(run_dir)


# ------------------------------------------------------------------------------------------------------------ searches
def write_search(folder: Path, name: str, rates: list[float], epochs: int) -> Config:
    """One trial of one worker a learning rate, in their order."""
    return write_settings(
        folder,
        name,
        train={"epochs": epochs},
        scale={"num_workers": 1},
        run={"max_failures": 20},
        search={
            "sampler": "grid",
            "scheduler": "none",
            "final": False,
            "space": {"optim.lr": {"choice": rates}},
        },
    )


def assert_calm_results(config: Config, rates: list[float], folder: Path) -> None:
    """Every trial in `runs/NAME` ended as a run of the same settings in this process, in every bit."""
    search_dir = config.run.storage_path / str(config.run.name)
    trials = json.loads((search_dir / RESULTS_FILE).read_text())
    assert sorted(trial["sample"]["optim.lr"] for trial in trials) == sorted(rates)
    assert [trial["failure"] for trial in trials] == [None] * len(rates)
    for trial in trials:
        rate = trial["sample"]["optim.lr"]
        run(config.replaced({"optim.lr": rate, "search.space": {}}), folder / f"{rate}")
        assert_same_run(search_dir / trial["id"], folder / f"{rate}")
        assert logged_epochs(search_dir / trial["id"]) == list(range(1, config.train.epochs + 1))
        assert_one_wandb_run(search_dir / trial["id"])


def trial_dirs(search_dir: Path, *, finished: bool) -> list[Path]:
    begun = [path.parent for path in search_dir.glob("*/metrics.jsonl")]
    return [run_dir for run_dir in begun if (run_dir / FINISHED_FILE).exists() == finished]


def test_a_trial_whose_node_is_to_go_leaves_a_checkpoint(cluster: PlayedCluster) -> None:
    config = write_search(cluster.folder, "announced", [0.02], epochs=2)
    (going,) = cluster.have_nodes(1)
    driver = cluster.drive("tune", "--config", "announced.yaml", step_s=5.0)  # 20 s an epoch
    search_dir = cluster.folder / "runs" / "announced"
    wait_until(lambda: bool(trial_dirs(search_dir, finished=False)), "the first epoch")
    (run_dir,) = trial_dirs(search_dir, finished=False)
    cluster.drain(going, deadline_s=60)
    wait_until(lambda: [*run_dir.glob("checkpoints/epoch-0001-batch-*")] != [], "a checkpoint in mid-epoch", 20.0)
    cluster.cut_power(going)
    cluster.have_nodes(1)
    cluster.await_end(driver)
    assert_calm_results(config, [0.02], cluster.folder / "calm-announced")


def test_a_search_outlives_its_head_node(cluster: PlayedCluster) -> None:
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
    assert_calm_results(config, rates, cluster.folder / "calm-headless")


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


def test_a_search_ends_as_a_calm_one_while_nodes_die_one_after_the_other(cluster: PlayedCluster) -> None:
    """Eight trials on three nodes; every 20 s for three minutes a node dies, and another one comes up."""
    rates = [0.01, 0.015, 0.02, 0.025, 0.03, 0.035, 0.04, 0.05]
    config = write_search(cluster.folder, "chaos", rates, epochs=24)
    cluster.have_nodes(3)
    driver = cluster.drive("tune", "--config", "chaos.yaml", step_s=0.4)  # 40 s a trial at least
    wait_until(lambda: bool(trial_dirs(cluster.folder / "runs" / "chaos", finished=False)), "a trial")
    num_cut = 0
    until_s = time.monotonic() + 180
    while time.monotonic() < until_s and driver.poll() is None:
        next_s = time.monotonic() + 20
        cluster.cut_power(cluster.have_nodes(3)[0])
        num_cut += 1
        cluster.add_node()
        time.sleep(max(0.0, next_s - time.monotonic()))
    print(f"nodes that were cut: {num_cut}")
    cluster.await_end(driver, limit_s=900)
    assert num_cut >= 7  # 9 where nodes start at once
    assert_calm_results(config, rates, cluster.folder / "calm-chaos")
