"""Names in figures stand there as they were given, whatever Matplotlib would make of them."""

from __future__ import annotations

import html
import re
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from made_studies import seeds
from matplotlib import rc_context
from matplotlib.figure import Figure
from written_runs import search_config, write_search

from nuciseg.reporting.figures import Curve, learning_curves, parallel_coordinates
from nuciseg.reporting.parameters import parameters_of
from nuciseg.reporting.records import SearchRecord, read_folder
from nuciseg.reporting.study_figure import heading, study_figure

NAMES = ["_hidden", r"a $\foo$ b", "lr$_1$", "50 % & $5", r"\$", "plain_name"]


def words(figure: Figure) -> list[str]:
    """Every text that is drawn."""
    svg = StringIO()
    with rc_context({"svg.fonttype": "none"}):
        figure.savefig(svg, format="svg")
    return [html.unescape(text).strip() for text in re.findall(r"<text[^>]*>(.*?)</text>", svg.getvalue(), re.S)]


@pytest.mark.parametrize("name", NAMES)
def test_a_run_has_its_name_in_the_legend(name: str) -> None:
    history = [{"epoch": epoch, "score": epoch / 10} for epoch in (1, 2)]
    assert name in words(learning_curves([Curve(history, name, "k")], "score", "title"))


@pytest.mark.parametrize("name", NAMES)
def test_choices_stand_at_their_axis(name: str, tmp_path: Path) -> None:
    config = search_config({"model.encoder": {"choice": [name, "other"]}})
    search = read_folder(write_search(tmp_path / "search", config, [({"model.encoder": name}, [3])]))
    assert isinstance(search, SearchRecord)
    assert name in words(parallel_coordinates(search, parameters_of(search)))


@pytest.mark.parametrize("name", NAMES)
def test_searches_and_arms_have_their_names_in_the_picture_of_a_study(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = seeds(a=[90, 80], b=[70, 60]).model_copy(update={"arm_names": (name, "other"), "name": name})
    drawn: list[Figure] = []

    def keep(figure: Figure, *place: Any, **settings: Any) -> None:
        drawn.append(figure)

    with monkeypatch.context() as patched:
        patched.setattr(Figure, "savefig", keep)
        study_figure([record])
    assert {name, heading(name)} <= set(words(drawn[0]))
