"""Search spaces: what is drawn makes whole configurations; what cannot is refused in one sentence before a trial."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from ray import tune
from ray.tune.search.sample import Domain

from nuciseg.config import Config
from nuciseg.distributed.search import _search_space, _within_bounds, check_search
from nuciseg.distributed.space import build_space, configure, variants
from nuciseg.distributed.trials import describe, plain_values
from nuciseg.errors import ConfigError

LR = {"optim.lr": {"loguniform": [1e-5, 1e-2]}}


def with_space(space: Mapping[str, Any], **search: Any) -> Config:
    return Config().replaced({"search.space": dict(space), **{f"search.{key}": value for key, value in search.items()}})


def drawn(space: Mapping[str, Any], num: int = 50) -> list[dict[str, Any]]:
    domains = build_space(with_space(space))
    return [{key: domain.sample() for key, domain in domains.items()} for _ in range(num)]


@pytest.mark.parametrize(
    "line",
    [
        {"uniform": [1e-4, 1e-2]},
        {"quniform": [0.1, 0.9, 0.1]},
        {"loguniform": [1e-4, 1e-2]},
        {"qloguniform": [1e-4, 1e-2, 1e-4]},
    ],
    ids=str,
)
def test_every_sampler_of_real_numbers_gives_whole_configurations(line: dict[str, Any]) -> None:
    [(low, high, *_)] = line.values()
    rates = {configure(Config(), sample).optim.lr for sample in drawn({"optim.lr": line})}
    assert len(rates) > 1
    assert all(isinstance(rate, float) and low <= rate <= high for rate in rates)


@pytest.mark.parametrize("line", [{"randint": [4, 9]}, {"lograndint": [4, 9]}, {"qrandint": [4, 8, 2]}], ids=str)
def test_every_sampler_of_integers_gives_whole_configurations(line: dict[str, Any]) -> None:
    sizes = {configure(Config(), sample).data.batch_size for sample in drawn({"data.batch_size": line})}
    assert len(sizes) > 1
    assert sizes <= set(range(4, 9))


def test_a_choice_may_be_between_whole_sections_and_later_lines_refine_it() -> None:
    space = {
        "model": {"choice": [{"kind": "unet", "width": 8}, {"kind": "timm", "encoder": "resnet18"}]},
        "model.dropout": {"choice": [0.25]},
    }
    base = with_space(space)
    models = [configure(base, sample).model for sample in drawn(space)]
    assert {model.kind for model in models} == {"unet", "timm"}
    assert all(model.dropout == 0.25 for model in models if model.kind != "baseline")
    assert all(model.width == 8 for model in models if model.kind == "unet")


def test_what_a_trial_does_not_sample_is_the_base_configuration() -> None:
    base = with_space(LR, num_trials=3)
    assert configure(base, {"optim.lr": 0.005}) == base.replaced({"optim.lr": 0.005})


def test_a_trial_is_described_by_what_differs() -> None:
    [sample] = drawn({"model": {"choice": [{"kind": "unet", "width": 8}]}, "data.batch_size": {"choice": [8]}}, num=1)
    assert plain_values(sample) == {"model": {"kind": "unet", "width": 8}, "data.batch_size": 8}
    assert describe({**sample, "optim.lr": 0.00123456}) == "model=unet/8 batch_size=8 lr=0.00123"


def test_none_and_booleans_can_be_chosen() -> None:
    space = {"train.ema_decay": {"choice": [None, 0.9]}, "augment.enabled": {"choice": [True, False]}}
    configs = [configure(with_space(space), sample) for sample in drawn(space)]
    assert {config.train.ema_decay for config in configs} == {None, 0.9}
    assert {config.augment.enabled for config in configs} == {True, False}


@pytest.mark.parametrize(
    ("space", "sentence"),
    [
        ({}, "search.space is empty; give at least one line"),
        ({"optim.lrr": {"uniform": [1e-4, 1e-2]}}, "unknown key 'optim.lrr'; did you mean 'optim.lr'?"),
        ({"lr": {"uniform": [1e-4, 1e-2]}}, "unknown key 'lr'; did you mean 'optim.lr'?"),
        ({"optim.lr": {"loguniform": [1e-2, 1e-5]}}, "loguniform takes [lower, upper] with lower < upper, found [0.01"),
        ({"optim.lr": {"uniform": [1e-2, 1e-2]}}, "lower < upper"),
        ({"optim.lr": {"uniform": [1e-2]}}, "uniform takes [lower, upper]"),
        ({"optim.lr": {"uniform": ["a", "b"]}}, "uniform takes [lower, upper]"),
        ({"optim.lr": {"uniform": [True, 2]}}, "uniform takes [lower, upper]"),
        ({"optim.lr": {"uniform": 0.1}}, "uniform takes a list of arguments, found 0.1"),
        ({"optim.lr": {"loguniform": [0, 1]}}, "loguniform needs a lower bound above 0, found 0"),
        ({"optim.lr": {"uniform": [1e-4, 1e-2, 3, 4]}}, "uniform cannot take"),
        ({"optim.lr": {"quniform": [1e-4, 1e-2]}}, "quniform cannot take"),
        ({"optim.lr": {"normal": [0, 1]}}, "unknown sampler 'normal'; choose one of uniform, "),
        ({"optim.lr": {"uniform": [1e-4, 1e-2], "choice": [1]}}, "give exactly one sampler, found uniform, choice"),
        ({"optim.lr": {}}, "give exactly one sampler, found none"),
        ({"optim.lr": {"choice": []}}, "choice takes a list of values, found []"),
        ({"optim.lr": {"choice": 0.1}}, "choice takes a list of values, found 0.1"),
        ({"optim.lr": {"uniform": [1e-4, 1e6]}}, "1000000.0 cannot be used"),
        ({"data.batch_size": {"randint": [0, 9]}}, "0 cannot be used"),
        ({"optim.kind": {"choice": ["adamw", "adagrad"]}}, "'adagrad' cannot be used"),
        (
            {"model": {"choice": [{"kind": "unet", "widht": 8}]}},
            "did you mean 'model.width'",
        ),
        ({"optim.kind": {"choice": ["sgd"]}, "optim.lr": {"uniform": [1e-4, 1e6]}}, "1000000.0 cannot be used"),
        (
            {"model": {"choice": [{"kind": "unet"}, {"kind": "timm"}]}, "model.dropout": {"choice": [2.0]}},
            "search.space.model.dropout: 2.0 cannot be used",
        ),
        ({"train.accumulate": {"choice": [1, 64]}}, "train.accumulate 64 is more than data.batch_size"),
        (
            {"model": {"choice": [{"kind": "unet"}, {"kind": "timm"}]}, "model.depth": {"choice": [3]}},
            "search.space.model.depth: 3 cannot be used where model is {'kind': 'timm'}: ",
        ),
        (
            {
                "loss.weights": {"choice": [{"bce": 1}, {"bce": 0, "dice": 1, "focal": 0}]},
                "loss.weights.dice": {"uniform": [0, 2]},
            },
            "0 cannot be used where loss.weights is {'bce': 0, 'dice': 1, 'focal': 0}: ",
        ),
        ({"data.batch_size": {"uniform": [4, 16]}}, "cannot be used: configuration: data.batch_size is 8.41"),
        ({"data.batch_size": {"loguniform": [4, 64]}}, "a valid integer"),
        ({"data.batch_size": {"quniform": [4, 16, 0.5]}}, "4.5 cannot be used"),
        ({"data.crop_px": {"randint": [128, 257]}}, "129 cannot be used"),
        ({"data.fold": {"choice": [0, 1]}}, "data.fold is 1, but data.num_folds is none"),
        (
            {"model.depth": {"choice": [3, 5]}, "model": {"choice": [{"kind": "unet", "width": 8}]}},
            "search.space.model.depth stands above model, which would take its place; put it below",
        ),
        ({"model.depth": {"qrandint": [2, 8, 2]}}, "8 cannot be used"),
        ({"model.depth": {"qlograndint": [2, 8, 2]}}, "8 cannot be used"),
        ({"model.depth": {"qrandint": [2, 6, 0]}}, "qrandint needs a step above 0, found 0"),
        ({"scale.num_workers": {"choice": [1, 2]}}, "scale cannot be searched: trials get the CPUs and GPUs"),
        ({"scale": {"choice": [{"num_workers": 2}]}}, "scale cannot be searched"),
        ({"search.num_trials": {"choice": [1, 2]}}, "search cannot be searched: it steers the search itself"),
        ({"run.max_failures": {"choice": [1, 2]}}, "run cannot be searched"),
        ({"tracking.kind": {"choice": ["none"]}}, "tracking cannot be searched"),
        ({"train.epochs": {"randint": [2, 9]}}, "train.epochs cannot be searched: "),
        ({"train.epochs": {"randint": [2, 9]}}, "set search.trial_epochs"),
        ({"train.metric": {"choice": ["border_dice"]}}, "train.metric cannot be searched: trials are ranked by one"),
        ({"train.calibrate": {"choice": [True]}}, "train.calibrate cannot be searched"),
        ({"train": {"choice": [{"clip_norm": 1.0}]}}, "train.epochs cannot be searched"),
        (
            {"data.split_seed": {"randint": [0, 9]}},
            "data.split_seed cannot be searched: trials are compared on the same",
        ),
        (
            {"data.validation_list": {"choice": ["a.txt"]}},
            "data.validation_list cannot be searched: trials are compared",
        ),
        ({"data.synthetic.overlap": {"choice": [0.1, 0.2]}}, "data.synthetic cannot be searched"),
        (
            {"inference.num_views": {"choice": [1, 8]}},
            "inference.num_views cannot be searched: trials are validated with one view",
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_space_that_cannot_be_sampled_is_refused_in_one_sentence(space: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as raised:
        build_space(with_space(space))
    message = str(raised.value)
    assert sentence in message
    assert "\n" not in message
    assert all(key in message for key in list(space)[-1:])


def test_variants_are_what_the_space_makes_of_a_section() -> None:
    space = {
        "model": {"choice": [{"kind": "unet", "depth": 2}, {"kind": "unet", "depth": 3}]},
        "model.width": {"randint": [4, 9]},
        "optim.lr": {"uniform": [1e-4, 1e-2]},
        "loss.weights.bce": {"choice": [0, 0.5, 1]},
        "loss.weights.dice": {"uniform": [0, 2]},
    }
    config = with_space(space)
    models = [variant.model for variant in variants(config, "model")]
    assert {(model.depth, model.width) for model in models if model.kind == "unet"} == {(2, 4), (2, 8), (3, 4), (3, 8)}
    assert len(models) == 4
    weights = [variant.value("loss.weights") for variant in variants(config, "loss")]
    assert {(each["bce"], each["dice"]) for each in weights} == {(0, 2), (1, 0), (1, 2)}, "all 0 is no loss"
    assert variants(config, "train") == [config]


def test_lines_that_never_fit_each_other_have_no_variant() -> None:
    space = {"loss.weights.bce": {"choice": [0]}, "loss.weights.dice": {"choice": [0]}}
    with pytest.raises(ConfigError, match=r"its lines for loss do not fit each other: .* all 0"):
        variants(with_space(space), "loss")


def test_the_upper_bound_of_steps_is_checked_where_it_is_one() -> None:
    [domain] = build_space(with_space({"model.depth": {"qrandint": [2, 7, 2]}})).values()
    assert max(domain.sample() for _ in range(50)) == 6


def test_the_upper_bound_of_integers_is_not_drawn_and_so_not_checked() -> None:
    assert isinstance(build_space(with_space({"model.depth": {"randint": [1, 7]}}))["model.depth"], Domain)
    with pytest.raises(ConfigError, match="7 cannot be used"):
        build_space(with_space({"model.depth": {"randint": [1, 8]}}))


@pytest.mark.parametrize(
    ("space", "search", "sentence"),
    [
        (LR, {"sampler": "grid"}, "optim.lr: the grid sampler needs `choice`"),
        ({"optim.lr": {"grid_search": [0.1]}}, {"sampler": "optuna"}, "takes `choice`, not `grid_search`"),
        ({"optim.lr": {"qloguniform": [1e-4, 1e-2, 1e-4]}}, {"sampler": "optuna"}, "knows none of randn, qrandn, qlog"),
        ({"data.batch_size": {"qlograndint": [4, 16, 4]}}, {"sampler": "optuna"}, "set search.sampler to random"),
        (LR, {"sampler": "optuna", "scheduler": "pbt"}, "pbt draws by itself: set search.sampler to random"),
        ({"model.width": {"choice": [8]}}, {"sampler": "random", "scheduler": "pbt"}, "this key must be fixed"),
        ({"optim.kind": {"choice": ["sgd"]}}, {"sampler": "random", "scheduler": "pbt"}, "this key must be fixed"),
        ({"data.crop_px": {"choice": [64]}}, {"sampler": "random", "scheduler": "pbt"}, "this key must be fixed"),
    ],
)
def test_a_search_whose_parts_do_not_fit_is_refused_before_ray_starts(
    space: dict[str, Any], search: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        check_search(with_space(space, **search), verbose=False)
    assert sentence in str(raised.value)


def test_population_based_training_wants_trials_of_one_worker() -> None:
    config = with_space(LR, sampler="random", scheduler="pbt").replaced({"scale.num_workers": 2})
    with pytest.raises(ConfigError, match=r"set scale\.num_workers to 1"):
        check_search(config, verbose=False)


def test_trials_have_a_fixed_number_of_workers() -> None:
    config = with_space(LR).replaced({"scale.num_workers": {"min": 1, "max": 2}})
    with pytest.raises(ConfigError, match=r"scale\.num_workers is from 1 to 2, .* such as --scale\.num_workers 1$"):
        check_search(config, verbose=False)


def test_a_grid_is_made_of_choices() -> None:
    space = _search_space(with_space({"optim.lr": {"choice": [0.1, 0.01]}}, sampler="grid"))
    assert space["optim.lr"] == tune.grid_search([0.1, 0.01])


def test_mutations_of_a_population_stay_within_the_space() -> None:
    lines = {
        "optim.lr": {"uniform": [1e-4, 1e-2]},
        "data.batch_size": {"randint": [4, 9]},
        "optim.weight_decay": {"choice": [0.0, 0.1]},
    }
    space = build_space(with_space(lines))
    above = {"optim.lr": 1.2e-2, "data.batch_size": 10, "optim.weight_decay": 0.1}
    below = {"optim.lr": 8e-5, "data.batch_size": 3, "optim.weight_decay": 0.0}
    assert _within_bounds(space, above) == {"optim.lr": 1e-2, "data.batch_size": 8, "optim.weight_decay": 0.1}
    assert _within_bounds(space, below) == {"optim.lr": 1e-4, "data.batch_size": 4, "optim.weight_decay": 0.0}
