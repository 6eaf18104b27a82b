"""The study as one Markdown page: questions with their conclusions, then the figures that each rests on."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from nuciseg.engine.evaluation import AVERAGING
from nuciseg.reporting.study_arms import Arm, arms_of
from nuciseg.reporting.study_conclusions import MIN_FOLDS, MIN_SEEDS, conclude, said_total
from nuciseg.reporting.study_figure import heading
from nuciseg.reporting.study_final import FinalFigures, FinalRecord
from nuciseg.reporting.study_questions import Question
from nuciseg.reporting.study_records import RECORDS_FOLDER, StudyRecord, StudyTrial

PICTURE = "images/study.png"
FINAL_HEADING = "The recommended model"
_INTRO = f"""\
# Study

Each question below is one search: a grid of arms, each with the same seeds (or the same folds), in which nothing else
differs. Its command makes the search again. This page, its picture and the answers at the top of the searches' YAML
files are then written, never by hand, by

```bash
python -m nuciseg.study SEARCHES
```

from the records in [{RECORDS_FOLDER}/]({RECORDS_FOLDER}/).
"""
_RULES = f"""\
## How to read it

- Separated are {AVERAGING["clusters_separated"]}.
- AP at .5 is {AVERAGING["ap_pooled"]} 0.5.
- Figures are of the last epoch on images that were held out, never of the best epoch, so that no epoch is chosen by the
  score that arms are compared by. The decoding is as configured, not calibrated.
- With {MIN_SEEDS} seeds or more an arm is called better than another only if its worst seed separates more clusters
  than the other's best. Where three seeds and three others do not differ, a given one of two arms comes out ahead in
  this way once in 20 times, either of them once in 10. Arms are compared two by two, so of more equal arms the first
  comes out ahead of some other more often: of 3 arms in 21 of 100 searches, of 5 in 40, of 7 in 54.
- With fewer seeds one seed decides nothing: only a difference of more than two of its standard errors,
  sqrt(2 p (1 - p) / N), is called one.
- In a cross-validation every cluster is held out once. An arm is called better than another only if it separates more
  in every one of at least {MIN_FOLDS} folds.
- Seeds change the weights, the batches and the augmentation, not the images: another data set may answer otherwise.
- Time is that of training, as a ratio to the first arm on the same seeds or folds. Other trials ran beside it, so a
  ratio near 1 says little. An arm that several questions share was trained once.
- Border Dice stands only where all arms draw the same true border.
"""


def study_page(records: Sequence[StudyRecord], questions: dict[str, Question], final: FinalRecord | None) -> str:
    """The page of `records`, each with its question by name; the same for the same records."""
    parts = [_INTRO]
    if records:
        parts.append(_summary(records, questions, final))
        parts.append(f"![Clusters that each arm separates, one dot a seed or fold]({PICTURE})\n")
    parts.append(_RULES)
    parts += [_section(record, questions[record.name]) for record in records]
    if final is not None:
        parts.append(_final_section(final))
    return "\n".join(parts)


def _summary(records: Sequence[StudyRecord], questions: dict[str, Question], final: FinalRecord | None) -> str:
    rows = [
        (_link(heading(record.name)), _plain(questions[record.name].text), _plain(conclude(record).sentence))
        for record in records
    ]
    if final is not None:
        rows.append((_link(FINAL_HEADING), "How good is the model that comes out of this?", _final_sentence(final)))
    return _table(("", "question", "answer"), rows)


def _section(record: StudyRecord, question: Question) -> str:
    arms = arms_of(record)
    columns = ("arm", *_columns(record, arms))
    rows = [(_plain(arm.name), *_row(record, arm, arms[0])) for arm in arms]
    failures = [f"- {arm.name}, {_which(trial)}, failed: {trial.failure or 'no reason was noted'}"
                for arm in arms for trial in arm.trials if trial.figures is None]  # fmt: skip
    parts = [
        f"## {heading(record.name)}\n\n{_plain(question.text)}\n",
        "\n".join(["```bash", *question.command, "```", ""]) if question.command else "",
        _table(columns, rows),
        "".join(f"{_plain(line)}\n" for line in failures),
        f"{_budget(record, question)}\n",
        f"**{_plain(conclude(record).sentence)}**\n",
    ]
    return "\n".join(part for part in parts if part)


def _columns(record: StudyRecord, arms: Sequence[Arm]) -> tuple[str, ...]:
    sizes = sorted({each.clusters for arm in arms for each in arm.figures})
    if record.num_folds is not None:
        counted = (f"separated in folds 0 to {record.num_folds - 1}", "separated, all folds")
    else:
        of = f", of {sizes[0]}" if len(sizes) == 1 else ""
        seeds = ", ".join(map(str, _seeds_of(record)))
        counted = (f"separated with seed {seeds}{of}", f"separated{of}: mean (lowest to highest)")
    return (*counted, "%", "border Dice", "AP at .5", "parameters", "time")


def _row(record: StudyRecord, arm: Arm, first: Arm) -> tuple[str, ...]:
    folds = {trial.fold for trial in record.trials} if record.num_folds is None else range(record.num_folds)
    each = ", ".join(
        " and ".join(_count_of(record, trial) for trial in arm.trials if (trial.fold, trial.seed) == place) or "-"
        for place in itertools.product(folds, _seeds_of(record))
    )
    parameters = "-" if arm.num_parameters is None else f"{arm.num_parameters / 1e6:.2f} M"
    if not arm.finished:
        return (each, "-", "-", "-", "-", parameters, "-")
    percents = [100 * figures.clusters_separated / figures.clusters if figures.clusters else 0.0
                for figures in arm.figures]  # fmt: skip
    spread = f"({min(percents):.1f} to {max(percents):.1f})"
    if record.num_folds is not None:
        separated, _, share = said_total(arm).partition(" (")
        percent = f"{share.rstrip(' %)')} {spread}"
    else:
        separated = f"{arm.mean_separated:.1f} ({min(arm.counts)} to {max(arm.counts)})"
        percent = f"{100 * arm.mean_share:.1f} {spread}"
    time = arm.time_beside(first)
    return (
        each,
        separated,
        percent,
        f"{arm.mean_border_dice:.3f}" if record.same_border else "-",
        f"{arm.mean_ap50_pooled:.3f}",
        parameters,
        "-" if time is None else f"{time:.2f}",
    )


def _count_of(record: StudyRecord, trial: StudyTrial) -> str:
    """Of a seed its clusters separated, all being of the same images; of a fold with how many it has."""
    if trial.figures is None:
        return "failed"
    of = f" of {trial.figures.clusters}" if record.num_folds is not None else ""
    return f"{trial.figures.clusters_separated}{of}"


def _seeds_of(record: StudyRecord) -> list[int]:
    return sorted({trial.seed for trial in record.trials})


def _which(trial: StudyTrial) -> str:
    return f"seed {trial.seed}" if trial.fold is None else f"fold {trial.fold}, seed {trial.seed}"


def _budget(record: StudyRecord, question: Question) -> str:
    """What all trials had in common, and what they were trained and scored on."""
    same = [
        ("{} epochs", record.epochs),
        ("crops of {} px", record.crop_px),
        ("{} images a step", record.batch_size),
        ("{} CPUs a trial" if record.cpus_per_trial != 1 else "{} CPU a trial", record.cpus_per_trial),
    ]
    parts = [words.format(value) for words, value in same if value is not None]
    trained, held_out = (_span(sizes) for sizes in (
        [split.num_train_images for split in record.splits], [split.num_held_out_images for split in record.splits]
    ))  # fmt: skip
    hashes = ", ".join(f"`{hash}`" for hash in dict.fromkeys(trial.split for trial in record.trials) if hash)
    seeds = _seeds_of(record)
    parts.append(f"trained on {trained} images, {held_out} held out (split {hashes or '-'})")
    parts.append(f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}")
    if record.num_folds is not None:
        everywhere = all(len(arm.by_fold()) == record.num_folds for arm in arms_of(record))
        parts.append(f"{record.num_folds} folds, {'every arm on each' if everywhere else 'not every arm on each'}")
    takes = f" Takes {question.takes}." if question.takes else ""
    return f"Every trial: {'; '.join(parts)}.{takes}"


def _span(sizes: Sequence[int]) -> str:
    if not sizes:
        return "-"
    return str(min(sizes)) if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"


# --- the recommended model -------------------------------------------------------------------------------------------


def _final_section(final: FinalRecord) -> str:
    rows = [_final_row("**the recommended model**", final.figures)]
    rows += [_final_row(f"drawn border {name}", found) for name, found in final.by_marking.items()]
    rows += [_final_row(f"baseline: {name.replace('_', ' ')}", found) for name, found in final.baselines.items()]
    columns = (f"{final.figures.clusters} {final.split} clusters", "separated", "nuclei found / true", "AP .5 pooled",
               "AP .5 per image", "border Dice")  # fmt: skip
    return "\n".join(
        [
            f"## {FINAL_HEADING}\n",
            f"```bash\npython -m nuciseg.evaluate --checkpoint CHECKPOINT --data.root DIR --split {final.split}\n```\n",
            _table(columns, rows),
            f"Checkpoint `{final.checkpoint}`, epoch {final.epoch}, trained on split `{final.split_hash}`, with the "
            "decoding that lies beside its weights.\n",
            f"**{_final_sentence(final)}**\n",
        ]
    )


def _final_row(name: str, found: FinalFigures) -> tuple[str, ...]:
    shares = (found.ap50_pooled, found.ap50_per_image, found.border_dice)
    return (name, str(found.clusters_separated), f"{found.nuclei_found} / {found.nuclei_true}",
            *(f"{share:.3f}" for share in shares))  # fmt: skip


def _final_sentence(final: FinalRecord) -> str:
    best = max((each.clusters_separated for each in final.baselines.values()), default=None)
    beside = "" if best is None else f", the best baseline {best}"
    markings = [f"{found.clusters_separated} with the drawn border {name}" for name, found in final.by_marking.items()]
    separated, clusters = final.figures.clusters_separated, final.figures.clusters
    return (
        f"It separates {separated} of {clusters} {final.split} clusters{beside}{''.join(f'; {m}' for m in markings)}."
    )


# --- Markdown --------------------------------------------------------------------------------------------------------


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *[[cell.replace("|", "\\|") for cell in row] for row in rows]]
    return "".join(f"| {' | '.join(' '.join(cell.split()) for cell in line)} |\n" for line in lines)


def _link(title: str) -> str:
    anchor = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
    return f"[{title}](#{anchor})"


def _plain(text: str) -> str:
    """One line of words, in which nothing becomes markup."""
    return re.sub(r"([*<\[\]`])", r"\\\1", " ".join(text.split()))
