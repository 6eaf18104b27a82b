"""The base of every configuration section: frozen, typed, unknown keys refused."""

from __future__ import annotations

import types
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, model_validator


class Section(BaseModel):
    """One part of the configuration. Give every field a type, bounds, a default and a `description` with its unit.

    The word `none` stands for no value wherever a field may have none: YAML and the command line have it as text.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _none_in_words(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {key: None if value == "none" and cls._may_be_none(key) else value for key, value in values.items()}

    @classmethod
    def _may_be_none(cls, key: str) -> bool:
        field = cls.model_fields.get(key)
        choices = _choices(field.annotation) if field is not None else set()
        return type(None) in choices and "none" not in choices


def _choices(annotation: Any) -> set[Any]:
    """The members of a union, with the values of its literals."""
    if get_origin(annotation) in (Union, types.UnionType, Literal):
        return {choice for part in get_args(annotation) for choice in _choices(part)}
    return {annotation}
