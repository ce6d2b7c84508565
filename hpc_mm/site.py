"""Where the site's values come from, and the run with them in it."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hpc_mm.config import (
    STORE_PREFIX,
    ConfigError,
    Run,
    Site,
    Slurm,
    parse_arguments,
    unknown,
    validated,
    with_overrides,
)

SITE_FILE = "~/.config/hpc_mm.toml"  # HPC_MM_SITE names another

# Slurm's own variables. They stand above what a script says, so they stand above a recipe here too.
SBATCH_VARIABLES = {
    "SBATCH_PARTITION": "partition",
    "SBATCH_ACCOUNT": "account",
    "SBATCH_QOS": "qos",
    "SBATCH_CONSTRAINT": "constraint",
    "SBATCH_TIMELIMIT": "time",
    "SBATCH_MEM_PER_NODE": "memory",
}


def read_site(environment: Mapping[str, str] = os.environ) -> Site:
    """The site file (if there is one) under the environment's values."""
    named = environment.get("HPC_MM_SITE", "")
    path = Path(named or SITE_FILE).expanduser()
    values: dict[str, Any] = {}
    if named or path.exists():
        try:
            values = tomllib.loads(path.read_text())
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"site file {path}: {error}") from None
    if not isinstance(values.get("slurm", {}), dict):
        raise ConfigError(
            f"site file {path}: slurm={values['slurm']!r} is no table; write [slurm] and its values below"
        )
    slurm = dict(values.get("slurm", {}))
    for name in slurm:
        if name not in Slurm.model_fields:
            raise unknown(f"key in [slurm] of {path}", name, Slurm.model_fields)
    slurm.update({key: environment[name] for name, key in SBATCH_VARIABLES.items() if environment.get(name)})
    for key, name in (("store", "HPC_MM_STORE"), ("runs", "HPC_MM_RUNS")):
        if environment.get(name):
            values[key] = environment[name]
    return validated(Site, {**values, "slurm": slurm})  # type: ignore[no-any-return]


def read_options(kind: type[Any], words: Sequence[str], values: Mapping[str, Any] | None = None) -> Any:
    """A script's options with the site's Slurm values, checked; every key may be nested with dots.

    ``values``: what the script says itself, below what the words say.
    """
    given, own = parse_arguments(words), dict(values or {})
    for name in given:
        if name.partition(".")[0] not in kind.model_fields:  # before what it leaves out is missed
            raise unknown("key", name, kind.model_fields)
    for name, field in kind.model_fields.items():
        if field.is_required() and name not in own:
            if name not in given:
                raise ConfigError(f"{name}=... is missing: {field.description}")
            own[name] = given.pop(name)
    return with_overrides(kind(**own, slurm=validated(Slurm, read_site().slurm)), given)


def at_site(run: Run, site: Site) -> Run:
    """The run with the site's Slurm values, and every name in the store as a whole address."""
    values = run.model_dump()
    values["slurm"].update(site.slurm)
    for source in values["sources"].values():
        source["data"] = in_store(source["data"], site.store)
    model = values["model"]
    tokenizer = model["language"]["tokenizer"]
    if tokenizer.startswith(STORE_PREFIX):
        model["language"]["tokenizer"] = in_store(tokenizer.removeprefix(STORE_PREFIX), site.store)
    for part, key in ((model["language"], "name"), (model["language"], "tokenizer"), (model["vision"], "pretrained")):
        part[key] = _whole_path(part[key])
    model["weights"] = _whole_path(model["weights"])
    values["start"] = run_folder(values["start"], site)
    return validated(Run, values)  # type: ignore[no-any-return]


def run_folder(name: str, site: Site) -> str:
    """The folder of a run that is named by it, or by its name among the site's runs; nothing stays nothing."""
    if not name or (Path(name).expanduser() / "run.json").exists():
        return _whole_path(name)
    return str(Path(site.runs).expanduser().resolve() / Path(name).expanduser())


def _whole_path(name: str) -> str:
    """A file or folder that lies here, as the job will find it from its own folder; a hub id or a tag as it is."""
    return str(Path(name).expanduser().resolve()) if name and Path(name).expanduser().exists() else name


def in_store(address: str, store: str) -> str:
    """``omnicorpus`` -> ``STORE/omnicorpus``; whole addresses and absolute paths stay as they are."""
    if "://" in address or address.startswith("/"):
        return address
    root = store if "://" in store else str(Path(store).expanduser().resolve())
    return f"{root.rstrip('/')}/{address}"
