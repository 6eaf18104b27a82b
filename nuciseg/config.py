"""A whole run as one frozen, validated object. Sources, weakest first: defaults < YAML files < flags.

Every section's class lies beside the component it configures; this file only puts them together, reads them and
writes them. Beyond `load_config` no dictionary of settings travels through the package.
"""

from __future__ import annotations

import argparse
import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsConfigDict

from nuciseg.buckets import Location, is_bucket
from nuciseg.data.augment import AugmentConfig
from nuciseg.data.dataset import NormalizationConfig
from nuciseg.data.formats import FormatName
from nuciseg.data.markings import Marking
from nuciseg.data.synthetic import SyntheticConfig
from nuciseg.errors import ConfigError
from nuciseg.images import write_bytes
from nuciseg.losses import CombinedConfig, LossConfig
from nuciseg.metrics import METRIC_NAMES
from nuciseg.models import ModelConfig, TimmConfig, UnetConfig
from nuciseg.optim import OptimConfig, ScheduleConfig
from nuciseg.scale import FORMS, ScaleConfig
from nuciseg.section import Section
from nuciseg.targets import TargetConfig, TouchingBorderConfig
from nuciseg.tracking import TrackingConfig
from nuciseg.yaml_files import as_yaml, read_layers


def _one_of(name: str, known: Sequence[str]) -> str:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(known)}"
        raise ValueError(f"no such score; {hint}")
    return name


class DataConfig(Section):
    """What is read, how it is split and cut."""

    format: FormatName = Field("auto", description="layout; auto: detected, synthetic without a root")
    root: Location | None = Field(None, description="folder of the data, s3:// and gs:// too; none: clusters are drawn")
    cache_dir: Path | None = Field(None, description="decoded images; none: the user's cache folder")
    validation_fraction: float = Field(0.2, gt=0, lt=1, description="share of the training images held out")
    split_seed: int = Field(0, ge=0, description="seed of the split into training and validation")
    num_folds: int | None = Field(
        None, ge=2, description="cross-validation in so many parts; none: validation_fraction"
    )
    fold: int = Field(0, ge=0, description="with num_folds: which part is held out, from 0")
    validation_list: Path | None = Field(
        None, description="text file, an image's id a line: these are held out; none: validation_fraction"
    )
    pool_test: bool = Field(
        False, description="divide the test images, too, for cross-validation; nothing is left to test"
    )
    crop_px: int = Field(192, ge=32, le=4096, multiple_of=32, description="longest side of a training crop, pixels")
    crops: Literal["one", "by_area"] = Field(
        "one",
        description="training crops of an image and epoch; by_area: as many as fill it, for fields of many sizes",
    )
    batch_size: int = Field(16, ge=1, description="images a step, over all workers")
    num_loader_threads: int = Field(1, ge=0, le=64, description="threads that make batches ahead, per worker; 0: none")
    marking: Marking = Field("as_is", description="drawn border of cut-out clusters; erased: not for the network")
    normalization: NormalizationConfig = NormalizationConfig()
    synthetic: SyntheticConfig = SyntheticConfig()


class TrainConfig(Section):
    """How a run goes on and when it ends."""

    init_from: Path | None = Field(
        None, description="checkpoint whose weights are trained further, of the same model and target; none: fresh ones"
    )
    epochs: int = Field(20, ge=1, description="passes over the training images")
    accumulate: int = Field(1, ge=1, description="parts that a batch is cut into; gradients are added up over them")
    clip_norm: float | None = Field(1.0, gt=0, description="largest norm of the gradient; none: not clipped")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field("auto", description="autocast type; auto: by capability")
    channels_last: bool | None = Field(None, description="memory format of images; none: with reduced precision")
    compile: bool = Field(False, description="torch.compile the network")
    ema_decay: float | None = Field(0.99, gt=0, lt=1, description="averaged weights, used by validation; none: off")
    metric: str = Field("cluster_score", description="validation score that ranks epochs; higher is better")
    patience: int | None = Field(None, ge=1, description="epochs without a better score before the end; none: all")
    calibrate: bool = Field(
        True,
        description="after training, choose the decoding thresholds of the best and the last epoch on validation, and "
        "which of the two is better",
    )

    @field_validator("metric")
    @classmethod
    def _known_metric(cls, metric: str) -> str:
        return _one_of(metric, METRIC_NAMES)


class InferenceConfig(Section):
    """How a finished network is asked; validation after each epoch asks for one view."""

    num_views: Literal[1, 2, 4, 8] = Field(
        1, description="turned and mirrored copies of an image whose probabilities are averaged"
    )
    rounds: int = Field(
        0,
        ge=0,
        le=20,
        description="times that the border found is drawn on the image and the network asked again, until it closes; "
        "for networks trained with augment.drawn_borders",
    )


RUN_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class RunConfig(Section):
    """Where a run keeps what it makes."""

    name: str | None = Field(None, pattern=RUN_NAME, description="folder; none: verb and time")
    storage_path: Location = Field(
        Path("runs"), description="folder of all runs, s3:// and gs:// too; else on a cluster one that all nodes share"
    )
    group: str | None = Field(None, description="W&B group; none: the name of the run or search")
    max_failures: int = Field(
        3,
        ge=0,
        description="deaths in a row, without an epoch in between, after which a run or trial is still taken up again",
    )
    checkpoint_minutes: float | None = Field(
        None, gt=0, description="longest time without a checkpoint, for long epochs; none: one after each epoch"
    )


class SearchConfig(Section):
    """What `tune` tries."""

    space: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="dotted config key: {ray.tune sampler: arguments}; where given, the default's lines are dropped",
    )
    num_trials: int = Field(8, ge=1, description="trials; the grid sampler tries the whole grid instead")
    max_hours: float | None = Field(
        None, gt=0, description="hours after which no trial begins and those that run end; none: no limit"
    )
    max_disk_gb: float | None = Field(None, gt=0, description="GB that its folder may take; none: no limit")
    trial_epochs: int | None = Field(None, ge=1, description="epochs of a trial; none: train.epochs")
    sampler: Literal["random", "grid", "optuna"] = Field("optuna", description="how configurations are drawn")
    scheduler: Literal["asha", "pbt", "none"] = Field("asha", description="which trials go on")
    grace_epochs: int = Field(2, ge=1, description="epochs before ASHA may stop a trial, or between PBT's steps")
    reduction_factor: int = Field(3, ge=2, description="ASHA: one of so many trials goes on at each rung")
    max_concurrent: int | None = Field(None, ge=1, description="trials at a time; none: as many as fit")
    final: bool = Field(True, description="train the winner to the end and evaluate it")


class Config(Section):
    """One run of nuciseg."""

    seed: int = Field(0, ge=0, description="seed of weights, batches and augmentation")
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    target: TargetConfig = TouchingBorderConfig()
    model: ModelConfig = UnetConfig()
    loss: LossConfig = CombinedConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()
    inference: InferenceConfig = InferenceConfig()
    scale: ScaleConfig = ScaleConfig()
    run: RunConfig = RunConfig()
    tracking: TrackingConfig = TrackingConfig()
    search: SearchConfig = SearchConfig()

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        if self.train.accumulate > self.data.batch_size:
            raise ValueError(
                f"train.accumulate {self.train.accumulate} is more than data.batch_size {self.data.batch_size}: "
                "a part of a batch needs at least one image"
            )
        if self.optim.frozen_encoder_epochs and not isinstance(self.model, TimmConfig):
            raise ValueError(
                f"optim.frozen_encoder_epochs is {self.optim.frozen_encoder_epochs}, but a network of model.kind "
                f"{self.model.kind!r} has no encoder to freeze: set it to 0, or model.kind to 'timm'"
            )
        if self.data.validation_list is not None and self.data.num_folds is not None:
            raise ValueError(
                f"data.validation_list {self.data.validation_list} and data.num_folds {self.data.num_folds} both say "
                "which images are held out: set one of them to none"
            )
        if self.data.fold >= (self.data.num_folds or 1):
            raise ValueError(
                f"data.fold is {self.data.fold}, but data.num_folds is {self.data.num_folds or 'none'}: set that to "
                f"{self.data.fold + 1} or more, or data.fold to less"
            )
        return self

    def replaced(self, changes: Mapping[str, Any]) -> Config:
        """The configuration with values put at dotted keys, validated as a whole.

        Raises ConfigError for a key that does not exist or a value out of its range.
        """
        values = self.model_dump(mode="json")
        for key, value in changes.items():
            put(values, key, value)
        return parse_config(values)

    def value(self, dotted_key: str) -> Any:
        """The plain value (sections as mappings) at a dotted key."""
        value: Any = self.model_dump(mode="json")
        for part in dotted_key.split("."):
            value = value[part]
        return value


def put(values: dict[str, Any], dotted_key: str, value: Any) -> None:
    """Set `values[a][b][c]` for the key `a.b.c`, making the sections on the way."""
    *sections, last = dotted_key.split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{dotted_key}: {section!r} is a value, not a section; see --help for the keys")
        values = inner
    values[last] = value


_KIND_IS_A_CHOICE = ("optim", "schedule", "tracking")  # here every kind has the same keys
_ALIKE_IN_ALL_KINDS = ("decode",)  # of a target: how maps are decoded does not depend on how they were encoded
_TAKEN_WHOLE = ("space",)  # search.space has the user's own keys: two of them mixed are neither's search


def merged(weaker: Mapping[str, Any], stronger: Mapping[str, Any]) -> dict[str, Any]:
    """Both mappings section by section; where both have a value the stronger one's counts.

    A section whose `kind` changes starts afresh, because another kind has other keys (but for `target.decode`); so does
    `search.space`.
    """
    result = dict(weaker)
    for key, value in stronger.items():
        before = result.get(key)
        if isinstance(value, Mapping) and isinstance(before, Mapping) and key not in _TAKEN_WHOLE:
            other_kind = "kind" in value and value["kind"] != before.get("kind", value["kind"])
            starts_afresh = other_kind and key not in _KIND_IS_A_CHOICE
            kept = {name: before[name] for name in _ALIKE_IN_ALL_KINDS if name in before} if starts_afresh else before
            result[key] = merged(kept, value)
        else:
            result[key] = value
    return result


def parse_config(values: Mapping[str, Any], source: str = "configuration") -> Config:
    """Validate `values` as a whole configuration; raises ConfigError with one sentence that names the key."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_sentence(error)}") from None


def load_config(path: Path | None = None, overrides: Mapping[str, Any] | None = None) -> Config:
    """Defaults < the YAML file at `path` < `overrides` (nested mapping)."""
    return _layered({}, path, overrides or {})


def _layered(base: Mapping[str, Any], path: Path | None, flags: Mapping[str, Any]) -> Config:
    """Defaults < `base` < the YAML file at `path` < `flags`; raises ConfigError that names the one at fault."""
    values = merged(Config().model_dump(mode="json"), base)
    for layer in read_layers(path) if path is not None else []:
        values = merged(values, layer)
    try:
        return parse_config(merged(values, flags), "flags")
    except ConfigError:
        if path is not None:
            parse_config(values, str(path))  # raises where the file is wrong without the flags, too
        raise


def write_config(config: Config, path: Path) -> None:
    """Write the resolved configuration as YAML that `--config` takes back. Raises ResourceError."""
    write_bytes(path, as_yaml(config.model_dump(mode="json")).encode())


class _Flags(BaseSettings, Config):
    """Config as the command line sees it; only its flags are used, never the environment."""

    model_config = SettingsConfigDict(
        extra="forbid", cli_hide_none_type=True, cli_prefix="", cli_implicit_flags=False, cli_enforce_required=False
    )


def add_config_flags(parser: argparse.ArgumentParser, *, several: bool = False) -> CliSettingsSource[Any]:
    """Add `--config FILE` and one flag for every key of the configuration, with type, unit and default in `--help`.

    With `several` the flag may be given more than once, and `args.config` is a list or None.
    """
    if several:
        help = "YAML file of settings, or a folder of them; given more than once, one search after the other; flags "
        help += "count more"
        parser.add_argument("--config", type=Path, action="append", metavar="FILE", help=help)
    else:
        parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file of settings; flags count more")
    parser.allow_abbrev = False
    source: CliSettingsSource[Any] = CliSettingsSource(_Flags, root_parser=parser, cli_parse_args=None)
    # pydantic-settings tells of one kind where several have the key, and no default of a union.
    for key, text in _help_texts().items():
        parser._option_string_actions[f"--{key}"].help = text.replace("%", "%%")
    return source


def _help_texts() -> dict[str, str]:
    """What `--help` says of each key, over all kinds of every section."""
    texts = dict(_told(Config()))
    for section in Config.model_fields:
        kinds_by_text: dict[str, dict[str, list[str]]] = {}
        for kind, model in _kinds(section).items():
            # Not validated: that would load the library of encoders for a line of help.
            for key, text in _told(model.model_construct(), f"{section}."):
                kinds_by_text.setdefault(key, {}).setdefault(text, []).append(kind)
        kinds_by_text.pop(f"{section}.kind", None)  # the default's, which is there already, counts
        for key, kinds in kinds_by_text.items():
            alike = len(kinds) == 1
            texts[key] = "; ".join(text if alike else f"{', '.join(of)}: {text}" for text, of in kinds.items())
    return texts


def _told(section: BaseModel, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Each key of a section with its description and default."""
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _told(value, f"{prefix}{name}.")
        else:
            default = "none" if value is None else value
            yield prefix + name, f"{field.description or ''} (default: {default})".lstrip()


def config_from_args(
    source: CliSettingsSource[Any],
    args: argparse.Namespace,
    base: Mapping[str, Any] | None = None,
    *,
    file: Path | None = None,
) -> Config:
    """Defaults < `base` < `file` (else `--config`) < flags, validated; raises ConfigError."""
    return _with_whole_paths(_layered(base or {}, file or args.config, source(parsed_args=args)()))


def _with_whole_paths(config: Config) -> Config:
    """Workers and resumed runs may have another working folder than the command had."""
    keys = ["data.root", "data.cache_dir", "data.validation_list"]
    if isinstance(config.model, TimmConfig) and config.model.weights_file is not None:
        keys.append("model.pretrained")
    start = config.train.init_from
    if start is not None and start.exists():  # else it is the name of weights that come with nuciseg, or a mistake
        keys.append("train.init_from")
    paths = {key: config.value(key) for key in keys}
    here = {key: path for key, path in paths.items() if path is not None and not is_bucket(path)}
    return config.replaced({key: str(Path(path).resolve()) for key, path in here.items()})


def known_keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Every dotted key that the configuration can have, over all kinds of every section."""
    for name, field in model.model_fields.items():
        yield prefix + name
        for section in _sections_of(field.annotation):
            yield from known_keys(section, f"{prefix}{name}.")


def nearest_key(key: str) -> str:
    """` (did you mean ...?)` for a key that does not exist, or nothing where no key is near."""
    near = difflib.get_close_matches(key, sorted(set(known_keys())), n=1, cutoff=0.5)
    if not near:
        last = key.rsplit(".", 1)[-1]
        near = [known for known in known_keys() if known.rsplit(".", 1)[-1] == last][:1]
    return f"; did you mean {near[0]!r}?" if near else "; --help lists the keys"


def _sections_of(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif typing.get_origin(annotation) is Annotated:
        yield from _sections_of(typing.get_args(annotation)[0])
    elif typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for part in typing.get_args(annotation):
            yield from _sections_of(part)


def _sentence(error: ValidationError) -> str:
    """The first fault as one sentence: key, value, what is wrong."""
    faults = []
    for fault in error.errors():
        place = [str(part) for part in fault["loc"] if part not in FORMS]
        # pydantic puts the kind behind the section where kinds differ in their keys.
        kind = place.pop(1) if len(place) > 1 and _kinds(place[0]) else ""
        key = ".".join(place)
        if fault["type"] == "extra_forbidden":
            faults.append(_unknown(place, kind))
        elif fault["type"] == "value_error" and not key:
            faults.append(str(fault["ctx"]["error"]))
        else:
            message = str(fault["ctx"]["error"]) if fault["type"] == "value_error" else fault["msg"]
            faults.append(f"{key} is {fault['input']!r}: {message[:1].lower()}{message[1:]}")
    more = f" (and {len(faults) - 1} more faults)" if len(faults) > 1 else ""
    return faults[0] + more


def _unknown(place: Sequence[str], kind: str) -> str:
    """What is wrong with a key that the configuration does not have there."""
    key = ".".join(place)
    parts = key.split(".")
    if key not in set(known_keys()):
        return f"unknown key {key!r}{nearest_key(key)}"
    if len(parts) > len(place):
        return f"unknown key {key!r}; write a section, {': {'.join(parts)}: ...{'}' * (len(parts) - 1)}"
    section, name = place
    owners = [other for other, model in _kinds(section).items() if name in model.model_fields]
    return f"{section}.kind {kind} has no {name}, which belongs to {', '.join(owners)}"


def _kinds(section: str) -> dict[str, type[BaseModel]]:
    """What a section can be, by its `kind`; nothing where all kinds have the same keys."""
    field = Config.model_fields.get(section)
    if field is None or field.discriminator is None:
        return {}
    return {model.model_fields["kind"].default: model for model in _sections_of(field.annotation)}
