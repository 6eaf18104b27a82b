"""A verb of nuciseg whose steps take longer, and wait where a file `RUN-holds/STEP` lies beside the run's folder.

So a node can be lost in the middle of an epoch, and join in another one, however fast the machine is.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable
from typing import Any

from nuciseg.cli import run_verb


def held(work: Callable[..., Any], step_s: float) -> Callable[..., Any]:
    """`work`, which a worker runs, with steps that take `step_s` longer and can be held."""

    def working(*arguments: Any, **named: Any) -> Any:
        from nuciseg.distributed import storage
        from nuciseg.engine.loop import Trainer

        storage.SEEN_TIMEOUT_S = 10.0  # here no folder is a network's, which may show late what was written
        step = Trainer._step

        def held_step(self: Trainer, *arguments: Any) -> Any:
            run_dir = self.store.folder.parent
            hold = run_dir.with_name(f"{run_dir.name}-holds") / str(self.progress.step)
            time.sleep(step_s)
            while hold.exists():
                hold.with_suffix(".held").touch()
                time.sleep(0.05)
            return step(self, *arguments)

        Trainer._step = held_step  # type: ignore[method-assign]
        try:
            return work(*arguments, **named)
        finally:
            Trainer._step = step  # type: ignore[method-assign]

    working.__name__ = work.__name__  # Tune takes a search up again only with a function of the same name
    return working


def main(verb: str, step_s: float, words: list[str]) -> None:
    from nuciseg.distributed import search, training

    training.train_loop = held(training.train_loop, step_s)
    search._run_trial = held(search._run_trial, step_s)
    importlib.import_module(f"nuciseg.{verb}").main(words)


if __name__ == "__main__":
    run_verb(lambda: main(sys.argv[1], float(sys.argv[2]), sys.argv[3:]))
