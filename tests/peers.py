"""Single files of packages that are installed without what they import, as modules."""

import importlib.util
import sys
import warnings
from importlib.machinery import ModuleSpec
from types import ModuleType

from required import absent


def peer(package: str, path: str) -> ModuleType:
    """A file of an installed package, without running the package's own __init__."""
    found: ModuleSpec | None = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        absent(f"{package} is not installed")
    name = f"{package}_{path.replace('/', '_').removesuffix('.py')}"
    spec = importlib.util.spec_from_file_location(name, f"{found.submodule_search_locations[0]}/{path}")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # escapes in their regular expressions
        spec.loader.exec_module(module)
    sys.modules[name] = module
    return module
