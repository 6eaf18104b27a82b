"""`plan` before a search: from given seconds, from a short trial of the networks themselves, and what it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from small_runs import SMALL

from nuciseg.config import merged
from nuciseg.engine.planning import DECODING_S
from nuciseg.errors import ConfigError, NucisegError
from nuciseg.plan import main

SEARCH = {
    "search": {
        "num_trials": 100,
        "scheduler": "none",
        "final": False,
        "space": {"optim.lr": {"loguniform": [1e-4, 1e-1]}},
    },
    "train": {"epochs": 9},
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "search.yaml"
    path.write_text(yaml.safe_dump(merged(SMALL, SEARCH)))
    return path


def plan(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    main([str(word) for word in words])
    return capsys.readouterr().out


def rows(said: str) -> dict[str, list[str]]:
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in said.splitlines() if line.startswith("│")]
    return {row[0]: row[1:] for row in cells}


def test_hours_and_dollars_follow_from_the_seconds_of_a_step(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--seconds-per-step", "1", "--machine", "g5.xlarge", "--machine", "g6.xlarge", "--nodes", 2)
    said = plan(capsys, "--config", config, *words)
    assert "16 crops an epoch of 16 training images, at most 64 px, 4 a step: 4 steps; 4 validation images" in said
    assert "search: 100 trials of at most 9 epochs; with none about 900 epochs together instead of 900\n" in said
    table = rows(said)
    at_once, step_s, hours, gpu_hours, core_hours, dollars = table["2 x g5.xlarge (A10G)"]
    assert (at_once, step_s, core_hours) == ("2", "1", "-")
    # 4 steps, 4 validation images of a third of a quarter of a second, decoded; 11 s for each trial to begin
    work_h = (900 * (4 + 4 * (1 / 12 + DECODING_S)) + 100 * 11) / 3600
    assert float(gpu_hours) == pytest.approx(work_h, abs=0.01)
    assert float(hours) == pytest.approx(work_h / 2, rel=0.02)
    assert float(dollars) == pytest.approx(float(hours) * (2 * 1.006 + 0.192), rel=0.02)
    assert float(table["2 x g6.xlarge (L4)"][-1]) < float(dollars)
    cheaper = plan(capsys, "--config", config, *words, "--dollars-per-hour", "g5.xlarge=0.4")
    assert float(rows(cheaper)["2 x g5.xlarge (A10G)"][-1]) == pytest.approx(float(hours) * 0.992, rel=0.02)
    assert "assumed:" in said


def test_no_more_trials_at_a_time_than_the_search_lets_run(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--config", config, "--seconds-per-step", "1", "--nodes", 8, "--machine", "g5.xlarge")
    _, _, hours, *_ = rows(plan(capsys, *words))["8 x g5.xlarge (A10G)"]
    at_once, _, longer, *_ = rows(plan(capsys, *words, "--search.max_concurrent", 2))["8 x g5.xlarge (A10G)"]
    assert at_once == "2"
    assert float(longer) == pytest.approx(4 * float(hours), rel=0.1)
    cpus = ("--config", config, "--seconds-per-step", "1", "--nodes", 2, "--machine", "c7i.8xlarge")
    assert rows(plan(capsys, *cpus, "--scale.cpus_per_worker", 5))["2 x c7i.8xlarge (CPU)"][0] == "12"


def test_the_networks_of_the_space_are_measured_here(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    space = {"model": {"choice": [{"kind": "unet", "depth": 2, "width": 4}, {"kind": "baseline"}]}}
    main(["--config", str(config), "--search.space", json.dumps(space)])
    said, progress = capsys.readouterr()
    assert progress == "measuring here: two short epochs of each network ...\n"
    found = re.findall(r"network (\w+): ([\d,]+) parameters, ", said)
    assert [kind for kind, _ in found] == ["unet", "baseline"]
    assert found[0][1] != found[1][1]
    seconds = re.findall(r"measured here, one worker on \w+: a step ([\d.e-]+) s, ", said)
    assert len(seconds) == 2
    assert all(0 < float(each) < 60 for each in seconds)
    [here] = [row for name, row in rows(said).items() if name.startswith("this one (")]
    assert float(here[2]) > 0
    assert here[-1] == "-"


def test_steps_of_more_workers_show_where_the_limit_is(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--seconds-per-step", "0.01", "--machine", "g5.xlarge", "--scaling")
    said = plan(capsys, "--config", config, *words)
    table = rows(said)
    assert table["1"][4:] == ["1.00", "network", "1.00"]
    assert table["4"][:2] == ["1", "2.5"]
    assert float(table["2"][4]) > 1
    assert float(table["32"][4]) < float(table["4"][4]), "no worker has less than an image"


def test_what_was_neither_measured_nor_given_is_estimated(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = plan(capsys, "--config", config, "--estimate", "--machine", "g5.xlarge", "--machine", "p5.48xlarge")
    table = rows(said)
    assert len(table) == 2, "nothing was measured here"
    assert table["4 x p5.48xlarge (H100)"][1] == "0.01", "so small a network is launched longer than it computes"
    assert "GPUs, which were not measured, are limited by their memory at " in said
    with pytest.raises(ConfigError, match=r"c7i\.8xlarge has no GPU, and no CPU was measured here"):
        main(["--config", str(config), "--estimate", "--machine", "c7i.8xlarge"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--seconds-per-step", "0"), r"--seconds-per-step 0: give the seconds of a step, more than 0"),
        (("--seconds-per-step", "1", "--machine", "g5"), r"--machine g5: not one that is known; choose among "),
        (("--seconds-per-step", "1", "--dollars-per-hour", "g5.xlarge"), r"give TYPE=DOLLARS, as g5\.xlarge=0\.45"),
        (("--seconds-per-step", "1", "--search.space", '{"optim.lrr": {"choice": [1]}}'), r"did you mean 'optim\.lr'"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(config: Path, words: tuple[str, ...], said: str) -> None:
    with pytest.raises(NucisegError, match=said) as refused:
        main(["--config", str(config), *words])
    assert isinstance(refused.value, ConfigError)


def test_the_verb_is_a_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "nuciseg", "plan", "--data.root", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert str(tmp_path / "none") in done.stderr
