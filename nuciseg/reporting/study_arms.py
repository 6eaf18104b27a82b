"""The arms of a search: what tells them apart, in few words, and what each reached over its seeds or folds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from nuciseg.errors import ConfigError
from nuciseg.reporting.study_records import Figures, StudyRecord, StudyTrial, flattened

_SAID_BY_VALUE = ("kind", "encoder")  # "adam" and "resnet18" need no key beside them
_VAGUE = ("enabled",)  # of what?


@dataclass(frozen=True)
class Arm:
    """One combination of settings; `trials` by fold and seed, those that failed among them."""

    name: str
    trials: tuple[StudyTrial, ...]

    @property
    def finished(self) -> tuple[StudyTrial, ...]:
        return tuple(trial for trial in self.trials if trial.figures is not None)

    @property
    def figures(self) -> tuple[Figures, ...]:
        """Those of the trials that came to their end, by fold and seed."""
        return tuple(trial.figures for trial in self.trials if trial.figures is not None)

    @property
    def num_seeds(self) -> int:
        """How many different seeds came to their end."""
        return len({trial.seed for trial in self.finished})

    @property
    def counts(self) -> tuple[int, ...]:
        """Clusters separated, by fold and seed."""
        return tuple(each.clusters_separated for each in self.figures)

    @property
    def mean_separated(self) -> float:
        """Over seeds; of a cross-validation over folds, too."""
        return fmean(self.counts)

    @property
    def mean_share(self) -> float:
        return fmean(each.clusters_separated / each.clusters if each.clusters else 0.0 for each in self.figures)

    @property
    def mean_ap50_pooled(self) -> float:
        return fmean(each.ap50_pooled for each in self.figures)

    @property
    def mean_border_dice(self) -> float:
        return fmean(each.border_dice for each in self.figures)

    @property
    def num_parameters(self) -> int | None:
        return next((trial.num_parameters for trial in self.trials if trial.num_parameters is not None), None)

    def by_fold(self) -> dict[int, tuple[float, int]]:
        """Of each fold that came to its end: clusters separated, the mean over its seeds, and clusters in all."""
        found: dict[int, list[Figures]] = {}
        for trial in self.finished:
            if trial.fold is not None and trial.figures is not None:
                found.setdefault(trial.fold, []).append(trial.figures)
        return {
            fold: (fmean(each.clusters_separated for each in figures), figures[0].clusters)
            for fold, figures in sorted(found.items())
        }

    def time_beside(self, other: Arm) -> float | None:
        """Training time as a ratio to `other`, over the seeds and folds that both finished; None without any."""
        mine = {(trial.fold, trial.seed): trial.train_s for trial in self.finished}
        theirs = {(trial.fold, trial.seed): trial.train_s for trial in other.finished}
        shared = mine.keys() & theirs.keys()
        whole = sum(theirs[key] for key in sorted(shared, key=str))
        return sum(mine[key] for key in sorted(shared, key=str)) / whole if whole else None


def arms_of(record: StudyRecord) -> list[Arm]:
    """The arms of `record` in the order of its grid. Raises ConfigError where it names more of them or fewer."""
    samples: list[dict[str, Any]] = []
    for trial in record.trials:
        if trial.arm not in samples:
            samples.append(trial.arm)
    trials = [[trial for trial in record.trials if trial.arm == sample] for sample in samples]
    unsaid = [next((trial.unsaid for trial in each if trial.unsaid), {}) for each in trials]
    names = record.arm_names or arm_names(samples, unsaid)
    if len(names) != len(samples):
        raise ConfigError(
            f"the header of {record.name}.yaml names {len(names)} arms ({'; '.join(names)}), but the search has "
            f"{len(samples)}; name each in the order of the grid, with a ';' between two"
        )
    return [Arm(name, tuple(each)) for name, each in zip(names, trials, strict=True)]


def arm_names(samples: Sequence[Mapping[str, Any]], unsaid: Sequence[Mapping[str, Any]] | None = None) -> list[str]:
    """For each arm as few of its settings as no other arm has together: `head_convs 2`, `unet, width 16`.

    `unsaid` are those of each arm that only others name, by dotted key; they are named last.
    """
    others = unsaid or [{}] * len(samples)
    values = [flattened(sample) | dict(other) for sample, other in zip(samples, others, strict=True)]
    flat = [{key: _in_words(value) for key, value in each.items()} for each in values]
    keys = list(dict.fromkeys(key for each in flat for key in each))
    differing = [key for key in keys if len({each.get(key, "") for each in flat}) > 1] or keys[:2]
    words = _words_of(differing)
    return [_name(at, flat, differing, words) for at in range(len(flat))]


def _name(at: int, flat: Sequence[Mapping[str, str]], keys: Sequence[str], words: Mapping[str, str]) -> str:
    """Settings are taken in their order as long as one shuts out an arm that the ones before it do not."""
    mine = flat[at]
    others = [each for place, each in enumerate(flat) if place != at]
    alone = not others
    taken = []
    for key in mine:
        if key not in keys or (key.endswith(".kind") and f"{key[:-4]}encoder" in mine):
            continue
        left = [each for each in others if each.get(key) == mine[key]]
        if alone or len(left) < len(others):
            taken.append(mine[key] if key.rsplit(".", 1)[-1] in _SAID_BY_VALUE else f"{words[key]} {mine[key]}")
            others = left
    return ", ".join(taken) or "as configured"


def _words_of(keys: Sequence[str]) -> dict[str, str]:
    """The last part of each key, or its last two where that alone does not say which setting is meant."""
    times = Counter(key.rsplit(".", 1)[-1] for key in keys)
    return {
        key: ".".join(key.split(".")[-2:]) if times[last] > 1 or last in _VAGUE else last
        for key in keys
        for last in (key.rsplit(".", 1)[-1],)
    }


def _in_words(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "/".join(map(_in_words, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
