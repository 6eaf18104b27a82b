"""Whether a cluster file keeps its secrets: the token that Ray asks for, and keys that belong into files alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

TOKEN_FILE = "~/.ray/auth_token"
NETRC_FILES = ("~/.netrc", "~/.ray/wandb_netrc")
TOKEN_MODE = re.compile(r"\bRAY_AUTH_MODE=token\b")
CURES = {
    TOKEN_FILE: "make it with `(umask 077; ray get-auth-token --generate)`",
    **dict.fromkeys(
        NETRC_FILES,
        "make it with `(umask 077; NETRC={path} wandb login)`, or empty with `(umask 077; touch {path})`",
    ),
}
# What a secret looks like, and the name for it. A name in capitals or in braces is a variable and no value.
PLAIN_KEYS = {
    r"WANDB_API_KEY\s*[=:]\s*[\"']?(?![$\"'])\S": "a W&B key",
    r"\bwandb_v\d_\w{20,}|(?<![\w:@/-])[0-9a-f]{40}(?!\w)": "a W&B key",
    r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b": "an AWS key",
    r"(?i:aws_secret_access_key)\s*[=:]\s*[\"']?(?![$\"'])\S": "an AWS key",
    r"RAY_AUTH_TOKEN\s*[=:]\s*[\"']?(?![$\"'])\S|(?<![\w:@/-])[0-9a-f]{64}(?!\w)": "a Ray token",
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----": "a private key",
    r"\bmachine\s+\S+\s+login\s+\S+\s+password\s+\S": "a password",
}


def find_plain_keys(text: str) -> Iterator[str]:
    """Lines of the file, comments too, that hold a secret; what it is stays unsaid."""
    for number, line in enumerate(text.splitlines(), start=1):
        for pattern, name in PLAIN_KEYS.items():
            if re.search(pattern, line):
                yield (
                    f"line {number} holds {name} in plain text, which everyone reads who reads this file or the "
                    "cluster's; revoke it, and send it as a file of mode 600 by file_mounts (docs/cluster.md)"
                )
                break


def check_token(config: Mapping[str, Any]) -> Iterator[str]:
    """Without the token whoever reaches a port of the cluster runs code on it."""
    if TOKEN_FILE not in (config.get("file_mounts") or {}):
        yield (
            f"file_mounts does not send {TOKEN_FILE}, so the cluster asks for no token and runs what anyone sends; "
            f'add "{TOKEN_FILE}": "{TOKEN_FILE}"'
        )
    docker = config.get("docker") or {}
    everywhere = [*(docker.get("run_options") or []), *(config.get("setup_commands") or [])]
    for role in ("head", "worker"):
        commands = [
            *everywhere,
            *(docker.get(f"{role}_run_options") or []),
            *(config.get(f"{role}_setup_commands") or []),
            *(config.get(f"{role}_start_ray_commands") or []),
        ]
        if not any(TOKEN_MODE.search(str(command)) for command in commands):
            yield (
                f"nothing sets RAY_AUTH_MODE=token for the {role}, so it asks for no token; set it in "
                "docker.run_options (--env=RAY_AUTH_MODE=token) or in setup_commands"
            )


def check_secret_files(config: Mapping[str, Any]) -> Iterator[str]:
    """Files that `ray up` would send: they must exist, and secrets be readable by their owner alone."""
    for remote, local in (config.get("file_mounts") or {}).items():
        path = Path(local).expanduser()
        cure = CURES.get(remote, "make it, or remove the line").format(path=local)
        if not path.exists():
            yield f"file_mounts sends {local}, which is not there; {cure}"
        elif remote in CURES and path.stat().st_mode & 0o077:
            yield f"file_mounts sends {local}, which others may read; chmod 600 {local}"
