"""Loss functions, one value for each image, over its valid pixels.

Each loss is one configuration class with `per_map`: a value for each image and target map. `Loss` masks, averages
over the maps and names the terms. A new loss is a new class here, in `LossConfig` and, if it shall be combined, in
`CombinedWeights` and `CombinedConfig`.

Targets may lie between 0 and 1 (a soft border). In the formulas of overlap, p t then stands for the smaller of the two.

Values per image, not per batch, so that sums over images do not depend on how images are spread over workers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, field_validator, model_validator
from torch import nn

from nuciseg.errors import ConfigError
from nuciseg.section import Section

Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0, le=1e6)]


class LossSection(Section, ABC):
    """A loss. `map_weights` is how much each target map counts in the mean over maps."""

    map_weights: tuple[Weight, ...] | None = Field(
        default=None, description="How much each target map counts, in the order of the target's maps; none: equally."
    )

    @model_validator(mode="after")
    def _some_map_counts(self) -> Self:
        if self.map_weights is not None and not any(self.map_weights):
            raise ValueError(f"map_weights {self.map_weights} are all 0: let one map count at least")
        return self

    @abstractmethod
    def per_map(self, logits_BKHW: torch.Tensor, targets_BKHW: torch.Tensor, valid_B1HW: torch.Tensor) -> torch.Tensor:
        """One value for each image and map. Invalid pixels have logit 0 and target 0; valid is 1.0 or 0.0.

        Logits are float32 (or float64), targets lie in [0, 1].
        """


class BCEConfig(LossSection):
    """Binary cross-entropy: mean over valid pixels of -(w t log p + (1 - t) log(1 - p))."""

    kind: Literal["bce"] = "bce"
    positive_weight: PositiveFloat | tuple[PositiveFloat, ...] = Field(
        default=1.0, description="Factor w on the pixels where the target is 1: one number, or one for each target map."
    )

    @field_validator("positive_weight", mode="before")
    @classmethod
    def _one_is_for_all_maps(cls, weights: Any) -> Any:
        """The command line gives a list of one for a number."""
        return weights[0] if isinstance(weights, list | tuple) and len(weights) == 1 else weights

    def per_map(self, logits_BKHW: torch.Tensor, targets_BKHW: torch.Tensor, valid_B1HW: torch.Tensor) -> torch.Tensor:
        num_maps = logits_BKHW.shape[1]
        weights = (
            self.positive_weight if isinstance(self.positive_weight, tuple) else (self.positive_weight,) * num_maps
        )
        weight_K11 = _per_map(weights, logits_BKHW, "loss.positive_weight").view(-1, 1, 1)
        values = F.binary_cross_entropy_with_logits(logits_BKHW, targets_BKHW, reduction="none", pos_weight=weight_K11)
        return _mean_over_valid(values, valid_B1HW)


class FocalConfig(LossSection):
    """Focal loss (Lin et al. 2017, arXiv:1708.02002): cross-entropy times (1 - probability of the truth)**gamma."""

    kind: Literal["focal"] = "focal"
    gamma: float = Field(
        default=2.0, ge=0, le=10, description="How much pixels that are already right count less; 0: not at all."
    )
    alpha: float = Field(
        default=0.5, ge=0, le=1, description="Weight of pixels where the target is 1; the others have 1 - alpha."
    )

    def per_map(self, logits_BKHW: torch.Tensor, targets_BKHW: torch.Tensor, valid_B1HW: torch.Tensor) -> torch.Tensor:
        # In logarithms: a power of 1 - p itself has an infinite slope at 1 - p = 0 for gamma below 1.
        log_p, log_not_p = F.logsigmoid(logits_BKHW), F.logsigmoid(-logits_BKHW)
        of_ones = -self.alpha * targets_BKHW * torch.exp(self.gamma * log_not_p) * log_p
        of_zeros = -(1 - self.alpha) * (1 - targets_BKHW) * torch.exp(self.gamma * log_p) * log_not_p
        return _mean_over_valid(of_ones + of_zeros, valid_B1HW)


class MseConfig(LossSection):
    """Mean squared error of the probabilities (Brier score), the loss of the `baseline` network's authors."""

    kind: Literal["mse"] = "mse"

    def per_map(self, logits_BKHW: torch.Tensor, targets_BKHW: torch.Tensor, valid_B1HW: torch.Tensor) -> torch.Tensor:
        return _mean_over_valid((torch.sigmoid(logits_BKHW) - targets_BKHW) ** 2, valid_B1HW)


class DiceConfig(LossSection):
    """Soft Dice (Milletari et al. 2016, arXiv:1606.04797): 1 - (2 sum(p t) + s) / (sum(p) + sum(t) + s)."""

    kind: Literal["dice"] = "dice"
    smooth: float = Field(
        default=1.0, gt=0, le=1e6, description="s, in pixels: an empty map that is predicted empty costs 0."
    )

    def per_map(self, logits_BKHW: torch.Tensor, targets_BKHW: torch.Tensor, valid_B1HW: torch.Tensor) -> torch.Tensor:
        return _tversky(logits_BKHW, targets_BKHW, valid_B1HW, 0.5, 0.5, self.smooth / 2)


class JaccardConfig(LossSection):
    """Soft Jaccard (intersection over union): 1 - (sum(p t) + s) / (sum(p) + sum(t) - sum(p t) + s)."""

    kind: Literal["jaccard"] = "jaccard"
    smooth: float = Field(
        default=1.0, gt=0, le=1e6, description="s, in pixels: an empty map that is predicted empty costs 0."
    )

    def per_map(self, logits_BKHW: torch.Tensor, targets_BKHW: torch.Tensor, valid_B1HW: torch.Tensor) -> torch.Tensor:
        return _tversky(logits_BKHW, targets_BKHW, valid_B1HW, 1.0, 1.0, self.smooth)


class TverskyConfig(LossSection):
    """Tversky loss (Salehi et al. 2017, arXiv:1706.05721): soft counts,
    1 - (TP + s) / (TP + alpha FP + beta FN + s)."""

    kind: Literal["tversky"] = "tversky"
    alpha: float = Field(default=0.3, ge=0, le=10, description="Cost of false positives.")
    beta: float = Field(
        default=0.7, ge=0, le=10, description="Cost of false negatives: above alpha, gaps cost more than excess."
    )
    smooth: float = Field(
        default=1.0, gt=0, le=1e6, description="s, in pixels: an empty map that is predicted empty costs 0."
    )

    def per_map(self, logits_BKHW: torch.Tensor, targets_BKHW: torch.Tensor, valid_B1HW: torch.Tensor) -> torch.Tensor:
        return _tversky(logits_BKHW, targets_BKHW, valid_B1HW, self.alpha, self.beta, self.smooth)


class CombinedWeights(Section):
    """How much each loss counts in the sum; 0 leaves it out."""

    bce: Weight = Field(default=1.0, description="Weight of binary cross-entropy.")
    dice: Weight = Field(default=1.0, description="Weight of the Dice loss.")
    jaccard: Weight = Field(default=0.0, description="Weight of the Jaccard loss.")
    focal: Weight = Field(default=0.0, description="Weight of the focal loss.")
    tversky: Weight = Field(default=0.0, description="Weight of the Tversky loss.")
    mse: Weight = Field(default=0.0, description="Weight of the mean squared error.")

    @model_validator(mode="after")
    def _something_is_left(self) -> Self:
        if not any(weight for _, weight in self):
            raise ValueError("the weights of a combined loss are all 0: give one of them a value above 0")
        return self


class CombinedConfig(Section):
    """A weighted sum of losses, each with its own parameters."""

    kind: Literal["combined"] = "combined"
    weights: CombinedWeights = Field(default=CombinedWeights(), description="How much each loss counts.")
    map_weights: tuple[Weight, ...] | None = Field(
        default=None, description="How much each target map counts; a term's own map_weights come before these."
    )
    bce: BCEConfig = Field(default=BCEConfig(), description="Parameters of binary cross-entropy.")
    dice: DiceConfig = Field(default=DiceConfig(), description="Parameters of the Dice loss.")
    jaccard: JaccardConfig = Field(default=JaccardConfig(), description="Parameters of the Jaccard loss.")
    focal: FocalConfig = Field(default=FocalConfig(), description="Parameters of the focal loss.")
    tversky: TverskyConfig = Field(default=TverskyConfig(), description="Parameters of the Tversky loss.")
    mse: MseConfig = Field(default=MseConfig(), description="Parameters of the mean squared error.")

    @model_validator(mode="after")
    def _some_map_counts(self) -> Self:
        if self.map_weights is not None and not any(self.map_weights):
            raise ValueError(f"map_weights {self.map_weights} are all 0: let one map count at least")
        return self

    @property
    def terms(self) -> dict[str, tuple[float, LossSection]]:
        """Weight and parameters of the losses that count."""
        return {name: (weight, getattr(self, name)) for name, weight in self.weights if weight > 0}


LossConfig = Annotated[
    BCEConfig | DiceConfig | JaccardConfig | FocalConfig | TverskyConfig | MseConfig | CombinedConfig,
    Field(discriminator="kind"),
]


class Loss(nn.Module):
    """`loss(logits_BKHW, targets_BKHW, valid_BHW)` gives values (B,): 'loss', the total, and each term by its kind.

    Terms are without their weight. An image without a valid pixel has value 0 and gradient 0. Half-precision logits
    are computed with in float32; what a logit or target is where `valid_BHW` is False does not matter, NaN included.
    """

    def __init__(self, config: LossConfig) -> None:
        super().__init__()
        self.terms = config.terms if isinstance(config, CombinedConfig) else {config.kind: (1.0, config)}
        self.map_weights = config.map_weights

    def forward(
        self, logits_BKHW: torch.Tensor, targets_BKHW: torch.Tensor, valid_BHW: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        dtype = torch.promote_types(logits_BKHW.dtype, torch.float32)
        is_valid_B1HW = valid_BHW.unsqueeze(1)
        logits = torch.where(is_valid_B1HW, logits_BKHW.to(dtype), 0.0)
        targets = torch.where(is_valid_B1HW, targets_BKHW.to(dtype), 0.0)
        valid_B1HW = is_valid_B1HW.to(dtype)
        has_pixels_B = valid_BHW.flatten(1).any(dim=1)
        values: dict[str, torch.Tensor] = {"loss": torch.zeros(len(logits), dtype=dtype, device=logits.device)}
        # Half-precision autocast would take these sums over thousands of pixels back to 8 bits of mantissa.
        with torch.autocast(logits.device.type, enabled=False):
            for name, (weight, term) in self.terms.items():
                values_BK = term.per_map(logits, targets, valid_B1HW)
                map_weights = term.map_weights or self.map_weights or (1.0,) * values_BK.shape[1]
                weights_K = _per_map(map_weights, logits, "loss.map_weights")
                mean_B = (values_BK * weights_K).sum(dim=1) / weights_K.sum()
                values[name] = torch.where(has_pixels_B, mean_B, 0.0)
                values["loss"] = values["loss"] + weight * values[name]
        return values


def build_loss(config: LossConfig) -> Loss:
    """The loss of `config`."""
    return Loss(config)


def _per_map(values: tuple[float, ...], logits_BKHW: torch.Tensor, key: str) -> torch.Tensor:
    """(K,) on the logits' device. Raises ConfigError where there is not one value for each map."""
    num_maps = logits_BKHW.shape[1]
    if len(values) != num_maps:
        raise ConfigError(f"{key} has {len(values)} values, but the target has {num_maps} maps: give {num_maps}")
    return logits_BKHW.new_tensor(values)


def _mean_over_valid(values_BKHW: torch.Tensor, valid_B1HW: torch.Tensor) -> torch.Tensor:
    return (values_BKHW * valid_B1HW).sum(dim=(2, 3)) / valid_B1HW.sum(dim=(2, 3)).clamp(min=1)


def _tversky(
    logits_BKHW: torch.Tensor,
    targets_BKHW: torch.Tensor,
    valid_B1HW: torch.Tensor,
    alpha: float,
    beta: float,
    smooth: float,
) -> torch.Tensor:
    """(B, K), with counts of probabilities instead of decisions. Jaccard is alpha = beta = 1, Dice is 1/2."""
    p = torch.sigmoid(logits_BKHW) * valid_B1HW
    # The same as p t where t is 0 or 1; between them p t would be best at p of 0 or 1, the smaller one is at p = t
    # (Wang, Ning and Blaschko 2023, arXiv:2302.05666).
    true_positives = torch.minimum(p, targets_BKHW).sum(dim=(2, 3))
    false_positives = p.sum(dim=(2, 3)) - true_positives
    false_negatives = targets_BKHW.sum(dim=(2, 3)) - true_positives
    shared = true_positives + smooth
    return 1 - shared / (shared + alpha * false_positives + beta * false_negatives)
