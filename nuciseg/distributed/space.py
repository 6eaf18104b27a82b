"""Search space: one line a parameter, `dotted.config.key: {sampler: arguments}`, samplers by Ray Tune's names.

    optim.lr: {loguniform: [1e-5, 1e-2]}
    data.batch_size: {choice: [8, 16, 32]}
    model: {choice: [{kind: unet, width: 16}, {kind: timm, encoder: resnet18}]}

A key may name a whole section; keys are applied in the order given, so that a later line refines an earlier one.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import Any

from ray import tune

from nuciseg.config import Config, known_keys, nearest_key
from nuciseg.errors import ConfigError

_SAMPLERS = (
    "uniform",
    "quniform",
    "loguniform",
    "qloguniform",
    "randn",
    "qrandn",
    "randint",
    "qrandint",
    "lograndint",
    "qlograndint",
    "choice",
    "grid_search",
)
_WITH_BOUNDS = tuple(name for name in _SAMPLERS if "uniform" in name or "randint" in name)
_SECTION_MARK = "section:"  # a choice between sections travels as text: samplers keep only plain values


def build_space(config: Config) -> dict[str, Any]:
    """Ray Tune's search space for `config.search.space`.

    Every bound and every choice is first put into the configuration by itself, so that a space that can give an
    invalid configuration is refused before anything starts. Raises ConfigError.
    """
    if not config.search.space:
        raise ConfigError("search.space is empty; give at least one line, as `optim.lr: {loguniform: [1e-5, 1e-2]}`")
    return {key: _sampler(key, line, config) for key, line in config.search.space.items()}


def configure(base: Config, sample: Mapping[str, Any]) -> Config:
    """The whole validated configuration of one trial. Raises ConfigError that names the sample's key."""
    return base.replaced({key: _value(drawn) for key, drawn in sample.items()})


def describe(sample: Mapping[str, Any]) -> str:
    """What differs between trials, for names and tables: `lr=0.001 batch_size=8`."""
    parts = []
    for key, drawn in sample.items():
        value = _value(drawn)
        if isinstance(value, Mapping):
            value = "/".join(str(part) for part in value.values())
        shown = f"{value:.3g}" if isinstance(value, float) else str(value)
        parts.append(f"{key.rsplit('.', 1)[-1]}={shown}")
    return " ".join(parts)


def _sampler(key: str, line: Mapping[str, Any], config: Config) -> Any:
    if key not in set(known_keys()):
        raise ConfigError(f"search.space: unknown key {key!r}{nearest_key(key)}")
    if len(line) != 1:
        raise ConfigError(f"search.space.{key}: give exactly one sampler, found {', '.join(line) or 'none'}")
    [(name, arguments)] = line.items()
    if name not in _SAMPLERS:
        raise ConfigError(f"search.space.{key}: unknown sampler {name!r}; choose one of {', '.join(_SAMPLERS)}")
    if name in ("choice", "grid_search"):
        if not isinstance(arguments, list) or not arguments:
            raise ConfigError(f"search.space.{key}: {name} takes a list of values, found {arguments!r}")
        for value in arguments:
            _check(config, key, value)
        return getattr(tune, name)([_plain(value) for value in arguments])
    if not isinstance(arguments, list):
        raise ConfigError(f"search.space.{key}: {name} takes a list of arguments, found {arguments!r}")
    if name in _WITH_BOUNDS:
        low, high = (*arguments, None, None)[:2]
        if not _is_number(low) or not _is_number(high) or not low < high:
            raise ConfigError(
                f"search.space.{key}: {name} takes [lower, upper] with lower < upper, found {arguments!r}"
            )
        if "log" in name and low <= 0:
            raise ConfigError(f"search.space.{key}: {name} needs a lower bound above 0, found {low!r}")
        for value in (low, high - 1 if "randint" in name else high):
            _check(config, key, value)
    sampler = getattr(tune, name)
    try:
        inspect.signature(sampler).bind(*arguments)
        return sampler(*arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"search.space.{key}: {name} cannot take {arguments!r} ({error})") from None


def _check(config: Config, key: str, value: Any) -> None:
    """Refuse a value that no configuration can have, whichever kind of its section is drawn."""
    section = key.split(".")[0]
    bases = [config]
    if section in config.search.space and key != section:
        kinds = config.search.space[section].get("choice") or config.search.space[section].get("grid_search") or []
        bases = [config.replaced({section: kind}) for kind in kinds]
    faults = []
    for base in bases:
        try:
            base.replaced({key: value})
        except ConfigError as error:
            faults.append(error)
    if bases and len(faults) == len(bases):
        raise ConfigError(f"search.space.{key}: {value!r} cannot be used: {faults[0]}") from None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _plain(value: Any) -> Any:
    return _SECTION_MARK + json.dumps(value) if isinstance(value, (dict, list)) else value


def _value(drawn: Any) -> Any:
    if isinstance(drawn, str) and drawn.startswith(_SECTION_MARK):
        return json.loads(drawn[len(_SECTION_MARK) :])
    return drawn.item() if hasattr(drawn, "item") else drawn
