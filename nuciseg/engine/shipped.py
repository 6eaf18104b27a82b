"""Weights that come with the package: `nuciseg/NAME` means the checkpoint in `shipped/NAME`.

Imports nothing heavy, because `--help` names them.
"""

from __future__ import annotations

from pathlib import Path

from nuciseg.errors import CheckpointError

SHIPPED_DIR = Path(__file__).parents[1] / "shipped"
PREFIX = "nuciseg"


def shipped_names() -> list[str]:
    """What `--checkpoint` takes besides paths, in order."""
    if not SHIPPED_DIR.is_dir():
        return []
    folders = [each.name for each in SHIPPED_DIR.iterdir() if each.is_dir() and not each.name.startswith((".", "_"))]
    return [f"{PREFIX}/{name}" for name in sorted(folders)]


def describe_shipped() -> str:
    """The names in words, for `--help` and for errors."""
    return ", ".join(shipped_names()) or "none in this installation"


def is_shipped_name(path: Path) -> bool:
    """Whether `path` has the form of a name, known or not."""
    return len(path.parts) == 2 and path.parts[0] == PREFIX


def shipped_folder(name: Path) -> Path:
    """The checkpoint folder that `nuciseg/NAME` means. Raises CheckpointError that lists the names there are."""
    if name.as_posix() not in shipped_names():
        raise CheckpointError(
            f"no weights called {name} come with nuciseg; give a run's folder or one of these: {describe_shipped()}"
        )
    return SHIPPED_DIR / name.name


def is_shipped(folder: Path) -> bool:
    """Whether a checkpoint folder, however it was named, is the package's: nothing may be written there."""
    return folder.resolve().is_relative_to(SHIPPED_DIR.resolve())
