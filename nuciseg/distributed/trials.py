"""What a search writes down of its trials, so that it can be read where there is no Ray."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nuciseg.config import Config
from nuciseg.distributed.worker import CONFIG_FILE

RESULTS_FILE = "results.json"
SAMPLE_FILE = "sample.json"
_SECTION_MARK = "section:"  # a choice between sections travels as text: samplers keep only plain values


@dataclass(frozen=True)
class Trial:
    """What became of one trial. `failure` is None unless it failed; without an epoch there are no scores."""

    id: str
    sample: Mapping[str, Any]
    score: float | None
    tie_break: float | None
    epochs: int
    seconds: float
    failure: str | None

    @property
    def rank(self) -> tuple[bool, float, float]:
        """Greater is better; what failed comes last."""
        lowest = -math.inf
        return (
            self.failure is None,
            lowest if self.score is None else self.score,
            lowest if self.tie_break is None else self.tie_break,
        )


def num_trials(config: Config) -> int:
    """How many trials the search has, unless `search.max_hours` ends it before."""
    gridded = [
        len(arguments)
        for line in config.search.space.values()
        for name, arguments in line.items()
        if name == "grid_search" or config.search.sampler == "grid"
    ]
    return math.prod(gridded) * (1 if config.search.sampler == "grid" else config.search.num_trials)


def best_first(trials: Iterable[Trial]) -> list[Trial]:
    """The trials by rank; of equals the one that was drawn first, however often the search was taken up."""
    return sorted(sorted(trials, key=lambda trial: trial.id), key=lambda trial: trial.rank, reverse=True)


def searches_in(folder: Path) -> list[Path]:
    """The folders of the searches that one `tune` of several configurations makes in `folder`; [] where it is none.

    Each has its configuration beside it, as FOLDER.yaml, before it begins.
    """
    if (folder / CONFIG_FILE).exists():
        return []
    return [path.with_suffix("") for path in sorted(folder.glob("*.yaml"))]


def as_text(value: Any) -> Any:
    """A value as samplers keep it: sections and lists as text, from which `plain_values` brings them back."""
    return _SECTION_MARK + json.dumps(value) if isinstance(value, (dict, list)) else value


def plain_values(sample: Mapping[str, Any]) -> dict[str, Any]:
    """The drawn values as they stand in a configuration file, sections as mappings."""
    return {key: _value(drawn) for key, drawn in sample.items()}


def describe(sample: Mapping[str, Any]) -> str:
    """What differs between trials, for names and tables: `lr=0.001 batch_size=8`."""
    parts = []
    for key, value in plain_values(sample).items():
        if isinstance(value, Mapping):
            value = "/".join(str(part) for part in value.values())
        shown = f"{value:.3g}" if isinstance(value, float) else str(value)
        parts.append(f"{key.rsplit('.', 1)[-1]}={shown}")
    return " ".join(parts)


def _value(drawn: Any) -> Any:
    if isinstance(drawn, str) and drawn.startswith(_SECTION_MARK):
        return json.loads(drawn[len(_SECTION_MARK) :])
    return drawn.item() if hasattr(drawn, "item") else drawn
