"""Checkpoints: one folder an epoch, written whole or not at all, nothing in it that can run code.

    checkpoints/
    ├── epoch-0007/
    │   ├── checkpoint.json       schema version, configuration, epoch, scores so far, split hash, sizes of the files
    │   ├── weights.safetensors   the weights to predict with (averaged ones where averaging is on)
    │   └── training.safetensors  raw weights, optimizer and averaging state: what resuming needs
    ├── epoch-0008/
    └── epoch-0008-batch-000120/  in the middle of the ninth epoch

A folder gets its name by a rename after all its files are on the disk, so a killed writer leaves nothing that could
be taken for a checkpoint. The best, the last and the one before it are kept: should a disk lose a part of the last one
after all, the run goes on from the one before. That one makes room for the next, so there are never more than three.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from nuciseg.config import Config, DataConfig, parse_config
from nuciseg.engine.shipped import describe_shipped, is_shipped_name, shipped_folder
from nuciseg.errors import CheckpointError, ConfigError, ResourceError, StorageAwayError, writing
from nuciseg.patience import error_number, is_away, names_in, patiently
from nuciseg.types import Diameters

SCHEMA_VERSION = 1
MAX_FOLDERS = 3
METADATA_FILE = "checkpoint.json"
WEIGHTS_FILE = "weights.safetensors"
TRAINING_FILE = "training.safetensors"


@dataclass(frozen=True)
class Progress:
    """Where a run stands; with the seed in the configuration it fixes all randomness to come.

    `epoch` epochs and, of the next one, `batches` batches are done. `history` has one flat mapping of figures an epoch,
    from epoch 1 on.
    """

    epoch: int = 0
    batches: int = 0
    step: int = 0
    best_epoch: int = 0
    history: tuple[Mapping[str, float], ...] = ()

    @property
    def epochs_since_best(self) -> int:
        return self.epoch - self.best_epoch


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory. `training` is empty where only prediction is wanted.

    `diameters` are those of the nuclei that it was trained on, `data_format` the layout of their images; None where
    that was not written down.
    """

    config: Config
    progress: Progress
    split_hash: str
    in_channels: int
    weights: Mapping[str, torch.Tensor]
    training: Mapping[str, torch.Tensor] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)
    diameters: Diameters | None = None
    data_format: str | None = None


def save_checkpoint(checkpoint: Checkpoint, folder: Path) -> None:
    """Write `folder` whole or not at all, and wait for storage that is away for two minutes or less.

    Raises ResourceError where there is no space or no permission; whatever lay there before is kept.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        patiently(lambda: _write_checkpoint(checkpoint, temporary, folder))
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise ResourceError(_why_not_written(error, folder)) from error


def _write_checkpoint(checkpoint: Checkpoint, temporary: Path, folder: Path) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True, exist_ok=True)  # there is what an attempt left while the storage went away
    files = {WEIGHTS_FILE: checkpoint.weights}
    if checkpoint.training:
        files[TRAINING_FILE] = checkpoint.training
    for name, tensors in files.items():
        save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, temporary / name)
    progress = checkpoint.progress
    metadata = {
        "schema_version": SCHEMA_VERSION,
        "config": checkpoint.config.model_dump(mode="json"),
        "in_channels": checkpoint.in_channels,
        "split_hash": checkpoint.split_hash,
        "scores": dict(checkpoint.scores),
        "diameters": asdict(checkpoint.diameters) if checkpoint.diameters else None,
        "data_format": checkpoint.data_format,
        "progress": {
            "epoch": progress.epoch,
            "batches": progress.batches,
            "step": progress.step,
            "best_epoch": progress.best_epoch,
            "history": [dict(row) for row in progress.history],
        },
        "file_bytes": {name: (temporary / name).stat().st_size for name in files},
    }
    (temporary / METADATA_FILE).write_text(json.dumps(metadata, indent=1), encoding="utf-8")
    for name in (*files, METADATA_FILE):
        _flush_to_disk(temporary / name)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(temporary, folder)


def load_checkpoint(folder: Path, *, training: bool = False) -> Checkpoint:
    """Read a checkpoint folder; with `training` also what resuming needs.

    Raises CheckpointError where it is none, truncated, or of another schema.
    """
    metadata_path = folder / METADATA_FILE
    try:
        metadata = read_json(metadata_path)
        version = metadata["schema_version"]
    except OSError as error:
        if is_away(error):
            raise _unreadable(folder, error) from error
        raise CheckpointError(
            f"{folder} is not a checkpoint (it has no {METADATA_FILE}); {_how_to_name_one()}"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{metadata_path} is truncated or no checkpoint's; {_how_to_name_one()}") from None
    if version != SCHEMA_VERSION:
        raise CheckpointError(
            f"{folder} has checkpoint schema {version}, this nuciseg reads schema {SCHEMA_VERSION}; "
            "use the nuciseg version that wrote it, or train again"
        )
    missing = {"config", "progress", "split_hash", "in_channels", "scores", "file_bytes"} - set(metadata)
    if missing:
        raise CheckpointError(f"{metadata_path} lacks {', '.join(sorted(missing))}; copy the whole checkpoint again")
    names = [WEIGHTS_FILE, TRAINING_FILE] if training else [WEIGHTS_FILE]
    tensors = {name: _load_tensors(folder / name, metadata["file_bytes"].get(name)) for name in names}
    try:
        config = parse_config(metadata["config"])
    except ConfigError as error:
        raise CheckpointError(f"{metadata_path}: its configuration cannot be used here: {error}") from None
    progress = metadata["progress"]
    return Checkpoint(
        config=config,
        progress=Progress(
            epoch=progress["epoch"],
            batches=progress.get("batches", 0),
            step=progress["step"],
            best_epoch=progress["best_epoch"],
            history=tuple(progress["history"]),
        ),
        split_hash=metadata["split_hash"],
        in_channels=metadata["in_channels"],
        weights=tensors[WEIGHTS_FILE],
        training=tensors.get(TRAINING_FILE, {}),
        scores=metadata["scores"],
        diameters=Diameters(**metadata["diameters"]) if metadata.get("diameters") else None,
        data_format=metadata.get("data_format") or _format_in(config.data),
    )


def _format_in(data: DataConfig) -> str | None:
    """The layout of the training images as far as the configuration tells."""
    if data.format != "auto":
        return data.format
    return "synthetic" if data.root is None else None


def replace_config(folder: Path, config: Config, scores: Mapping[str, float]) -> None:
    """Put another configuration (of decoding, chosen after training) and its scores into a checkpoint."""
    path = folder / METADATA_FILE
    metadata = read_json(path)
    write_json({**metadata, "config": config.model_dump(mode="json"), "scores": dict(scores)}, path)


class CheckpointStore:
    """The checkpoints of one run: best and last."""

    def __init__(self, run_dir: Path, on_saved: Callable[[], None] = lambda: None) -> None:
        """`on_saved` is called at the end of each `save`: only when it returns is the checkpoint kept."""
        self.folder, self.on_saved = run_dir / "checkpoints", on_saved

    def save(self, checkpoint: Checkpoint) -> Path:
        """Keep `checkpoint` as the last one (and the best, where its progress says so); drop what is neither."""
        progress = checkpoint.progress
        path, best = self._path(progress.epoch, progress.batches), self._path(progress.best_epoch)
        for abandoned in self._folders(".epoch-"):  # by a killed writer; first, or there were four folders
            shutil.rmtree(abandoned, ignore_errors=True)
        before = self.last
        self._drop_all_but(before, self.best)
        save_checkpoint(checkpoint, path)
        self._drop_all_but(path, best, before)
        self.on_saved()
        return path

    def call_best(self, folder: Path) -> None:
        """Let one of these checkpoints be the best, for reasons that are known only after training."""
        last = self.last
        assert last is not None  # `folder` is here
        path = last / METADATA_FILE
        metadata = read_json(path)
        metadata["progress"]["best_epoch"] = _progress_in(folder)["epoch"]
        write_json(metadata, path)

    def adopt(self, folder: Path) -> None:
        """Go on from another run's checkpoint: it becomes the only one here. One of this run's own changes nothing."""
        handed_over = _progress_in(folder)
        own = self.last
        if own is not None and _progress_in(own)["history"][: handed_over["epoch"]] == handed_over["history"]:
            return
        path = self._path(handed_over["epoch"])
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        shutil.rmtree(temporary, ignore_errors=True)
        with writing(path):
            shutil.copytree(folder, temporary)
            for other in self._folders():
                shutil.rmtree(other)
            os.replace(temporary, path)

    def take_over(self, other: CheckpointStore) -> None:
        """Copy all checkpoints of another run into this one, which has none. Raises ResourceError."""
        temporary = self.folder.with_name(f".{self.folder.name}.copy")
        shutil.rmtree(temporary, ignore_errors=True)  # of an attempt that was killed
        with writing(self.folder):
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(other.folder, temporary)
            os.rename(temporary, self.folder)

    @property
    def last(self) -> Path | None:
        """The newest whole checkpoint, or None before the first; where none is whole the newest: loading says why."""
        newest_first = self._folders()[::-1]
        return next(filter(_is_whole, newest_first), newest_first[0] if newest_first else None)

    @property
    def damaged(self) -> list[Path]:
        """Checkpoints newer than the last whole one."""
        last = self.last
        if last is None:
            return []
        return [folder for folder in self._folders() if _numbers_in(folder.name) > _numbers_in(last.name)]

    @property
    def best(self) -> Path | None:
        """The checkpoint with the best validation score, or None before the first epoch's. The last one knows which
        it is."""
        last = self.last
        if last is None:
            return None
        try:
            best_epoch = _progress_in(last)["best_epoch"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            if is_away(error):
                raise _unreadable(last, error) from error
            return last  # damaged: whoever loads it says how
        if best_epoch == 0:
            return None
        path = self._path(best_epoch)
        return path if patiently(path.exists) else last

    def _folders(self, prefix: str = "epoch-") -> list[Path]:
        try:
            names = [name for name in names_in(self.folder) if name.startswith(prefix)]
            return [self.folder / name for name in sorted(names, key=_numbers_in)]
        except OSError as error:
            raise _unreadable(self.folder, error) from error

    def _path(self, epoch: int, batches: int = 0) -> Path:
        return self.folder / (f"epoch-{epoch:04d}" + (f"-batch-{batches:06d}" if batches else ""))

    def _drop_all_but(self, *kept: Path | None) -> None:
        for folder in self._folders():
            if folder not in kept:
                shutil.rmtree(folder, ignore_errors=True)


def _numbers_in(name: str) -> list[int]:
    """Orders names of checkpoints in time, however many digits their epochs have."""
    return [int(digits) for digits in re.findall(r"\d+", name)]


def find_checkpoint(path: Path) -> Path:
    """The checkpoint folder that `path` means: itself, a run's best one, the best one of a search's final run, or
    `nuciseg/NAME`: weights that come with the package.

    A run of that name counts more than the package's weights; a folder without a checkpoint does not, because where
    nuciseg is checked out there is a folder `nuciseg`. Raises CheckpointError where there is none.
    """
    if (path / METADATA_FILE).exists():
        return path
    for run_dir in (path, path / "final"):
        best = CheckpointStore(run_dir).best
        if best is not None:
            return best
    if is_shipped_name(path):
        return shipped_folder(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; {_how_to_name_one()}")
    raise CheckpointError(f"{path} is not a checkpoint and holds none; {_how_to_name_one()}")


def disk_need_bytes(num_parameters: int) -> int:
    """Upper bound of what a run's checkpoints take: weights, raw weights and two moments, three folders."""
    return MAX_FOLDERS * 4 * 4 * num_parameters


def write_json(value: Any, path: Path) -> None:
    """Write JSON to `path` whole or not at all; raises ResourceError where there is no space or no permission."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")

    def write() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(value, indent=1), encoding="utf-8")
        os.replace(temporary, path)

    try:
        patiently(write)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise ResourceError(_why_not_written(error, path)) from error


def read_json(path: Path) -> Any:
    """What JSON says; storage that is away is waited for. Raises OSError, ValueError."""
    return json.loads(patiently(lambda: path.read_text(encoding="utf-8")))


def _is_whole(folder: Path) -> bool:
    """Whether all files are there in full length. (What a disk changed within them, loading finds out.)"""
    try:
        sizes = read_json(folder / METADATA_FILE)["file_bytes"].items()
        return all(patiently((folder / name).stat).st_size == size for name, size in sizes)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if is_away(error):  # a checkpoint that cannot be asked is not one that may be dropped
            raise _unreadable(folder, error) from error
        return False


def _progress_in(folder: Path) -> dict[str, Any]:
    progress: dict[str, Any] = read_json(folder / METADATA_FILE)["progress"]
    return progress


def _unreadable(path: Path, error: Exception) -> StorageAwayError:
    reason = getattr(error, "strerror", None) or error
    return StorageAwayError(
        f"{path} cannot be read ({reason}); when its storage answers again, go on with --resume; where this alone is "
        "damaged, move it away before"
    )


def _how_to_name_one() -> str:
    return (
        "give a run's folder, a folder under its checkpoints/, or the name of weights that come with nuciseg "
        f"({describe_shipped()})"
    )


def _load_tensors(path: Path, expected_bytes: int | None) -> dict[str, torch.Tensor]:
    try:
        size = patiently(path.stat).st_size
        if expected_bytes is not None and size != expected_bytes:
            raise CheckpointError(
                f"{path} is truncated ({size} of {expected_bytes} bytes); take the run's other one or copy it again"
            )
        # Not mapped into memory: a page that the storage cannot bring then ends the process, and no error tells.
        return load(patiently(path.read_bytes))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); copy the whole checkpoint folder") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path} is truncated or damaged ({error}); copy the checkpoint again") from None


def _flush_to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _why_not_written(error: Exception, folder: Path) -> str:
    number = error_number(error)
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        parent = next(p for p in folder.parents if p.exists())
        free_mb = shutil.disk_usage(parent).free / 1e6
        return (
            f"no space left for {folder} ({free_mb:.1f} MB free); the checkpoints before it are whole: "
            "free space or set run.storage_path elsewhere, then --resume"
        )
    reason = os.strerror(number) if number is not None else str(error)
    return f"cannot write {folder}: {reason}; set run.storage_path to a folder you may write to"
