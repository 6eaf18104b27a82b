"""The page: chapters of one run or search, or of several beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nuciseg.distributed.trials import num_trials
from nuciseg.pages import Block, Chapter, Note, Pictures, Table, Text, drawing, write_page
from nuciseg.reporting.comparison import comparison_chapters
from nuciseg.reporting.evaluations import evaluation_blocks, hard_images
from nuciseg.reporting.figures import (
    BEST,
    Curve,
    importance_bars,
    learning_curves,
    parallel_coordinates,
    search_curves,
)
from nuciseg.reporting.parameters import (
    CHANCE_LIMIT,
    MIN_TRIALS,
    NUM_SHUFFLES,
    Importance,
    compare_fairly,
    importances,
    parameters_of,
)
from nuciseg.reporting.records import RunRecord, SearchRecord, TrialRecord

Subject = RunRecord | SearchRecord


def write_report(subjects: Sequence[Subject], out: Path) -> None:
    """Write the page of `subjects`, at least one. Raises DataError for damaged pictures, ResourceError."""
    if len(subjects) == 1:
        [subject] = subjects
        kind = "Search" if isinstance(subject, SearchRecord) else "Run"
        write_page(out, f"{kind} {subject.name}", _chapters(subject))
        return
    chapters = comparison_chapters(subjects)
    for subject in subjects:
        chapters += _short_chapters(subject)
    write_page(out, f"{len(subjects)} runs and searches", chapters)


def _chapters(subject: Subject) -> list[Chapter]:
    return _search_chapters(subject) if isinstance(subject, SearchRecord) else _run_chapters(subject)


def _short_chapters(subject: Subject) -> list[Chapter]:
    """What stands under the comparison, which has the curves of runs already."""
    if isinstance(subject, RunRecord):
        blocks = [*_run_summary(subject), *evaluation_blocks(subject), *hard_images([subject])]
        return [Chapter(f"Run {subject.name}", blocks)]
    return [
        Chapter(f"{subject.name}: {each.title[:1].lower()}{each.title[1:]}", each.blocks) for each in _chapters(subject)
    ]


# --- a search --------------------------------------------------------------------------------------------------------


def _search_chapters(search: SearchRecord) -> list[Chapter]:
    chapters = [Chapter("At a glance", _search_summary(search))]
    if not search.trials:
        return chapters
    chapters.append(Chapter("Trials", _ranked_tables(search)))
    if any(each.history for each in search.trials):
        chapters.append(Chapter("Learning curves", _search_curve_blocks(search)))
        chapters.append(Chapter("Parameters", _parameter_blocks(search)))
    chapters.append(Chapter("Best and worst clusters", _winner_blocks(search)))
    chapters.append(Chapter("What failed", _failure_blocks(search)))
    return chapters


def _search_summary(search: SearchRecord) -> list[Block]:
    counts = {state: sum(each.state == state for each in search.trials) for state in ("done", "stopped", "failed")}
    words = [
        f"{counts['done']} ran to the end",
        f"{counts['stopped']} were stopped early",
        f"{counts['failed']} failed",
    ]
    blocks: list[Block] = []
    if not search.is_finished:
        open_trials = sum(each.state == "unfinished" for each in search.trials)
        not_begun = max(num_trials(search.config) - len(search.trials), 0)
        blocks.append(
            Note(
                f"This search is not finished: {open_trials} of {len(search.trials)} trials begun have not ended, "
                f"{not_begun} were not begun. If it is not running, go on with: "
                f"python -m nuciseg.tune --resume {search.folder}",
                "warning",
            )
        )
    config = search.config
    splits = f"split{'s' if len(search.split_hashes) > 1 else ''} {', '.join(search.split_hashes) or '-'}"
    blocks.append(
        Text(
            f"{len(search.trials)} trials: {', '.join(words)}. Drawn by {config.search.sampler}, scheduled by "
            f"{config.search.scheduler}, ranked by validation {search.metric}, on {splits} of "
            f"{config.data.root or 'drawn images'}; {_minutes(search)} of training in all."
        )
    )
    if len(search.split_hashes) > 1:
        blocks.append(
            Note(
                f"The trials were validated on {len(search.split_hashes)} different sets of images, so they are ranked "
                "within each, and none is called the best."
            )
        )
    best = search.best
    if best is not None and best.trial.score is not None:
        settings = ", ".join(
            f"{each.key} {each.label(best.trial.sample[each.key])}"
            for each in parameters_of(search)
            if each.key in best.trial.sample
        )
        found = f"Best trial {best.trial.id}: {search.metric} {best.trial.score:.3f} with {settings}."
        blocks.append(Note(found, "good"))
    for evaluation in search.final.evaluations if search.final is not None else ():
        figures = evaluation.figures
        blocks.append(
            Note(
                f"The winner, trained to the end, separates {figures['clusters_separated']} of {figures['clusters']} "
                f"{evaluation.split} clusters.",
                "good",
            )
        )
    return blocks


def _ranked_tables(search: SearchRecord) -> list[Block]:
    """One table or, where trials were validated on several splits, one for each."""
    if len(search.split_hashes) < 2:
        return [_ranked_table(search, search.trials)]
    by_split: dict[str | None, list[TrialRecord]] = {hash: [] for hash in search.split_hashes}
    for each in search.trials:
        by_split.setdefault(None if each.run is None else each.run.split_hash, []).append(each)
    early = "no split, since they did not come to their first batch"
    return [
        _ranked_table(search, trials, f"{early if hash is None else f'split {hash}'}: ")
        for hash, trials in by_split.items()
    ]


def _ranked_table(search: SearchRecord, trials: Sequence[TrialRecord], of: str = "") -> Table:
    parameters = parameters_of(search)
    rows = []
    for place, each in enumerate(trials, start=1):
        trial = each.trial
        sample = [p.label(trial.sample[p.key]) if p.key in trial.sample else "-" for p in parameters]
        rows.append((str(place), trial.id, _number(trial.score), _number(trial.tie_break), str(trial.epochs),
                     f"{trial.seconds:.0f}", each.state, *sample))  # fmt: skip
    columns = ("rank", "trial", search.metric, "mean AP", "epochs", "s", "state", *(each.key for each in parameters))
    return Table(
        columns, rows, f"{of}best first, by the best epoch's validation {search.metric}, then mean AP per image"
    )


def _search_curve_blocks(search: SearchRecord) -> list[Block]:
    curves = search_curves(search)
    metric = learning_curves(curves, search.metric, f"validation {search.metric}")
    loss = learning_curves(curves, "train_loss", "training loss")
    blocks: list[Block] = [
        Pictures([drawing(metric, f"{search.metric} of each trial"), drawing(loss, "loss of each trial")])
    ]
    if any(key.split(".")[0] == "loss" for key in search.config.search.space):
        blocks.append(Text("The loss itself was searched, so the losses of two trials cannot be compared."))
    return blocks


def _parameter_blocks(search: SearchRecord) -> list[Block]:
    parameters = parameters_of(search)
    ranking = compare_fairly(search)
    found = importances(parameters, ranking)
    pictures = []
    if search.best is not None and search.best.trial.score is not None:
        caption = "each line a trial, from its settings down to its score; the darker the better ranked"
        pictures.append(drawing(parallel_coordinates(search, parameters), caption))
    if not found:
        lacking = (
            f"{MIN_TRIALS} trials that ended in order; there are {len(ranking.trials)}"
            if len(ranking.trials) < MIN_TRIALS
            else "a setting, other than seed and fold, that differs between trials; there is none"
        )
        return [Pictures(pictures), Note(f"Importance takes {lacking}.")]
    pictures.append(drawing(importance_bars(found), "importance by PED-ANOVA; grey: no more than chance gives"))
    blocks = [Pictures(pictures), *_importance_blocks(found, ranking.epochs, len(ranking.trials), search.metric)]
    if len(search.split_hashes) > 1:
        blocks.append(
            Text("Trials of different splits stand in one order here, so what splits differ by adds to chance.")
        )
    return blocks


def _importance_blocks(found: Sequence[Importance], epochs: int, num_trials: int, metric: str) -> list[Block]:
    beyond = [each.parameter.key for each in found if each.is_beyond_chance]
    verdict = (
        f"More than chance: {', '.join(beyond)}."
        if beyond
        else "No parameter mattered more than chance would have it: between these trials luck decides."
    )
    rows = [(each.parameter.key, f"{each.share:.0%}", f"{each.chance:.0%}", each.trend) for each in found]
    return [
        Note(verdict),
        Table(
            ("parameter", "importance", "chance", f"which values go with a better {metric}"),
            rows,
            f"{num_trials} trials, compared by the best of their first {epochs} epochs, which all of them had",
        ),
        Text(
            f"Chance is how many of {NUM_SHUFFLES} shuffles of the trials' order give as much importance or more; from "
            f"{CHANCE_LIMIT:.0%} on a bar is grey. One in twenty parameters that do nothing is not grey all the same."
        ),
    ]


def _winner_blocks(search: SearchRecord) -> list[Block]:
    if search.final is not None:
        return evaluation_blocks(search.final)
    if len(search.split_hashes) > 1:
        return [
            Text("The winner has not been trained to the end, and of trials on several splits none is called the best.")
        ]
    if search.best is None or search.best.run is None:
        return [Text("No trial has a network to show.")]
    said = Text("The winner has not been trained to the end; this is the best trial's.")
    return [said, *evaluation_blocks(search.best.run)]


def _failure_blocks(search: SearchRecord) -> list[Block]:
    failed = [each for each in search.trials if each.state == "failed"]
    blocks: list[Block] = [_failure(each) for each in failed]
    if not failed:
        blocks.append(Text("No trial failed."))
    if search.final is not None and search.final.failure is not None:
        blocks.append(Note(f"The winner's training failed: {search.final.failure}", "warning"))
    return [*blocks, *hard_images(each.run for each in search.trials if each.run is not None and each.run.images)]


def _failure(each: TrialRecord) -> Note:
    when = f"after epoch {each.trial.epochs}" if each.trial.epochs else "before its first epoch was over"
    return Note(f"Trial {each.trial.id} failed {when}: {each.trial.failure}", "warning")


# --- a run -----------------------------------------------------------------------------------------------------------


def _run_chapters(run: RunRecord) -> list[Chapter]:
    chapters = [Chapter("At a glance", _run_summary(run))]
    if run.history:
        metric = run.config.train.metric
        curve = [Curve(run.history, None, BEST, 2.0)]
        figures = [
            drawing(learning_curves(curve, metric, f"validation {metric}"), f"{metric} after each epoch"),
            drawing(learning_curves(curve, "train_loss", "training loss"), "loss of each epoch"),
        ]
        chapters.append(Chapter("Learning curves", [Pictures(figures)]))
    chapters.append(Chapter("Best and worst clusters", evaluation_blocks(run)))
    hard = hard_images([run])
    if hard:
        chapters.append(Chapter("What failed", hard))
    return chapters


def _run_summary(run: RunRecord) -> list[Block]:
    config = run.config
    blocks: list[Block] = []
    if run.failure is not None:
        blocks.append(Note(f"This run failed: {run.failure}", "warning"))
    elif not run.is_finished:
        blocks.append(
            Note(
                f"This run is not finished: {len(run.history)} of {config.train.epochs} epochs. If it is not running, "
                f"go on with: python -m nuciseg.train --resume {run.folder}",
                "warning",
            )
        )
    network = getattr(config.model, "encoder", config.model.kind)
    blocks.append(
        Text(
            f"{network}, {config.target.kind}, {len(run.history)} of {config.train.epochs} epochs, on split "
            f"{run.split_hash} of {config.data.root or 'drawn images'}."
        )
    )
    if run.scores is not None:
        score = run.scores[config.train.metric]
        calibrated = ", its decoding calibrated" if run.is_finished and config.train.calibrate else ""
        blocks.append(Note(f"Best checkpoint{calibrated}: validation {config.train.metric} {score:.3f}.", "good"))
    return blocks


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _minutes(search: SearchRecord) -> str:
    return f"{sum(each.trial.seconds for each in search.trials) / 60:.0f} min"
