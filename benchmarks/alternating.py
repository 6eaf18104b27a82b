"""Programs that take turns at the same work, each in a process of its own and on the same cores.

TensorFlow and PyTorch have thread pools that are fixed when they start, so each number of cores needs new processes;
and a peer may need another Python. A player reads one JSON value a line and answers with one: first the job, then the
name of each pass over the images that it is to make. One that waits takes no time of the cores.

Knows the standard library alone, since every player's Python imports it.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

THREADS = (
    *("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"),
    *("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "STARDIST_EDT_NUM_THREADS"),
)
QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}

Pass = Callable[[], int]
"""One pass over all images; returns the number of nuclei found."""


def all_cores() -> list[int]:
    """The cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


@contextlib.contextmanager
def on_cores(cores: Sequence[int]) -> Iterator[dict[str, str]]:
    """Keep what is started in here on these cores, and give it this environment: as many threads as cores."""
    before = all_cores()
    _keep_on(cores)
    try:
        yield {**os.environ, **QUIET, **dict.fromkeys(THREADS, str(len(cores)))}
    finally:
        _keep_on(before)


def _keep_on(cores: Sequence[int]) -> None:
    if hasattr(os, "sched_setaffinity"):  # Linux; elsewhere the number of threads alone is the same
        os.sched_setaffinity(0, cores)


class Player:
    """A process that plays `serve`; one that fails says why on stderr and ends this process, too."""

    def __init__(self, command: Sequence[str], job: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=dict(environment)
        )
        self.facts = self._ask(job)

    def play(self, name: str) -> dict[str, Any]:
        """One pass: `wall_s` and `nuclei`."""
        return self._ask(name)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _ask(self, what: object) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(what), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            sys.exit(self._process.wait() or 1)
        return dict(json.loads(answer))


def serve(prepare: Callable[[dict[str, Any]], tuple[dict[str, Pass], dict[str, Any]]]) -> None:
    """Take the job from stdin, `prepare` it, and make passes until stdin ends.

    `prepare` returns the passes by name, and facts for the report.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    passes, facts = prepare(json.loads(sys.stdin.readline()))
    print(json.dumps(facts), file=answers, flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        num_nuclei = passes[json.loads(line)]()
        print(json.dumps({"wall_s": time.perf_counter() - start, "nuclei": num_nuclei}), file=answers, flush=True)
