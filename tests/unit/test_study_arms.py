"""Arms in few words, and times compared on the same seeds."""

from __future__ import annotations

from typing import Any

import pytest
from made_studies import record, trial

from nuciseg.reporting.study_arms import arm_names, arms_of

LITE = {"kind": "timm", "encoder": "tf_efficientnet_lite0", "pretrained": "package"}


@pytest.mark.parametrize(
    ("samples", "names"),
    [
        ([{"data.marking": "as_is"}, {"data.marking": "erased"}], ["marking as_is", "marking erased"]),
        ([{"augment.join": 0.5}, {"augment.join": 0.0}], ["join 0.5", "join 0"]),
        ([{"augment.enabled": True}, {"augment.enabled": False}], ["augment.enabled true", "augment.enabled false"]),
        ([{"train.ema_decay": None}, {"train.ema_decay": 0.99}], ["ema_decay none", "ema_decay 0.99"]),
        (
            [{"model": LITE}, {"model": LITE | {"pretrained": "none"}}, {"model": {"kind": "unet", "width": 16}}],
            ["tf_efficientnet_lite0, pretrained package", "tf_efficientnet_lite0, pretrained none", "unet"],
        ),
        (
            [{"model": {"kind": "unet", "width": width}, "optim.kind": kind} for width in (8, 16) for kind in "ab"],
            ["width 8, a", "width 8, b", "width 16, a", "width 16, b"],
        ),
        (
            [{"loss.weights.dice": 1.0, "loss.dice.smooth": 1.0, "loss.weights.smooth": at} for at in (0.0, 1.0)],
            ["smooth 0", "smooth 1"],
        ),
        ([{"optim.kind": "adam"}], ["adam"]),
        ([{}], ["as configured"]),
        ([{"a.channels": [8, 4]}, {"a.channels": [4]}], ["channels 8/4", "channels 4"]),
    ],
)  # fmt: skip
def test_an_arm_is_named_by_what_no_other_has(samples: list[dict[str, Any]], names: list[str]) -> None:
    assert arm_names(samples) == names
    assert len(set(names)) == len(names)


def test_what_only_other_arms_name_tells_an_arm_apart_where_its_own_settings_do_not() -> None:
    bare = {"kind": "timm", "encoder": "resnet18"}
    samples = [{"model": bare | more} for more in ({}, {"head_convs": 2}, {"head_convs": 3, "width": 0.5})]
    unsaid = [{"model.head_convs": 0, "model.width": 1.0}, {"model.width": 1.0}, {}]
    assert arm_names(samples, unsaid) == ["head_convs 0", "head_convs 2", "head_convs 3"]
    trials = [trial(sample, seed, 90).model_copy(update={"unsaid": other if seed else {}})
              for sample, other in zip(samples, unsaid, strict=True) for seed in (0, 1)]  # fmt: skip
    assert [arm.name for arm in arms_of(record(trials))] == ["head_convs 0", "head_convs 2", "head_convs 3"]


def test_keys_that_end_alike_are_told_apart() -> None:
    samples = [{"optim.scale": at, "augment.scale": at % 2} for at in (1, 2, 3)]
    assert arm_names(samples) == ["optim.scale 1", "optim.scale 2", "optim.scale 3"]


def test_times_are_compared_on_the_seeds_that_both_finished() -> None:
    slow = [trial({"optim.kind": "slow"}, seed, count, train_s=100) for seed, count in ((0, 90), (1, 90), (2, None))]
    quick = [trial({"optim.kind": "quick"}, seed, 90, train_s=50 + 450 * (seed == 2)) for seed in (0, 1, 2)]
    first, second = arms_of(record([*quick, *slow]))
    assert second.time_beside(first) == 2.0
    assert first.time_beside(first) == 1.0
    lost, _ = arms_of(record([trial({"optim.kind": "lost"}, 5, 90), *slow]))
    assert lost.time_beside(second) is None
