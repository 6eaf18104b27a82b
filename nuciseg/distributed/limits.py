"""What a search may use, in hours and on the disk. At the bound it ends in order, and a higher one lets it go on.

No further trial begins then, and Tune's loop ends as soon as every trial that was running has left a checkpoint, so
that nothing is lost; one that says nothing for long is not waited for: its node may be gone. Where only the room for
one trial more lacks, those that are running come to their own end.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial as TuneTrial

from nuciseg.buckets import BucketFolder
from nuciseg.config import Config, SearchConfig, load_config
from nuciseg.distributed.final import FINAL_FOLDER, num_epochs
from nuciseg.distributed.mirror import Mirror
from nuciseg.distributed.runs import trial_disk_bytes
from nuciseg.distributed.trials import Trial
from nuciseg.distributed.worker import CONFIG_FILE
from nuciseg.engine.checkpoint import write_json
from nuciseg.errors import ConfigError, LimitReachedError
from nuciseg.patience import names_in, patiently

TIME_FILE = "search_time.json"
CLOSED_DIR = ".closed"  # while there is a file in it no trial begins; those that wait have one too
CLOSED_MARK = "closed"
LOOK_S = 1.0
PUSH_S = 60.0
PATIENCE_S = 600.0  # and two of its epochs: so long a trial is waited for
MOST_OF_TIME = 0.05  # looking at many files on a slow disk takes at most this share of the driver's time
BYTES_PER_GB = 1e9


@dataclass(frozen=True)
class Bound:
    """A bound that was reached: why, the flag that raises it, and whether running trials end after a checkpoint."""

    reason: str
    flag: str
    ends_running: bool


class SearchEndedError(LimitReachedError):
    """The search ended at a bound; `trials` are those that have something to tell, best first."""

    def __init__(self, message: str, trials: Sequence[Trial]) -> None:
        super().__init__(message)
        self.trials = trials


class ClosedError(Exception):
    """Leaves Tune's loop; `unfinished` are the ids of the trials that can go on or were not begun."""

    def __init__(self, bound: Bound, trials: Sequence[Any], num_trials: int) -> None:
        super().__init__(bound.reason)
        self.bound, self.trials, self.num_trials = bound, tuple(trials), num_trials
        self.unfinished = frozenset(trial.trial_id for trial in trials if not trial.is_finished())

    def describe(self, folder: Mirror, trials: Sequence[Trial]) -> str:
        """One sentence: why the search in `folder` ended, what became of its trials, how it goes on."""
        begun = sum(trial.id in self.unfinished for trial in trials)
        ended = len(trials) - begun
        return (
            f"the search ended at its bound: {self.bound.reason}; of {self.num_trials} trials {ended} ended, {begun} "
            f"can go on from a checkpoint, {self.num_trials - ended - begun} were not begun: go on with "
            f"`python -m nuciseg.tune --resume {shlex.quote(str(folder))} {self.bound.flag} MORE`"
        )


def reached(search: SearchConfig, seconds: float, used_bytes: float, needed_bytes: float) -> Bound | None:
    """The bound that a search has reached after `seconds`, or None.

    `used_bytes` lie in its folder, `needed_bytes` would be taken at most with one trial more and the winner.
    """
    if search.max_hours is not None and seconds >= search.max_hours * 3600:
        used = f"{seconds / 3600:.2f} h of --max-hours {search.max_hours:g} are used"
        return Bound(used, "--max-hours", ends_running=True)
    if search.max_disk_gb is None:
        return None
    most = f"--max-disk {search.max_disk_gb:g} (GB)"
    if used_bytes >= search.max_disk_gb * BYTES_PER_GB:
        return Bound(f"{used_bytes / BYTES_PER_GB:.3g} GB of {most} are used", "--max-disk", ends_running=True)
    if needed_bytes > search.max_disk_gb * BYTES_PER_GB:
        reason = f"with one trial more its folder could take {needed_bytes / BYTES_PER_GB:.3g} GB of {most}"
        return Bound(reason, "--max-disk", ends_running=False)
    return None


def trials_within_disk(config: Config) -> int | None:
    """How many trials at a time `search.max_disk_gb` has room for, or None; raises ConfigError for less than one."""
    if config.search.max_disk_gb is None:
        return None
    trial_bytes = trial_disk_bytes(config)
    num_runs = int(config.search.max_disk_gb * BYTES_PER_GB // trial_bytes) - config.search.final
    if num_runs < 1:
        least_gb = (1 + config.search.final) * trial_bytes / BYTES_PER_GB
        raise ConfigError(
            f"search.max_disk_gb is {config.search.max_disk_gb:g}, but the checkpoints of one trial"
            f"{' and of the winner' if config.search.final else ''} take up to {least_gb:.3g} GB; raise --max-disk, or "
            "search smaller networks"
        )
    return num_runs


def refuse_late_winner(trials: Sequence[Trial], config: Config, search: Mirror) -> None:
    """Raise SearchEndedError where training the winner, an epoch as long as in its trial, would go beyond the bound."""
    best = trials[0] if trials else None
    if config.search.max_hours is None or best is None or best.failure is not None or not best.epochs:
        return
    if best.epochs >= config.train.epochs:
        return  # its trial was all of it
    epochs = config.train.epochs - num_epochs(search.folder / FINAL_FOLDER)
    hours = (spent_seconds(search.folder) + epochs * best.seconds / best.epochs) / 3600
    if hours > config.search.max_hours:
        raise SearchEndedError(
            f"the search ended at its bound: all {len(trials)} trials are there, but with the winner's {epochs} epochs "
            f"it would take {hours:.3g} h, more than --max-hours {config.search.max_hours:g}: go on with "
            f"`python -m nuciseg.tune --resume {shlex.quote(str(search))} --max-hours MORE`",
            trials,
        )


def spent_seconds(folder: Path) -> float:
    """How long the search in `folder` has been running, all its resumptions together."""
    try:
        seconds: float = json.loads((folder / TIME_FILE).read_text(encoding="utf-8"))["seconds"]
    except FileNotFoundError:
        return 0.0
    return seconds


def reopen(search: Mirror) -> None:
    """Let trials begin again."""
    search.unmark(CLOSED_DIR)


def wait_where_closed(search: Mirror, trial_id: str) -> None:
    """In a trial: where the search is closed say so, and wait for the driver to end this process."""
    if search.marks(CLOSED_DIR):
        search.mark(CLOSED_DIR, trial_id)
        threading.Event().wait()


class Limits(tune.Callback):  # type: ignore[misc]  # ray is untyped
    """Holds a search to the bounds of the configuration that lies in its folder."""

    def __init__(self, search: Mirror, concurrent: int) -> None:
        self.search, self.folder, self.concurrent = search, search.folder, concurrent

    # The callback is stored with the search; a resumption reads the bounds and the time anew.
    def __getstate__(self) -> dict[str, Any]:
        return {"search": self.search, "folder": self.folder, "concurrent": self.concurrent}

    def setup(
        self,
        stop: Any = None,
        num_samples: int | None = None,
        total_num_samples: int | None = None,
        **info: Any,
    ) -> None:
        config = load_config(self.folder / CONFIG_FILE)
        self._bounds, self._trial_bytes = config.search, trial_disk_bytes(config)
        self._num_trials = total_num_samples or 0
        self._bound: Bound | None = None
        self._running: set[str] = set()
        self._awaited: set[str] = set()
        self._epoch_s: dict[str, float] = {}  # the last one of each trial that has reported
        self._earlier_s, self._started_s = spent_seconds(self.folder), time.monotonic()
        self._next_look_s = self._next_push_s = self._started_s

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any) -> None:
        self._epoch_s[trial.trial_id] = result.get("time_this_iter_s", 0.0)
        if self._bound is not None and self._bound.ends_running:
            self._awaited.discard(trial.trial_id)  # it reports what it has kept a checkpoint of

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        running = {trial.trial_id for trial in trials if trial.status == TuneTrial.RUNNING}
        if running != self._running or time.monotonic() >= self._next_look_s:
            self._running = running
            self._look()
        if self._bound is None:
            return
        self._awaited &= running - self.search.marks(CLOSED_DIR)
        if self._bound.ends_running:
            waited_s = time.monotonic() - self._reached_s
            unheard_s = self._reached_s - self._started_s  # of one that has not reported: its epoch may take as long
            self._awaited = {
                each for each in self._awaited if waited_s < PATIENCE_S + 2 * self._epoch_s.get(each, unheard_s)
            }
        all_ended = len(trials) >= self._num_trials and all(trial.is_finished() for trial in trials)
        if not self._awaited and not all_ended:
            raise ClosedError(self._bound, trials, max(self._num_trials, len(trials)))

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        self._note_time()
        self.search.push()

    def _look(self) -> None:
        start_s = time.monotonic()
        seconds = self._note_time()
        used, needed = (0, 0) if self._bounds.max_disk_gb is None else self._bytes()
        bound = reached(self._bounds, seconds, used, needed)
        if bound is not None and (self._bound is None or bound.ends_running > self._bound.ends_running):
            self.search.mark(CLOSED_DIR, CLOSED_MARK)
            self._bound, self._awaited, self._reached_s = bound, set(self._running), time.monotonic()
        end_s = time.monotonic()
        self._next_look_s = end_s + max(LOOK_S, (end_s - start_s) / MOST_OF_TIME)
        if end_s >= self._next_push_s:  # the hours used must outlive this machine
            self._next_push_s = end_s + PUSH_S
            self.search.push()

    def _note_time(self) -> float:
        seconds = self._earlier_s + time.monotonic() - self._started_s
        write_json({"seconds": round(seconds, 1)}, self.folder / TIME_FILE)
        return seconds

    def _bytes(self) -> tuple[int, int]:
        """Of the search's folder: what lies there, and what may at most with the winner and, where one can begin now,
        one trial more."""
        sizes = self._sizes()
        more_runs = self._bounds.final + (len(self._running) < self.concurrent)
        growing = sum(max(0, self._trial_bytes - sizes.get(trial_id, 0)) for trial_id in self._running)
        used = sum(sizes.values())
        return used, used + growing + more_runs * self._trial_bytes

    def _sizes(self) -> Mapping[str, int]:
        """Bytes of each file and folder of the search."""
        if self.search.uri is None:
            return {name: _size(self.folder / name) for name in names_in(self.folder)}
        sizes: Counter[str] = Counter()
        for file in patiently(BucketFolder(self.search.uri).files):
            sizes[file.name.split("/")[0]] += file.num_bytes
        return sizes


def _size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder; what goes while it is counted is left out."""
    files = [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names]
    total = 0
    for file in files if path.is_dir() else [str(path)]:
        with contextlib.suppress(OSError):
            total += os.stat(file).st_size
    return total
