"""Ends this process when it no longer answers, so that who looks after it starts it again.

A thread says every second that the process is there, and a child listens: it goes on where the process is halted, or
where something in it holds Python's lock for ever. Ray Train's health check sees no more of its workers.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

TIMEOUT_VARIABLE = "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"  # Ray Train's own, for the workers of larger runs
TIMEOUT_S = 600.0
SIGN_S = 1.0


@contextmanager
def ended_where_it_hangs() -> Iterator[None]:
    """Within, this process is killed after ten minutes (or TIMEOUT_VARIABLE) without a sign of it."""
    timeout_s = os.environ.get(TIMEOUT_VARIABLE, str(TIMEOUT_S))
    # The file by itself, with the standard library alone: it starts at once and takes no memory to speak of.
    words = [sys.executable, "-I", "-S", __file__, str(os.getpid()), timeout_s]
    done = threading.Event()
    with subprocess.Popen(words, stdin=subprocess.PIPE, start_new_session=True) as listener:
        assert listener.stdin is not None
        signs = listener.stdin.fileno()

        def sign() -> None:
            with suppress(BrokenPipeError):  # killed by somebody: then nobody looks after this process
                while not done.wait(SIGN_S):
                    os.write(signs, b".")

        thread = threading.Thread(target=sign, name="nuciseg-watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def _listen(pid: int, timeout_s: float) -> None:
    """Kill process `pid`, this one's parent, after so many seconds without a sign; they do not count in a suspended
    machine, which halts this process as well."""
    silent_s = 0.0
    while os.getppid() == pid:
        heard, _, _ = select.select([sys.stdin], [], [], SIGN_S)
        if not heard:
            silent_s += SIGN_S
        elif os.read(sys.stdin.fileno(), 4096):
            silent_s = 0.0
        else:
            return
        if silent_s >= timeout_s and os.getppid() == pid:
            print(f"nuciseg: process {pid} has not answered for {silent_s:.0f} s, it is ended", file=sys.stderr)
            os.kill(pid, signal.SIGKILL)
            return


if __name__ == "__main__":
    _listen(int(sys.argv[1]), float(sys.argv[2]))
