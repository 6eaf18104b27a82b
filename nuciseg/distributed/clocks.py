"""How far the nodes' clocks are from that of this process."""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.exceptions import RayError

from nuciseg.distributed.nodes import ANSWER_TIMEOUT_S, Result, alive_nodes, stationed

NUM_TRIPS = 5


class _Clock:
    def now(self) -> float:
        return time.time()


def clock_offsets() -> dict[str, Result[float]]:
    """Seconds that each node's clock is ahead of ours, by the node's name; right to half of the shortest round trip.

    A process on the node answers several times, because the first answer takes as long as the process to start.
    """
    with stationed(_Clock) as clocks:
        return {name: _offset(clocks.get(name)) for name in alive_nodes().values()}


def _offset(clock: Any) -> Result[float]:
    if clock is None:
        return Result(failure=f"does not tell its time within {ANSWER_TIMEOUT_S:g} s; see whether it is overloaded")
    trips = []
    for _ in range(NUM_TRIPS):
        asked = time.time()
        try:
            there = float(ray.get(clock.now.remote(), timeout=ANSWER_TIMEOUT_S))
        except RayError:
            return Result(failure="went away while it told its time; see `ray status`, and add a node in its place")
        answered = time.time()
        trips.append((answered - asked, there - (asked + answered) / 2))
    return Result(value=min(trips)[1])
