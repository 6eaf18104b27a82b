"""What a person sees while a search or a run goes on: one updating table on a terminal, plain lines in a log."""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray import cloudpickle, tune
from ray.exceptions import RayTaskError
from rich.console import Console
from rich.live import Live
from rich.table import Table

from nuciseg.config import Config
from nuciseg.distributed.failures import FAILURE_FILE, noted_failure
from nuciseg.distributed.mirror import Mirror
from nuciseg.distributed.trials import describe
from nuciseg.engine.checkpoint import CheckpointStore
from nuciseg.errors import NucisegError
from nuciseg.tracking import METRICS_FILE, read_metrics

POLL_S = 0.5


class SearchProgress(tune.Callback):  # type: ignore[misc]  # ray is untyped
    """Follows the trials of a search in the driver."""

    def __init__(self, config: Config, search: Mirror, concurrent: int) -> None:
        self.metric = config.train.metric
        self.epochs = config.search.trial_epochs or config.train.epochs
        self.search, self.concurrent = search, concurrent
        self.started = time.monotonic()
        self.rows: dict[str, tuple[str, str, str, str]] = {}
        self.console = Console()
        self.live: Live | None = None

    # The callback is stored with the search, and a terminal cannot be.
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "console": None, "live": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.console, self.started = Console(), time.monotonic()

    def setup(self, stop: Any = None, num_samples: int | None = None, **info: Any) -> None:
        if self.console.is_terminal:
            self.live = Live(console=self.console, refresh_per_second=2, get_renderable=self._table)
            self.live.start()
            atexit.register(self.live.stop)  # after Ctrl+C too: it gives the cursor back

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        store = CheckpointStore(self.search.inner(trial.trial_id).folder)
        lost = ", ".join(f"{folder.name} is truncated" for folder in store.damaged)
        self._show(trial, "running", "-", f"started; {lost}: it goes on from {store.last}" if lost else "started")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        progress = f"{int(result['epoch'])}/{self.epochs}"
        self._show(trial, "running", progress, f"{self.metric} {result[self.metric]:.3f} (best {result['score']:.3f})")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        failure = self._noted_failure(trial)
        if failure is not None:
            self._show(trial, "failed", "-", str(failure))
            return
        last = trial.last_result or {}
        epoch = int(last.get("epoch", 0))
        status = "done" if epoch >= self.epochs else "stopped"
        self._show(trial, status, f"{epoch}/{self.epochs}", f"best {last.get('score', float('nan')):.3f}")

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._show(trial, "died", "-", f"{self._why_failed(trial)}; it is started again")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._show(trial, "failed", "-", self._why_failed(trial))

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None

    def _noted_failure(self, trial: Any) -> NucisegError | None:
        run = self.search.inner(trial.trial_id)
        run.fetch(lambda name: name == FAILURE_FILE)
        return noted_failure(run.folder)

    def _why_failed(self, trial: Any) -> str:
        """What the trial noted, what it raised, or that its process is gone."""
        noted = self._noted_failure(trial)
        if noted is not None:
            return str(noted)
        raised = trial.pickled_error_file
        error = cloudpickle.loads(Path(raised).read_bytes()) if raised is not None else None
        return str(error).strip().splitlines()[-1] if isinstance(error, RayTaskError) else "its process ended"

    def _show(self, trial: Any, status: str, progress: str, figures: str) -> None:
        number = trial.trial_id.rsplit("_", 1)[-1]
        self.rows[trial.trial_id] = (number, status, progress, f"{figures}  {describe(trial.config)}")
        if self.live is None:
            seconds = time.monotonic() - self.started
            print(f"[{seconds:6.0f} s] trial {' '.join(self.rows[trial.trial_id])}", flush=True)

    def _table(self) -> Table:
        seconds = time.monotonic() - self.started
        table = Table(title=f"{seconds:.0f} s, {self.concurrent} trials at a time, results in {self.search}")
        for heading in ("trial", "status", "epoch", f"{self.metric} and settings"):
            table.add_column(heading)
        for row in list(self.rows.values()):  # drawn in a thread of its own, while trials are added
            table.add_row(*row)
        return table


@contextmanager
def followed(run_dir: Path, epochs: int, metric: str) -> Iterator[None]:
    """Print a line for each epoch that is added to the run's metrics while the block runs; first what is damaged."""
    path = run_dir / METRICS_FILE
    store = CheckpointStore(run_dir)
    for damaged in store.damaged:
        print(f"{damaged} is truncated: the run goes on from {store.last}", flush=True)
    already = {row["epoch"] for row in read_metrics(path)}
    done = threading.Event()

    def follow() -> None:
        while True:
            last_look = done.wait(POLL_S)
            for row in read_metrics(path):
                if row["epoch"] not in already:
                    already.add(row["epoch"])
                    print(
                        f"epoch {row['epoch']}/{epochs}  loss {row['train_loss']:.4f}  {metric} {row[metric]:.4f}  "
                        f"{row['images_per_s']:.1f} images/s, waiting for data {row['data_wait_share']:.0%}",
                        flush=True,
                    )
            if last_look:
                return

    thread = threading.Thread(target=follow, name="nuciseg-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
