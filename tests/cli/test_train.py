"""`train`: what it prints and leaves, how it is taken up again, and what it answers where it cannot."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from small_runs import (
    SMALL,
    assert_same_run,
    figures,
    last_checkpoint,
    logged_epochs,
    open_data,
    recovery_shown,
    truncate_last_checkpoint,
    wait_until,
)

from nuciseg import train, tune
from nuciseg.cli import run_verb
from nuciseg.config import load_config, merged
from nuciseg.data.synthetic import SyntheticConfig, write_nucleus_folder
from nuciseg.engine.checkpoint import find_checkpoint, load_checkpoint
from nuciseg.engine.inference import score_samples
from nuciseg.engine.network import load_network
from nuciseg.metrics import Scores
from nuciseg.targets import decode_grids

COMMAND = [sys.executable, "-m", "nuciseg.train"]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(yaml.safe_dump(merged(SMALL, {"tracking": {"kind": "none"}})))


def answer(*words: str | Path) -> int:
    """The exit code of the verb, in this process: importing torch once more takes seconds."""
    with pytest.raises(SystemExit) as exit_:
        run_verb(lambda: train.main([str(word) for word in words]))
    return int(str(exit_.value.code))


def test_a_run_tells_where_it_is_and_how_it_goes(capsys: pytest.CaptureFixture[str]) -> None:
    assert answer("--config", "small.yaml", "--run.name", "a", "--train.epochs", "2") == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert lines[0] == "run folder: runs/a"
    assert lines[1].startswith("disk: at most ")
    assert [line.split("  ")[0] for line in lines if line.startswith("epoch ")] == ["epoch 1/2", "epoch 2/2"]
    assert f"best checkpoint: {find_checkpoint(Path('runs/a'))}" in lines
    assert lines[-1] == "metrics: runs/a/metrics.jsonl"
    assert said.err == ""


def test_the_resolved_configuration_given_back_makes_the_same_run() -> None:
    flags = ("--optim.lr", "0.003", "--optim.kind", "sgd", "--seed", "3", "--train.epochs", "2")
    assert answer("--config", "small.yaml", "--run.name", "a", *flags) == 0
    assert answer("--config", "runs/a/config.yaml", "--run.name", "b") == 0
    first, second = (load_config(Path("runs") / name / "config.yaml") for name in "ab")
    assert first.optim.lr == 0.003
    assert second == first.replaced({"run.name": "b"})
    assert figures(last_checkpoint(Path("runs/a")).progress.history) == figures(
        last_checkpoint(Path("runs/b")).progress.history
    )


def test_flags_count_more_than_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert answer("--config", "small.yaml", "--train.epochs", "1", "--run.name", "a", "--model.width", "6") == 0
    config = load_config(Path("runs/a/config.yaml"))
    assert (config.train.epochs, config.model.kind, getattr(config.model, "width", None)) == (1, "unet", 6)
    assert config.data.crop_px == 64


def test_weights_are_trained_further_with_the_recipe_that_made_them() -> None:
    assert answer("--config", "small.yaml", "--run.name", "first", "--train.epochs", "1") == 0
    data = merged(SMALL["data"], {"synthetic": {"seed": 1}})
    Path("other.yaml").write_text(yaml.safe_dump({"data": data, "tracking": {"kind": "none"}}))
    hardly = ("--train.epochs", "1", "--optim.lr", "1e-9", "--train.ema_decay", "none")
    assert answer("--init-from", "runs/first", "--config", "other.yaml", "--run.name", "further", *hardly) == 0
    first, further = (last_checkpoint(Path("runs") / name) for name in ("first", "further"))
    assert (further.config.model, further.config.loss) == (first.config.model, first.config.loss)
    assert further.config.train.metric == "border_dice"
    assert further.config.train.init_from == find_checkpoint(Path("runs/first")).resolve()
    assert further.split_hash != first.split_hash
    for name, tensor in first.weights.items():
        torch.testing.assert_close(further.weights[name], tensor, msg=name)


def test_weights_are_not_validated_on_what_they_were_taught_with(capsys: pytest.CaptureFixture[str]) -> None:
    """Their scores would be those of a memory, and the best epoch one that remembers best."""
    taught = ("--data.num_folds", "2", "--data.split_seed", "3")
    assert answer("--config", "small.yaml", "--run.name", "first", "--train.epochs", "1", *taught) == 0
    capsys.readouterr()
    further = ("--init-from", "runs/first", "--config", "small.yaml", "--run.name", "further", "--train.epochs", "1")
    assert answer(*further, "--data.num_folds", "2", "--data.split_seed", "3", "--data.fold", "1") == 2
    num_images = SMALL["data"]["synthetic"]["num_train"]
    assert capsys.readouterr().err == (
        f"nuciseg: train.init_from {find_checkpoint(Path('runs/first')).resolve()}: its weights were trained on "
        f"{num_images // 2} of the {num_images // 2} images held out here, so their scores would be no validation; "
        "divide the images as they were then: --data.fold 0\n"
    )
    space = ("--search.space", '{"data.fold": {"choice": [0, 1]}}')
    with pytest.raises(SystemExit):
        run_verb(lambda: tune.main(["--config", "small.yaml", *taught, *space, "--train.init_from", "runs/first"]))
    assert "divide the images as they were then: --data.fold 0\n" in capsys.readouterr().err
    assert not Path("runs/further").exists()
    assert answer(*further, *taught) == 0


def test_weights_taught_with_the_test_images_are_refused_where_there_is_a_test(
    capsys: pytest.CaptureFixture[str],
) -> None:
    pooled = ("--data.pool_test", "true")
    assert answer("--config", "small.yaml", "--run.name", "first", "--train.epochs", "1", *pooled) == 0
    further = ("--init-from", "runs/first", "--config", "small.yaml", "--run.name", "further", "--train.epochs", "1")
    assert answer(*further) == 2
    assert "trained on the test images too, so they would be no test; set data.pool_test" in capsys.readouterr().err
    assert answer(*further, *pooled) == 0
    write_nucleus_folder(SyntheticConfig(num_train=6, num_test=1, mean_diameter_px=20.0), Path("crops"))
    shutil.rmtree("crops/test")
    of_others = ("--data.root", "crops", "--data.format", "nucleus", "--run.name", "of_others")
    assert answer(*further, *of_others) == 0, "there are no test images that could have been among them"


def test_the_decoding_is_calibrated_on_validation() -> None:
    words = ("--train.epochs", "1", "--run.name", "a", "--train.calibrate", "true", "--target.decode.min_nuclei", "2")
    assert answer("--config", "small.yaml", *words) == 0
    checkpoint = load_checkpoint(find_checkpoint(Path("runs/a")))
    (grid_of,) = decode_grids(checkpoint.config.target)
    assert checkpoint.config.target in [candidate for row in grid_of(checkpoint.config.target) for candidate in row]
    assert checkpoint.config.target.decode.min_nuclei == 2
    data = open_data(checkpoint.config)
    network, _ = load_network(find_checkpoint(Path("runs/a")), torch.device("cpu"))
    scores = Scores.total(score_samples(network, data.samples, data.split.validation)).flat_summary()
    assert scores.items() <= checkpoint.scores.items()


@pytest.mark.parametrize("truncated", [False, True])
def test_a_killed_run_is_resumed_as_if_undisturbed(truncated: bool, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--config", "small.yaml", "--data.synthetic.num_train", "100", "--train.epochs", "8")
    process = subprocess.Popen([*COMMAND, *words, "--run.name", "killed"], stdout=subprocess.DEVNULL)
    wait_until(lambda: len(logged_epochs(Path("runs/killed"))) >= 2 or process.poll() is not None, "the second epoch")
    process.kill()
    process.wait()
    assert 2 <= len(logged_epochs(Path("runs/killed"))) < 8
    lost = truncate_last_checkpoint(Path("runs/killed")) if truncated else None
    with recovery_shown("a run killed, from --resume", lambda: Path("runs/killed")):
        assert answer("--resume", "runs/killed") == 0
    assert (f"{lost} is truncated: the run goes on from runs/killed/" in capsys.readouterr().out) == truncated
    assert logged_epochs(Path("runs/killed")) == list(range(1, 9))
    assert answer(*words, "--run.name", "undisturbed") == 0
    assert_same_run(Path("runs/killed"), Path("runs/undisturbed"))


def test_a_run_that_is_told_to_go_keeps_the_epoch_that_it_is_in() -> None:
    words = ("--config", "small.yaml", "--data.synthetic.num_train", "200", "--data.batch_size", "1")
    words = (*words, "--train.epochs", "6")
    with subprocess.Popen(
        [*COMMAND, *words, "--run.name", "told"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        wait_until(lambda: len(logged_epochs(Path("runs/told"))) >= 1 or process.poll() is not None, "the first epoch")
        process.terminate()
        _, said = process.communicate()
    assert process.returncode == 143
    kept = last_checkpoint(Path("runs/told")).progress
    assert kept.batches > 0
    resume = f"go on with --resume {Path('runs/told').resolve()}"
    assert said == f"nuciseg: asked to stop in epoch {kept.epoch + 1}, after a checkpoint; {resume}\n"
    assert answer("--resume", "runs/told") == 0
    assert logged_epochs(Path("runs/told")) == [1, 2, 3, 4, 5, 6]
    assert answer(*words, "--run.name", "undisturbed") == 0
    assert_same_run(Path("runs/told"), Path("runs/undisturbed"))


def test_a_run_killed_before_its_first_step_can_be_resumed(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("nuciseg.distributed.training.run_training", lambda job: (_ for _ in ()).throw(KeyboardInterrupt))
        assert answer("--config", "small.yaml", "--train.epochs", "1", "--run.name", "early") == 130
    assert answer("--resume", "runs/early") == 0
    assert logged_epochs(Path("runs/early")) == [1]


def test_a_resumed_run_keeps_its_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert answer("--config", "small.yaml", "--train.epochs", "1", "--run.name", "a") == 0
    capsys.readouterr()
    assert answer("--resume", "runs/a", "--optim.lr", "0.1") == 2
    assert "leave out --optim.lr, or start a new run" in capsys.readouterr().err
    assert answer("--resume", "runs/a", "--config", "small.yaml") == 2
    assert "leave out --config" in capsys.readouterr().err
    assert answer("--resume", "runs/a") == 0


def test_a_search_is_not_resumed_as_a_run_nor_a_run_as_a_search(capsys: pytest.CaptureFixture[str]) -> None:
    search = {"search": {"space": {"optim.lr": {"uniform": [0.1, 0.2]}}}}
    Path("search.yaml").write_text(yaml.safe_dump(merged(SMALL, search)))
    assert answer("--config", "search.yaml", "--train.epochs", "1", "--run.name", "a") == 0
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run_verb(lambda: tune.main(["--resume", "runs/a"]))
    assert "runs/a is a training run, not a search; resume it with `nuciseg train`" in capsys.readouterr().err
    Path("runs/search").mkdir()
    Path("runs/a/config.yaml").rename("runs/search/config.yaml")
    assert answer("--resume", "runs/search") == 2
    assert "runs/search is a search, not a training run; resume it with `nuciseg tune`" in capsys.readouterr().err


def test_the_summary_shows_the_network_and_trains_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    model = ("--model.kind", "timm", "--model.encoder", "resnet10t", "--model.pretrained", "hub", "--model.stages", "3")
    words = ("--data.root", "nowhere", "--data.crop_px", "96", "--optim.frozen_encoder_epochs", "1")
    assert answer("--summary", *model, *words) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out.startswith("timm resnet10t, 3 stages, stride 8, one grey image of 96x96 px")
    rows = {line.split("│")[1].strip(): line.split("│")[2:-1] for line in said.out.splitlines() if line.startswith("│")}
    assert [cell.strip() for cell in rows["encoder 3"][:3]] == ["8", "128", "230,144"]
    assert [rows[f"encoder {n}"][-1].strip() for n in range(1, 6)] == ["skip", "skip", "deepest", *["left out"] * 2]
    for part in ("weights: pretrained, from the hub (timm/resnet10t.", "three times (model.channel_policy copy)",
                 "then normalised for the encoder (mean 0.485 ", "frozen for the first 1 of 20 epochs"):  # fmt: skip
        assert part in said.out
    assert not Path("runs").exists()
    assert answer("--summary", "--resume", "runs/a") == 2
    assert "give --config runs/a/config.yaml" in capsys.readouterr().err
    assert answer("--summary", *model[:-1], "6") == 2
    assert "'resnet10t' has 5: choose at most 5" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_ends_with_one_sentence_and_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    explosive = ("--optim.kind", "sgd", "--optim.lr", "100", "--optim.weight_decay", "10", "--train.clip_norm", "null",
                 "--model.norm", "none", "--run.name", "a")  # fmt: skip
    assert answer("--config", "small.yaml", *explosive) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("nuciseg: the gradient is not finite in step ")


@pytest.mark.parametrize("verb", ["train", "tune"])
def test_help_shows_types_units_and_defaults(verb: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"nuciseg.{verb}", "--help"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0
    assert done.stderr == ""
    text = " ".join(done.stdout.split())
    assert "--optim.lr float" in text
    assert "--data.crop_px int longest side of a training crop, pixels (default: 192)" in text
    assert "--resume DIR" in text
    assert "--config FILE" in text
    assert ("--no-final" in text) == (verb == "tune")
