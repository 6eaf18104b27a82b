"""The page of runs and searches: what stands on it, and what is not compared."""

from __future__ import annotations

import html
import re
from pathlib import Path

import pytest
from small_runs import small_config
from written_runs import search_config, split, write_run, write_search

from nuciseg.distributed.failures import note_failure
from nuciseg.distributed.trials import SAMPLE_FILE
from nuciseg.engine.checkpoint import write_json
from nuciseg.errors import TrainingError
from nuciseg.reporting.page import write_report
from nuciseg.reporting.records import read_folder

SPACE = {"optim.lr": {"loguniform": [1e-4, 1e-1]}, "optim.kind": {"choice": ["adam", "sgd"]}}
SAMPLES = [{"optim.lr": 10 ** (-4 + 0.25 * at), "optim.kind": ("adam", "sgd")[at % 2]} for at in range(12)]


def page(*folders: Path) -> str:
    """What is written, with the pictures' data left out."""
    out = folders[0].parent / "page.html"
    write_report([read_folder(folder) for folder in folders], out)
    text = out.read_text(encoding="utf-8")
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)""", text), "the page asks for something from elsewhere"
    return html.unescape(re.sub(r'"data:[^"]*"', '"data:"', text))


def chapters(text: str) -> dict[str, str]:
    return dict(re.findall(r"<h2>(.*?)</h2>(.*?)</section>", text, re.S))


def cells(text: str) -> list[list[str]]:
    return [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", text, re.S)][1:]


@pytest.fixture
def search(tmp_path: Path) -> Path:
    """Twelve trials, half of them stopped early, and one more that failed before its first epoch was over."""
    trials = [(sample, [at // 2, at // 2 + 1] + [at // 2 + 2] * 2 * (at % 2)) for at, sample in enumerate(SAMPLES)]
    folder = write_search(tmp_path / "search", search_config(SPACE), trials)
    write_json({"optim.lr": 0.09, "optim.kind": "sgd"}, folder / "broken" / SAMPLE_FILE)
    note_failure(folder / "broken", TrainingError("the loss is not finite in step 3"))
    return folder


@pytest.fixture
def crossvalidation(tmp_path: Path) -> Path:
    """Adam and SGD, three seeds and two folds, of which the second is the easier one."""
    samples = [{"optim.kind": kind, "seed": seed, "data.fold": fold}
               for kind in ("adam", "sgd") for seed in (0, 1, 2) for fold in (0, 1)]  # fmt: skip
    space = {"optim.kind": {"choice": ["adam", "sgd"]}, "seed": {"choice": [0, 1, 2]}, "data.fold": {"choice": [0, 1]}}
    config = search_config(space, epochs=2).replaced({"search.sampler": "grid", "data.num_folds": 2})
    trials = [(sample, [1, 3 * (sample["optim.kind"] == "adam") + 4 * sample["data.fold"] + 1]) for sample in samples]
    folder = write_search(tmp_path / "folds", config, trials)
    for at, (sample, separated) in enumerate(trials):
        own = config.replaced({"search.space": {}})
        write_run(folder / f"trial{at:02d}", separated, split_seed=sample["data.fold"], config=own)
    return folder


def test_trials_of_several_splits_are_ranked_within_each_and_none_is_the_best(crossvalidation: Path) -> None:
    found = chapters(page(crossvalidation))
    hashes = [split(fold).hash for fold in (0, 1)]
    assert f"on splits {hashes[0]}, {hashes[1]} of drawn images" in found["At a glance"]
    assert "The trials were validated on 2 different sets of images" in found["At a glance"]
    assert "Best trial" not in found["At a glance"]
    assert [f"split {hash}: best first" in found["Trials"] for hash in hashes] == [True, True]
    rows = [row for row in cells(found["Trials"]) if row]  # without the second heading
    assert [(row[0], row[-1]) for row in rows] == [(str(place), fold) for fold in "01" for place in range(1, 7)]
    assert [row[7] for row in rows] == (["adam"] * 3 + ["sgd"] * 3) * 2
    assert "best trial's" not in found["Best and worst clusters"]


def test_a_trial_without_a_split_stands_in_a_table_of_its_own(crossvalidation: Path) -> None:
    write_json({"optim.kind": "sgd", "seed": 3, "data.fold": 0}, crossvalidation / "broken" / SAMPLE_FILE)
    note_failure(crossvalidation / "broken", TrainingError("out of memory"))
    trials = chapters(page(crossvalidation))["Trials"]
    assert trials.count("<tbody>") == 3
    assert "no split, since they did not come to their first batch: best first" in trials


def test_what_only_repeats_a_trial_has_no_importance(crossvalidation: Path) -> None:
    parameters = chapters(page(crossvalidation))["Parameters"]
    assert [row[0] for row in cells(parameters)] == ["optim.kind"]
    assert "Trials of different splits stand in one order here" in parameters
    assert parameters.count("<img") == 1, "importance; parallel coordinates would rank all trials"


def test_a_search_over_seeds_alone_has_no_importance(tmp_path: Path) -> None:
    config = search_config({"seed": {"choice": list(range(10))}}, epochs=1).replaced({"search.sampler": "grid"})
    folder = write_search(tmp_path / "seeds", config, [({"seed": seed}, [seed]) for seed in range(10)])
    assert "Importance takes a setting, other than seed and fold, that differs" in chapters(page(folder))["Parameters"]


def test_a_crossvalidation_without_a_winner_is_not_compared(crossvalidation: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [3, 6])
    compared = chapters(page(crossvalidation, run))["Compared on validation images"]
    assert (
        "folds has no best trial, since its trials were validated on several splits, so it is not compared." in compared
    )
    assert [row[0] for row in cells(compared)] == ["run"]
    write_run(crossvalidation / "final", [3, 9])
    compared = chapters(page(crossvalidation, run))["Compared on validation images"]
    assert [row[0] for row in cells(compared)] == ["folds/final", "run"]


def test_a_search_has_its_chapters(search: Path) -> None:
    text = page(search)
    assert "<title>Search search</title>" in text
    expected = ["At a glance", "Trials", "Learning curves", "Parameters", "Best and worst clusters", "What failed"]
    assert list(chapters(text)) == expected
    assert "13 trials: 6 ran to the end, 6 were stopped early, 1 failed" in text
    assert text.count("<img") == 4  # two curves, parallel coordinates, importance


def test_trials_are_ranked_with_their_settings(search: Path) -> None:
    rows = cells(chapters(page(search))["Trials"])
    assert len(rows) == 13
    assert rows[0] == ["1", "trial11", "0.700", "0.700", "4", "12", "done", "0.0562", "sgd"]
    assert rows[-1] == ["13", "broken", "-", "-", "0", "0", "failed", "0.09", "sgd"]
    scores = [float(row[2]) for row in rows[:-1]]
    assert scores == sorted(scores, reverse=True)


def test_a_trial_that_failed_is_told_with_its_reason(search: Path) -> None:
    failed = chapters(page(search))["What failed"]
    assert "Trial broken failed before its first epoch was over: the loss is not finite in step 3" in failed


def test_images_that_most_trials_did_not_separate_come_first(search: Path) -> None:
    rows = cells(chapters(page(search))["What failed"])
    counts = [int(row[-1].split()[0]) for row in rows]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == 12, "no trial separated more than seven of ten"


def test_importance_says_after_how_many_epochs_trials_were_compared(search: Path) -> None:
    parameters = chapters(page(search))["Parameters"]
    assert "12 trials, compared by the best of their first 2 epochs" in parameters
    assert cells(parameters)[0][0] == "optim.lr"


def test_a_search_that_goes_on_says_so_and_how_to_resume_it(tmp_path: Path) -> None:
    folder = write_search(tmp_path / "search", search_config(SPACE), [(SAMPLES[0], [3])], ranked=False)
    write_json(SAMPLES[1], folder / "trial01" / SAMPLE_FILE)
    text = page(folder)
    assert "This search is not finished: 1 of 2 trials begun have not ended, 6 were not begun." in text
    assert f"python -m nuciseg.tune --resume {folder}" in text
    assert "Importance takes 10 trials that ended in order; there are 1." in text


def test_a_search_without_a_trial_is_a_page_too(tmp_path: Path) -> None:
    folder = write_search(tmp_path / "search", search_config(SPACE), [], ranked=False)
    assert list(chapters(page(folder))) == ["At a glance"]


def test_the_winners_final_run_stands_for_the_search(search: Path, tmp_path: Path) -> None:
    write_run(search / "final", [3, 9])
    text = page(search)
    assert f"python -m nuciseg.evaluate --checkpoint {search / 'final'}" in chapters(text)["Best and worst clusters"]
    compared = chapters(page(search, write_run(tmp_path / "run", [3, 6])))["Compared on validation images"]
    assert [row[0] for row in cells(compared)] == ["search/final", "run"]


def test_a_search_in_which_every_trial_failed_is_a_page_too(tmp_path: Path) -> None:
    folder = write_search(tmp_path / "search", search_config(SPACE), [], ranked=False)
    write_json(SAMPLES[0], folder / "trial00" / SAMPLE_FILE)
    note_failure(folder / "trial00", TrainingError("out of memory"))
    text = page(folder)
    assert "Trial trial00 failed before its first epoch was over: out of memory" in text
    assert "Best trial" not in text


def test_a_run_without_evaluation_says_how_to_make_one(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [3, 8])
    text = page(folder)
    assert f"python -m nuciseg.evaluate --checkpoint {folder}" in text
    assert list(chapters(text)) == ["At a glance", "Learning curves", "Best and worst clusters", "What failed"]


def test_a_figure_that_was_not_finite_leaves_a_gap(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [3, 8])
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines[0] = re.sub(r'"train_loss": [\d.]+', '"train_loss": null', lines[0])
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert "Learning curves" in page(folder)


def test_runs_of_one_split_are_ranked_beside_each_other(tmp_path: Path) -> None:
    worse = write_run(tmp_path / "worse", [3, 5])
    better = write_run(tmp_path / "better", [3, 8], config=small_config(**{"train.epochs": 2, "optim.lr": 0.007}))
    found = chapters(page(worse, better))
    assert [row[0] for row in cells(found["Compared on validation images"])] == ["better", "worse"]
    assert "not compared" not in found["Compared on validation images"]
    differs = {row[0]: row[1:] for row in cells(found["What differs"])}
    assert differs["optim.lr"] == ["0.001", "0.007"]
    assert not any(key.startswith(("run.", "tracking.")) for key in differs)
    assert {"Run worse", "Run better"} <= set(found)


def test_scores_of_borders_drawn_differently_are_not_compared(tmp_path: Path) -> None:
    settings = {"train.epochs": 2, "train.metric": "border_dice"}
    one = write_run(tmp_path / "one", [3, 5], config=small_config(**settings))
    other = write_run(tmp_path / "other", [3, 8], config=small_config(**settings, **{"target.width_px": 7}))
    assert "border_dice" in chapters(page(one))["Learning curves"]
    compared = chapters(page(one, other))["Compared on validation images"]
    assert "border_dice" not in compared
    assert [row[0] for row in cells(compared)] == ["other", "one"], "by cluster_score"


def test_runs_of_other_splits_are_not_compared(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", [3, 5])
    other = write_run(tmp_path / "other", [3, 8], split_seed=7)
    compared = chapters(page(one, other))["Compared on validation images"]
    assert split(0).hash != split(7).hash
    assert f"not compared across splits ({split(0).hash}: one; {split(7).hash}: other)" in compared
    assert compared.count("<tbody>") == 2, "a table for each split"


def test_a_search_is_compared_by_its_winner(search: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [3, 6])
    rows = cells(chapters(page(search, run))["Compared on validation images"])
    assert [row[0] for row in rows] == ["search/trial11", "run"]


def test_file_names_are_never_markup(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "<script>alert(1)", [3])
    write_report([read_folder(folder)], tmp_path / "page.html")
    assert "<script" not in (tmp_path / "page.html").read_text(encoding="utf-8")
