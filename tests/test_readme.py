"""The README is true: its commands run, its settings exist, its file tree is the repository's."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import tifffile
from drawn_fields import draw_discs
from made_studies import SIX_TRIALS, write_grid, write_question

from nuciseg.__main__ import VERBS
from nuciseg.config import known_keys
from nuciseg.data.synthetic import SyntheticConfig, write_labels_folder, write_nucleus_folder

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")

INSTALL_COMMANDS = [
    line for block in re.findall(r"^```bash\n(.*?)^```", README, re.M | re.S) for line in block.splitlines()
]
EXAMPLES = re.findall(r"`(python -m nuciseg[^`]*)`", README)
FIND = "python -m nuciseg.predict IMAGES --out nuclei"
SEPARATE = "python -m nuciseg.predict --checkpoint nuciseg/separator IMAGE --out labels"
FURTHER = "python -m nuciseg.train --init-from nuciseg/fields --data.root DIR --optim.lr 3e-4"
SHORT_TRAINING = "--train.epochs 1 --data.batch_size 4 --data.crop_px 64 --data.num_loader_threads 0"
SHORT_SEARCH = f"{SHORT_TRAINING} --search.num_trials 1"


@dataclass(frozen=True)
class Workplace:
    """A folder to run the README's commands in, and the images that its DIR stands for."""

    folder: Path
    data_root: Path

    def run(self, command: str, timeout_s: float = 280) -> str:
        """Run `command`; returns what it printed and fails with that where the command fails."""
        words = shlex.split(command)
        assert words[0] == "python"
        result = subprocess.run(
            [sys.executable, *words[1:]],
            cwd=self.folder,
            env=os.environ | {"COLUMNS": "300"},  # tables keep paths on one line
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
        )
        assert result.returncode == 0, f"{command}: exit code {result.returncode}\n{result.stdout}"
        return result.stdout

    def printed_checkpoint(self, output: str) -> Path:
        """The path among the words of `output` that a user would take for the checkpoint."""
        paths = [
            self.folder / word.strip(".,;:'\"()") for word in output.split() if "checkpoint" in word or "best" in word
        ]
        existing = [path for path in paths if path.exists()]
        assert existing, f"no path of a checkpoint was printed:\n{output}"
        return existing[-1]


def example(verb: str) -> str:
    """The README's example of `verb`."""
    (command,) = (
        command for command in EXAMPLES if command.startswith(f"python -m nuciseg.{verb} ") and command != FURTHER
    )
    return command


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    folder = tmp_path_factory.mktemp("readme")
    (folder / "tune_configs").symlink_to(ROOT / "tune_configs")
    write_nucleus_folder(SyntheticConfig(num_train=12, num_test=3), folder / "drawn")
    return Workplace(folder, folder / "drawn")


@pytest.fixture(scope="module")
def checkpoint(workplace: Workplace) -> Path:
    """What the README's example of `train` leaves behind."""
    command = example("train").replace("DIR", str(workplace.data_root))
    return workplace.printed_checkpoint(workplace.run(f"{command} {SHORT_TRAINING}"))


def test_every_command_is_one_that_is_run_here_or_by_continuous_integration() -> None:
    (find, first, separate, second) = INSTALL_COMMANDS
    assert find == f"pip install -e . && {FIND}"
    assert first == "pip install -e . && python -m nuciseg.tune"
    assert separate == f"pip install -e . && {SEPARATE}"
    assert second == "pip install -e '.[test]' && pytest"  # .ci/run takes this line from the README
    verbs = {command.split()[2] for command in EXAMPLES}
    assert verbs == {"nuciseg", *(f"nuciseg.{verb}" for verb in VERBS)}


def test_the_verbs_are_listed(workplace: Workplace) -> None:
    listed = workplace.run("python -m nuciseg")
    assert all(f"nuciseg.{verb}" in listed for verb in VERBS)


def test_explore(workplace: Workplace) -> None:
    workplace.run(example("explore").replace("DIR", str(workplace.data_root)))
    assert (workplace.folder / "explore.html").exists()


@pytest.mark.slow
def test_plan(workplace: Workplace) -> None:
    assert "hours" in workplace.run(example("plan").replace("DIR", str(workplace.data_root)))


@pytest.mark.slow
def test_doctor(workplace: Workplace) -> None:
    assert "passed" in workplace.run(example("doctor").replace("DIR", str(workplace.data_root)))


def test_train(checkpoint: Path) -> None:
    assert checkpoint.exists()


def test_train_further(workplace: Workplace) -> None:
    assert FURTHER in EXAMPLES
    write_labels_folder(SyntheticConfig(num_train=6, num_test=1), workplace.folder / "own")
    command = FURTHER.replace("DIR", str(workplace.folder / "own"))
    assert workplace.printed_checkpoint(workplace.run(f"{command} {SHORT_TRAINING} --train.calibrate false")).exists()


def test_evaluate(workplace: Workplace, checkpoint: Path) -> None:
    command = example("evaluate").replace("DIR", str(workplace.data_root)).replace("CHECKPOINT", str(checkpoint))
    workplace.run(command)
    assert list(workplace.folder.rglob("scores.json")), "evaluate writes scores.json"


def test_predict(workplace: Workplace, checkpoint: Path) -> None:
    image = min((workplace.data_root / "test").glob("*.png"))
    workplace.run(example("predict").replace("CHECKPOINT", str(checkpoint)).replace("IMAGE", str(image)))
    written = {path.suffix for path in (workplace.folder / "labels").rglob(f"{image.stem}*")}
    assert {".tif", ".png"} <= written


def test_separate_with_the_weights_that_come_along(workplace: Workplace) -> None:
    image = min((workplace.data_root / "test").glob("*.png"))
    workplace.run(SEPARATE.replace("IMAGE", str(image)).replace("labels", "separated"))
    assert (workplace.folder / "separated" / f"{image.stem}_masks.tif").exists()


@pytest.fixture(scope="module")
def field(workplace: Workplace) -> Path:
    path = workplace.folder / "field.tif"
    tifffile.imwrite(path, draw_discs((300, 340), 24)[0])
    return path


def test_find_with_the_weights_that_come_along(workplace: Workplace, field: Path) -> None:
    workplace.run(FIND.replace("IMAGES", field.name))
    written = {path.name for path in (workplace.folder / "nuclei").iterdir()}
    assert written == {"field_masks.tif", "field_overlay.png", "field_measurements.csv", "summary.csv", "predict.json"}


def test_the_pages_python_runs(workplace: Workplace, field: Path) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
    (workplace.folder / "page.py").write_text(code)
    assert re.fullmatch(r"(\d+) nuclei, largest label \1\n", workplace.run("python page.py"))


def test_export(workplace: Workplace) -> None:
    workplace.run(example("export"))
    assert (workplace.folder / "fields.onnx").exists()


def test_cut(workplace: Workplace) -> None:
    write_labels_folder(SyntheticConfig(num_train=3, num_test=1), workplace.folder / "fields")
    output = workplace.run(example("cut").replace("FIELDS", "fields"))
    assert "python -m nuciseg.train --data.root clusters" in output
    assert list((workplace.folder / "clusters" / "train").glob("*.png"))


def test_report(workplace: Workplace, checkpoint: Path) -> None:
    run_dir = checkpoint.parent.parent
    workplace.run(re.sub(r"\bRUN\b", str(run_dir), example("report")))
    assert (run_dir / "report.html").exists()


def test_study(tmp_path: Path) -> None:
    """In a folder of its own: the answers are written into the searches' YAML files, which are linked elsewhere."""
    write_question(tmp_path / "tune_configs", "optimizer")
    write_grid(tmp_path / "searches" / "optimizer", SIX_TRIALS)
    Workplace(tmp_path, tmp_path).run(example("study").replace("SEARCHES", "searches/optimizer"))
    assert "## Optimizer" in (tmp_path / "docs" / "study.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_tune_on_own_images(workplace: Workplace) -> None:
    output = workplace.run(f"{example('tune').replace('DIR', str(workplace.data_root))} {SHORT_SEARCH}")
    assert workplace.printed_checkpoint(output)


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_tune_with_nothing_else(workplace: Workplace) -> None:
    """The first thing that a new user sees."""
    output = workplace.run("python -m nuciseg.tune", timeout_s=900)
    assert workplace.printed_checkpoint(output)
    assert "wandb" in output.lower(), "says how to look at the runs"


def test_settings_exist() -> None:
    keys = set(known_keys())
    named = set(re.findall(r"--((?:\w+\.)+\w+)", README)) | {"search.space", "data.synthetic"}
    assert named <= keys, f"the README names settings that do not exist: {sorted(named - keys)}"


def tree_paths() -> list[str]:
    """The paths in the README's file tree, relative to the repository."""
    (tree,) = re.findall(r"^```text\n(.*?)^```", README, re.M | re.S)
    lines = tree.splitlines()
    return [f"nuciseg/{line.split()[0]}" if line.startswith("  ") else line.split()[0] for line in lines]


def test_the_file_tree_is_the_repository() -> None:
    tree = {path.rstrip("/") for path in tree_paths()}
    missing = [path for path in tree if not (ROOT / path).exists()]
    assert not missing, f"in the README's tree, but not in the repository: {missing}"
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    top = {name.split("/")[0] for name in names}
    package = {"/".join(name.split("/")[:2]) for name in names if name.startswith("nuciseg/")} - {"nuciseg/__init__.py"}
    assert (top | package) - tree == set(), "in the repository, but not in the README's tree"
