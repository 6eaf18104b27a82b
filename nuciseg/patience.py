"""Storage on the network that does not answer for a while is waited for, up to two minutes."""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from nuciseg.errors import StorageAwayError

WAITS_S = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0)

_AWAY = frozenset(
    (errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.ECONNRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH,
     errno.ENETDOWN, errno.ENETUNREACH)
)  # fmt: skip
T = TypeVar("T")


def patiently(do: Callable[[], T]) -> T:
    """What `do()` returns, tried again and again while the storage is away; raises what the last attempt raised.

    `do` may have come to any point before it failed, its end included.
    """
    for wait_s in WAITS_S:
        try:
            return do()
        except Exception as error:
            if not is_away(error):
                raise
        time.sleep(wait_s)
    return do()


def names_in(folder: Path) -> list[str]:
    """What lies in a folder, in the order of the names; nothing where there is no such folder.

    `Path.glob` takes a folder that does not answer for an empty one, from Python 3.12 on.
    """
    try:
        return sorted(patiently(lambda: os.listdir(folder)))
    except (FileNotFoundError, NotADirectoryError):
        return []


def is_away(error: BaseException) -> bool:
    """Whether that was raised because a bucket or a mounted folder does not answer now."""
    return isinstance(error, StorageAwayError) or error_number(error) in _AWAY


def error_number(error: BaseException) -> int | None:
    """The system's number for what went wrong, None where the system had no part in it."""
    if isinstance(error, OSError):
        return error.errno
    stated = re.search(r"\(os error (\d+)\)", str(error))  # safetensors wraps the system's error in its own text
    return int(stated.group(1)) if stated else None
