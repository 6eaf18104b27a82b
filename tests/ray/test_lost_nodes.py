"""Nodes of a cluster lose their power while it trains: what goes on, with what, and after how many seconds.

Each test prints the seconds (`pytest -rP`); docs/reliability.md has those of one machine.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from played_nodes import (
    PlayedCluster,
    await_held,
    has_worker,
    hold,
    played_cluster,
    release,
    seconds_until_epoch,
)
from small_runs import QUICK_TO_LEARN, last_checkpoint, logged_epochs, wait_until

from nuciseg.config import Config, load_config, merged

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# 48 images in batches of 12: 4 steps an epoch.
RUN = {
    "data": {"batch_size": 12},
    "optim": {"lr": 0.02},
    "train": {"epochs": 5, "calibrate": False},
    "scale": {"num_workers": 2, "cpus_per_worker": 1},
}
STEPS = 4
SPREAD = 0.02  # of a score, between runs whose numbers of workers differ: sums in another order


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PlayedCluster]:
    with played_cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


def write_settings(folder: Path, name: str, **more: Any) -> Config:
    """`NAME.yaml` of a run or search whose folder is `runs/NAME`."""
    here = {"run": {"storage_path": str(folder / "runs"), "name": name}}
    settings = merged(merged(merged(QUICK_TO_LEARN, RUN), here), more)
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    return load_config(folder / f"{name}.yaml")


def show(what: str, seconds: float) -> None:
    print(f"seconds: {what}: {seconds:.1f}")


@pytest.fixture(scope="module")
def undisturbed(cluster: PlayedCluster) -> Path:
    """The folder of a run by two workers that nothing happened to."""
    cluster.have_nodes(2)
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
    assert all(map(has_worker, (kept, *lost)))
    hold(run_dir, second)
    cut_s = cluster.cut_power(*lost)
    release(run_dir, first)
    show("elastic, from the cut to the next epoch", seconds_until_epoch(run_dir, 2, cut_s))
    await_held(run_dir, second)
    assert has_worker(kept)
    assert logged_epochs(run_dir) == [1, 2, 3]
    spare = cluster.add_node()
    joined_s = time.time()
    wait_until(lambda: has_worker(spare), "a second worker")
    release(run_dir, second)
    show("elastic, from the spare's joining to the next epoch", seconds_until_epoch(run_dir, 4, joined_s))
    cluster.await_end(driver)
    assert logged_epochs(run_dir) == [1, 2, 3, 4, 5]
    mine, theirs = (last_checkpoint(folder).progress for folder in (run_dir, undisturbed))
    assert mine.step == theirs.step == 5 * STEPS
    for row, expected in zip(mine.history, theirs.history, strict=True):
        assert row["learning_rate"] == expected["learning_rate"]
        assert row["train_loss"] == pytest.approx(expected["train_loss"], rel=0.02)
        assert row["border_dice"] == pytest.approx(expected["border_dice"], abs=SPREAD)
