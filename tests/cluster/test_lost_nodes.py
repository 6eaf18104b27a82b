"""Nodes of a cluster lose their power while it trains: what goes on, with what, and after how many seconds.

Each test prints the seconds (`pytest -rP`); docs/reliability.md has those of one machine.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from played_nodes import (
    PlayedCluster,
    await_held,
    has_worker,
    hold,
    release,
)
from played_runs import STEPS, write_settings
from small_runs import (
    assert_same_run,
    last_checkpoint,
    logged_epochs,
    seconds_until_epoch,
    show_seconds,
    wait_until,
)
from wandb_offline import assert_one_wandb_run

from nuciseg.engine.checkpoint import CheckpointStore

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SPREAD = 0.02  # of Dice of the border, between runs whose numbers of workers differ


@pytest.fixture(scope="module")
def undisturbed(played: PlayedCluster) -> Path:
    """The folder of a run by two workers that nothing happened to."""
    played.have_nodes(3)  # as many as the first test needs: Ray counts them every 20 seconds
    write_settings(played.folder, "undisturbed")
    played.await_end(played.drive("train", "--config", "undisturbed.yaml"))
    return played.folder / "runs" / "undisturbed"


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
    cluster.drain(going, deadline_s=20)
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
