"""The header of a search's YAML: its question is read, its answer written, and nothing else is touched."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_studies import HEADER, write_question

from nuciseg.errors import ConfigError
from nuciseg.reporting.study_questions import LINE_LENGTH, Question, find_questions, write_answer

LONG = f"Best is adam with {'very ' * 60}many clusters."
BODY = b"search:  {sampler: grid}   # as it is\n"


def question(folder: Path, header: str = HEADER) -> Question:
    write_question(folder, "border_width", header)
    return find_questions(["border_width"], folder)["border_width"]


def test_the_entries_of_a_header_are_read(tmp_path: Path) -> None:
    header = HEADER.replace("python -m", "pip install -e '.[weights]'\n#            python -m")
    found = question(tmp_path / "study", header)
    assert found.text == "How much does the border's width matter? And does it at all?"
    assert found.takes == "9 minutes on 2 cores"
    assert found.command == (
        "pip install -e '.[weights]'",
        "python -m nuciseg.tune --config tune_configs/NAME.yaml --data.root DIR",
    )
    assert found.arms == ()
    assert find_questions(["border_width"], tmp_path)["border_width"] == found, "in a folder inside, too"


def test_a_header_may_name_the_arms(tmp_path: Path) -> None:
    assert question(tmp_path, f"{HEADER}# Arms       narrow; as it is,\n#            drawn;wide\n").arms == (
        "narrow",
        "as it is, drawn",
        "wide",
    )


def test_an_answer_is_put_under_the_header(tmp_path: Path) -> None:
    found = question(tmp_path)
    assert write_answer(found, LONG)
    text = found.path.read_text()
    assert text.startswith(f"{HEADER}# Answer     Best is adam with very")
    lines = text.removeprefix(HEADER).removesuffix(BODY.decode()).splitlines()
    assert len(lines) > 2
    assert all(line.startswith("#            ") and len(line) <= LINE_LENGTH for line in lines[1:])
    assert " ".join(line[13:] for line in lines) == LONG


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_all_other_bytes_stay_and_a_second_time_nothing_changes(tmp_path: Path, ending: str) -> None:
    header = (HEADER + "# Answer     docs/study.md\n#            and more\n# Source     a page\u2028 of\n").replace(
        "\n", ending
    )
    path = tmp_path / "border_width.yaml"
    path.write_bytes(header.encode() + b"#\n# prose\r\n\n" + BODY + b"x: 'no end \xc3\xa9'")
    before = path.read_bytes()
    found = find_questions(["border_width"], tmp_path)["border_width"]
    assert write_answer(found, "Sch\u00f6n.")
    old = f"# Answer     docs/study.md{ending}#            and more{ending}".encode()
    assert path.read_bytes() == before.replace(old, f"# Answer     Sch\u00f6n.{ending}".encode())
    assert not write_answer(found, "Sch\u00f6n.")
    assert write_answer(found, LONG)
    assert write_answer(found, "Sch\u00f6n."), "lines of a longer answer are taken away again"
    assert path.read_bytes() == before.replace(old, f"# Answer     Sch\u00f6n.{ending}".encode())


def test_comments_further_down_are_no_header(tmp_path: Path) -> None:
    path = tmp_path / "border_width.yaml"
    path.write_text(f"{HEADER}search: {{}}\n# Answer     of somebody else\n")
    write_answer(find_questions(["border_width"], tmp_path)["border_width"], "Yes.")
    assert path.read_text() == f"{HEADER}# Answer     Yes.\nsearch: {{}}\n# Answer     of somebody else\n"


def test_an_answer_after_a_comment_that_is_no_entry_continues_nothing(tmp_path: Path) -> None:
    path = tmp_path / "border_width.yaml"
    path.write_text("# Question   Why?\n# prose\n#            indented prose\nseed: 1\n")
    found = find_questions(["border_width"], tmp_path)["border_width"]
    assert found.text == "Why?"
    write_answer(found, "So.")
    assert path.read_text() == ("# Question   Why?\n# Answer     So.\n# prose\n#            indented prose\nseed: 1\n")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, r"there is no border_width.yaml in .*questions"),
        ({"other": HEADER}, r"there is no border_width.yaml"),
        ({"border_width": "# Command    none\n"}, r"border_width.yaml does not say what it asks"),
        ({"border_width": ""}, r"border_width.yaml does not say what it asks"),
        ({"a/border_width": HEADER, "b/border_width": HEADER}, r"a/border_width.yaml and .*b/border_width.yaml"),
    ],
)
def test_a_record_without_one_question_is_refused(tmp_path: Path, files: dict[str, str], said: str) -> None:
    (tmp_path / "questions").mkdir()
    for name, header in files.items():
        write_question(tmp_path / "questions", name, header)
    with pytest.raises(ConfigError, match=said):
        find_questions(["border_width"], tmp_path / "questions")


def test_a_folder_that_is_none_and_a_file_that_is_no_text_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--questions .*nowhere is no folder"):
        find_questions([], tmp_path / "nowhere")
    (tmp_path / "border_width.yaml").write_bytes(b"# Question   \xff\n")
    with pytest.raises(ConfigError, match=r"border_width.yaml cannot be read as text"):
        find_questions(["border_width"], tmp_path)
