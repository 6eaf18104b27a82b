"""What all tests share: an environment that calls nobody, the slow switch, real data, one Ray session."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# Before torch, ray, wandb and albumentations are imported here or in any process that a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # thread pools of several processes on few cores fight each other
os.environ.update(
    RAY_USAGE_STATS_ENABLED="0",
    WANDB_MODE="offline",
    WANDB_BASE_URL="http://127.0.0.1:9",  # nobody listens there
    WANDB_SILENT="true",
    HF_HUB_OFFLINE="1",
    NO_ALBUMENTATIONS_UPDATE="1",
)
os.environ.pop("WANDB_API_KEY", None)

# An example that takes long says nothing on a machine that does other work beside.
hypothesis.settings.register_profile("shared machine", deadline=None)
hypothesis.settings.load_profile("shared machine")

NUM_LOGICAL_CPUS = 4  # Ray schedules by this number, not by cores: enough for two trials of two workers anywhere


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="also run the tests that take minutes")
    parser.addoption("--run-cluster", action="store_true", help="also launch clusters of several hosts (root, Debian)")


def pytest_configure(config: pytest.Config) -> None:
    """Decoded images go to a cache of this test run, which its child processes share and which is gone at the end."""
    cache = tempfile.TemporaryDirectory(prefix="nuciseg-cache-", ignore_cleanup_errors=True)
    os.environ["NUCISEG_CACHE"] = cache.name
    config.add_cleanup(cache.cleanup)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=_turn)
    for item in items:
        if "slow" in item.keywords:
            option = "--run-cluster" if "cluster" in item.path.parts else "--run-slow"
            if not config.getoption(option):
                item.add_marker(pytest.mark.skip(reason=f"slow: give {option}"))


LONGEST_FIRST = (
    "test_lost_nodes_searches.py",
    "test_aws_launch.py",
    "test_on_prem.py",
    "test_lost_nodes.py",
    "test_storage_lost.py",
    "test_readme.py",
    "ray",
    "cli",
)


def _turn(item: pytest.Item) -> int:
    """A file is one process' business: where the longest came last, the other process had nothing left to do."""
    turns = [turn for turn, name in enumerate(LONGEST_FIRST) if name in item.path.parts]
    return min(turns, default=len(LONGEST_FIRST))


def _real_data(name: str) -> Path:
    data = os.environ.get("NUCISEG_DATA")
    if not data:
        pytest.skip(f"no real data: set NUCISEG_DATA to the folder that holds {name}/")
    root = Path(data) / name
    if not root.is_dir():
        pytest.skip(f"NUCISEG_DATA is {data}, which has no folder {name}")
    return root.resolve()


@pytest.fixture(scope="session")
def nucleus_root() -> Path:
    """The real nucleus clusters: {train,test}/X.png beside {train,test}/solutions/X.png."""
    return _real_data("nucleus")


@pytest.fixture(scope="session")
def dsb2018_root() -> Path:
    """The real fluorescence fields: {train,test}/{images,masks}/X.tif."""
    return _real_data("dsb2018")


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run: a U-Net of stride 8 that has seen drawn pairs of nuclei for a few seconds."""
    from nuciseg.config import load_config
    from nuciseg.engine.checkpoint import CheckpointStore
    from nuciseg.engine.datasets import open_training_set
    from nuciseg.engine.inference import Place
    from nuciseg.engine.loop import train

    drawn = {"num_train": 60, "num_test": 6, "mean_diameter_px": 24.0, "nuclei_per_cluster": [2, 2]}
    settings = {
        "data": {"synthetic": drawn, "crop_px": 64, "batch_size": 8, "num_loader_threads": 0},
        "augment": {"enabled": False},
        "model": {"depth": 3, "width": 8},
        "optim": {"lr": 0.01},
        "train": {"epochs": 8, "ema_decay": None},
        "tracking": {"kind": "none"},
    }
    run_dir = tmp_path_factory.mktemp("runs") / "tiny"
    config = load_config(overrides=settings)
    train(config, open_training_set(config, 8), Place(), CheckpointStore(run_dir), lambda report: None)
    return run_dir


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_run: Path) -> Path:
    """The best checkpoint of `tiny_run`."""
    from nuciseg.engine.checkpoint import find_checkpoint

    return find_checkpoint(tiny_run)


@pytest.fixture(scope="session")
def tiny_fields_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run: a U-Net that finds the discs of drawn fields, 14 to 24 px wide."""
    import tifffile
    from drawn_fields import draw_discs

    from nuciseg.config import load_config
    from nuciseg.engine.checkpoint import CheckpointStore
    from nuciseg.engine.datasets import open_training_set
    from nuciseg.engine.inference import Place
    from nuciseg.engine.loop import train
    from nuciseg.images import write_labels_tiff

    folder = tmp_path_factory.mktemp("fields")
    images = folder / "data" / "train" / "images"
    images.mkdir(parents=True)
    for number in range(12):
        image_HW, labels_HW = draw_discs((160, 160), (14, 18, 24)[number % 3], seed=number, share=0.35, least_gap=0.95)
        tifffile.imwrite(images / f"{number}.tif", image_HW)
        write_labels_tiff(images.with_name("masks") / f"{number}.tif", labels_HW)
    settings = {
        "data": {
            "root": str(folder / "data"), "format": "labels", "normalization": {"ignore_extremes": False},
            "crop_px": 96, "batch_size": 2, "num_loader_threads": 0,
        },
        "target": {"kind": "depth"},
        "augment": {"enabled": False},
        "model": {"depth": 2, "width": 8},
        "optim": {"lr": 0.02},
        "train": {"epochs": 8, "ema_decay": None},
        "tracking": {"kind": "none"},
    }  # fmt: skip
    config = load_config(overrides=settings)
    train(config, open_training_set(config, 4), Place(), CheckpointStore(folder / "run"), lambda report: None)
    return folder / "run"


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One Ray instance on this machine for all tests that need one; starting one takes seconds."""
    import ray

    from nuciseg.distributed.cluster import connect

    connect(verbose=False, num_cpus=NUM_LOGICAL_CPUS, num_gpus=0, object_store_memory=256 * 2**20)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of a real S3 server on loopback."""
    from s3_server import serving_s3

    with serving_s3() as address:
        yield address


@pytest.fixture(autouse=True)
def _unit_tests_stay_on_this_machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A unit test that connects to another machine fails at once and says where it wanted to go."""
    if "unit" not in request.path.parts:
        return
    connect = socket.socket.connect

    def connect_here(self: socket.socket, address: Any) -> None:
        host = address[0] if isinstance(address, tuple) else "unix socket"
        if self.family in (socket.AF_INET, socket.AF_INET6) and host not in ("localhost", "127.0.0.1", "::1"):
            raise AssertionError(f"a unit test wanted to connect to {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_here)
