"""What a node says of a folder that it shares with the one that asks, or not, and how it is put to the user."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nuciseg import patience
from nuciseg.distributed.nodes import Result
from nuciseg.distributed.storage import (
    _refuse,
    _what_is_missing,
    _what_is_wrong,
    await_seen,
    require_everywhere,
    require_shared,
)
from nuciseg.errors import ResourceError, StorageAwayError

ASK = """
import sys
from pathlib import Path
from nuciseg.distributed.storage import _what_is_wrong
print(_what_is_wrong(Path(sys.argv[1]), "token"))
"""


@pytest.fixture
def probe(tmp_path: Path) -> Path:
    path = tmp_path / "runs" / ".probe"
    path.parent.mkdir()
    path.write_text("token", encoding="ascii")
    return path


def test_a_shared_folder_is_left_as_it_was(probe: Path) -> None:
    assert _what_is_wrong(probe, "token") is None
    assert os.listdir(probe.parent) == [probe.name]


def test_another_folder_is_told_from_the_same(probe: Path) -> None:
    assert _what_is_wrong(probe, "other") == "reads something else there"
    probe.unlink()
    assert _what_is_wrong(probe, "token") == "does not see what is written there"
    assert _what_is_missing(probe) == "has no such path"
    assert _what_is_missing(probe.parent) is None


@pytest.mark.parametrize(
    ("mount", "said"),
    [
        ('mount -t tmpfs none "{0}"', "does not see what is written there"),
        ('mount --bind "{0}" "{0}" && mount -o remount,bind,ro "{0}"', "cannot write there (Read-only file system)"),
    ],
    ids=["hidden", "read-only"],
)
def test_a_machine_with_other_mounts(probe: Path, mount: str, said: str) -> None:
    """A process in a mount namespace of its own sees what another machine would."""
    if (
        shutil.which("unshare") is None
        or subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode
    ):
        pytest.skip("needs root and unshare, to hide a folder from a process")
    command = mount.format(probe.parent) + ' && exec "$@"'
    words = ["unshare", "--mount", "sh", "-ec", command, "sh", sys.executable, "-c", ASK, str(probe)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == said, done.stderr


def away(path: Path) -> bool:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_storage_that_is_away_is_neither_unshared_nor_a_traceback(probe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "WAITS_S", (0.0,))
    monkeypatch.setattr(Path, "exists", away)
    with pytest.raises(StorageAwayError, match=r"cannot look for \S+ \(Input/output error\); see that its mount"):
        await_seen(probe)
    monkeypatch.setattr(Path, "read_text", lambda path, encoding: away(path))
    with pytest.raises(StorageAwayError, match=r"gets no answer there \(Input/output error\)"):
        _what_is_wrong(probe, "token")


def test_the_first_node_that_is_wrong_is_named() -> None:
    answers: dict[str, Result[str | None]] = {"head": Result(value=None)}
    _refuse("run.storage_path is /runs", answers, "set it")
    answers |= {"w1": Result(value="does not see what is written there"), "w2": Result(failure="does not answer")}
    with pytest.raises(ResourceError) as refused:
        _refuse("run.storage_path is /runs", answers, "set it")
    assert str(refused.value) == (
        "run.storage_path is /runs, but node w1 does not see what is written there (and 1 of 3 nodes more); set it"
    )


def test_without_a_cluster_nothing_is_asked(tmp_path: Path) -> None:
    require_shared(tmp_path / "runs")
    require_everywhere({"data.root": tmp_path / "nowhere"})
    assert not list(tmp_path.iterdir())
