"""Which errors are waited out, and what is known meanwhile."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from nuciseg import patience
from nuciseg.distributed.failures import ask_to_stop, is_asked_to_stop
from nuciseg.engine.checkpoint import CheckpointStore
from nuciseg.errors import ResourceError, StorageAwayError
from nuciseg.patience import is_away, patiently

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


def stale_from_now_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def stat(*_: Any, **__: Any) -> None:
        raise STALE

    monkeypatch.setattr(Path, "stat", stat)


def test_a_run_whose_storage_is_away_trains_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ask_to_stop(tmp_path)
    assert is_asked_to_stop(tmp_path)
    stale_from_now_on(monkeypatch)
    assert not is_asked_to_stop(tmp_path)


def test_checkpoints_that_cannot_be_asked_are_not_taken_for_damaged(
    tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tiny_run)
    assert store.last is not None
    stale_from_now_on(monkeypatch)
    with pytest.raises(OSError, match="Stale"):
        _ = store.last
