"""`python -m nuciseg` lists the verbs; `nuciseg VERB ...` is the same as `python -m nuciseg.VERB ...`."""

from __future__ import annotations

import difflib
import importlib
import sys

from nuciseg.cli import run_verb
from nuciseg.errors import ConfigError

VERBS = {
    "explore": "look at a data set: figures, faults, leaks, the best possible score, and what to train with",
    "plan": "estimate hours, disk and dollars of a search or run, before it starts",
    "doctor": "see whether this machine or cluster can train: versions, GPUs, network, storage, data, W&B, disk",
    "tune": "search for the best network, train the winner to the end and evaluate it",
    "train": "train one network on any number of workers",
    "evaluate": "score a network beside trivial baselines, with a picture of each image, worst first",
    "predict": "write a label image and a picture with outlined nuclei for each image",
    "export": "write a network for other programs: ONNX, or a bioimage.io model package",
    "cut": "cut clusters of touching nuclei out of labelled fields, as a data set to train on",
    "report": "write a page of runs and searches: ranked, compared, with curves and pictures",
    "study": "write a page of questions, each answered by a finished search, from what is kept of them",
}


def main() -> None:
    """List the verbs, or run the one that the command line names."""
    verb, *args = sys.argv[1:] or ["--help"]
    run_verb(lambda: _list_verbs() if verb in ("--help", "-h") else _dispatch(verb, args))


def _list_verbs() -> None:
    width = max(map(len, VERBS))
    print("Separates touching cell nuclei in fluorescence microscopy.\n")
    for verb, what in VERBS.items():
        print(f"  python -m nuciseg.{verb:<{width}}  {what}")
    print("\n`--help` after a verb shows its settings, with types, units and defaults. `nuciseg VERB` is the same.")


def _dispatch(verb: str, args: list[str]) -> None:
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(VERBS)}"
        raise ConfigError(f"there is no verb {verb!r}; {hint}")
    importlib.import_module(f"nuciseg.{verb}").main(args)


if __name__ == "__main__":
    main()
