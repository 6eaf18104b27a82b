"""A study from its finished searches to its page: records, questions, page, picture, and the answers to the questions.

OUT/study/NAME.json      what is kept of each search
OUT/study.md             the page, made of all records and the questions
OUT/images/study.png     its picture
QUESTIONS/**/NAME.yaml   the line `# Answer` of each
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nuciseg.images import write_bytes
from nuciseg.reporting.study_conclusions import conclude
from nuciseg.reporting.study_figure import study_figure
from nuciseg.reporting.study_final import read_final, write_final
from nuciseg.reporting.study_page import PICTURE, study_page
from nuciseg.reporting.study_questions import find_questions, write_answer
from nuciseg.reporting.study_records import collect, read_records, search_folders, write_record

PAGE_FILE = "study.md"


@dataclass(frozen=True)
class StudyResult:
    """What was written: the page, records of the searches named, answers that changed; `unfinished` was left out."""

    page: Path
    records: tuple[Path, ...]
    answers: tuple[Path, ...]
    unfinished: tuple[Path, ...]


def write_study(named: Sequence[Path], final: Path | None, out: Path, questions: Path) -> StudyResult:
    """Keep the finished searches in `named` and the evaluation `final`, then write the page of all that is kept.

    Nothing is written before all searches are read and all questions found. Raises DataError for a folder that is no
    search and a damaged record, ConfigError for a record without its question, ResourceError.
    """
    collected = {folder: collect(folder) for folder in search_folders(named)}
    new = {record.name: record for record in collected.values() if record is not None}
    kept = {record.name: record for record in read_records(out)} | new
    asked = find_questions(sorted(kept), questions)
    records = [kept[name].model_copy(update={"arm_names": question.arms}) for name, question in asked.items()]
    conclusions = {record.name: conclude(record) for record in records}
    written = [write_record(each, out) for each in records if each.name in new or each != kept[each.name]]
    if final is not None:
        written.append(write_final(final, out))
    page = study_page(records, asked, read_final(out))
    if records:
        write_bytes(out / PICTURE, study_figure(records))
    write_bytes(out / PAGE_FILE, page.encode())
    changed = [name for name, found in conclusions.items() if write_answer(asked[name], found.sentence)]
    return StudyResult(
        page=out / PAGE_FILE,
        records=tuple(written),
        answers=tuple(asked[name].path for name in changed),
        unfinished=tuple(folder for folder, record in collected.items() if record is None),
    )
