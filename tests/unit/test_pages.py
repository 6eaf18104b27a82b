"""Pages stand alone, show what they were given and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from nuciseg.errors import ResourceError
from nuciseg.pages import Chapter, Note, Pictures, Table, Text, drawing, photograph, write_page


def figure() -> Figure:
    made = Figure(figsize=(2, 1))
    made.subplots().plot([0, 1], [1, 0])
    return made


def page(tmp_path: Path) -> str:
    chapters = [
        Chapter("Words", [Text("1 < 2 & <script>alert(1)</script>"), Note("mend this", "warning")]),
        Chapter("Figures", [Table(("name", "n"), [("a", "1"), ("b", "2.5")], "two rows")]),
        Chapter(
            "Pictures", [Pictures([drawing(figure(), "a line"), photograph(np.eye(8, dtype=np.uint8), "dots", 4)])]
        ),
    ]
    write_page(tmp_path / "page.html", "A <title>", chapters)
    return (tmp_path / "page.html").read_text(encoding="utf-8")


def test_the_page_asks_for_nothing_from_anywhere(tmp_path: Path) -> None:
    sources = re.findall(r'(?:src|href)="([^"]*)"', page(tmp_path))
    assert sources
    assert all(source.startswith(("data:", "#")) for source in sources)
    assert not re.search(r"@import|url\(", page(tmp_path))


def test_text_is_never_markup(tmp_path: Path) -> None:
    html = page(tmp_path)
    assert "<script" not in html
    assert "1 &lt; 2 &amp; &lt;script&gt;" in html
    assert "<title>A &lt;title&gt;</title>" in html


def test_columns_of_words_are_told_from_columns_of_numbers() -> None:
    table = Table(("name", "share", "change", "mixed"), [("a", "1.5 %", "-2", "3"), ("b", "–", "1,000", "three")])
    assert table.is_word == (True, False, False, True)
    assert Table(("trial", "score"), [("12345_00000", "0.5"), ("12345_00001", "0.7")]).is_word == (True, False)


def test_the_same_figure_gives_the_same_bytes() -> None:
    assert drawing(figure(), "a") == drawing(figure(), "a")


def test_a_page_that_cannot_be_written_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match=r"page\.html"):
        write_page(tmp_path / "file" / "page.html", "title", [])
