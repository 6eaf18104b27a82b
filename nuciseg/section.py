"""The base of every configuration section: frozen, typed, unknown keys refused."""

from __future__ import annotations

import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, model_validator


class Section(BaseModel):
    """One part of the configuration. Give every field a type, bounds, a default and a `description` with its unit.

    YAML and the command line have as text what has a type of its own: the word `none`, which stands for no value
    wherever a field may have none, and the numbers of a `Literal`. A flag of several values is a list, of one word too.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _as_meant(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        fields = cls.model_fields
        return {
            key: _as_meant(value, _choices(fields[key].annotation)) if key in fields else value
            for key, value in values.items()
        }


def _as_meant(value: Any, choices: set[Any]) -> Any:
    if value in ("none", ["none"]) and type(None) in choices and "none" not in choices:
        return None
    numbers = {choice for choice in choices if choice in (int, float) or type(choice) is int}
    if isinstance(value, str):
        return next((number for number in numbers if str(number) == value), value)
    if isinstance(value, bool) and numbers and bool not in choices:
        return str(value).lower()  # or pydantic takes YAML's `yes` for 1; the word it refuses
    return value


def _choices(annotation: Any) -> set[Any]:
    """The members of a union, with the values of its literals."""
    if get_origin(annotation) is Annotated:
        return _choices(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType, Literal):
        return {choice for part in get_args(annotation) for choice in _choices(part)}
    return {annotation}
