"""Importing makes the collector walk nothing again and again, and afterwards it works as ever."""

from __future__ import annotations

import subprocess
import sys

COUNTED = """
import gc
passes = []
gc.callbacks.append(lambda phase, info: passes.append(info["generation"]) if phase == "start" else None)
import nuciseg.distributed.search
print(passes.count(2))
from nuciseg.startup import imports_are_done, imports_begin
imports_are_done()
before = gc.get_freeze_count()
imports_begin()
imports_are_done()
print(before > 100_000, gc.get_freeze_count() <= before, *gc.get_threshold())
"""


def test_no_full_pass_while_a_worker_imports() -> None:
    usual = subprocess.run(
        [sys.executable, "-c", "import gc; print(*gc.get_threshold())"], capture_output=True, text=True
    )
    done = subprocess.run([sys.executable, "-c", COUNTED], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["0", f"True True {usual.stdout.strip()}"], done.stderr
