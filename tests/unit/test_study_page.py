"""The page of a study: what stands on it for each record, the same bytes each time, and its picture."""

from __future__ import annotations

import re
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from made_studies import folds, record, seeds, trial
from PIL import Image

from nuciseg.reporting.study_conclusions import conclude
from nuciseg.reporting.study_figure import DOTS_PER_IN, WIDTH_IN, heading, study_figure
from nuciseg.reporting.study_final import FinalFigures, FinalRecord
from nuciseg.reporting.study_page import study_page
from nuciseg.reporting.study_questions import Question
from nuciseg.reporting.study_records import StudyRecord, read_records, write_record

FIGURES = FinalFigures(
    clusters=42, clusters_separated=40, border_dice=0.793, ap50_pooled=0.983, ap50_per_image=0.987, nuclei_found=117,
    nuclei_true=118,
)  # fmt: skip
WORSE = FIGURES.model_copy(update={"clusters_separated": 24})
FINAL = FinalRecord(
    checkpoint="separator/checkpoints/epoch-0006", epoch=6, split="test", split_hash="abc", figures=FIGURES,
    baselines={"all_black": WORSE.model_copy(update={"clusters_separated": 0}), "watershed": WORSE},
    by_marking={"erased": WORSE.model_copy(update={"clusters_separated": 39})},
)  # fmt: skip


def page(*records: StudyRecord, final: FinalRecord | None = None, text: str = "How much | does *it* matter?") -> str:
    questions = {each.name: Question(each.name, Path("x.yaml"), text, ("python -m nuciseg.tune",), "9 minutes")
                 for each in records}  # fmt: skip
    return study_page(records, questions, final)


def tables(text: str) -> list[list[list[str]]]:
    """Every table as its rows of cells, headings first."""
    blocks = re.findall(r"(?:^\|.*\n)+", text, re.M)
    rows = [[re.split(r" (?<!\\)\| ", line.strip("| \n")) for line in block.splitlines()] for block in blocks]
    return [[line for line in block if set("".join(line)) != {"-"}] for block in rows]


def test_each_question_has_its_figures_its_budget_and_its_conclusion() -> None:
    found = seeds(adam=[90, 85, 92], sgd=[80, 82, 81])
    text = page(found)
    _, (columns, *rows) = tables(text)
    assert columns == [
        "arm", "separated with seed 0, 1, 2, of 100", "separated, of 100: mean (lowest to highest)", "%",
        "border Dice", "AP at .5", "parameters", "time",
    ]  # fmt: skip
    assert rows == [
        ["adam", "90, 85, 92", "89.0 (85 to 92)", "89.0 (85.0 to 92.0)", "0.700", "0.900", "1.06 M", "1.00"],
        ["sgd", "80, 82, 81", "81.0 (80 to 82)", "81.0 (80.0 to 82.0)", "0.700", "0.900", "1.06 M", "1.00"],
    ]
    assert (
        "Every trial: 4 epochs; crops of 128 px; 8 images a step; 1 CPU a trial; trained on 150 images, 100 held out "
        "(split `67f083a1e9724492`); seeds 0, 1, 2. Takes 9 minutes.\n"
    ) in text
    assert "```bash\npython -m nuciseg.tune\n```" in text
    assert text.endswith(f"\n**{conclude(found).sentence}**\n")


def test_the_page_begins_with_every_question_and_its_answer() -> None:
    one, other = seeds(adam=[90]), folds(adam=[19] * 5, sgd=[15] * 5)
    (_, *rows), *_ = tables(page(one, other, final=FINAL))
    assert rows[:2] == [
        ["[Border width](#border-width)", r"How much \| does \*it\* matter?", conclude(one).sentence],
        ["[Crossvalidation](#crossvalidation)", r"How much \| does \*it\* matter?", conclude(other).sentence],
    ]
    assert rows[2][0] == "[The recommended model](#the-recommended-model)"
    assert "40 of 42 test clusters, the best baseline 24; 39 with the drawn border erased." in rows[2][2]
    headings = re.findall(r"^## (.*)$", page(one, other, final=FINAL), re.M)
    assert headings == ["How to read it", "Border width", "Crossvalidation", "The recommended model"]


def test_a_failed_trial_stands_in_the_table_with_its_reason_below() -> None:
    text = page(seeds(adam=[90, None, 92], sgd=[None, None, None]))
    _, (_, adam, sgd) = tables(text)
    assert adam[1:3] == ["90, failed, 92", "91.0 (90 to 92)"]
    assert sgd[1:] == ["failed, failed, failed", "-", "-", "-", "-", "1.06 M", "-"]
    assert "- adam, seed 1, failed: the loss is not finite in step 3\n" in text
    assert text.count(", failed: ") == 4


def test_a_count_stands_in_the_place_of_its_seed() -> None:
    found = record([trial({"optim.kind": kind}, seed, 90 + seed)
                    for kind, seed in (("adam", 0), ("adam", 1), ("adam", 1), ("sgd", 1), ("sgd", 2))])  # fmt: skip
    _, (columns, adam, sgd) = tables(page(found))
    assert columns[1] == "separated with seed 0, 1, 2, of 100"
    assert (adam[1], sgd[1]) == ("90, 91 and 91, -", "-, 91, 92")


def test_border_dice_stands_only_where_the_borders_are_the_same() -> None:
    found = seeds(adam=[90], sgd=[80]).model_copy(update={"same_border": False, "epochs": None})
    text = page(found)
    _, (columns, *rows) = tables(text)
    assert {row[columns.index("border Dice")] for row in rows} == {"-"}
    assert "Every trial: crops of 128 px" in text, "epochs that differ are no common budget"


def test_folds_are_shown_one_by_one_and_summed() -> None:
    text = page(folds(adam=[19, 18, 17, 20, 20], sgd=[15, 15, 15, 15, None]))
    _, (columns, adam, sgd) = tables(text)
    assert columns[1:3] == ["separated in folds 0 to 4", "separated, all folds"]
    assert adam[1:4] == [
        "19 of 20, 18 of 20, 17 of 20, 20 of 20, 20 of 20", "94 of 100", "94.0 (85.0 to 100.0)",
    ]  # fmt: skip
    assert sgd[1].endswith("failed")
    assert "5 folds, not every arm on each" in text
    lacking = [trial({"optim.kind": "adam"}, 0, 19, clusters=20, fold=fold) for fold in (0, 2)]
    _, (_, adam) = tables(page(record(lacking, "crossvalidation", 3)))
    assert adam[1] == "19 of 20, -, 19 of 20"
    assert "5 folds, every arm on each" in page(folds(adam=[19, 18, 17, 20, 20]))


def test_the_recommended_model_stands_beside_its_baselines() -> None:
    text = page(final=FINAL)
    ((columns, *rows),) = tables(text)
    assert columns[:2] == ["42 test clusters", "separated"]
    assert [row[:3] for row in rows] == [
        ["**the recommended model**", "40", "117 / 118"],
        ["drawn border erased", "39", "117 / 118"],
        ["baseline: all black", "0", "117 / 118"],
        ["baseline: watershed", "24", "117 / 118"],
    ]
    assert rows[0][3:] == ["0.983", "0.987", "0.793"]
    assert "Checkpoint `separator/checkpoints/epoch-0006`, epoch 6, trained on split `abc`" in text
    assert "recommended" not in page(seeds(adam=[90]))


def test_the_page_is_the_same_from_the_files_of_its_records(tmp_path: Path) -> None:
    found = [folds(adam=[19] * 5, sgd=[18] * 5), seeds(adam=[90, 91, 92], sgd=[80, 80, 91])]
    for each in found:
        write_record(each, tmp_path)
    assert page(*read_records(tmp_path), final=FINAL) == page(*sorted(found, key=lambda each: each.name), final=FINAL)


def test_no_word_of_a_question_becomes_markup() -> None:
    text = page(seeds(adam=[90]), text="Is <b> [x](y) `z`?")
    assert text.count(r"Is \<b> \[x\](y) \`z\`?") == 2, "in the summary and under the heading"


@pytest.mark.parametrize(
    ("name", "words"), [("border_width", "Border width"), ("crossvalidation", "Crossvalidation"), ("AP-50", "AP 50")]
)
def test_headings_are_names_in_words(name: str, words: str) -> None:
    assert heading(name) == words


def test_the_picture_has_a_row_for_each_arm() -> None:
    few, many = seeds(a=[90, 80]), seeds(**{f"arm{at}": [90 - at, 10] for at in range(20)})
    low, high = (Image.open(BytesIO(study_figure([each]))) for each in (few, many))
    assert low.width == high.width == WIDTH_IN * DOTS_PER_IN
    assert high.height > 3 * low.height
    study_figure([record([]), seeds(a=[None]), record([trial({}, 0, 0, clusters=0)])])  # nothing to show is no fault


def test_beaten_arms_are_grey_in_the_picture() -> None:
    def num_blue(each: StudyRecord) -> int:
        rgb_HWC = np.asarray(Image.open(BytesIO(study_figure([each]))).convert("RGB")).astype(int)
        return int((rgb_HWC[..., 2] > rgb_HWC[..., 0] + 60).sum())

    assert num_blue(seeds(a=[90, 91, 92], b=[80, 81, 82])) < 0.6 * num_blue(seeds(a=[90, 91, 92], b=[80, 91, 82]))
