"""YAML as people write it: read and written alike."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from nuciseg.errors import ConfigError

EXTENDS = "extends"


def read_layers(path: Path, extending: tuple[Path, ...] = ()) -> list[dict[str, Any]]:
    """The mappings in a YAML file and in those that it `extends`, the weakest first; raises ConfigError.

    `extends: FILE` names a file beside it, or by a path from there; what both set counts as the file itself has it.
    `extending` are the files that led here, so that a circle of them is noticed. One by one, as what a section without
    a `kind` means depends on what it lies over.
    """
    values = _read_mapping(path)
    name = values.pop(EXTENDS, None)
    if name is None:
        return [values]
    if not isinstance(name, str):
        raise ConfigError(f"{path}: {EXTENDS} takes the path of one YAML file, found {name!r}")
    other, known = path.parent / name, (*extending, path.resolve())
    if other.resolve() in known:
        raise ConfigError(f"{path}: {EXTENDS} {name} leads back to a file that extends it; take the line out of one")
    if not other.is_file():
        raise ConfigError(f"{path}: {EXTENDS} {name}, but there is no file {other}")
    return [*read_layers(other, known), values]


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise ConfigError(f"{path}: cannot read this configuration ({reason}); give the path of a YAML file") from None
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        line = f", line {place.line + 1}" if place else ""
        raise ConfigError(f"{path}{line}: not valid YAML ({getattr(error, 'problem', error)})") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a configuration is a mapping of sections, found {type(values).__name__}")
    return values


def as_yaml(values: Mapping[str, Any]) -> str:
    """The text that `read_layers` takes back."""
    text: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False)
    return text


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-4` as a string; here it is a number, as everybody who writes it means. `1:30`, there a number
    to the base of 60, is a string here, and so no hours by mistake.

    PyYAML keeps the last of two equal keys without a word, and with it loses what the first one's section held.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Here, not in construct_mapping: by then `<<` may have put another mapping's keys beside this one's.
        mapping: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key in (key for key, _ in mapping.value if isinstance(key, yaml.ScalarNode)):
            if key.value in lines:
                problem = f"{key.value!r} is there twice, first in line {lines[key.value]}: keep one of them"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            lines[key.value] = key.start_mark.line + 1
        return mapping


class _Dumper(yaml.SafeDumper):
    """Puts quotes around text that `_Loader` would read as a number."""


# Before PyYAML's own, of which the first that fits counts.
_Loader.yaml_implicit_resolvers = {
    first: [("tag:yaml.org,2002:str", re.compile(r"^[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?$")), *resolvers]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9_]+)([eE][-+]?[0-9]+)$"),
        list("-+0123456789."),
    )
