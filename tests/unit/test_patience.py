"""Which errors are waited out, and what is known meanwhile."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from nuciseg import patience
from nuciseg.distributed.failures import ask_to_stop, is_asked_to_stop
from nuciseg.engine.checkpoint import METADATA_FILE, WEIGHTS_FILE, CheckpointStore, load_checkpoint
from nuciseg.errors import ResourceError, StorageAwayError
from nuciseg.patience import is_away, patiently
from nuciseg.wandb_records import wandb_files

STALE = OSError(errno.ESTALE, "Stale file handle")


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "WAITS_S", (0.0, 0.0))


@pytest.mark.parametrize(
    ("error", "away"),
    [
        (STALE, True),
        (OSError(errno.EIO, "Input/output error"), True),
        (SafetensorError("I/O error: Input/output error (os error 5)"), True),
        (StorageAwayError("s3://bucket: the storage cannot be reached"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), False),
        (SafetensorError("header too large"), False),
        (ResourceError("no space left"), False),
        (ValueError("5"), False),
    ],
)
def test_what_is_waited_for(error: Exception, away: bool) -> None:
    assert is_away(error) == away
    attempts: list[int] = []

    def fail() -> None:
        attempts.append(1)
        raise error

    with pytest.raises(type(error)):
        patiently(fail)
    assert len(attempts) == (3 if away else 1)


def test_storage_that_comes_back_is_asked_again() -> None:
    answers = iter([STALE, "there"])

    def ask() -> str:
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return str(answer)

    assert patiently(ask) == "there"


def test_a_run_whose_storage_is_away_trains_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ask_to_stop(tmp_path)
    assert is_asked_to_stop(tmp_path)
    monkeypatch.setattr(Path, "stat", stale_for(lambda path: True, Path.stat))
    assert not is_asked_to_stop(tmp_path)


@pytest.fixture
def store(tiny_run: Path, tmp_path: Path) -> CheckpointStore:
    """Of a run with two checkpoints, the last of which is not the best."""
    store = CheckpointStore(tmp_path)
    shutil.copytree(CheckpointStore(tiny_run).folder, store.folder)
    last = store.last
    assert last is not None
    first = last.with_name("epoch-0001")
    if not first.exists():
        shutil.copytree(last, first)
    return store


@pytest.mark.parametrize(("asked", "file"), [("read_text", METADATA_FILE), ("stat", WEIGHTS_FILE)])
def test_checkpoints_that_cannot_be_asked_are_not_taken_for_damaged(
    asked: str, file: str, store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = store.last
    assert last is not None
    names = sorted(path.name for path in store.folder.iterdir())
    further = load_checkpoint(last, training=True)
    further = replace(further, progress=replace(further.progress, epoch=further.progress.epoch + 1))
    monkeypatch.setattr(Path, asked, stale_for(lambda path: path == last / file, getattr(Path, asked)))
    with pytest.raises(StorageAwayError, match=r"Stale file handle.*go on with --resume"):
        _ = store.last
    with pytest.raises(StorageAwayError):
        store.save(further)
    monkeypatch.undo()
    assert sorted(path.name for path in store.folder.iterdir()) == names


def test_a_folder_that_cannot_be_listed_is_not_taken_for_empty(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "listdir", stale_for(lambda path: True, os.listdir))
    with pytest.raises(StorageAwayError):
        _ = store.last
    with pytest.raises(OSError, match="Stale"):
        wandb_files(store.folder)


def stale_for(is_away: Callable[[Path], bool], ask: Callable[..., Any]) -> Callable[..., Any]:
    def asking(path: Path, *arguments: Any, **named: Any) -> Any:
        if is_away(path):
            raise STALE
        return ask(path, *arguments, **named)

    return asking
