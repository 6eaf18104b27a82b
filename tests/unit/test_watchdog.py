"""The watchdog ends a process that no longer answers, and nothing else."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import psutil

from nuciseg.distributed.watchdog import TIMEOUT_VARIABLE, ended_where_it_hangs

WATCHED = "from nuciseg.distributed.watchdog import ended_where_it_hangs\nwith ended_where_it_hangs():\n    "


def start(body: str, timeout_s: str = "2") -> subprocess.Popen[str]:
    environment = {TIMEOUT_VARIABLE: timeout_s}
    return subprocess.Popen(
        [sys.executable, "-c", WATCHED + body],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_halted_process_is_ended_with_a_sentence() -> None:
    process = start("import time; print('up', flush=True); time.sleep(60)")
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGSTOP)
    _, said = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL
    assert said == f"nuciseg: process {process.pid} has not answered for 2 s, it is ended\n"


def test_a_process_that_is_busy_or_waits_is_left_alone() -> None:
    process = start("import time; until = time.time() + 4\n    while time.time() < until: pass\n    time.sleep(4)")
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (0, "")


def test_listener_ends_with_the_block_and_with_its_process() -> None:
    with ended_where_it_hangs():
        [listener] = [child for child in psutil.Process().children() if "watchdog.py" in " ".join(child.cmdline())]
    assert not listener.is_running()

    process = start("import time; print('up', flush=True); time.sleep(60)", timeout_s="600")
    assert process.stdout is not None
    process.stdout.readline()
    [listener] = psutil.Process(process.pid).children()
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while listener.is_running() and listener.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.1)
