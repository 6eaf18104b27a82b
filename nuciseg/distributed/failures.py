"""Failures that a retry cannot mend are written down in the run's folder.

A worker that raises is restarted by Ray. That is right for a machine that died and wrong for a loss that became NaN:
restarted workers find the note and stop at once, and whoever waits for the run reads the reason from it.
"""

from __future__ import annotations

import contextlib
import gc
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from nuciseg import errors
from nuciseg.engine.checkpoint import read_json, write_json
from nuciseg.errors import NucisegError, OutOfMemoryError, StoppedError
from nuciseg.patience import is_away, patiently

FAILURE_FILE = "failure.json"
_SMALLER_PARTS_FILE = "smaller_parts.json"
STOP_FILE = "stop"


def note_failure(run_dir: Path, error: NucisegError, parts_factor: int = 1) -> None:
    """Write down why the run ended, unless an earlier reason stands there. A lack of memory at `parts_factor` 1 is no
    reason yet, on however many workers: the next attempt cuts the batch into twice as many parts."""
    if isinstance(error, OutOfMemoryError) and parts_factor == 1:
        write_json({"reason": str(error)}, run_dir / _SMALLER_PARTS_FILE)
        return
    if not (run_dir / FAILURE_FILE).exists():
        write_json({"kind": type(error).__name__, "message": str(error)}, run_dir / FAILURE_FILE)


def noted_failure(run_dir: Path) -> NucisegError | None:
    """The reason why the run ended, or None."""
    try:
        note = read_json(run_dir / FAILURE_FILE)
    except (FileNotFoundError, NotADirectoryError):
        return None
    kind: type[NucisegError] = getattr(errors, note["kind"])
    return kind(note["message"])


def batch_parts_factor(run_dir: Path) -> int:
    """2 after memory ran out once, else 1: what `train.accumulate` is multiplied by."""
    return 2 if patiently((run_dir / _SMALLER_PARTS_FILE).exists) else 1


def forget_failure(run_dir: Path) -> None:
    """Before a run is taken up again by hand. Its configuration file has the parts that the batch was cut into."""
    for name in (FAILURE_FILE, _SMALLER_PARTS_FILE, STOP_FILE):
        (run_dir / name).unlink(missing_ok=True)


def ask_to_stop(run_dir: Path) -> None:
    """Ask a run, on whatever machines its workers are, to stop after the step that they are in."""
    patiently((run_dir / STOP_FILE).touch)


@contextlib.contextmanager
def stopped_by_sigterm(run_dir: Path) -> Iterator[None]:
    """Within, SIGTERM asks the run to stop: what a machine sends that is about to go, as spot instances are."""
    before = signal.signal(signal.SIGTERM, lambda *_: ask_to_stop(run_dir))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def sigterm_raises(error: StoppedError) -> Iterator[None]:
    """Within, SIGTERM ends what is going on as Ctrl+C does, and `error` comes out.

    Raised is KeyboardInterrupt: where Ray waits in its own code, it lets nothing else of a signal's handler through.
    """
    received = False

    def interrupt(*_: object) -> None:
        nonlocal received
        received = True
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        if received:
            raise error from None
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def is_asked_to_stop(run_dir: Path) -> bool:
    """Whether the run was asked to stop; not, as far as is known, where its folder's storage is away."""
    try:
        return (run_dir / STOP_FILE).exists()
    except OSError as error:
        if not is_away(error):
            raise
        return False


def is_lost_connection(error: BaseException) -> bool:
    """Whether a worker raised this because another one is gone: gloo has no class of its own for that."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)


def with_one_retry(run: Callable[[], object], run_dir: Path) -> None:
    """Run, and once more where memory ran out: the batch is cut into twice as many parts then."""
    if _ran_out_of_memory(run, run_dir):
        # Not in an except block: the error's traceback would keep the first attempt's tensors alive.
        gc.collect()
        torch.cuda.empty_cache()
        run()


def _ran_out_of_memory(run: Callable[[], object], run_dir: Path) -> bool:
    try:
        run()
    except OutOfMemoryError:
        if noted_failure(run_dir) is not None:
            raise
        return True
    return False
