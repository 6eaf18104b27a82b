"""Losses: gradients, extreme targets and logits, padding, agreement with segmentation_models_pytorch."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from nuciseg.errors import ConfigError
from nuciseg.losses import Loss, LossConfig, build_loss

ALL_LOSSES: list[dict[str, Any]] = [
    {"kind": "bce"},
    {"kind": "bce", "positive_weight": (4.0, 0.5), "map_weights": (1.0, 3.0)},
    {"kind": "dice", "smooth": 0.5},
    {"kind": "jaccard"},
    {"kind": "focal"},
    {"kind": "focal", "gamma": 0.5, "alpha": 0.25},
    {"kind": "tversky"},
    {"kind": "mse"},
    {
        "kind": "combined",
        "weights": {"bce": 0.5, "dice": 1, "jaccard": 0.3, "focal": 2, "tversky": 0.2, "mse": 1},
        "map_weights": (0.0, 1.0),
        "focal": {"gamma": 1.5, "map_weights": (1.0, 1.0)},
    },
]


def test_every_kind_is_held_to_the_contract() -> None:
    kinds = {get_args(section.model_fields["kind"].annotation)[0] for section in get_args(get_args(LossConfig)[0])}
    assert {config["kind"] for config in ALL_LOSSES} == kinds


def make_loss(values: dict[str, Any]) -> Loss:
    return build_loss(TypeAdapter(LossConfig).validate_python(values))


def draw(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(3, 2, 5, 6, generator=generator, dtype=dtype)
    targets = (torch.rand(3, 2, 5, 6, generator=generator) > 0.6).to(dtype)
    valid = torch.rand(3, 5, 6, generator=generator) > 0.3
    return logits, targets, valid


@pytest.mark.parametrize("config", ALL_LOSSES, ids=str)
class TestEveryLoss:
    def test_gradient_is_the_slope(self, config: dict[str, Any]) -> None:
        loss = make_loss(config)
        logits, targets, valid = draw()
        assert torch.autograd.gradcheck(
            lambda x: loss(x, targets, valid)["loss"], (logits.requires_grad_(),), fast_mode=True
        )

    def test_one_value_for_each_image_and_its_terms(self, config: dict[str, Any]) -> None:
        logits, targets, valid = draw()
        values = make_loss(config)(logits, targets, valid)
        terms = list(config.get("weights", {config["kind"]: 1}))
        assert list(values) == ["loss", *terms]
        assert all(value.shape == (3,) for value in values.values())
        weights = config.get("weights", {config["kind"]: 1.0})
        torch.testing.assert_close(values["loss"], sum(weights[term] * values[term] for term in terms))
        alone = make_loss(config)(logits[1:2], targets[1:2], valid[1:2])
        torch.testing.assert_close(alone["loss"], values["loss"][1:2])

    @pytest.mark.parametrize("target", [0.0, 1.0])
    @pytest.mark.parametrize("logit", [-1e4, 0.0, 1e4])
    def test_empty_and_full_targets_stay_finite(self, config: dict[str, Any], target: float, logit: float) -> None:
        logits = torch.full((2, 2, 4, 4), logit, requires_grad=True)
        targets, valid = torch.full((2, 2, 4, 4), target), torch.ones(2, 4, 4, dtype=torch.bool)
        values = make_loss(config)(logits, targets, valid)
        values["loss"].sum().backward()
        assert torch.isfinite(values["loss"]).all()
        assert logits.grad is not None
        assert torch.isfinite(logits.grad).all()
        if logit == (1e4 if target else -1e4):
            torch.testing.assert_close(values["loss"], torch.zeros(2), atol=1e-5, rtol=0)
        else:
            assert (values["loss"] > 0.05).all()

    def test_what_lies_in_the_padding_does_not_matter(self, config: dict[str, Any]) -> None:
        loss = make_loss(config)
        logits, targets, valid = draw(dtype=torch.float32)
        logits.requires_grad_()
        expected = loss(logits, targets, valid)["loss"]
        (expected_gradient,) = torch.autograd.grad(expected.sum(), logits)
        pad = (1, 3, 2, 0)
        wide_logits = torch.nn.functional.pad(logits.detach(), pad, value=float("nan")).requires_grad_()
        wide_targets = torch.nn.functional.pad(targets, pad, value=float("nan"))
        values = loss(wide_logits, wide_targets, torch.nn.functional.pad(valid, pad))["loss"]
        (gradient,) = torch.autograd.grad(values.sum(), wide_logits)
        torch.testing.assert_close(values, expected)
        torch.testing.assert_close(gradient[:, :, 2:, 1:-3], expected_gradient)
        assert gradient.isfinite().all()
        assert gradient.abs().sum() == pytest.approx(expected_gradient.abs().sum().item(), rel=1e-5)

    def test_image_without_valid_pixels_counts_nothing(self, config: dict[str, Any]) -> None:
        logits, targets, valid = draw(dtype=torch.float32)
        valid[1] = False
        logits.requires_grad_()
        values = make_loss(config)(logits, targets, valid)
        values["loss"].sum().backward()
        assert all(value[1] == 0 for value in values.values())
        assert logits.grad is not None
        assert (logits.grad[1] == 0).all()
        assert (logits.grad[0] != 0).any()

    @pytest.mark.parametrize("target", [0.25, 0.5, 0.75])
    def test_soft_targets_pull_from_both_sides(self, config: dict[str, Any], target: float) -> None:
        """A probability far below the target rises, one far above it falls; no sum over the image outweighs that."""
        loss = make_loss(config)
        targets, valid = torch.full((1, 2, 4, 4), target), torch.ones(1, 4, 4, dtype=torch.bool)
        for logit in (-6.0, 6.0):
            logits = torch.full((1, 2, 4, 4), logit, requires_grad=True)
            value = loss(logits, targets, valid)["loss"].sum()
            (gradient,) = torch.autograd.grad(value, logits)
            assert bool(value.isfinite())
            assert bool((gradient.sign() == (1 if logit > 0 else -1)).all())

    def test_learned_probabilities_rise_with_a_soft_target(self, config: dict[str, Any]) -> None:
        """Descending to the end: not all or nothing, as products of probability and target would have it."""
        targets = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]).expand(1, 2, 4, 5)
        valid = torch.ones(1, 4, 5, dtype=torch.bool)
        logits = torch.zeros(1, 2, 4, 5, requires_grad=True)
        optimizer = torch.optim.Adam([logits], lr=0.05)
        for _ in range(400):
            optimizer.zero_grad()
            make_loss(config)(logits, targets, valid)["loss"].sum().backward()
            optimizer.step()
        p = torch.sigmoid(logits.detach())[0, :, 0]
        assert bool((p.diff(dim=1) > 0.02).all()), p
        assert bool((p[:, 0] < 0.1).all())
        assert bool((p[:, 4] > 0.9).all())

    def test_bf16_logits_are_computed_with_in_float32(self, config: dict[str, Any]) -> None:
        logits, targets, valid = draw(dtype=torch.float32)
        half = logits.bfloat16().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            values = make_loss(config)(half, targets, valid)["loss"]
        values.sum().backward()
        exact = half.detach().float().requires_grad_()
        expected = make_loss(config)(exact, targets, valid)["loss"]
        expected.sum().backward()
        assert values.dtype == torch.float32
        torch.testing.assert_close(values, expected)
        assert half.grad is not None
        assert exact.grad is not None
        torch.testing.assert_close(half.grad, exact.grad.bfloat16())


@pytest.mark.parametrize(
    ("config", "peer", "options"),
    [
        ({"kind": "bce"}, "SoftBCEWithLogitsLoss", {}),
        # Theirs adds its smooth to half of numerator and denominator.
        ({"kind": "dice", "smooth": 4.0}, "DiceLoss", {"mode": "multilabel", "smooth": 2.0}),
        ({"kind": "jaccard", "smooth": 2.0}, "JaccardLoss", {"mode": "multilabel", "smooth": 2.0}),
        (
            {"kind": "tversky", "alpha": 0.2, "beta": 0.9, "smooth": 1.0},
            "TverskyLoss",
            {"mode": "multilabel", "alpha": 0.2, "beta": 0.9, "smooth": 1.0},
        ),
        (
            {"kind": "focal", "gamma": 1.5, "alpha": 0.3},
            "FocalLoss",
            {"mode": "multilabel", "gamma": 1.5, "alpha": 0.3},
        ),
    ],
)
def test_agrees_with_segmentation_models_pytorch(config: dict[str, Any], peer: str, options: dict[str, Any]) -> None:
    from nuciseg.models.timm_library import import_timm

    import_timm()  # the peer imports timm
    smp_losses = pytest.importorskip("segmentation_models_pytorch.losses")
    logits, targets, _ = draw(seed=3)
    theirs = getattr(smp_losses, peer)(**options)
    values = make_loss(config)(logits, targets, torch.ones(3, 5, 6, dtype=torch.bool))["loss"]
    for image in range(3):  # theirs take a whole batch together
        expected = theirs(logits[image : image + 1], targets[image : image + 1])
        torch.testing.assert_close(values[image], expected, atol=1e-6, rtol=1e-5)


def test_positive_weight_and_map_weights_count_as_said() -> None:
    logits, targets, valid = torch.zeros(1, 2, 2, 2), torch.ones(1, 2, 2, 2), torch.ones(1, 2, 2, dtype=torch.bool)
    value = make_loss({"kind": "bce", "positive_weight": (4.0, 1.0), "map_weights": (1.0, 3.0)})(logits, targets, valid)
    assert value["loss"].item() == pytest.approx((4 * 1 + 1 * 3) / 4 * 0.6931472)
    with pytest.raises(ConfigError, match=r"loss\.map_weights has 3 values, but the target has 2 maps"):
        make_loss({"kind": "dice", "map_weights": (1.0, 1.0, 1.0)})(logits, targets, valid)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kind": "combined", "weights": {"bce": 0, "dice": 0}}, "all 0"),
        ({"kind": "combined", "map_weights": (0.0, 0.0)}, "all 0"),
        ({"kind": "dice", "map_weights": (0.0,)}, "all 0"),
        ({"kind": "dice", "smooth": 0}, "greater than 0"),
        ({"kind": "combined", "weights": {"hinge": 1}}, "hinge"),
    ],
)
def test_useless_losses_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        make_loss(config)
