"""`doctor --cluster FILE`: a cluster file checked without a network and without Ray; wrong settings are refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nuciseg import doctor
from nuciseg.cli import run_verb

# No node of it runs in a cloud; the address is one of those kept for documentation.
GOOD = """\
cluster_name: lab
provider: {type: local, head_ip: 192.0.2.10, worker_ips: []}
auth: {ssh_user: researcher}
"""


def answer(*words: str | Path) -> int:
    with pytest.raises(SystemExit) as exit_:
        run_verb(lambda: doctor.main([str(word) for word in words]))
    return int(str(exit_.value.code))


def run_doctor_without_cluster(*words: str | Path, **variables: str) -> tuple[int, list[str]]:
    """The exit code and the lines of a process of its own (another test may have started Ray in this one)."""
    environment = {**os.environ, **(variables or {"RAY_ADDRESS": "127.0.0.1:9"})}
    done = subprocess.run(
        [sys.executable, "-m", "nuciseg.doctor", *words], capture_output=True, text=True, env=environment
    )
    return done.returncode, done.stdout.splitlines()


def test_a_cluster_file_is_checked_offline(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(GOOD.replace("provider:", "max_wokers: 3\nprovider:"))
    exit_code, lines = run_doctor_without_cluster("--cluster", path)
    assert exit_code == 2
    [fault] = [line for line in lines if "max_wokers" in line]
    assert fault.startswith(
        "FAILED  cluster     max_wokers is a key that Ray does not know; did you mean 'max_workers'?"
    )
    assert lines[-1].endswith("checks failed")


def test_what_cannot_be_read_is_no_cluster_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert answer("--cluster", tmp_path / "none.yaml", "--json") == 2
    [check] = json.loads(capsys.readouterr().out)
    assert (check["name"], check["passed"]) == ("cluster", False)
    assert "none.yaml cannot be read" in check["said"]


def test_wrong_settings_are_the_command_s_own_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert answer("--optim.lr", "-1") == 2
    assert "optim.lr is '-1'" in capsys.readouterr().err
    assert answer("--kill-workers") == 2
    assert "did you mean '--kill-worker'?" in capsys.readouterr().err


def test_a_cluster_that_is_not_there_is_the_first_finding() -> None:
    exit_code, lines = run_doctor_without_cluster()
    assert exit_code == 1
    assert lines[0].startswith("FAILED  cluster     no Ray cluster answers at '127.0.0.1:9' (Connection refused)"), (
        lines
    )
    assert lines[1:] == ["1 of 1 checks failed"]


@pytest.mark.parametrize("named", ["", "auto"])
def test_a_cluster_that_was_left_on_this_machine_and_is_gone_is_not_waited_for(tmp_path: Path, named: str) -> None:
    """Ray itself would try for many minutes. What `ray start` notes down stays there after a power cut."""
    note = tmp_path / "ray" / "ray_current_cluster"
    note.parent.mkdir()
    note.write_text("127.0.0.1:9")
    exit_code, lines = run_doctor_without_cluster(RAY_TMPDIR=str(tmp_path), RAY_ADDRESS=named)
    assert exit_code == 1
    assert lines[0].startswith("FAILED  cluster     no Ray cluster answers at '127.0.0.1:9' (Connection refused)"), (
        lines
    )
    assert ("which forgets it" if not named else "correct RAY_ADDRESS") in lines[0]
