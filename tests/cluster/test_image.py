"""The Dockerfile, built and run without Docker: by buildah, on a base that debootstrap makes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hosts import REPOSITORY
from packaging.utils import canonicalize_name

COMMANDS = {"buildah": "buildah", "debootstrap": "debootstrap"}
CONSTRAINTS = REPOSITORY / "scripts/image-constraints.txt"
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


def pins() -> dict[str, str]:
    """The image's packages with their versions."""
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def wheels_of_the_image(folder: Path) -> None:
    """Puts there what the Dockerfile installs, as pip on this machine finds it, with its indexes and certificates.

    In a container pip would not have this machine's settings, among them certificates of a proxy.
    """
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(folder), "--python-version", "3.11"]
    pinned = os.environ | {"PIP_CONSTRAINT": str(CONSTRAINTS)}

    def download(*words: str, env: dict[str, str] = pinned) -> None:
        done = subprocess.run([*pip, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
        assert done.returncode == 0, f"pip download {' '.join(words)}: {done.stdout[-2000:]}"

    index = ["--index-url", url] if (url := os.environ.get("TORCH_INDEX_URL")) else []
    download("--no-deps", *index, *(f"{name}=={pins()[name]}" for name in ("torch", "torchvision")))
    if not list(folder.glob("torch-*+cpu-*")):
        pytest.skip("set TORCH_INDEX_URL to the index of PyTorch's CPU wheels; pip by itself finds another build")
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    extras = project["project"]["optional-dependencies"]
    asked = [*project["project"]["dependencies"], *extras["weights"], *extras["cluster"]]
    download("--only-binary", ":all:", "--find-links", str(folder), *asked)
    download("--only-binary", ":all:", *project["build-system"]["requires"], env=dict(os.environ))


def test_image_is_built_and_searches(buildah: Buildah) -> None:
    policy = ["--signature-policy", buildah.folder / "policy.json"]
    wheels = buildah.folder / "wheels"
    wheels_of_the_image(wheels)
    (buildah.folder / "pip.conf").write_text("[global]\nno-index = true\nfind-links = /wheels\n")
    mounts = [f"--volume={buildah.folder / 'pip.conf'}:/etc/pip.conf:ro", f"--volume={wheels}:/wheels:ro"]
    arguments = ["--build-arg=BASE=localhost/base", "--build-arg=COMPUTE=cpu", "--build-arg=TORCH_INDEX_URL=/wheels"]
    words = ["--isolation", "chroot", *mounts, *arguments, "--tag", "nuciseg", REPOSITORY]
    buildah("bud", "--pull-never", *policy, *words, timeout_s=1000)
    shutil.rmtree(wheels)

    container = buildah("from", "--pull-never", *policy, "nuciseg", timeout_s=300)
    root = Path(buildah("mount", container, timeout_s=60))
    size_gb = sum(file.lstat().st_size for file in root.rglob("*") if not file.is_symlink()) / 1e9
    print(f"the image without CUDA is {size_gb:.2f} GB")
    assert size_gb < 3.5

    def run(*words: str, timeout_s: float = 120) -> str:
        return buildah("run", "--isolation", "chroot", container, "--", *words, timeout_s=timeout_s)

    installed = run("pip", "freeze", "--exclude", "nuciseg").replace("+cpu", "").splitlines()
    assert {canonicalize_name(name): version for name, version in (line.split("==") for line in installed)} == pins()
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
