"""See in under a minute whether this machine or cluster can train: `python -m nuciseg.doctor [--config FILE]`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from nuciseg.cli import Parser, run_verb
from nuciseg.errors import ConfigError

if TYPE_CHECKING:
    from nuciseg.distributed.checks import Check

DESCRIPTION = """\
See in under a minute whether this machine, or the Ray cluster that RAY_ADDRESS names, can do what a configuration asks.

A line a check: passed, or what is wrong and what to do. Every node is asked for its versions, GPUs, data, W&B, clock
and disk; workers sum gradients; the storage is probed. Nothing is left behind. The exit code is 1 where a check failed,
2 where a cluster file did.
"""
NAME_WIDTH = len("all-reduce")


def main(argv: Sequence[str] | None = None) -> None:
    """Print each check; leave with exit code 1 where one failed, 2 where a cluster file did. Raises ConfigError."""
    from nuciseg.config import add_config_flags, config_from_args

    parser = Parser("doctor", DESCRIPTION)
    add = parser.add_argument
    add(
        "--cluster", type=Path, metavar="FILE", help="check this file for `ray up`, without a network, and nothing else"
    )
    add("--kill-worker", action="store_true", help="also kill a worker of a tiny run to see that it recovers: a minute")
    add("--json", action="store_true", help="print one JSON list of the checks instead")
    add("--verbose", action="store_true", help="show what Ray and W&B say")
    flags = add_config_flags(parser)
    args = parser.parse_args(argv)
    if args.cluster is not None:
        checks = _file_checks(args.cluster)
    else:
        from nuciseg.distributed.examination import examine

        checks = examine(config_from_args(flags, args), kill_worker=args.kill_worker, verbose=args.verbose)
    if args.json:
        with redirect_stdout(sys.stderr):  # Ray tells there of a worker that was killed
            done = list(checks)
    else:
        done = list(_printed(checks))
    num_failed = sum(not check.passed for check in done)
    if args.json:
        print(json.dumps([asdict(check) for check in done], indent=1))
    else:
        print(f"{num_failed} of {len(done)} checks failed" if num_failed else f"all {len(done)} checks passed")
    if num_failed:
        sys.exit(1 if args.cluster is None else ConfigError.exit_code)  # a wrong file is the user's own mistake


def _printed(checks: Iterator[Check]) -> Iterator[Check]:
    for check in checks:
        print(f"{'passed' if check.passed else 'FAILED'}  {check.name:<{NAME_WIDTH}}  {check.said}", flush=True)
        yield check


def _file_checks(path: Path) -> Iterator[Check]:
    from nuciseg.distributed.checks import failed, passed
    from nuciseg.distributed.cluster_file import check_cluster_file

    faults = check_cluster_file(path)
    for fault in faults:
        yield failed("cluster", fault)
    if not faults:
        yield passed("cluster", f"{path} can be given to `ray up`")


if __name__ == "__main__":
    run_verb(main)
