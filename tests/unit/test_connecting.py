"""Where Ray cannot start on this machine: one sentence instead of its traceback. Ray's own part is played."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from nuciseg.distributed.cluster import connect
from nuciseg.errors import ConfigError, ResourceError


@pytest.fixture(autouse=True)
def _machine_that_is_too_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(**_: Any) -> None:
        raise Exception("The current node timed out during startup. This could happen because ...")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", start)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_a_machine_that_is_too_busy_for_ray_is_told_in_one_sentence() -> None:
    with pytest.raises(ResourceError, match="Ray did not start on this machine within 30 seconds; stop what keeps"):
        connect(verbose=False)


@pytest.mark.parametrize("folder", ["", "here"])
def test_a_relative_folder_is_refused_before_ray_waits_in_it(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", folder)
    with pytest.raises(ConfigError, match=f"RAY_TMPDIR is '{folder}'"):
        connect(verbose=False)
