"""Promises about the repository as a whole: places, sizes, import direction, changelog, links."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import nuciseg
from nuciseg.reporting.study import write_study

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 450
TEXT_SUFFIXES = {"", ".cfg", ".ini", ".json", ".md", ".py", ".sh", ".toml", ".txt", ".yaml", ".yml"}


def repository_files() -> list[Path]:
    """Every file that is tracked or would be with `git add .`."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in sorted(set(names.split("\0"))) if name and (ROOT / name).is_file()]


def text_files() -> list[Path]:
    return [path for path in repository_files() if path.suffix in TEXT_SUFFIXES]


def run_lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-c",
        "from importlinter.cli import lint_imports_command as main; main()",
        "--no-cache",
        "--no-logo",
    ]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_no_file_names_a_folder_of_one_machine() -> None:
    machine_path = re.compile(r"(?<![\w.~}$-])/(?:work|root|tmp|home|Users|mnt)/\w")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in text_files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if machine_path.search(line)
    ]
    assert not found, "\n".join(found)


def test_python_files_keep_to_one_subject() -> None:
    python_files = [path for path in repository_files() if path.suffix == ".py"]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in python_files}
    too_long = {name: length for name, length in lengths.items() if length > MAX_LINES}
    assert not too_long, f"longer than {MAX_LINES} lines: {too_long}"


def test_each_test_file_has_a_name_of_its_own() -> None:
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []  # pytest could not collect them together


def test_imports_go_downward_only() -> None:
    result = run_lint_imports(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("engine/planted.py", "import ray"),
        ("labels.py", "import nuciseg.metrics"),
        ("losses.py", "import albumentations"),
        ("engine/planted.py", "import wandb"),
        ("without_a_layer.py", ""),
    ],
)
def test_a_forbidden_import_is_noticed(tmp_path: Path, module: str, line: str) -> None:
    shutil.copytree(ROOT / "nuciseg", tmp_path / "nuciseg", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "nuciseg" / module).open("a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")
    result = run_lint_imports(tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    assert Path(module).stem in result.stdout


def test_importing_the_package_does_no_work() -> None:
    code = "import sys, nuciseg; print(sorted({'torch', 'ray', 'wandb', 'numpy', 'albumentations'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_changelog_keeps_its_form() -> None:
    lines = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# Changelog"
    sections = [line for line in lines if line.startswith("## ")]
    assert sections[0] == "## [Unreleased]"
    releases = [re.fullmatch(r"## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d{2}-\d{2})", line) for line in sections[1:]]
    assert all(releases), f"a release's heading is '## [1.2.3] - 2030-01-31': {sections[1:]}"
    dates = [release[2] for release in releases if release]
    assert dates == sorted(dates, reverse=True), "newest first"
    if releases and releases[0]:
        assert releases[0][1] == nuciseg.__version__
    kinds = {line for line in lines if line.startswith("### ")}
    assert kinds <= {f"### {kind}" for kind in ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")}


def test_links_in_the_documents_lead_somewhere() -> None:
    broken = []
    for document in (path for path in repository_files() if path.suffix == ".md"):
        text = re.sub(
            r"<!--.*?-->|^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
        )
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if re.match(r"[a-z]+:", target):
                continue
            name, _, anchor = target.partition("#")
            linked = (document.parent / name) if name else document
            if not linked.exists() or (anchor and anchor not in anchors(linked)):
                broken.append(f"{document.relative_to(ROOT)}: {target}")
    assert not broken, "\n".join(broken)


def anchors(document: Path) -> set[str]:
    """The anchors that a Markdown viewer makes of the headings."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_study_is_what_the_command_makes_of_its_records(tmp_path: Path) -> None:
    """Page and answers are never written by hand: a record, a question or a sentence of the page that changes alone."""
    if not list((ROOT / "docs" / "study").glob("*.json")):
        pytest.skip("there are no records of a study yet")
    shutil.copytree(ROOT / "docs" / "study", tmp_path / "docs" / "study")
    shutil.copytree(ROOT / "tune_configs", tmp_path / "tune_configs")
    write_study([], None, tmp_path / "docs", tmp_path / "tune_configs")
    places = ["docs/study.md", *(str(path.relative_to(ROOT)) for path in (ROOT / "tune_configs").rglob("*.yaml"))]
    changed = [place for place in places if (tmp_path / place).read_bytes() != (ROOT / place).read_bytes()]
    assert not changed, f"run `python -m nuciseg.study`, which would change {changed}"
    assert (ROOT / "docs" / "images" / "study.png").exists()


def test_old_pips_hear_of_an_extras_bound_before_they_choose() -> None:
    """pip 23.0, which Debian 12 has, tries torch after torch where a bound of an extra of an extra comes too late."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = {Requirement(line).name for line in project["dependencies"]}
    extras = project["optional-dependencies"]
    [own] = [Requirement(line) for line in extras["test"] if line.startswith("nuciseg[")]
    bounds = {line for extra in own.extras for line in extras[extra] if Requirement(line).name in needed}
    assert bounds
    assert bounds <= set(extras["test"])
