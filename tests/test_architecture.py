"""The rules of the layout that a machine can check."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hpc_mm"
MODULES = sorted(PACKAGE.rglob("*.py"))

# folder or module -> what of ours it may import
ALLOWED = {
    "grammar": set(),
    "config": {"grammar"},
    "data": {"config", "data"},
    "models": {"config", "models"},
    "objectives": {"config", "objectives"},
    "recipes": {"config", "recipes"},  # a variant calls another
}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def own_imports(path: Path) -> set[str]:
    """Rooms of ours that a module imports at any place in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("hpc_mm.")}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    imports = own_imports(path)
    if room(path) in ALLOWED:
        assert imports <= ALLOWED[room(path)]
    elif room(path) != "launch":
        assert "recipes" not in imports, "only launch imports recipes"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_module_opens_with_a_sentence(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_functions_and_files_stay_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 450
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 60, f"{node.name} has {length} lines"


NO_TORCH = (
    *("config", "launch", "report", "index", "checkpoint", "lint", "prepare", "data.store", "data.shards"),
    *("measure", "data.lengths", "data.order"),
    *("data.pictures", "data.recode", "data.perceptual", "data.filters"),
    *("metrics", "ok_vqa", "benchmark", "demonstrations", "protocol", "predictions", "similarity", "trials", "scoring"),
    *("evaluate", "results", "compare", "watch", "gallery", "page"),
    *("faithfulness", "judging", "score", "staged"),
    *("run_scores", "scheduled", "evaluations"),
    *("agreement", "faithfulness"),
)


@pytest.mark.parametrize("module", NO_TORCH)
def test_no_torch_where_a_login_node_waits(module: str) -> None:
    code = f"import sys, hpc_mm.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_recipe_is_one_function_of_its_files_name() -> None:
    for path in (PACKAGE / "recipes").glob("*.py"):
        if path.name == "__init__.py":
            continue
        functions = [node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
        assert functions == [path.stem]


def test_the_readme_maps_every_module() -> None:
    readme = (ROOT / "README.md").read_text()
    tree = readme.split("## The tree", 1)[1]
    for path in [*PACKAGE.glob("*.py"), *(ROOT / "data_prep").glob("*.py"), *(ROOT / "eval").glob("*.py")]:
        if not path.name.startswith("__"):
            assert path.name in tree, f"{path.name} is not on the README's map"
