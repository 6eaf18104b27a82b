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

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if trial.num_failures == 0:  # where a trial that failed is resumed Tune forgets its deaths, not their bound
            self._allow(trial)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self._allow(trial)

    def _allow(self, trial: Any) -> None:
        trial.max_failures = trial.num_failures + self.max_failures
        trial.invalidate_json_state()  # else Tune stores the bound before
