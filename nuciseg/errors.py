"""Every error a user can cause, with the value, the place and the cure in its message.

NucisegError
├── ConfigError         an unknown key, a value out of range, a search space that cannot be sampled
├── DataError           a folder, image or solution that cannot be used
├── CheckpointError     not a checkpoint, truncated, or of another schema
├── ResourceError       more workers or GPUs than there are; no space, no permission
│   └── StorageAwayError     a bucket does not answer; it may later
├── LimitReachedError   a search ended at its bound of hours or disk; what it found is kept, and it can go on
├── StoppedError        a run, search or batch was asked to end (SIGTERM); it can go on from what it has
└── TrainingError       training cannot go on
    ├── NonFiniteLossError   the loss became NaN or infinite
    └── OutOfMemoryError     the batch does not fit

A command prints the message as one sentence and leaves with exit code 2 (TrainingError: 1, LimitReachedError: 3,
StoppedError: 143). Anything else is our own bug and keeps its traceback.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path


class NucisegError(Exception):
    """Base of all errors that a user can mend."""

    exit_code = 2


class ConfigError(NucisegError):
    """The configuration cannot be used."""


class DataError(NucisegError):
    """The data cannot be used."""


class CheckpointError(NucisegError):
    """The checkpoint cannot be used."""


class ResourceError(NucisegError):
    """The machine or cluster lacks what was asked for."""


class StorageAwayError(ResourceError):
    """Storage on the network does not answer."""


class LimitReachedError(NucisegError):
    """A search ended at a bound that the user had set."""

    exit_code = 3


class StoppedError(NucisegError):
    """A run, or a batch of images, was asked to end before it was over."""

    exit_code = 143  # as shells have it: 128 + SIGTERM


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within, an OSError becomes a ResourceError that names `path`."""
    try:
        yield
    except OSError as error:
        raise ResourceError(
            f"{path} cannot be written ({error.strerror or error}); choose another folder or make room."
        ) from error


class TrainingError(NucisegError):
    """Training cannot go on."""

    exit_code = 1


class NonFiniteLossError(TrainingError):
    """The loss became NaN or infinite."""


class OutOfMemoryError(TrainingError):
    """The batch does not fit in memory."""
