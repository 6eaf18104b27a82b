"""Nodes that join while a search runs, as on a cluster that grows on demand: they need its folder and files too."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import tune

from nuciseg.distributed.nodes import alive_nodes
from nuciseg.distributed.storage import require_shared_by_joined

LOOK_S = 5.0


class Newcomers(tune.Callback):  # type: ignore[misc]  # ray is untyped
    """Ends the search with a ResourceError where a node joins that does not see its folder, which is None in a bucket,
    or lacks one of its `files`, by the settings that name them. The search can be resumed.

    Left alone such a node would take one trial after the other and fail each.
    """

    def __init__(self, folder: Path | None, files: Mapping[str, Path]) -> None:
        self.folder, self.files = folder, dict(files)

    # The callback is stored with the search; a resumption has other nodes, and asked them before.
    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "files": self.files}

    def setup(self, stop: Any = None, num_samples: int | None = None, **info: Any) -> None:
        self._known = set(alive_nodes())
        self._next_look_s = time.monotonic() + LOOK_S

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if time.monotonic() >= self._next_look_s:
            require_shared_by_joined(self.folder, self.files, self._known)
            self._next_look_s = time.monotonic() + LOOK_S
