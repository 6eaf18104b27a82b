"""What a node says of itself when `doctor` asks: each function here runs there."""

from __future__ import annotations

import platform
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import ray
import torch

import nuciseg
from nuciseg.config import Config, TrainConfig
from nuciseg.data.cache import default_cache_dir
from nuciseg.engine.datasets import check_first_image
from nuciseg.engine.precision import choose_precision, local_device
from nuciseg.tracking import wandb_mode
from nuciseg.tracking_wandb import silent_server

PRECISIONS = {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class NodeFacts:
    """`versions` by what has them, `gpus` by name, `precision` that `train.precision: auto` takes there, `full` the
    share of its disks that is taken, by folder, `cache_free_bytes` for copies of images and of runs in a bucket."""

    versions: Mapping[str, str]
    gpus: tuple[str, ...]
    precision: str
    full: Mapping[str, float]
    cache_free_bytes: int


@dataclass(frozen=True)
class Images:
    """How many training images a node finds, and a digest of their names."""

    num: int
    names: str


def node_facts(config: Config) -> NodeFacts:
    """Runs on a node: what it is made of. The process has then taken hold of all GPUs, and must train on none."""
    caches = config.data.cache_dir or default_cache_dir()
    return NodeFacts(
        versions=versions(),
        gpus=tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())),
        precision=PRECISIONS[choose_precision(TrainConfig(), local_device()).dtype],
        full={str(folder): _full(folder) for folder in (Path(tempfile.gettempdir()), caches)},
        cache_free_bytes=disk_usage(default_cache_dir()).free,
    )


def versions() -> dict[str, str]:
    """What must be the same everywhere. nuciseg's files count, because its version is the same between releases."""
    return {
        "Python": platform.python_version(),
        "Ray": ray.__version__,
        "torch": torch.__version__,
        "nuciseg": f"{nuciseg.__version__} ({_digest_of_files()})",
    }


def first_image(config: Config) -> Images:
    """Runs on a node: reads its list of training images, and decodes the first. Raises DataError, ResourceError."""
    records = check_first_image(config.data)
    names = "\n".join(record.id for record in records)
    return Images(len(records), blake2b(names.encode(), digest_size=8).hexdigest())


def wandb_state(config: Config) -> str:
    """Runs on a node: none, offline, online, or the address of the server that does not answer there.

    Nothing is sent where no key is configured. Raises ConfigError for `tracking.kind: wandb` without a key.
    """
    mode = wandb_mode(config.tracking, verbose=False)
    if mode != "online":
        return mode or "none"
    return silent_server() or mode


def _digest_of_files() -> str:
    package = Path(nuciseg.__file__).parent
    digest = blake2b(digest_size=4)
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _full(folder: Path) -> float:
    usage = disk_usage(folder)
    return 1 - usage.free / usage.total


def disk_usage(folder: Path) -> shutil._ntuple_diskusage:
    """Of the disk that the folder lies on, or will lie on."""
    return shutil.disk_usage(next(each for each in (folder, *folder.parents) if each.exists()))
