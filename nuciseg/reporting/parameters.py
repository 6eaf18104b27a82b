"""What a search varied: each line of its space as one axis, and how much it mattered.

Importance is PED-ANOVA (Watanabe, Bansal, Hutter 2023, arxiv.org/abs/2304.10255) by Optuna: how differently a parameter
is distributed among the best trials and among all. With the few trials of a search chance alone gives large values,
so each stands beside how often the same trials give as much when their order is shuffled.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from scipy.stats import spearmanr

from nuciseg.metrics import TIE_BREAK, rank
from nuciseg.reporting.records import FOLD_KEY, SEED_KEY, SearchRecord, TrialRecord, best_row

MIN_TRIALS = 10  # of which half are the best then: PED-ANOVA wants at least NUM_BEST
NUM_BEST = 5  # optuna's own advice
NUM_SHUFFLES = 200
CHANCE_LIMIT = 0.05


@dataclass(frozen=True)
class Parameter:
    """One searched setting: words where `categories` is not empty, else a number between `low` and `high`."""

    key: str
    categories: tuple[str, ...]
    low: float
    high: float
    is_log: bool
    words: Mapping[str, str]

    def label(self, value: Any) -> str:
        """A drawn value in few words: of sections what tells them apart."""
        text = _as_key(value)
        if text in self.words:
            return self.words[text]
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    def position(self, value: Any) -> float:
        """Where the value stands between 0 and 1; NaN where it is none of this parameter's."""
        if self.categories:
            label = self.label(value)
            return _share(self.categories.index(label), len(self.categories)) if label in self.categories else math.nan
        if not _is_number(value):
            return math.nan
        low, high, value = (math.log(x) if self.is_log else x for x in (self.low, self.high, float(value)))
        return 0.5 if high <= low else (value - low) / (high - low)


@dataclass(frozen=True)
class Importance:
    """How much a parameter mattered: its `share` of all parameters' sum.

    `chance` is the share of shuffles that gave as much or more; `trend` says which values went with better scores.
    """

    parameter: Parameter
    share: float
    chance: float
    trend: str

    @property
    def is_beyond_chance(self) -> bool:
        return self.chance < CHANCE_LIMIT


@dataclass(frozen=True)
class Ranking:
    """Trials compared after equally many epochs, best first; `epochs` that all of them had."""

    epochs: int
    trials: tuple[TrialRecord, ...]
    scores: tuple[float, ...]


def parameters_of(search: SearchRecord) -> list[Parameter]:
    """One axis for each line of the search space that trials have a value for."""
    found = []
    for key, line in search.config.search.space.items():
        values = [each.trial.sample[key] for each in search.trials if key in each.trial.sample]
        if values:
            [(sampler, arguments)] = line.items()
            found.append(_parameter(key, sampler, arguments, values))
    return found


def compare_fairly(search: SearchRecord) -> Ranking:
    """Rank trials by their best score within the epochs that each of them had.

    A trial that a scheduler stopped after three epochs has had less time for a good one than the others. Those that
    failed or have not ended are left out.
    """
    ended = [each for each in search.trials if each.state in ("done", "stopped") and each.history]
    epochs = min((len(each.history) for each in ended), default=0)
    best = [(each, best_row(each.history[:epochs], search.metric)) for each in ended]
    scored = [(each, row) for each, row in best if row is not None]
    scored.sort(key=lambda pair: rank(pair[1], search.metric), reverse=True)
    return Ranking(
        epochs=epochs,
        trials=tuple(each for each, _ in scored),
        scores=tuple(float(row[search.metric]) + 1e-6 * float(row[TIE_BREAK]) for _, row in scored),
    )


def importances(parameters: Sequence[Parameter], ranking: Ranking) -> list[Importance]:
    """Of each parameter that had more than one value, the most important first; none with fewer than MIN_TRIALS.

    Seed and fold are left out: how much they matter is chance.
    """
    samples = [each.trial.sample for each in ranking.trials]
    everywhere = [each for each in parameters if all(each.key in sample for sample in samples)]
    varied = [each for each in everywhere if each.key not in (SEED_KEY, FOLD_KEY) and _num_values(each, samples) > 1]
    if len(samples) < MIN_TRIALS or not varied:
        return []
    # The seed of the shuffles is fixed so that a page comes out the same each time.
    generator = np.random.default_rng(0)
    with _quiet_optuna():
        found = _divergences(varied, samples)
        shuffled = [
            _divergences(varied, [samples[at] for at in generator.permutation(len(samples))])
            for _ in range(NUM_SHUFFLES)
        ]
    chance = (np.array(shuffled) >= found).mean(axis=0)
    total = max(float(found.sum()), 1e-12)
    results = [
        Importance(each, float(value) / total, float(share), _trend(each, samples, ranking.scores))
        for each, value, share in zip(varied, found, chance, strict=True)
    ]
    return sorted(results, key=lambda each: each.share, reverse=True)


# --- axes ------------------------------------------------------------------------------------------------------------


def _parameter(key: str, sampler: str, arguments: Any, values: Sequence[Any]) -> Parameter:
    if sampler in ("choice", "grid_search"):
        choices = [*arguments, *(value for value in values if value not in arguments)]
        if all(map(_is_number, choices)):
            choices.sort()
        words = _shortest_words(choices)
        return Parameter(key, tuple(dict.fromkeys(words.values())), 0.0, 0.0, False, words)
    bounds = list(arguments[:2]) if "uniform" in sampler or "randint" in sampler else []
    numbers = [float(value) for value in [*bounds, *values] if _is_number(value)]
    return Parameter(key, (), min(numbers), max(numbers), "log" in sampler, {})


def _shortest_words(choices: Sequence[Any]) -> dict[str, str]:
    """For each choice the value of the first of its keys that no other choice shares, or all of them."""
    words = {}
    for choice in choices:
        text = _as_key(choice)
        if not isinstance(choice, Mapping):
            words[text] = text if isinstance(choice, list) else str(choice)
            continue
        others = [other for other in choices if other != choice and isinstance(other, Mapping)]
        alone = (str(value) for key, value in choice.items() if all(other.get(key) != value for other in others))
        words[text] = next(alone, " ".join(map(str, choice.values())))
    return words


def _as_key(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _share(position: int, count: int) -> float:
    return 0.5 if count == 1 else position / (count - 1)


def _num_values(parameter: Parameter, samples: Iterable[Mapping[str, Any]]) -> int:
    return len({_as_key(sample[parameter.key]) for sample in samples})


# --- importance ------------------------------------------------------------------------------------------------------


@contextmanager
def _quiet_optuna() -> Iterator[None]:
    """Without a line for each study, and without the warning that absolute importances are new in Optuna."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)


def _divergences(parameters: Sequence[Parameter], samples: Sequence[Mapping[str, Any]]) -> np.ndarray[Any, Any]:
    """PED-ANOVA's divergence of each parameter; `samples` best first."""
    distributions = {each.key: _distribution(each) for each in parameters}
    study = optuna.create_study(direction="minimize")
    study.add_trials(
        [
            optuna.create_trial(
                params={each.key: _optuna_value(each, sample[each.key]) for each in parameters},
                distributions=distributions,
                value=float(place),
            )
            for place, sample in enumerate(samples)
        ]
    )
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=max(0.1, NUM_BEST / len(samples)))
    found = optuna.importance.get_param_importances(study, evaluator=evaluator, normalize=False)
    return np.array([found[each.key] for each in parameters])


def _distribution(parameter: Parameter) -> optuna.distributions.BaseDistribution:
    if parameter.categories:
        return optuna.distributions.CategoricalDistribution(parameter.categories)
    return optuna.distributions.FloatDistribution(parameter.low, parameter.high, log=parameter.is_log)


def _optuna_value(parameter: Parameter, value: Any) -> Any:
    return parameter.label(value) if parameter.categories else float(value)


def _trend(parameter: Parameter, samples: Sequence[Mapping[str, Any]], scores: Sequence[float]) -> str:
    values = [sample[parameter.key] for sample in samples]
    if not parameter.categories:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # equal scores have no correlation
            correlation = float(spearmanr(values, scores).statistic)
        if not abs(correlation) >= 0.1:
            return "no direction"
        return f"{'larger' if correlation > 0 else 'smaller'} is better (rank correlation {correlation:+.2f})"
    by_label: dict[str, list[float]] = {}
    for value, score in zip(values, scores, strict=True):
        by_label.setdefault(parameter.label(value), []).append(score)
    ordered = sorted(by_label, key=lambda label: float(np.mean(by_label[label])), reverse=True)
    return ", ".join(f"{label}: mean {np.mean(by_label[label]):.3f} of {len(by_label[label])}" for label in ordered)
