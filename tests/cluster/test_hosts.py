"""The hosts that the cluster tests run on: they reach each other, keep to themselves, and never outlive the tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from hosts import REPOSITORY, Lan, wait_for, why_no_hosts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(180),
    pytest.mark.skipif(why_no_hosts() is not None, reason=str(why_no_hosts())),
]

SSH = "ssh -o BatchMode=yes -o StrictHostKeyChecking=no -o ConnectTimeout=5 -o LogLevel=ERROR"


def test_hosts_have_files_processes_and_names_of_their_own(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    with Lan(tmp_path / "lan", shared=[shared]) as lan:
        laptop = lan.add("laptop", 1, has_key=True)
        one = lan.add("one", 2)
        there = f"{SSH} {one.address} 'hostname; command -v python; touch ~/mine {shared}/ours; ls /proc'"
        name, python, *processes = laptop.run(there, timeout_s=30).stdout.splitlines()
        assert name == "one"
        assert python == f"{sys.prefix}/bin/python"
        assert str(psutil.Process().pid) not in processes
        assert (one.home / "mine").exists()
        assert not (laptop.home / "mine").exists()
        assert (shared / "ours").exists()
        assert one.run(f"touch {REPOSITORY}/nobody", timeout_s=30, check=False).returncode != 0
        assert one.run(f"{SSH} {laptop.address} true", timeout_s=30, check=False).returncode != 0, "no key there"


def test_power_cut_ends_every_process_of_the_host(tmp_path: Path) -> None:
    with Lan(tmp_path / "lan") as lan:
        laptop, one = lan.add("laptop", 1, has_key=True), lan.add("one", 2)
        many = "for number in $(seq 300); do nohup sleep 54321 >/dev/null 2>&1 & done"
        laptop.run(f"{SSH} {one.address} '{many}'", timeout_s=30)
        wait_for(lambda: one.processes() == ["sleep 54321"] * 300, "as many processes", 30)
        sleeping = [each for each in psutil.process_iter(["cmdline"]) if each.info["cmdline"] == ["sleep", "54321"]]
        assert sleeping
        one.power_off()
        assert not any(process.is_running() for process in sleeping)
        assert one.processes() == []
        assert laptop.run(f"{SSH} {one.address} true", timeout_s=30, check=False).returncode != 0
        lan.power_on(one)
        laptop.run(f"{SSH} {one.address} true", timeout_s=30)


def test_hosts_die_with_the_tests(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys, time\nfrom hosts import Lan\n"
        f"lan = Lan(pathlib.Path({str(tmp_path / 'lan')!r}))\nlan.__enter__()\n"
        "host = lan.add('one', 1)\nhost.run('nohup sleep 65432 >/dev/null 2>&1 &', timeout_s=30)\n"
        "print('up', flush=True)\ntime.sleep(600)\n"
    )
    tests = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent)
    assert tests.stdout is not None
    assert tests.stdout.readline() == "up\n"

    def mounts() -> list[str]:
        """Of this test's files or onto them: other tests mount and unmount beside this one."""
        mine = str(Path(*tmp_path.parts[-2:]))  # the file system of /tmp may be one of its own
        return [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if mine in line]

    assert mounts() == []
    started = psutil.Process(tests.pid).children(recursive=True)
    assert any(process.cmdline() == ["sleep", "65432"] for process in started)
    tests.kill()
    tests.wait()
    wait_for(lambda: not any(process.is_running() for process in started), "the end of the hosts", 10)
    assert mounts() == []
