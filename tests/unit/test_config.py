"""The configuration: where values come from, what is refused, and that it survives being written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from nuciseg.cli import Parser
from nuciseg.config import (
    Config,
    add_config_flags,
    config_from_args,
    known_keys,
    load_config,
    merged,
    nearest_key,
    parse_config,
    write_config,
)
from nuciseg.errors import ConfigError
from nuciseg.losses import BCEConfig, CombinedConfig
from nuciseg.targets import DecodeConfig, DepthConfig, FullBorderConfig


def from_command_line(*words: str, base: dict[str, Any] | None = None) -> Config:
    parser = Parser("train", "what it does")
    source = add_config_flags(parser)
    return config_from_args(source, parser.parse_args(list(words)), base)


def yaml_file(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


# ----------------------------------------------------------------------------------------------- where values come from
def test_nothing_given_is_the_defaults() -> None:
    assert from_command_line() == load_config() == Config()


def test_defaults_lose_to_yaml_and_yaml_loses_to_flags(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "optim: {lr: 0.5, weight_decay: 0.25}\nseed: 3\n")
    config = from_command_line("--config", str(path), "--optim.lr", "0.125")
    assert (config.optim.lr, config.optim.weight_decay, config.seed) == (0.125, 0.25, 3)
    assert config.train == Config().train


def test_a_verbs_own_base_loses_to_yaml(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "train: {epochs: 7}\n")
    config = from_command_line("--config", str(path), base={"train": {"epochs": 2, "patience": 4}})
    assert (config.train.epochs, config.train.patience) == (7, 4)


def test_a_file_lies_over_the_one_that_it_extends(tmp_path: Path) -> None:
    (tmp_path / "questions").mkdir()
    (tmp_path / "recipe.yaml").write_text(
        "optim: {lr: 0.5, weight_decay: 0.25}\nmodel: {kind: timm, stages: 2}\nsearch: {space: {seed: {choice: [0]}}}"
    )
    (tmp_path / "budget.yaml").write_text("extends: recipe.yaml\ntrain: {epochs: 7}\noptim: {lr: 0.125}")
    path = tmp_path / "questions" / "which.yaml"
    path.write_text("extends: ../budget.yaml\nmodel: {kind: unet}\nsearch: {space: {optim.lr: {choice: [0.1]}}}")
    config = load_config(path)
    assert (config.optim.lr, config.optim.weight_decay, config.train.epochs) == (0.125, 0.25, 7)
    assert config.model == Config().model  # another kind starts afresh, as with flags
    assert set(config.search.space) == {"optim.lr"}
    assert from_command_line("--config", str(path), "--train.epochs", "3").train.epochs == 3


def test_another_kind_than_the_default_starts_afresh_over_an_extended_file(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("target: {width_px: 9, decode: {min_nuclei: 2}}")
    path = yaml_file(tmp_path, "extends: recipe.yaml\ntarget: {kind: depth}")
    assert load_config(path).target == DepthConfig(decode=DecodeConfig(min_nuclei=2))
    path.write_text("extends: recipe.yaml\ntarget: {smooth_px: 0.5}")
    base = {"target": {"kind": "full_border"}}
    with_base = from_command_line("--config", str(path), base=base).target
    assert with_base == FullBorderConfig(width_px=9, smooth_px=0.5, decode=DecodeConfig(min_nuclei=2))


@pytest.mark.parametrize(
    ("extends", "sentence"),
    [
        ("recipe.yml", r"which\.yaml: extends recipe\.yml, but there is no file .*recipe\.yml$"),
        ("[a, b]", r"extends takes the path of one YAML file, found \['a', 'b'\]$"),
        ("which.yaml", r"extends which\.yaml leads back to a file that extends it; take the line out of one$"),
        ("circle.yaml", r"circle\.yaml: extends which\.yaml leads back to a file that extends it"),
        ("broken.yaml", r"broken\.yaml.*: not valid YAML"),
    ],
)
def test_a_file_that_cannot_be_extended_is_named(extends: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "circle.yaml").write_text("extends: which.yaml")
    (tmp_path / "broken.yaml").write_text("optim: {lr")
    (tmp_path / "which.yaml").write_text(f"extends: {extends}")
    with pytest.raises(ConfigError, match=sentence):
        load_config(tmp_path / "which.yaml")


@pytest.mark.parametrize("word", ["none", "null"])
def test_none_in_words_is_no_value_where_there_may_be_none(word: str, tmp_path: Path) -> None:
    config = from_command_line("--train.clip_norm", word, "--model.kind", "timm", "--model.pretrained", word)
    assert (config.train.clip_norm, getattr(config.model, "pretrained", "")) == (None, None)
    text = f"train: {{clip_norm: {word}}}\nmodel: {{kind: unet, norm: none}}\nsearch: {{scheduler: none}}\n"
    from_file = load_config(yaml_file(tmp_path, text))
    assert (from_file.train.clip_norm, from_file.search.scheduler) == (None, "none")
    assert getattr(from_file.model, "norm", None) == "none"


def test_flags_take_none_booleans_lists_and_paths() -> None:
    config = from_command_line(
        "--train.clip_norm", "null", "--augment.enabled", "false", "--data.root", "some/folder",
        "--tracking.tags", "[a,b]",
    )  # fmt: skip
    assert config.train.clip_norm is None
    assert config.augment.enabled is False
    assert config.data.root == Path("some/folder").resolve(), "workers may have another working folder"
    assert config.tracking.tags == ("a", "b")


def test_a_number_out_of_a_few_can_be_given_as_a_flag(tmp_path: Path) -> None:
    assert from_command_line("--inference.num_views", "8").inference.num_views == 8
    assert load_config(yaml_file(tmp_path, "inference: {num_views: '4'}")).inference.num_views == 4
    with pytest.raises(ConfigError, match=r"inference\.num_views is '3': input should be 1, 2, 4 or 8"):
        from_command_line("--inference.num_views", "3")


@pytest.mark.parametrize(
    "changes",
    [{}, {"model": {"kind": "timm"}}, {"model": {"kind": "baseline"}}, {"target": {"kind": "depth"}}]
    + [{"loss": {"kind": kind}} for kind in ("bce", "dice", "jaccard", "focal", "tversky", "mse")],
    ids=str,
)
def test_every_value_of_the_defaults_can_be_given_as_a_flag(changes: dict[str, Any]) -> None:
    config = load_config(overrides=changes)
    words = [f"--{key}={as_flag(value)}" for key, value in values_of(config.model_dump(mode="json"))]
    assert from_command_line(*words) == config


def values_of(section: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in section.items():
        if isinstance(value, dict) and name != "space":
            yield from values_of(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def as_flag(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value)) or "[]"
    return "none" if value is None else str(value)


def test_a_factor_for_all_maps_or_one_for_each_can_be_given_as_a_flag() -> None:
    loss = from_command_line("--loss.bce.positive_weight", "3").loss
    assert isinstance(loss, CombinedConfig)
    assert loss.bce.positive_weight == 3
    for_each = from_command_line("--loss.kind", "bce", "--loss.positive_weight", "3,4", "--loss.map_weights", "1,2")
    assert for_each.loss == BCEConfig(positive_weight=(3, 4), map_weights=(1, 2))


def test_the_environment_sets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEED", "77")
    monkeypatch.setenv("OPTIM", '{"lr": 0.77}')
    assert from_command_line() == Config()


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", ".1e-3", "0.0001", "1_0e-5"])
def test_numbers_in_yaml_are_numbers_however_they_are_written(tmp_path: Path, text: str) -> None:
    path = yaml_file(tmp_path, f"optim: {{lr: {text}}}\nsearch: {{space: {{optim.lr: {{loguniform: [{text}, 1]}}}}}}\n")
    config = load_config(path)
    assert config.optim.lr == 1e-4
    assert config.search.space == {"optim.lr": {"loguniform": [1e-4, 1]}}


def test_another_kind_starts_its_section_afresh(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "model: {kind: unet, depth: 5, width: 24}\n")
    config = from_command_line("--config", str(path), "--model.kind", "timm", "--model.encoder", "resnet34")
    assert config.model.kind == "timm"
    assert config.model.encoder == "resnet34"
    same_kind = from_command_line("--config", str(path), "--model.width", "8")
    assert same_kind.model == Config().replaced({"model.depth": 5, "model.width": 8}).model


def test_another_target_is_decoded_as_the_one_before(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "target: {width_px: 7, decode: {min_nuclei: 2, border_share: 0.8}}\n")
    target = from_command_line("--config", str(path), "--target.kind", "full_border").target
    assert (target.kind, target.width_px) == ("full_border", FullBorderConfig().width_px)
    assert (target.decode.min_nuclei, target.decode.border_share) == (2, 0.8)
    assert Config().replaced({"target.decode.min_nuclei": 2}).replaced(
        {"target.kind": "full_border"}
    ).target.decode == (FullBorderConfig(decode=DecodeConfig(min_nuclei=2)).decode)


def test_paths_do_not_depend_on_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("--model.kind", "timm", "--model.pretrained")
    config = from_command_line("--data.root", "images", *words, "w.pth")
    assert config.data.root == tmp_path / "images"
    assert config.value("model.pretrained") == str(tmp_path / "w.pth")
    assert from_command_line(*words, "hub").value("model.pretrained") == "hub"


def test_another_optimizer_keeps_the_learning_rate() -> None:
    """All optimizers have the same keys, so that a kind alone may be searched."""
    config = Config().replaced({"optim.lr": 0.5}).replaced({"optim.kind": "sgd"})
    assert (config.optim.kind, config.optim.lr) == ("sgd", 0.5)


SPACE = "{optim.lr: {uniform: [1e-3, 1e-2]}}"


@pytest.mark.parametrize("where", ["flag", "file"])
def test_a_search_space_that_is_given_takes_the_place_of_the_one_below(tmp_path: Path, where: str) -> None:
    below = {"search": {"num_trials": 3, "space": {"optim.lr": {"loguniform": [0.1, 0.2]}, "seed": {"choice": [1]}}}}
    if where == "flag":
        path = yaml_file(tmp_path, yaml.safe_dump(below))
        words = ("--config", str(path), "--search.space", '{"optim.lr": {"uniform": [1e-3, 1e-2]}}')
        search = from_command_line(*words).search
    else:
        path = yaml_file(tmp_path, f"search: {{space: {SPACE}}}\n")
        search = from_command_line("--config", str(path), base=below).search
    assert search.space == {"optim.lr": {"uniform": [1e-3, 1e-2]}}
    assert search.num_trials == 3


def test_merging_changes_neither_side() -> None:
    weaker, stronger = {"a": {"b": 1}}, {"a": {"c": 2}}
    assert merged(weaker, stronger) == {"a": {"b": 1, "c": 2}}
    assert (weaker, stronger) == ({"a": {"b": 1}}, {"a": {"c": 2}})


# ---------------------------------------------------------------------------------------------------- written and read
@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--model.kind", "timm", "--model.encoder", "resnet34", "--optim.lr", "1.2345678901234567e-3"),
        ("--target.kind", "full_border", "--loss.kind", "focal", "--train.patience", "3", "--data.root", "x"),
        ("--model.kind", "baseline", "--schedule.kind", "one_cycle", "--train.clip_norm", "null"),
        ("--run.name", "12e4567", "--run.group", "1e3", "--tracking.tags", "[1:30,0x1]"),
    ],
)
def test_the_resolved_configuration_can_be_given_back(tmp_path: Path, words: tuple[str, ...]) -> None:
    config = from_command_line(*words)
    write_config(config, tmp_path / "config.yaml")
    assert from_command_line("--config", str(tmp_path / "config.yaml")) == config
    assert parse_config(yaml.safe_load((tmp_path / "config.yaml").read_text())) == config
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_the_configuration_is_frozen() -> None:
    with pytest.raises(ValidationError):
        Config().optim.lr = 3.0  # type: ignore[misc]


def test_replaced_validates_the_whole() -> None:
    config = Config().replaced({"optim.lr": 0.5, "model.depth": 2})
    assert config.optim.lr == 0.5
    assert Config().optim.lr != 0.5
    with pytest.raises(ConfigError, match=r"train\.accumulate 99 is more than data\.batch_size"):
        Config().replaced({"train.accumulate": 99})
    with pytest.raises(ConfigError, match="'seed' is a value, not a section"):
        Config().replaced({"seed.x": 1})


def test_a_run_has_a_number_of_workers_or_a_range_of_them(tmp_path: Path) -> None:
    scale = Config().replaced({"scale.num_workers": 3}).scale
    assert (scale.num_workers, scale.min_workers, scale.max_workers) == (3, 3, 3)
    path = yaml_file(tmp_path, "scale: {num_workers: {min: 1, max: 4}}")
    config = from_command_line("--config", str(path), "--scale.num_workers.max", "8")
    assert (config.scale.min_workers, config.scale.max_workers) == (1, 8)
    assert from_command_line("--config", str(path), "--scale.num_workers", "2").scale.num_workers == 2
    write_config(config, tmp_path / "written.yaml")
    assert load_config(tmp_path / "written.yaml") == config


# --------------------------------------------------------------------------------------------------------- refused
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: {lrr: 1}", "unknown key 'optim.lrr'; did you mean 'optim.lr'?"),
        ("optimm: {lr: 1}", "unknown key 'optimm'; did you mean 'optim'?"),
        ("batch_size: 4", "unknown key 'batch_size'; did you mean 'data.batch_size'?"),
        ("model: {kind: unet, encoder: resnet18}", "model.kind unet has no encoder, which belongs to timm"),
        ("loss: {kind: bce, alpha: 1}", "loss.kind bce has no alpha, which belongs to focal, tversky"),
        ("data.batch_size: 4", "unknown key 'data.batch_size'; write a section, data: {batch_size: ...}"),
        ("loss: {bce.positive_weight: 4}", "; write a section, loss: {bce: {positive_weight: ...}}"),
        ("loss: {bce: {map_weights: [0, 0]}}", "loss.bce is {'map_weights': [0, 0], 'kind'"),
        ("loss: {bce: {map_weight: [1, 2]}}", "'loss.bce.map_weight'; did you mean 'loss.bce.map_weights'?"),
        ("data: {batch_size: 0}", "data.batch_size is 0: input should be greater than or equal to 1"),
        ("data: {batch_size: four}", "data.batch_size is 'four': "),
        ("data: {crop_px: 100}", "data.crop_px is 100: "),
        ("optim: {lr: .nan}", "optim.lr is nan: "),
        ("train: {metric: cluster_scor}", "did you mean 'cluster_score'?"),
        ("model: {kind: unett}", "model"),
        ("run: {name: ../elsewhere}", "run.name is '../elsewhere': "),
        ("scale: {num_workers: 0}", "scale.num_workers is 0: input should be greater than or equal to 1"),
        ("scale: {num_workers: two}", "scale.num_workers is 'two': input should be a valid integer"),
        ("scale: {num_workers: {min: 3, max: 2}}", "min 3 is more than max 2: swap them, or give one number"),
        ("scale: {num_workers: {min: 0, max: 2}}", "scale.num_workers.min is 0: input should be greater than or"),
        ("scale: {num_workers: {min: 1}}", "scale.num_workers.max is {'min': 1}: field required"),
        ("seed: 1\ndata: [1, 2]", "data is [1, 2]: "),
        ("- 1\n- 2", "a configuration is a mapping of sections, found list"),
        ("model: {kind: timm, input_range: [1, 1]}", "model.input_range is [1, 1]: black 1.0 is not below"),
        ("model: {kind: timm, input_range: [1.5, -0.5]}", "model.input_range is [1.5, -0.5]: black 1.5 is not below"),
        ("search: {max_hours: 1:30}", "search.max_hours is '1:30': input should be a valid number"),
        ("run: {checkpoint_minutes: 10:00}", "run.checkpoint_minutes is '10:00': input should be a valid number"),
        ("train: {patience: yes}", "train.patience is 'true': input should be a valid integer"),
        ("train: {clip_norm: off}", "train.clip_norm is 'false': input should be a valid number"),
        ("scale: {num_workers: yes}", "scale.num_workers is 'true': input should be a valid integer"),
        ("loss: {bce: {positive_weight: yes}}", " is 'true': input should be a valid number"),
        ("inference: {num_views: yes}", "inference.num_views is 'true': input should be 1, 2, 4 or 8"),
        ("seed: 1\noptim: {lr: 1}\noptim: {lr: 2}", "line 3: not valid YAML ('optim' is there twice, first in line 2"),
        ("search:\n  space:\n    seed: {choice: [1]}\n    seed: {choice: [2]}", "line 4: not valid YAML ('seed' is"),
        ("optim: {lr: 1, lr: 2}", "line 1: not valid YAML ('lr' is there twice, first in line 1: keep one of them)"),
        ("seed: {", "not valid YAML"),
        ("seed: 1\n\tx: 2", "line 2: not valid YAML"),
    ],
)
def test_bad_input_is_one_sentence_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    path = yaml_file(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    sentence = str(caught.value)
    assert message in sentence
    assert str(path) in sentence
    assert "\n" not in sentence


def test_several_faults_are_counted(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="1 more fault"):
        load_config(yaml_file(tmp_path, "data: {batch_size: 0, crop_px: 1}"))


@pytest.mark.parametrize(("content", "reason"), [(None, "No such file"), (b"\xff\xfe\x00", "not a text file")])
def test_a_file_that_is_no_configuration(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=reason):
        load_config(path)


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert load_config(yaml_file(tmp_path, "# nothing yet\n")) == Config()


def test_a_flag_out_of_range_is_named() -> None:
    with pytest.raises(ConfigError, match=r"data\.batch_size is '?0'?: "):
        from_command_line("--data.batch_size", "0")


def test_a_fault_is_told_of_the_file_or_of_the_flags(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "data: {batch_size: 8}\ntrain: {accumulate: 16}\n")
    with pytest.raises(ConfigError, match=rf"^{path}: train\.accumulate 16"):
        from_command_line("--config", str(path), "--seed", "1")
    assert from_command_line("--config", str(path), "--data.batch_size", "16").train.accumulate == 16
    for words in (("--data.batch_size", "0"), ("--data.batch_size", "16", "--optim.lr", "fast")):
        with pytest.raises(ConfigError, match=r"^flags: (data\.batch_size|optim\.lr) is "):
            from_command_line("--config", str(yaml_file(tmp_path, "seed: 1\n")), *words)


def test_keys_of_every_kind_are_known() -> None:
    keys = set(known_keys())
    assert {"seed", "optim.lr", "model.encoder", "model.depth", "target.decode.border_threshold"} <= keys
    assert nearest_key("optim.learning_rat").startswith("; did you mean")
    assert nearest_key("qqqqqqqq") == "; --help lists the keys"


@pytest.mark.parametrize(
    "said",
    [
        "--model.kind {baseline,timm,unet} (default: unet)",
        "--target.kind {depth,full_border,touching_border} (default: touching_border)",
        "with more where there is room (default: 1)",
        "tversky: Cost of false positives. (default: 0.3)",
        "focal: Weight of pixels where the target is 1; the others have 1 - alpha. (default: 0.5)",
        "depth: full width of the line between two nuclei, in pixels (default: 2)",
        "none: verb and time (default: none)",
    ],
)
def test_help_shows_the_default_of_each_kind(said: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser("train", "what it does")
    add_config_flags(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    assert said in " ".join(capsys.readouterr().out.split())


def test_help_shows_type_unit_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser("train", "what it does")
    add_config_flags(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "--data.crop_px int longest side of a training crop, pixels (default: 192)" in said
    for key in known_keys():
        assert f"--{key}" in said, key
