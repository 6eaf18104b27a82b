"""The image of the Dockerfile, and machines that run it: hosts with a Docker engine, as cluster.yaml expects.

buildah builds it on a base that debootstrap makes; a Docker engine takes it up, and every machine gets a copy of that.
"""

from __future__ import annotations

import os
import resource
import secrets
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from hosts import REPOSITORY, Host, Lan, wait_for, why_no_hosts

CONSTRAINTS = REPOSITORY / "scripts/image-constraints.txt"
USER = "ubuntu"  # of AWS's machines, who may do everything
USER_ID = 1000  # there, and in the image
# What a user may be given here, where the cluster file asks for more.
OPEN_FILES = min(65536, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
_COMMANDS = {"buildah": "buildah", "debootstrap": "debootstrap", "dockerd": "docker.io", "sudo": "sudo"}
_DOCKER_DRIVERS = {"overlay": "overlay2", "vfs": "vfs"}  # as buildah calls them, and Docker
_FOLDERS = Path("/var/tmp").resolve()  # hosts have a /tmp of their own
_PREFIX = "nuciseg-image-"  # before the number of the process that works there
_TAKES_GB = 12  # for a while: what is built, its archive for Docker, and what Docker makes of it
_MEMORY_GB = _TAKES_GB + 6  # with what the tests beside take

# The user of a machine has the home of the host, may become root, and may use Docker.
_BOOT = """\
mount -t tmpfs tmpfs /home
mkdir /home/{user}
mount --bind "$home" /home/{user}
others() {{ grep -v -E '^({user}|docker):|^[^:]*:[^:]*:{id}:' "$1"; }}
{{ others /etc/passwd; echo '{user}:*:{id}:{id}::/home/{user}:/bin/bash'; }} > /run/passwd
{{ others /etc/group; echo '{user}:x:{id}:'; echo 'docker:x:64999:{user}'; }} > /run/group
(umask 337; echo '{user} ALL=(ALL) NOPASSWD: ALL' > /run/sudoers)
for name in passwd group sudoers; do mount --bind "/run/$name" "/etc/$name"; done
chown -R {id}:{id} "$home"
setsid dockerd --bridge=none --iptables=false --ip6tables=false --ip-forward=false --group=docker \\
    --storage-driver={driver} --cgroup-parent={cgroup} --data-root={root} --exec-root=/run/docker \\
    --pidfile=/run/docker.pid > /run/host/docker.log 2>&1 < /dev/null &
"""


def why_no_images() -> str | None:
    """Why this machine cannot build the image and run it, with the cure; None where it can."""
    if why_no_hosts() is not None:
        return why_no_hosts()
    missing = [package for command, package in _COMMANDS.items() if shutil.which(command) is None]
    if missing:
        return f"Debian packages are missing: apt-get install --no-install-recommends {' '.join(missing)}"
    free_gb = shutil.disk_usage(_FOLDERS).free / 1e9
    if free_gb < _TAKES_GB and not _fits_into_memory():
        return f"{_FOLDERS} has {free_gb:.0f} GB free, the image takes {_TAKES_GB}"
    return None


@dataclass(frozen=True)
class Image:
    """An image by its name, and what a Docker engine that has it keeps, in `folder`/engine."""

    name: str
    folder: Path
    driver: str  # of buildah's and Docker's storage

    def add_machine(self, lan: Lan, name: str, number: int) -> Host:
        """A host with the user of AWS's machines, who has sudo, and a Docker engine that has the image."""
        root = self.folder / name
        root.mkdir()
        for part in (self.folder / "engine").iterdir():
            # Nobody writes to the files of an image: links do.
            links = ["--link"] if part.name in _DOCKER_DRIVERS.values() else []
            _said_by("cp", "--archive", *links, part, root, timeout_s=300)
        return _add_engine(self, lan, name, number, root)


@contextmanager
def built_image(name: str) -> Iterator[Image]:
    """The image of the Dockerfile as it is now. Machines must be off when the block ends: all is removed then."""
    if (reason := why_no_images()) is not None:  # others may have filled memory or disk meanwhile
        pytest.skip(reason)
    _remove_what_killed_tests_left()
    folder = _FOLDERS / f"{_PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
    folder.mkdir()
    try:
        if _fits_into_memory():  # which takes half the time and cores
            _said_by("mount", "-t", "tmpfs", "-o", f"size={_TAKES_GB}g", "tmpfs", folder, timeout_s=10)
        image = Image(name, folder, "overlay" if _can_lay_over(folder) else "vfs")
        archive = _build(image)
        with Lan(folder / "lan") as lan:
            engine = _add_engine(image, lan, "loader", 1, folder / "engine")
            engine.run(f"docker load --quiet --input {archive}", timeout_s=300)
            # It writes what it knows when it ends.
            engine.run("pkill --exact dockerd; while pgrep --exact dockerd; do sleep 0.1; done", timeout_s=60)
        archive.unlink()
        yield image
    finally:
        _remove(folder)


def _remove(folder: Path) -> None:
    """All of an image and its machines, which are off."""
    _unmount(folder)
    groups = Path("/sys/fs/cgroup")
    for group in (groups / folder.name, *groups.glob(f"*/{folder.name}")):  # of cgroups' second and first version
        for inner, _, _ in os.walk(group, topdown=False):
            os.rmdir(inner)
    shutil.rmtree(folder)


def _remove_what_killed_tests_left() -> None:
    for folder in _FOLDERS.glob(f"{_PREFIX}*-*"):
        if not psutil.pid_exists(int(folder.name.removeprefix(_PREFIX).split("-")[0])):
            _remove(folder)


def pins() -> dict[str, str]:
    """The image's packages with their versions."""
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def _build(image: Image) -> Path:
    """Builds the image and returns an archive of it."""
    folder = image.folder
    store = ["--root", folder / "root", "--runroot", folder / "run", "--storage-driver", image.driver]
    policy = ["--signature-policy", folder / "policy.json"]

    def buildah(*words: str | Path, timeout_s: float) -> str:
        return _said_by("buildah", *store, *words, timeout_s=timeout_s)

    base, wheels = folder / "base", folder / "wheels"
    with ThreadPoolExecutor() as downloads:
        downloaded = downloads.submit(_download_wheels, wheels)
        made = subprocess.run(["debootstrap", "--variant=minbase", "bookworm", base], capture_output=True, text=True)
        downloaded.result()
    if made.returncode != 0:
        pytest.skip(f"debootstrap could make no base: {made.stdout[-300:]}")
    (folder / "policy.json").write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
    container = buildah("from", "scratch", timeout_s=60)
    buildah("add", "--quiet", container, base, "/", timeout_s=300)
    buildah("commit", "--quiet", "--rm", *policy, container, "base", timeout_s=300)
    shutil.rmtree(base)

    (folder / "pip.conf").write_text("[global]\nno-index = true\nfind-links = /wheels\n")
    mounts = [f"--volume={folder / 'pip.conf'}:/etc/pip.conf:ro", f"--volume={wheels}:/wheels:ro"]
    arguments = ["--build-arg=BASE=localhost/base", "--build-arg=COMPUTE=cpu", "--build-arg=TORCH_INDEX_URL=/wheels"]
    archive = folder / "image.tar"
    words = ["--isolation", "chroot", *mounts, *arguments, "--tag", f"docker-archive:{archive}:{image.name}"]
    buildah("bud", "--pull-never", *policy, *words, REPOSITORY, timeout_s=1000)
    shutil.rmtree(wheels)
    _unmount(folder / "root")
    shutil.rmtree(folder / "root")
    return archive


def _download_wheels(folder: Path) -> None:
    """Puts there what the Dockerfile installs, as pip on this machine finds it, with its indexes and certificates.

    In a container pip would not have this machine's settings, among them certificates of a proxy.
    """
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", folder, "--python-version", "3.11"]
    pinned = os.environ | {"PIP_CONSTRAINT": str(CONSTRAINTS)}

    def download(*words: str | Path, env: dict[str, str] = pinned) -> None:
        _said_by(*pip, *words, timeout_s=900, env=env)

    index = ["--index-url", url] if (url := os.environ.get("TORCH_INDEX_URL")) else []
    download("--no-deps", *index, *(f"{name}=={pins()[name]}" for name in ("torch", "torchvision")))
    if not list(folder.glob("torch-*+cpu-*")):
        pytest.skip("set TORCH_INDEX_URL to the index of PyTorch's CPU wheels; pip by itself finds another build")
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    extras = project["project"]["optional-dependencies"]
    asked = [*project["project"]["dependencies"], *extras["weights"], *extras["cluster"]]
    download("--only-binary", ":all:", "--find-links", folder, *asked)
    download("--only-binary", ":all:", *project["build-system"]["requires"], env=dict(os.environ))


def _fits_into_memory() -> bool:
    return psutil.virtual_memory().available > _MEMORY_GB * 1e9


def _can_lay_over(folder: Path) -> bool:
    """Whether layers may lie one over the other there; else each is a copy of all below it."""
    layers = [folder / "layers" / name for name in ("lower", "upper", "work", "merged")]
    for layer in layers:
        layer.mkdir(parents=True)
    lower, upper, work, merged = map(str, layers)
    options = f"lowerdir={lower},upperdir={upper},workdir={work}"
    mount = ["unshare", "--mount", "mount", "-t", "overlay", "overlay", "-o", options, merged]
    return subprocess.run(mount, capture_output=True).returncode == 0


def _unmount(folder: Path) -> None:
    """Takes away what is mounted there."""
    mounted = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for mount in sorted((path for path in mounted if Path(path).is_relative_to(folder)), reverse=True):
        # Lazily: of a command that ran into its time limit a process may be left that works there.
        subprocess.run(["umount", "--lazy", mount], check=True)


def _add_engine(image: Image, lan: Lan, name: str, number: int, root: Path) -> Host:
    """A machine whose Docker engine keeps its images and containers in `root`."""
    driver = _DOCKER_DRIVERS[image.driver]
    boot = _BOOT.format(user=USER, id=USER_ID, root=root, driver=driver, cgroup=f"/{image.folder.name}")
    host = lan.add(name, number, boot=boot)
    wait_for(
        lambda: host.run("docker version", timeout_s=30, check=False).returncode == 0,
        f"Docker on {name}",
        60,
        told=(host.folder / "docker.log").read_text,
    )
    return host


def _said_by(*words: str | Path, timeout_s: float, env: dict[str, str] | None = None) -> str:
    """Runs a command and returns what it printed, errors among it. Raises AssertionError where it fails."""
    done = subprocess.run(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
        env=env,
    )
    said = "\n".join(done.stdout.splitlines()[-60:])
    assert done.returncode == 0, f"{shlex.join(map(str, words))}: {done.returncode}\n{said}"
    return done.stdout.strip()
