"""Deaths of a trial count in a row: an epoch that was reached in between makes good for those before it.

Tune counts all of a trial's deaths against one bound, and a long search on spot machines has many.
"""

from __future__ import annotations

from typing import Any

from ray import tune


class Forgiveness(tune.Callback):  # type: ignore[misc]  # ray is untyped
    """Lets each trial die `max_failures` times after each epoch that it reports."""

    def __init__(self, max_failures: int) -> None:
        self.max_failures = max_failures

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        trial.max_failures = trial.num_failures + self.max_failures
