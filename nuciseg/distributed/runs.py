"""Before a run: whether its settings can be used, its folder, who it is, what it will take."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nuciseg.buckets import BucketFolder
from nuciseg.config import Config, known_keys, load_config
from nuciseg.distributed.cluster import has_gpu
from nuciseg.distributed.failures import forget_failure
from nuciseg.distributed.mirror import Mirror, working_copy
from nuciseg.distributed.space import variants
from nuciseg.distributed.storage import require_everywhere, require_shared
from nuciseg.distributed.trials import num_trials
from nuciseg.distributed.worker import CONFIG_FILE, SPLIT_FILE
from nuciseg.engine.checkpoint import MAX_FOLDERS, disk_need_bytes
from nuciseg.engine.network import begun_network, count_parameters
from nuciseg.engine.precision import choose_precision
from nuciseg.engine.shipped import is_shipped_name
from nuciseg.errors import ConfigError, ResourceError
from nuciseg.losses import build_loss
from nuciseg.models import TimmConfig
from nuciseg.targets import build_target
from nuciseg.tracking import RunIdentity, read_identity, wandb_mode

HANDED_OVER = 4  # checkpoints a trial that PBT passes on: with fewer they go before the other trial has them


def check_settings(config: Config, *, verbose: bool) -> None:
    """Find before a folder is made what would end the run, or trials of the search, as soon as they began.

    Raises ConfigError or CheckpointError for weights to start from that are not to be had, a loss whose weights do not
    fit the target's maps, W&B demanded without a key.
    """
    valid = torch.ones(1, 8, 8, dtype=torch.bool)
    for num_maps in {len(build_target(variant.target).map_names) for variant in variants(config, "target")}:
        maps = torch.zeros(1, num_maps, 8, 8)
        for variant in variants(config, "loss"):
            build_loss(variant.loss)(maps, maps, valid)
    for variant in _beginnings(config):
        begun_network(variant, 1, torch.device("cpu"))
    if config.tracking.kind == "wandb":
        wandb_mode(config.tracking, verbose)


def _beginnings(config: Config) -> list[Config]:
    """One configuration for each set of weights that the run, or a trial of the search, would begin with."""
    found: dict[object, Config] = {}
    for variant in variants(config, "model"):
        model = variant.model
        if config.train.init_from is not None:
            found[model] = variant
        elif isinstance(model, TimmConfig) and model.pretrained is not None:
            found[model.encoder, model.pretrained] = variant
    return list(found.values())


def check_precision(config: Config) -> None:
    """Raise ResourceError where workers would have to compute in what their device does not. Any cluster is joined."""
    if not has_gpu(config.scale):
        for variant in variants(config, "train"):
            choose_precision(variant.train, torch.device("cpu"))


def check_storage(config: Config, folder: Path | str | None = None, *, begun: bool = False) -> None:
    """Raise ResourceError where nodes of the connected cluster could not work in `folder`, by default the one for all
    runs, or lack files; a run that has `begun` needs its data alone."""
    require_shared(config.run.storage_path if folder is None else folder)
    files = files_of_nodes(config)
    require_everywhere({setting: path for setting, path in files.items() if not begun or setting == "data.root"})


def files_of_nodes(config: Config) -> dict[str, Path]:
    """What every node has to have besides the run's folder, by the settings that name it."""
    model, start = config.model, config.train.init_from
    encoder_weights = model.weights_file if isinstance(model, TimmConfig) and start is None else None
    files = {
        "data.root": config.data.root,
        "data.validation_list": config.data.validation_list,
        "train.init_from": None if start is None or is_shipped_name(start) else start,
        "model.pretrained": encoder_weights,
    }
    return {setting: path for setting, path in files.items() if isinstance(path, Path)}


def new_run(config: Config, default_name: str, *, below: bool = True) -> Mirror:
    """Make the folder of a new run, or with `below` False of a search.

    Raises ResourceError where that cannot be written, ConfigError where it exists.
    """
    name = config.run.name or default_name
    if isinstance(config.run.storage_path, Path):
        return Mirror(_new_folder(config.run.storage_path, name), below=below)
    uri = f"{config.run.storage_path.rstrip('/')}/{name}"
    if BucketFolder(uri).files():
        raise _exists(uri)
    mirror = working_copy(uri, "work", below=below)
    mirror.fetch()  # nothing: the copy of one that was there before goes
    return mirror


def _exists(folder: Path | str) -> ConfigError:
    return ConfigError(f"{folder} exists already; go on with it by --resume {folder}, or choose another --run.name")


def _new_folder(storage: Path, name: str) -> Path:
    folder = storage / name
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise _exists(folder) from None
    except OSError as error:
        raise ResourceError(
            f"cannot write into {storage} ({error.strerror}); set run.storage_path to a folder you may write to"
        ) from None
    return folder


def resumed_config(run: Mirror, flags: Mapping[str, Any], config_file: Path | None) -> Config:
    """The configuration of the run in a folder, ready to go on. Raises ConfigError where there is none."""
    folder = run.folder
    if not (folder / CONFIG_FILE).exists():
        raise ConfigError(f"--resume {run}: no run there (it has no {CONFIG_FILE}); give the folder that was printed")
    if not (folder / SPLIT_FILE).exists():
        raise ConfigError(f"--resume {run} is a search, not a training run; resume it with `nuciseg tune`")
    refuse_other_settings(flags, config_file)
    forget_failure(folder)
    return load_config(folder / CONFIG_FILE)


def refuse_other_settings(flags: Mapping[str, Any], config_files: Path | Sequence[Path] | None) -> None:
    """A resumed run keeps its settings: raise ConfigError where others are given."""
    given = _first_key(flags) if flags else ("config" if config_files else None)
    if given is not None:
        raise ConfigError(f"--resume goes on with the run's own settings; leave out --{given}, or start a new run")


def _first_key(flags: Mapping[str, Any]) -> str:
    known = set(known_keys())
    key, value = next(iter(flags.items()))
    while isinstance(value, Mapping) and value and f"{key}.{next(iter(value))}" in known:
        inner, value = next(iter(value.items()))
        key = f"{key}.{inner}"
    return key


def train_identity(config: Config, run_dir: Path, search: str | None = None) -> RunIdentity:
    """Who the run is to W&B, in the group of the search that it belongs to; a resumed run is who it was."""
    earlier = read_identity(run_dir)
    if earlier is not None:
        return earlier
    kind = getattr(config.model, "encoder", config.model.kind)
    label = run_dir.name if search is None else f"{search}-{run_dir.name}"
    return RunIdentity(
        id=f"{label}-{os.urandom(4).hex()}",  # W&B keeps runs of folders that are long gone
        name=run_dir.name,
        group=config.run.group or search or run_dir.name,
        job_type="train",
        tags=(config.model.kind, kind, config.target.kind),
    )


def trial_disk_bytes(config: Config) -> int:
    """What the checkpoints of one trial take at most; those of a run without a search are as many."""
    run_bytes = _run_disk_bytes(config)
    if config.search.space and config.search.scheduler == "pbt":
        run_bytes += HANDED_OVER * run_bytes // MAX_FOLDERS
    return run_bytes


def disk_need(config: Config) -> int:
    """What all checkpoints of the run or search take at most, bytes."""
    if not config.search.space:
        return _run_disk_bytes(config)
    return num_trials(config) * trial_disk_bytes(config) + config.search.final * _run_disk_bytes(config)


def describe_disk_need(config: Config, folder: Path) -> str:
    """One line: what the checkpoints of the run or search in `folder` take at most, and what is free there."""
    num_runs = num_trials(config) + config.search.final if config.search.space else 1
    runs = "" if num_runs == 1 else f"{num_runs} runs, each "
    is_population = bool(config.search.space) and config.search.scheduler == "pbt"
    handed_over = f", and {HANDED_OVER} a trial to hand over" if is_population else ""
    free_mb = shutil.disk_usage(folder).free / 1e6
    return (
        f"disk: at most {disk_need(config) / 1e6:.0f} MB of checkpoints ({runs}best, last, one more{handed_over}), "
        f"{free_mb:.0f} MB free"
    )


def _run_disk_bytes(config: Config) -> int:
    return disk_need_bytes(max(map(count_parameters, variants(config, "model"))))
