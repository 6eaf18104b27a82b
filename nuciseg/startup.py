"""A process starts and ends sooner where Python's collector leaves alone what importing makes.

torch, Ray and what they bring are a million objects that stay to the end. While they come, the collector's full passes
walk all of them again and again, and once more when the process ends: 1.7 s of the 4.1 s that `python -c "import
nuciseg.distributed.search"` took.
"""

from __future__ import annotations

import gc

_USUAL = gc.get_threshold()
_RARELY = 1000


def imports_begin() -> None:
    """Hardly any full passes from now on; the frequent ones, over what is new, go on."""
    if gc.get_freeze_count() == 0:
        gc.set_threshold(*_USUAL[:2], _RARELY)


def imports_are_done() -> None:
    """Full passes as usual from now on, and what is there by now stays out of them. It is done once a process."""
    if gc.get_freeze_count() == 0:
        gc.freeze()
        gc.set_threshold(*_USUAL)
