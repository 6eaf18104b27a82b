"""Search space: one line a parameter, `dotted.config.key: {sampler: arguments}`, samplers by Ray Tune's names.

    optim.lr: {loguniform: [1e-5, 1e-2]}
    data.batch_size: {choice: [8, 16, 32]}
    model: {choice: [{kind: unet, width: 16}, {kind: timm, encoder: resnet18}]}

A key may name a whole section, which is then set whole: what a choice leaves out has its default, not what the base
configuration says. Keys are applied in the order given, so that a later line refines an earlier one.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ray import tune

from nuciseg.config import Config, known_keys, nearest_key
from nuciseg.distributed.trials import as_text, plain_values
from nuciseg.errors import ConfigError
from nuciseg.scale import WorkerRange

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
# What a search needs alike in every trial: section or key -> why, and what to do instead.
_NOT_SEARCHED = {
    "scale": "trials get the CPUs and GPUs that the base configuration asks for, so set it there",
    "search": "it steers the search itself, so set it beside search.space",
    "run": "every trial keeps its files in the search's folder, so set it in the base configuration",
    "tracking": "all trials of a search are logged alike, so set it in the base configuration",
    "train.epochs": "trials are compared after equally many epochs, so set search.trial_epochs, and this one for the "
    "winner",
    "train.metric": "trials are ranked by one score, so set it in the base configuration",
    "train.calibrate": "only the winner is calibrated, so set it in the base configuration",
    "inference.num_views": "trials are validated with one view, so set it in the base configuration",
    **dict.fromkeys(
        (
            *("data.root", "data.format", "data.cache_dir", "data.synthetic", "data.pool_test"),
            *("data.validation_fraction", "data.validation_list", "data.split_seed"),
            "data.num_folds",  # but data.fold: all parts in turn
        ),
        "trials are compared on the same images, so set it in the base configuration",
    ),
}


def build_space(config: Config) -> dict[str, Any]:
    """Ray Tune's search space for `config.search.space`.

    Every bound and every choice is first put into the configuration, with every choice of the sections that it lies
    in, so that a line that can give an invalid configuration is refused before anything starts. Lines that are valid
    one by one may still not fit each other, and normal distributions have no bounds: such a sample is refused by
    `configure` before its trial trains. Raises ConfigError.
    """
    refuse_elastic_trials(config)
    if not config.search.space:
        raise ConfigError("search.space is empty; give at least one line, as `optim.lr: {loguniform: [1e-5, 1e-2]}`")
    for above, below in itertools.combinations(config.search.space, 2):
        if above.startswith(f"{below}."):
            raise ConfigError(f"search.space.{above} stands above {below}, which would take its place; put it below")
    return {key: _sampler(key, line, config) for key, line in config.search.space.items()}


def refuse_elastic_trials(config: Config) -> None:
    """Raise ConfigError for trials without a fixed number of workers: they would take each other's room."""
    workers = config.scale.num_workers
    if isinstance(workers, WorkerRange):
        raise ConfigError(
            f"scale.num_workers is from {workers.min} to {workers.max}, which a run of `train` may have but not the "
            f"trials of a search; set it to one number, such as --scale.num_workers {workers.min}"
        )


def configure(base: Config, sample: Mapping[str, Any]) -> Config:
    """The whole validated configuration of one trial. Raises ConfigError that names the sample's key."""
    return base.replaced(plain_values(sample))


def variants(config: Config, section: str) -> list[Config]:
    """Configurations with every `section` that the space can give, of numbers the least and the greatest.

    `config` itself where the space has no line for the section. The space is one that `build_space` accepts.
    """
    lines = {key: line for key, line in config.search.space.items() if f"{key}.".startswith(f"{section}.")}
    found: dict[Any, Config] = {}
    fault: ConfigError | None = None
    for values in itertools.product(*(_ends(name, given) for line in lines.values() for name, given in line.items())):
        try:
            variant = config.replaced(dict(zip(lines, values, strict=True)))
        except ConfigError as error:  # lines that are valid one by one, but not together: refused when they are drawn
            fault = error
            continue
        found[getattr(variant, section)] = variant
    if not found:
        raise ConfigError(f"search.space: its lines for {section} do not fit each other: {fault}")
    return list(found.values())


def _sampler(key: str, line: Mapping[str, Any], config: Config) -> Any:
    if key not in set(known_keys()):
        raise ConfigError(f"search.space: unknown key {key!r}{nearest_key(key)}")
    for fixed, reason in _NOT_SEARCHED.items():
        if f"{key}.".startswith(f"{fixed}.") or fixed.startswith(f"{key}."):
            raise ConfigError(f"search.space.{key}: {fixed} cannot be searched: {reason}")
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
        return getattr(tune, name)([as_text(value) for value in arguments])
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
        if name.startswith("q") and len(arguments) > 2 and not (_is_number(arguments[2]) and arguments[2] > 0):
            raise ConfigError(f"search.space.{key}: {name} needs a step above 0, found {arguments[2]!r}")
        for value in (*_ends(name, arguments), *_between(name, arguments)):
            _check(config, key, value)
    sampler = getattr(tune, name)
    try:
        inspect.signature(sampler).bind(*arguments)
        return sampler(*arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"search.space.{key}: {name} cannot take {arguments!r} ({error})") from None


def _check(config: Config, key: str, value: Any) -> None:
    """Refuse a value that does not fit every choice of the sections that `key` lies in."""
    for chosen, base in _bases(config, key):
        try:
            base.replaced({key: value})
        except ConfigError as error:
            where = "".join(f" where {section} is {choice}" for section, choice in chosen.items())
            raise ConfigError(f"search.space.{key}: {value!r} cannot be used{where}: {error}") from None


def _bases(config: Config, key: str) -> list[tuple[dict[str, Any], Config]]:
    """The configurations that `key` may be put into: one for each choice of each section that it lies in."""
    bases: list[tuple[dict[str, Any], Config]] = [({}, config)]
    parts = key.split(".")
    for section in (".".join(parts[:length]) for length in range(1, len(parts))):
        line = config.search.space.get(section, {})
        choices = line.get("choice") or line.get("grid_search")
        if isinstance(choices, list):
            bases = [
                ({**chosen, section: choice}, base.replaced({section: choice}))
                for chosen, base in bases
                for choice in choices
            ]
    return bases


def _ends(name: str, arguments: Sequence[Any]) -> tuple[Any, ...]:
    """Least and greatest value of a sampler of numbers, every value of another, the mean of a normal distribution."""
    if name in _WITH_BOUNDS:
        low, high, *step = arguments
        if "randint" not in name:
            return low, high
        # Integers stay below their upper bound, unless they are drawn in steps.
        return low, high - high % (step[0] if step else 1) if name.startswith("q") else high - 1
    if name in ("choice", "grid_search"):
        return (min(arguments), max(arguments)) if all(map(_is_number, arguments)) else tuple(arguments)
    return tuple(arguments[:1]) or (0.0,)


def _between(name: str, arguments: Sequence[Any]) -> tuple[Any, ...]:
    """A value that a sampler of numbers may give besides its ends: not every key that takes those takes all between."""
    low, high, *step = arguments
    if "randint" not in name and not step:
        return (low + (high - low) / math.e,)  # a whole number never
    spacing = step[0] if step else 1
    first = math.floor(low / spacing + 1) * spacing  # of the multiples that are drawn
    return (first,) if first <= _ends(name, arguments)[1] else ()


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
