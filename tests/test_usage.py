"""The help page, read from the source, says what the pydantic models say."""

from collections.abc import Iterator
from typing import Any, get_args, get_origin

import pytest
from pydantic_core import PydanticUndefined

from hpc_mm.config import Part, Run, Site
from hpc_mm.launch import recipe_names
from hpc_mm.usage import REQUIRED, fields, recipes, text


def values(part: type[Part], start: str = "") -> Iterator[tuple[str, Any, str]]:
    """Key, default and description of everything below a part, as pydantic knows it."""
    for name, field in part.model_fields.items():
        inner, key = field.annotation, f"{start}{name}"
        if get_origin(inner) is dict:
            inner, key = get_args(inner)[1], f"{key}.NAME"
        kinds = [kind for kind in (inner, *get_args(inner)) if isinstance(kind, type) and issubclass(kind, Part)]
        inside = [value for kind in kinds for value in values(kind, f"{key}.")]
        yield from (value for place, value in enumerate(inside) if value not in inside[:place])
        if not kinds:
            default = REQUIRED if field.default is PydanticUndefined else field.default
            yield f"{start}{name}", default, field.description or ""


@pytest.mark.parametrize("part", [Run, Site])
def test_help_equals_the_models(part: type[Part]) -> None:
    assert [(field.key, field.default, field.description) for field in fields(part.__name__)] == list(values(part))


def test_every_field_and_every_recipe_stands_in_the_help() -> None:
    page = text()
    assert all(f"  {field.key} " in page for field in fields("Run") + fields("Site"))
    assert list(recipes()) == recipe_names()
    assert all(description and description in page for description in recipes().values())
