"""How values are written and told apart: groups of checked values, ``key=value`` words over them, and clear errors.

This module imports nothing of ours and never torch.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError


class ConfigError(Exception):
    """A user's mistake, told in one line: what is wrong, the value, what would be right."""


class Part(BaseModel):
    """One group of values. An unknown name is an error; a finished part never changes."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), defer_build=True, allow_inf_nan=False
    )


def parse_arguments(arguments: Iterable[str]) -> dict[str, str]:
    """Split ``key=value`` words. The same key twice, or a word without ``=``, is an error."""
    values: dict[str, str] = {}
    for word in arguments:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise ConfigError(f"{word!r} is not key=value (nested keys take dots: train.steps=100)")
        if key in values:
            raise ConfigError(f"{key} is given twice: {values[key]!r} and {value!r}")
        values[key] = value
    return values


def unknown(kind: str, name: str, legal: Iterable[str]) -> ConfigError:
    """The answer to a word that we do not know: the nearest legal one, and all of them."""
    names = sorted(legal)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    return ConfigError(f"unknown {kind} {name!r}: {hint}known: {', '.join(names)}")


def with_overrides(part: Part, overrides: Mapping[str, str]) -> Any:
    """A copy of ``part`` with dotted keys replaced and everything validated again."""
    values = part.model_dump()
    for key, text in overrides.items():
        _set(type(part), values, key, text)
    return validated(type(part), values)


def _set(kind: type[Part], values: dict[str, Any], key: str, text: str) -> None:
    """Walk ``key`` down the parts to its field, and put ``text`` there."""
    here, annotation = values, kind
    words = key.split(".")
    for depth, word in enumerate(words):
        annotation = _chosen(annotation, here)
        legal = _names(annotation, here)
        if legal is not None and word not in legal:
            start = ".".join(words[:depth])
            raise unknown("key", key, [f"{start}.{name}" if start else name for name in legal])
        annotation = _child(annotation, word)
        if depth == len(words) - 1:
            break
        if not isinstance(here.get(word), dict):
            raise ConfigError(f"{key}: {'.'.join(words[: depth + 1])} has no parts")
        here = here[word]
    annotation = _chosen(annotation, here.get(words[-1]))
    if _is_part(annotation):
        inside = ", ".join(f"{key}.{name}" for name in _names(annotation, here.get(words[-1], {})) or [])
        raise ConfigError(f"{key} is a group; set one of its values: {inside}")
    here[words[-1]] = _value(annotation, text)


def _chosen(annotation: Any, values: Any) -> Any:
    """Of several parts that a field may hold, the one whose ``family`` these values have."""
    if get_origin(annotation) not in (Union, UnionType):
        return annotation
    kinds = [kind for kind in get_args(annotation) if _is_part(kind)]
    return next((kind for kind in kinds if kind.model_fields["family"].default == values["family"]), annotation)


def _place(kind: type[Part], words: Iterable[int | str]) -> list[str]:
    """The words of a key without those that pydantic adds to say which of several parts it means."""
    annotation, key = kind, []
    for word in words:
        kinds = [part for part in get_args(annotation) if _is_part(part)]
        families = {part.model_fields["family"].default: part for part in kinds if "family" in part.model_fields}
        if word in families:
            annotation = families[word]
        else:
            annotation = _child(annotation, str(word))
            key.append(str(word))
    return key


def _is_part(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Part)


def _names(annotation: Any, values: Mapping[str, Any]) -> list[str] | None:
    """Legal keys below a field; None where any key may be added (free dictionaries)."""
    if _is_part(annotation):
        return list(annotation.model_fields)
    if get_origin(annotation) is dict and _is_part(get_args(annotation)[1]):
        return list(values)
    return None


def _child(annotation: Any, word: str) -> Any:
    if _is_part(annotation):
        return annotation.model_fields[word].annotation if word in annotation.model_fields else Any
    if get_origin(annotation) is dict:
        return get_args(annotation)[1]
    return Any


def _value(annotation: Any, text: str) -> Any:
    """Text as pydantic wants it: JSON for groups and for null, commas for lists, else the text as it is."""
    if annotation is str:
        return text
    if get_origin(annotation) in (tuple, list) and not text.startswith("["):
        return [word for word in text.split(",") if word]
    if annotation is Any or text.startswith(("{", "[")) or text in ("null", "none"):
        try:
            return json.loads("null" if text == "none" else text)
        except json.JSONDecodeError:
            return text
    return text


def validated(kind: type[Part], values: Mapping[str, Any]) -> Any:
    """Build ``kind``; pydantic's report becomes one line."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError(one_line(error, kind)) from None


def one_line(error: ValidationError, kind: type[Part]) -> str:
    problems = []
    for found in error.errors(include_url=False):
        key = ".".join(_place(kind, found["loc"]))
        message = found["msg"].removeprefix("Value error, ")
        if found["type"] == "extra_forbidden":
            problems.append(f"unknown key {key!r}")
        elif found["type"] == "missing":
            problems.append(f"{key} is missing")
        elif not key:
            problems.append(message)
        elif isinstance(found["input"], dict):  # the message names what of the part is meant
            problems.append(f"{key}: {message[0].lower()}{message[1:]}")
        else:
            problems.append(f"{key}={found['input']!r}: {message[0].lower()}{message[1:]}")
    return "; ".join(problems)


def differences(old: Part, new: Part) -> list[str]:
    """What differs, a line each: ``train.steps: 100 -> 200``."""
    before, after = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    return [
        f"{key}: {json.dumps(before.get(key))} -> {json.dumps(after.get(key))}"
        for key in {**before, **after}
        if before.get(key) != after.get(key)
    ]


def _flat(values: Any, start: str = "") -> dict[str, Any]:
    if not isinstance(values, dict) or not values:
        return {start: values}
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flat(value, f"{start}.{key}" if start else str(key)))
    return flat
