"""Parameters of a search: their axes, and that importance finds what mattered and nothing else."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from written_runs import search_config, write_run, write_search

from nuciseg.reporting.parameters import compare_fairly, importances, parameters_of
from nuciseg.reporting.records import SearchRecord, read_folder

SECTIONS = [
    {"kind": "unet", "width": 16},
    {"kind": "timm", "encoder": "resnet18", "pretrained": "package"},
    {"kind": "timm", "encoder": "tf_efficientnet_lite0", "pretrained": "package"},
]


def search_in(folder: Path) -> SearchRecord:
    found = read_folder(folder)
    assert isinstance(found, SearchRecord)
    return found


@pytest.fixture
def learning_rate_matters(tmp_path: Path) -> SearchRecord:
    """The nearer to 1e-3, the more images; weight decay, batch size and seed do nothing."""
    generator = np.random.default_rng(3)
    space = {
        "optim.weight_decay": {"loguniform": [1e-6, 1e-3]},
        "optim.lr": {"loguniform": [1e-5, 1e-1]},
        "data.batch_size": {"choice": [16, 4, 8]},
    }
    trials = []
    for _ in range(30):
        lr = float(10 ** generator.uniform(-5, -1))
        sample = {
            "optim.weight_decay": float(10 ** generator.uniform(-6, -3)),
            "optim.lr": lr,
            "data.batch_size": int(generator.choice([4, 8, 16])),
        }
        score = round(10 - 4 * abs(math.log10(lr) + 3))
        trials.append((sample, [max(score - 1, 0), max(score, 0)]))
    return search_in(write_search(tmp_path / "search", search_config(space, epochs=2), trials))


def test_importance_finds_the_parameter_that_matters(learning_rate_matters: SearchRecord) -> None:
    found = importances(parameters_of(learning_rate_matters), compare_fairly(learning_rate_matters))
    assert found[0].parameter.key == "optim.lr"
    assert found[0].share > 0.5
    assert [each.parameter.key for each in found if each.is_beyond_chance] == ["optim.lr"]
    assert math.isclose(sum(each.share for each in found), 1.0)


def test_importance_is_the_same_each_time(learning_rate_matters: SearchRecord) -> None:
    parameters, ranking = parameters_of(learning_rate_matters), compare_fairly(learning_rate_matters)
    assert importances(parameters, ranking) == importances(parameters, ranking)


def test_words_that_matter_are_told_with_their_means(tmp_path: Path) -> None:
    trials = [
        ({"model": SECTIONS[at % 2 + 1], "optim.lr": 1e-4 * (1 + at)}, [9 if at % 2 else 4, 5]) for at in range(12)
    ]
    space = {"model": {"choice": SECTIONS}, "optim.lr": {"loguniform": [1e-5, 1e-1]}}
    search = search_in(write_search(tmp_path / "search", search_config(space, epochs=2), trials))
    found = importances(parameters_of(search), compare_fairly(search))
    assert found[0].parameter.key == "model"
    assert found[0].trend == "tf_efficientnet_lite0: mean 0.900 of 6, resnet18: mean 0.500 of 6"


def test_few_trials_have_no_importance(tmp_path: Path) -> None:
    trials = [({"optim.lr": 1e-3 * (1 + at)}, [at]) for at in range(9)]
    search = search_in(
        write_search(tmp_path / "search", search_config({"optim.lr": {"uniform": [0, 1]}}, epochs=1), trials)
    )
    assert importances(parameters_of(search), compare_fairly(search)) == []


def test_stopped_trials_are_compared_after_as_many_epochs_as_they_had(tmp_path: Path) -> None:
    """The long trial's best comes after the other was stopped; until then the other was ahead."""
    space = {"optim.lr": {"uniform": [0, 1]}}
    trials = [({"optim.lr": 0.5}, [3, 4, 9, 9]), ({"optim.lr": 0.1}, [5, 6]), ({"optim.lr": 0.2}, [7])]
    folder = write_search(tmp_path / "search", search_config(space), trials)
    write_run(folder / "trial02", [7], finished=False, failure="died", config=search_config(space))
    ranking = compare_fairly(search_in(folder))
    assert ranking.epochs == 2
    assert [each.trial.id for each in ranking.trials] == ["trial01", "trial00"]


def test_axes_place_numbers_logarithms_and_words(tmp_path: Path) -> None:
    space = {
        "optim.lr": {"loguniform": [1e-4, 1e-2]},
        "loss.weights.dice": {"uniform": [0.0, 2.0]},
        "data.batch_size": {"choice": [16, 4, 8]},
        "model": {"choice": SECTIONS},
        "optim.kind": {"choice": ["adam", "sgd"]},
    }
    sample = {
        "optim.lr": 1e-3,
        "loss.weights.dice": 0.5,
        "data.batch_size": 8,
        "model": SECTIONS[1],
        "optim.kind": "sgd",
    }
    search = search_in(write_search(tmp_path / "search", search_config(space), [(sample, [1])]))
    axes = {each.key: each for each in parameters_of(search)}
    places = {key: axes[key].position(value) for key, value in sample.items()}
    assert places == pytest.approx(
        {"optim.lr": 0.5, "loss.weights.dice": 0.25, "data.batch_size": 0.5, "model": 0.5, "optim.kind": 1.0}
    )
    assert axes["model"].categories == ("unet", "resnet18", "tf_efficientnet_lite0")
    assert axes["data.batch_size"].categories == ("4", "8", "16")
    assert axes["optim.lr"].label(0.00123456) == "0.00123"
    assert math.isnan(axes["optim.kind"].position("lion"))
