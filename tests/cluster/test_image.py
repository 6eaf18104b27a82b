"""The Dockerfile, built and run without Docker: by buildah, on a base that debootstrap makes."""

from __future__ import annotations

import configparser
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from hosts import REPOSITORY

COMMANDS = {"buildah": "buildah", "debootstrap": "debootstrap"}
FREE_GB = 15  # where every layer is kept whole


def why_no_build() -> str | None:
    """Why this machine cannot build an image, with the cure; None where it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "an image is built without Docker by root alone"
    missing = [package for command, package in COMMANDS.items() if shutil.which(command) is None]
    if missing:
        return f"Debian packages are missing: apt-get install --no-install-recommends {' '.join(missing)}"
    free_gb = shutil.disk_usage("/var/tmp").free / 1e9
    return f"/var/tmp has {free_gb:.0f} GB free, the image is built in {FREE_GB}" if free_gb < FREE_GB else None


pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(why_no_build() is not None, reason=str(why_no_build())),
]


@dataclass(frozen=True)
class Buildah:
    """buildah with all that it keeps in one folder."""

    folder: Path
    driver: str

    def __call__(self, *words: str | Path, timeout_s: float) -> str:
        store = ["--root", self.folder / "root", "--runroot", self.folder / "run", "--storage-driver", self.driver]
        done = subprocess.run(
            ["buildah", *store, *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
        )
        said = "\n".join(done.stdout.splitlines()[-60:])
        assert done.returncode == 0, f"buildah {words[0]}: {done.returncode}\n{said}"
        return done.stdout.strip()


def can_lay_over(folder: Path) -> bool:
    """Whether layers may lie one over the other there; else each is a copy of all below it."""
    layers = [folder / name for name in ("lower", "upper", "work", "merged")]
    for layer in layers:
        layer.mkdir()
    lower, upper, work, merged = map(str, layers)
    options = f"lowerdir={lower},upperdir={upper},workdir={work}"
    mount = ["unshare", "--mount", "mount", "-t", "overlay", "overlay", "-o", options, merged]
    return subprocess.run(mount, capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def buildah() -> Iterator[Buildah]:
    """buildah that knows one image, `base`: the smallest Debian that the Dockerfile's own base comes from."""
    folder = Path("/var/tmp") / f"nuciseg-image-{os.getpid()}"  # not in memory, as /tmp may be
    folder.mkdir()
    try:
        build = Buildah(folder, "overlay" if can_lay_over(folder) else "vfs")
        made = subprocess.run(
            ["debootstrap", "--variant=minbase", "bookworm", folder / "base"], capture_output=True, text=True
        )
        if made.returncode != 0:
            pytest.skip(f"debootstrap could make no base: {made.stdout[-300:]}")
        (folder / "policy.json").write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
        container = build("from", "scratch", timeout_s=60)
        build("add", "--quiet", container, folder / "base", "/", timeout_s=300)
        build(
            "commit", "--quiet", "--rm", "--signature-policy", folder / "policy.json", container, "base", timeout_s=300
        )
        shutil.rmtree(folder / "base")
        yield build
    finally:
        mounted = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
        for mount in sorted((path for path in mounted if path.startswith(str(folder))), reverse=True):
            subprocess.run(["umount", mount], check=True)
        shutil.rmtree(folder)


def pip_settings() -> dict[str, str]:
    """What pip is set to on this machine, by its files and by the environment."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    settings = [line.partition("=") for line in listed.stdout.splitlines() if line.startswith(("global.", ":env:."))]
    return {key.rpartition(".")[2].lower(): value.strip("'\"").replace("\\n", " ") for key, _, value in settings}


def mounts_of_pip_settings(folder: Path) -> list[str]:
    """Mounts that give pip in a container the settings that pip has on this machine: indexes, wheels, certificates."""
    values = pip_settings()
    # Where certificates lie the image's own package puts some, and fails where they are a mount.
    certificates = values.pop("cert", None)
    mounts = {"/etc/pip.conf": folder / "pip.conf"}
    words = [word for value in values.values() for word in value.split() if "/" in word]
    # An index in a folder leads to files beside it.
    paths = {str(Path(urlsplit(word).path).parent) if word.startswith("file:") else word for word in words}
    mounts |= {path: Path(path) for path in sorted(paths) if Path(path).exists()}
    if certificates is not None:
        values["cert"] = "/etc/pip-certificates.crt"
        mounts[values["cert"]] = Path(certificates)
    file = configparser.RawConfigParser()
    file["global"] = {key: value for key, value in values.items() if key != "config-file"}
    with (folder / "pip.conf").open("w", encoding="utf-8") as out:
        file.write(out)
    return [f"--volume={path}:{there}:ro" for there, path in mounts.items()]


def index_of_cpu_wheels() -> str:
    """Where pip finds PyTorch without CUDA: TORCH_INDEX_URL, or pip's own index where its settings lead there."""
    from pip._internal.models.index import PyPI  # not every environment has pip

    if given := os.environ.get("TORCH_INDEX_URL"):
        return given
    pins = (REPOSITORY / "scripts/image-constraints.txt").read_text(encoding="utf-8").splitlines()
    [torch] = [pin for pin in pins if pin.startswith("torch==")]
    ask = ["install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet", "--report", "-", torch]
    asked = subprocess.run([sys.executable, "-m", "pip", *ask], capture_output=True, text=True)
    found = json.loads(asked.stdout)["install"][0]["metadata"]["version"] if asked.returncode == 0 else asked.stderr
    if "+cpu" not in found:
        pytest.skip(f"set TORCH_INDEX_URL to the index of PyTorch's CPU wheels; pip by itself finds {found}")
    return pip_settings().get("index-url", PyPI.simple_url)


def test_image_is_built_and_searches(buildah: Buildah) -> None:
    policy = ["--signature-policy", buildah.folder / "policy.json"]
    chroot = ["--isolation", "chroot", *mounts_of_pip_settings(buildah.folder)]
    url = index_of_cpu_wheels()
    arguments = [f"--build-arg={each}" for each in ("BASE=localhost/base", "COMPUTE=cpu", f"TORCH_INDEX_URL={url}")]
    buildah("bud", "--pull-never", *policy, *chroot, *arguments, "--tag", "nuciseg", REPOSITORY, timeout_s=1000)

    container = buildah("from", "--pull-never", *policy, "nuciseg", timeout_s=300)
    root = Path(buildah("mount", container, timeout_s=60))
    size_gb = sum(file.lstat().st_size for file in root.rglob("*") if not file.is_symlink()) / 1e9
    print(f"the image without CUDA is {size_gb:.2f} GB")
    assert size_gb < 3.5

    def run(*words: str, timeout_s: float = 120) -> str:
        return buildah("run", "--isolation", "chroot", container, "--", *words, timeout_s=timeout_s)

    assert run("id", "-un") == "nuciseg"
    assert run("bash", "--login", "-c", "command -v ray") == "/opt/nuciseg/bin/ray"
    search = [
        "--search.num_trials",
        "2",
        "--search.trial_epochs",
        "1",
        "--train.epochs",
        "1",
        "--tracking.kind",
        "none",
    ]
    small = ["--data.synthetic.num_train", "40", "--data.synthetic.num_test", "4", "--model.width", "4"]
    assert "best checkpoint: " in run("python", "-m", "nuciseg.tune", *search, *small, timeout_s=400)
