"""One sentence of conclusion from the figures of a search, by a rule that was settled before them.

With at least three seeds an arm, A is better than B only if A's worst seed separates more clusters than B's best. If
three seeds of A and three of B do not differ, the six come in one of 20 equally likely arrangements, one of which has
all of A's before B's (the exact test of Wilcoxon 1945 at its smallest p-value). With fewer seeds only a difference
beyond two of its standard errors, sqrt(2 p (1 - p) / N) for shares of N clusters, is called one. In a cross-validation
A is better than B only if it separates more in every one of at least five folds: of five that happens by chance once in
32 times. Arms are compared two by two, so among several equal ones it is likelier that some two come out apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nuciseg.reporting.study_arms import Arm, arms_of
from nuciseg.reporting.study_records import StudyRecord

MIN_SEEDS = 3
MIN_FOLDS = 5
NUM_STANDARD_ERRORS = 2.0
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


@dataclass(frozen=True)
class Conclusion:
    """What was found: in a sentence, and by the names of the arms that the leading one beats."""

    sentence: str
    beaten: tuple[str, ...] = ()


def conclude(record: StudyRecord) -> Conclusion:
    """What the figures of `record` say by the rule above, and which trials are missing."""
    arms = [arm for arm in arms_of(record) if arm.finished]
    if not arms:
        return Conclusion(f"No answer: {_failures(record)}.")
    if not _are_of_the_same_images(arms):
        found = Conclusion("No answer: the arms were scored on different images, so they are not compared")
    elif record.num_folds is not None:
        found = _by_folds(arms, record.num_folds)
    else:
        found = _by_seeds(arms)
    failed = _failures(record)
    return Conclusion(f"{found.sentence}{f'; {failed}' if failed else ''}.", found.beaten)


def ranked(arms: Sequence[Arm]) -> list[Arm]:
    """Most clusters separated first; ties by average precision, then in the order of the grid."""
    return sorted(arms, key=lambda arm: (-arm.mean_separated, -arm.mean_ap50_pooled))


def is_better(a: Arm, b: Arm) -> bool:
    """Whether the seeds of `a` show that it separates more than `b`, of the same images."""
    if min(a.num_seeds, b.num_seeds) >= MIN_SEEDS:
        return min(a.counts) > max(b.counts)
    return a.mean_separated - b.mean_separated > chance_clusters(a, b)


def chance_clusters(a: Arm, b: Arm) -> float:
    """Two standard errors of the difference between two arms that separate what these do on average, in clusters."""
    num_clusters = a.figures[0].clusters
    share = (a.mean_share + b.mean_share) / 2
    return NUM_STANDARD_ERRORS * math.sqrt(2 * num_clusters * share * (1 - share))


# --- seeds -----------------------------------------------------------------------------------------------------------


def _by_seeds(arms: Sequence[Arm]) -> Conclusion:
    leader, *rest = ranked(arms)
    of = f"of {leader.figures[0].clusters}"
    if not rest:
        return Conclusion(f"No comparison: {leader.name} alone came to its end, with {_mean(leader)} {of} clusters")
    beaten = [arm for arm in rest if is_better(leader, arm)]
    level = [arm for arm in rest if arm not in beaten]
    # An arm whose seeds lie far apart can lead and beat nobody, while one behind it does.
    others = [(a, b) for a in level for b in level if is_better(a, b)]
    if not beaten and not others:
        return Conclusion(_no_difference(leader, rest))
    parts = [f"Best is {leader.name} with {_mean(leader)} {of} clusters on average ({_range(leader)})"]
    parts += _beaten_parts(leader, beaten)
    if level:
        parts.append(f"not distinguishable from it: {_listed(level)}")
    parts += [f"{a.name} is better than {b.name}" for a, b in others]
    return Conclusion("; ".join(parts), tuple(arm.name for arm in beaten))


def _beaten_parts(leader: Arm, beaten: Sequence[Arm]) -> list[str]:
    """What the leading arm beats, by which of the two rules."""
    by_rank = [arm for arm in beaten if min(leader.num_seeds, arm.num_seeds) >= MIN_SEEDS]
    by_errors = [arm for arm in beaten if arm not in by_rank]
    parts = []
    if by_rank:
        parts.append(f"its worst seed separates more than the best of {_listed(by_rank)}")
    if by_errors:
        fewest = min(arm.num_seeds for arm in (leader, *by_errors))
        parts.append(f"{_seeds(fewest)} alone, so only more than two standard errors count: ahead of "
                     f"{_listed(by_errors)}")  # fmt: skip
    return parts


def _no_difference(best: Arm, rest: Sequence[Arm]) -> str:
    """For arms of which none is better than another; `rest` in their order."""
    worst = rest[-1]
    of = f"of {best.figures[0].clusters} clusters"
    fewest = min(arm.num_seeds for arm in (best, *rest))
    gap = best.mean_separated - worst.mean_separated
    spread = max(max(arm.counts) - min(arm.counts) for arm in (best, *rest))
    begin = f"No difference that {_seeds(fewest)} show{'s' if fewest == 1 else ''}"
    ends = f"{best.name} and {worst.name}" if len(rest) == 1 else f"the first, {best.name}, and the last, {worst.name},"
    if fewest >= MIN_SEEDS:
        chance = f"seeds alone differ by {'up to ' if spread else ''}{spread}"
        only = "only " if gap <= spread else ""
    else:
        chance = f"two standard errors are {chance_clusters(best, worst):.1f}"
        only = "only "
    if gap == 0:
        every = f"{best.name} and {worst.name}" if len(rest) == 1 else f"all {len(rest) + 1} arms"
        return f"{begin}: {every} each separate {_mean(best)} {of} on average, {chance}"
    return f"{begin}: between {ends} lie {only}{gap:.1f} {of} on average ({_mean(best)} and {_mean(worst)}), {chance}"


def _listed(arms: Sequence[Arm]) -> str:
    said = [f"{arm.name} ({_mean(arm)}, {_range(arm)})" for arm in arms]
    return said[0] if len(said) == 1 else f"{', '.join(said[:-1])} and {said[-1]}"


def _mean(arm: Arm) -> str:
    return f"{arm.mean_separated:.1f}"


def _range(arm: Arm) -> str:
    """Of the counts, lowest to highest."""
    lowest, highest = min(arm.counts), max(arm.counts)
    if len(arm.counts) == 1:
        return "one seed"
    return f"{lowest} to {highest}" if lowest < highest else f"{lowest} in each"


def _seeds(number: int) -> str:
    return f"{_number(number)} seed{'' if number == 1 else 's'}"


def _number(number: int) -> str:
    return _NUMBERS[number] if number < len(_NUMBERS) else str(number)


# --- folds -----------------------------------------------------------------------------------------------------------


def _by_folds(arms: Sequence[Arm], num_folds: int) -> Conclusion:
    whole = [arm for arm in arms if len(arm.by_fold()) == num_folds]
    partial = [f"{arm.name} lacks {_missing_folds(arm, num_folds)} and is not compared"
               for arm in arms if arm not in whole]  # fmt: skip
    if not whole:
        return Conclusion("; ".join(["No answer: no arm was trained on every fold", *partial]))
    leader, *rest = sorted(whole, key=lambda arm: (-total(arm)[0], -arm.mean_ap50_pooled))
    parts = [f"{leader.name} separates {said_total(leader)}, each held out once"]
    parts += [f"{arm.name} {said_total(arm)}, {_fold_by_fold(leader, arm)}" for arm in rest]
    beaten = tuple(arm.name for arm in rest if _wins(leader, arm)[0] == num_folds >= MIN_FOLDS)
    return Conclusion("; ".join([*parts, *partial]), beaten)


def total(arm: Arm) -> tuple[float, int]:
    """Clusters separated over all folds of a cross-validation, and clusters in all."""
    folds = arm.by_fold().values()
    return sum(separated for separated, _ in folds), sum(clusters for _, clusters in folds)


def said_total(arm: Arm) -> str:
    """`581 of 597 (97.3 %)`"""
    separated, clusters = total(arm)
    return f"{_count(separated)} of {clusters} ({100 * separated / clusters if clusters else 0:.1f} %)"


def _fold_by_fold(leader: Arm, arm: Arm) -> str:
    more, level, fewer = _wins(leader, arm)
    folds = _number(more + level + fewer)
    if not level and not fewer:
        few = "" if more >= MIN_FOLDS else f", which are too few to call it worse: {_number(MIN_FOLDS)} would do"
        return f"fewer in each of {folds} folds{few}"
    return f"fewer in {more} of {folds} folds, as many in {level} and more in {fewer}, so not called worse"


def _wins(a: Arm, b: Arm) -> tuple[int, int, int]:
    """In how many folds `a` separates more than `b`, as many, fewer."""
    mine, theirs = a.by_fold(), b.by_fold()
    gaps = [mine[fold][0] - theirs[fold][0] for fold in mine]
    return sum(gap > 0 for gap in gaps), sum(gap == 0 for gap in gaps), sum(gap < 0 for gap in gaps)


def _missing_folds(arm: Arm, num_folds: int) -> str:
    missing = [str(fold) for fold in range(num_folds) if fold not in arm.by_fold()]
    return f"fold{'s' if len(missing) > 1 else ''} {', '.join(missing)}"


def _count(value: float) -> str:
    return f"{value:.0f}" if value == round(value) else f"{value:.1f}"


# --- what is missing -------------------------------------------------------------------------------------------------


def _failures(record: StudyRecord) -> str:
    """How many trials failed, and which arms have none that did not; nothing where all came to their end."""
    num_failed = sum(trial.figures is None for trial in record.trials)
    if not num_failed:
        return ""
    if num_failed == len(record.trials):
        return f"all {num_failed} trials failed"
    lost = [arm.name for arm in arms_of(record) if not arm.finished]
    said = f"{num_failed} of {len(record.trials)} trials failed"
    return f"{said}, all of {' and of '.join(lost)}" if lost else said


def _are_of_the_same_images(arms: Sequence[Arm]) -> bool:
    """Whether every fold (or, without folds, every trial) was scored on the same held-out images."""
    splits: dict[int | None, set[str | None]] = {}
    for arm in arms:
        for trial in arm.finished:
            splits.setdefault(trial.fold, set()).add(trial.split)
    return all(len(found) == 1 for found in splits.values())
