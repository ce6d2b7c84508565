"""``python -m hpc_mm.launch --help``: recipes and every field, read from the source: importing pydantic is slow."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent
REQUIRED = object()  # the default of a field that every recipe sets

HEAD = """\
python -m hpc_mm.launch recipe=NAME [cluster=auto|slurm|local|print] [key=value ...]

Freezes the run in HPC_MM_RUNS/NAME and starts it: as a Slurm job where sbatch is on PATH (auto, slurm), as processes
of this machine (local), or not at all: print shows the job. The same command again goes on with the run.
A value comes from the command line, else the environment, else the site file, else the recipe.
"""


@dataclass(frozen=True)
class Field:
    key: str
    kind: str
    default: Any
    description: str


def text() -> str:
    """The whole help page."""
    lines = [HEAD, "Recipes"]
    lines += [f"  {name:<14}{description}" for name, description in recipes().items()]
    lines += ["", "Fields (recipes set their own values; the defaults here hold where a recipe says nothing)"]
    lines += [_line(field) for field in fields("Run")]
    lines += ["", "Site: ~/.config/hpc_mm.toml (HPC_MM_SITE names another), or the environment"]
    lines += [_line(field) for field in fields("Site")]
    return "\n".join(lines)


def _line(field: Field) -> str:
    default = "set by the recipe" if field.default is REQUIRED else f"default {_shown(field.default)}"
    return f"  {field.key:<42}{field.kind:<24} {field.description + '; ' if field.description else ''}{default}"


def _shown(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return ",".join(str(item) for item in value)
    return "empty" if value in ("", {}) else "none" if value is None else str(value)


def recipes() -> dict[str, str]:
    """Name and first docstring line of every file in recipes/."""
    files = sorted(file for file in (PACKAGE / "recipes").glob("*.py") if not file.stem.startswith("_"))
    return {file.stem: (ast.get_docstring(ast.parse(file.read_text())) or "").split("\n")[0] for file in files}


def fields(part: str) -> list[Field]:
    """Every value below a class of config.py, groups walked down, in the order of the source."""
    module = ast.parse((PACKAGE / "config.py").read_text())
    classes = {node.name: node for node in module.body if isinstance(node, ast.ClassDef)}
    aliases = {
        node.targets[0].id: node.value
        for node in module.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    return _walk(part, "", classes, aliases)


def _walk(part: str, start: str, classes: dict[str, ast.ClassDef], aliases: dict[str, ast.expr]) -> list[Field]:
    found = []
    for node in classes[part].body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        if ast.unparse(node.annotation) == "ClassVar":
            continue
        key = start + node.target.id
        words = [name.id for name in ast.walk(node.annotation) if isinstance(name, ast.Name)]
        inner = [word for word in words if word in classes]  # several: families of models, which share some fields
        for word in inner:
            inside = _walk(word, f"{key}.{'NAME.' if 'dict' in words else ''}", classes, aliases)
            found += [field for field in inside if field not in found]
        if not inner:
            default, description = _default(node.value)
            found.append(Field(key, _kind(node.annotation, aliases), default, description))
    return found


def _default(value: ast.expr | None) -> tuple[Any, str]:
    """``Field(default, description=...)`` or a plain default."""
    if not isinstance(value, ast.Call):
        return (REQUIRED if value is None else ast.literal_eval(value)), ""
    named = {word.arg: word.value for word in value.keywords}
    description = ast.literal_eval(named["description"]) if "description" in named else ""
    return (ast.literal_eval(value.args[0]) if value.args else REQUIRED), description


def _kind(annotation: ast.expr, aliases: dict[str, ast.expr]) -> str:
    """A type as a user types it: ``a|b`` for choices, the plain type for the rest."""
    if isinstance(annotation, ast.Name):
        alias = aliases.get(annotation.id)
        return _kind(alias, aliases) if alias is not None else annotation.id
    if isinstance(annotation, ast.Subscript) and isinstance(annotation.value, ast.Name):
        inner = annotation.slice
        items = inner.elts if isinstance(inner, ast.Tuple) else [inner]
        if annotation.value.id == "Literal":
            return "|".join(str(ast.literal_eval(item)) for item in items)
        if annotation.value.id == "Annotated":
            return _kind(items[0], aliases) + _bounds(items[1])
        if annotation.value.id == "tuple":
            return "list, with commas"
        return "{...}" if annotation.value.id == "dict" else annotation.value.id
    if isinstance(annotation, ast.BinOp):
        return f"{_kind(annotation.left, aliases)} or none"
    return ast.unparse(annotation)


def _bounds(field: ast.expr) -> str:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    words = field.keywords if isinstance(field, ast.Call) else []
    return "".join(f" {signs[word.arg]}{ast.literal_eval(word.value)}" for word in words if word.arg in signs)
