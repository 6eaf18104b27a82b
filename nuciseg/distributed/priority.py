"""Who gets a core first where Ray's own processes and the training share all of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def in_background() -> Iterator[None]:
    """Processes started within do not interrupt others: they wait for a free core or their turn (Linux's SCHED_BATCH).

    A dozen processes of Ray wake a hundred times a second each. Whichever worker they interrupt, the others wait for it
    at every step. Elsewhere than on Linux, or where the system does not allow it, nothing changes.
    """
    if sys.platform != "linux":
        yield
        return
    before = os.sched_getscheduler(0)
    _schedule(os.SCHED_BATCH)
    try:
        yield
    finally:
        _schedule(before)


def come_to_foreground() -> None:
    """This thread, and those that it starts, interrupt others again."""
    if sys.platform == "linux" and os.sched_getscheduler(0) == os.SCHED_BATCH:
        _schedule(os.SCHED_OTHER)


def _schedule(policy: int) -> None:
    with suppress(OSError):  # a sandbox may forbid it, and nothing but time depends on it
        os.sched_setscheduler(0, policy, os.sched_param(0))
