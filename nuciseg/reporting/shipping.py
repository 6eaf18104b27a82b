"""Put a checkpoint into the package: without its training state, without its machine's paths, with a model card.

    nuciseg/shipped/NAME/
    ├── checkpoint.json       as in any checkpoint
    ├── weights.safetensors
    └── README.md             the model card

`scripts/ship.py` is the command.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nuciseg.config import Config, load_config
from nuciseg.engine import shipped
from nuciseg.engine.checkpoint import Checkpoint, find_checkpoint, load_checkpoint, save_checkpoint
from nuciseg.engine.datasets import format_of
from nuciseg.engine.evaluation import SCORES_FILE, SplitName, default_out, run_of
from nuciseg.engine.network import load_network
from nuciseg.errors import CheckpointError, ConfigError, writing
from nuciseg.models import TimmConfig
from nuciseg.reporting.model_card import CardFacts, measure_images, write_card
from nuciseg.reporting.study_records import flattened

MAX_BYTES = 10_000_000  # what everybody downloads who installs the package
CARD_FILE = "README.md"
SPLITS_NEEDED: tuple[SplitName, ...] = ("validation", "test")


@dataclass(frozen=True)
class CardSources:
    """What a model card is made of besides the checkpoint itself.

    `words` is the card with $placeholders for its figures, `recipe` the YAML file the network was trained with.
    `scores` are files of `nuciseg evaluate`; none: those in the run's own folder. `data_root` None is the folder that
    the network was trained on.
    """

    words: Path
    recipe: Path
    scores: Sequence[Path] = ()
    crossvalidation: Path | None = None
    data_root: Path | None = None


def ship(checkpoint: Path, name: str, sources: CardSources) -> Path:
    """Write the checkpoint that `checkpoint` means into the package as `nuciseg/NAME`, whole or not at all.

    Returns its folder; weights of that name are replaced. Raises CheckpointError where it is too large, was not
    evaluated on validation and test images, or where the scores or the data are not this checkpoint's; ConfigError for
    a name or a card that cannot be used; DataError; ResourceError.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", name):
        raise ConfigError(f"the name {name!r} cannot be used; take small letters, digits and hyphens")
    folder = find_checkpoint(checkpoint)
    loaded = load_checkpoint(folder)
    reports = read_reports(folder, loaded, sources.scores)
    data = loaded.config.data.model_copy(update={"root": sources.data_root or loaded.config.data.root})
    images = measure_images(data, loaded, reports["validation"]["data"]["content_hash"])
    layout = format_of(data)
    stripped = replace(loaded, config=without_machine(loaded.config, layout), training={})
    target = shipped.SHIPPED_DIR / name
    temporary = target.with_name(f".{name}.{os.getpid()}")
    try:
        save_checkpoint(stripped, temporary)
        network, _ = load_network(temporary, torch.device("cpu"))
        facts = CardFacts(
            name=name,
            checkpoint=stripped,
            num_parameters=sum(parameter.numel() for parameter in network.model.parameters()),
            num_bytes=_num_bytes(temporary),
            images=images,
            reports=reports,
            recipe=sources.recipe,
            flags=recipe_flags(stripped.config, without_machine(load_config(sources.recipe), layout)),
            crossvalidation=sources.crossvalidation,
        )
        write_card(facts, sources.words, temporary / CARD_FILE)
        _refuse_large(temporary, folder)
        _publish(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def without_machine(config: Config, layout: str) -> Config:
    """The configuration without what belongs to the machine and the search that it was trained on and in.

    `layout` takes the place of what was to be detected: without a folder it cannot be. The names of two files stay: of
    weights, since a network with weights to start from is given its input differently, and of the validation images.
    """
    plain = Config()
    changes: dict[str, Any] = {section: plain.value(section) for section in ("scale", "run", "tracking", "search")}
    changes |= {"data.format": layout, "data.root": None, "data.cache_dir": None}
    if isinstance(config.model, TimmConfig) and config.model.weights_file is not None:
        changes["model.pretrained"] = config.model.weights_file.name
    start = config.train.init_from
    if start is not None and not shipped.is_shipped_name(start):
        changes["train.init_from"] = run_of(start).name
    if config.data.validation_list is not None:
        changes["data.validation_list"] = config.data.validation_list.name
    return config.replaced(changes)


def recipe_flags(config: Config, recipe: Config) -> tuple[str, ...]:
    """The flags that turn `recipe` into `config`, both without their machine; thresholds chosen after training are
    none."""
    found, expected = (flattened(each.model_dump(mode="json")) for each in (config, recipe))
    ours = [key for key in found if key not in expected or found[key] != expected[key]]
    if config.train.calibrate:
        ours = [key for key in ours if not key.startswith("target.decode.")]
    return tuple(f"--{key} {found[key] if isinstance(found[key], str) else json.dumps(found[key])}" for key in ours)


def read_reports(folder: Path, loaded: Checkpoint, files: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """The evaluations of a checkpoint by split. Raises CheckpointError where one lacks or is of another checkpoint."""
    expected = {
        "epoch": loaded.progress.epoch,
        "split_hash": loaded.split_hash,
        "seed": loaded.config.seed,
        "target": loaded.config.target.model_dump(mode="json"),
    }
    found: dict[str, dict[str, Any]] = {}
    for path in files or [default_out(folder, split) / SCORES_FILE for split in SPLITS_NEEDED]:
        report = _read_report(path, folder)
        other = [key for key, value in expected.items() if report.get(key) != value]
        if other:
            raise CheckpointError(
                f"{path} is no evaluation of {folder} ({', '.join(other)} differ); run python -m nuciseg.evaluate again"
            )
        found[report["split"]] = report
    for split in SPLITS_NEEDED:
        if split not in found:
            raise CheckpointError(f"no evaluation of {folder} on {split} images was given; {_how_to_evaluate(split)}")
    return found


def _read_report(path: Path, folder: Path) -> dict[str, Any]:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be shipped without its scores: {path} cannot be read ({error.strerror}); "
            f"{_how_to_evaluate('validation')} and once more for test"
        ) from None
    except ValueError:
        report = None
    if not isinstance(report, dict) or "split" not in report:
        raise CheckpointError(f"{path} is no {SCORES_FILE} of an evaluation; {_how_to_evaluate('SPLIT')}")
    return report


def _how_to_evaluate(split: str) -> str:
    return f"run python -m nuciseg.evaluate with this checkpoint and --split {split}"


def _num_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _refuse_large(temporary: Path, folder: Path) -> None:
    size = _num_bytes(temporary)
    if size > MAX_BYTES:
        raise CheckpointError(
            f"{folder} takes {size / 1e6:.1f} MB without its training state, weights in the package may take "
            f"{MAX_BYTES / 1e6:.0f} MB; ship a network with fewer parameters"
        )


def _publish(temporary: Path, target: Path) -> None:
    with writing(target):
        for path in temporary.iterdir():
            path.chmod(0o644)  # safetensors writes for its owner alone, but packages are installed for everybody
        if target.exists():
            shutil.rmtree(target)
        os.replace(temporary, target)
