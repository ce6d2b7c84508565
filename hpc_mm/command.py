"""What a job is: one ``accelerate launch`` line on each node, and the sbatch script around it, as text."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from hpc_mm.config import ConfigError, Run, Slurm, unknown

ROOT = Path(__file__).resolve().parents[1]  # accelerate_configs/ and sbatch/ lie beside the package
STRATEGIES = ROOT / "accelerate_configs"


@dataclass(frozen=True)
class Submission:
    """One start of a run: its number, and where its files lie below the run's folder."""

    run_folder: Path
    number: int

    @property
    def folder(self) -> Path:
        return self.run_folder / "submissions" / f"{self.number:03d}"

    @property
    def code(self) -> Path:
        return self.folder / "code"

    def log(self, node: int | str) -> Path:
        return self.folder / f"node{node}.log"


def strategy_file(strategy: str) -> Path:
    """The accelerate configuration of a name (a file of accelerate_configs/) or of a path to a user's own."""
    if strategy.endswith((".yaml", ".yml")):
        file = Path(strategy).expanduser().resolve()
        if not file.is_file():
            raise ConfigError(f"strategy={strategy!r}: there is no such file")
        return file
    if not STRATEGIES.is_dir():
        raise ConfigError(f"no folder {STRATEGIES}: launch from a checkout (pip install -e .)")
    names = [file.stem for file in STRATEGIES.glob("*.yaml")]
    if strategy not in names:
        raise unknown("strategy", strategy, names)
    return STRATEGIES / f"{strategy}.yaml"


def uses_deepspeed(strategy: str) -> bool:
    """Whether the strategy's file says ``distributed_type: DEEPSPEED``; what is no accelerate file is refused."""
    file = strategy_file(strategy)
    try:
        values = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"strategy={strategy!r}: {file} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict) or "distributed_type" not in values:
        raise ConfigError(
            f"strategy={strategy!r}: {file} has no distributed_type, so it is no accelerate configuration"
        )
    return bool(values["distributed_type"] == "DEEPSPEED")


def accelerate_line(run: Run, run_folder: Path, rank: str, address: str, port: str) -> str:
    """What one node runs, to be pasted into a shell whose folder is the code snapshot.

    ``rank``, ``address`` and ``port`` may be shell variables; everything else is quoted.
    """
    words = [
        "accelerate-launch",  # `accelerate launch` imports all that its other verbs need first, for seconds
        f"--config_file {shlex.quote(f'accelerate_configs/{strategy_file(run.strategy).name}')}",
    ]
    words.append(f"--num_machines {run.nodes} --num_processes {run.world_size}")
    words.append(f"--machine_rank {rank} --main_process_ip {address} --main_process_port {port}")
    words.append(f"--mixed_precision {'bf16' if run.precision == 'bf16' else 'no'}")
    words.append(f"-m hpc_mm.train {shlex.quote(f'run={run_folder}')}")
    return " ".join(words)


# Slurm signals every process of a step; what runs training must not end of that before training has saved.
IGNORE_SIGNALS = 'trap "" TERM USR2'


def environment(run: Run, threads: int) -> dict[str, str]:
    """Variables that the accelerate line needs. ``threads``: CPU threads of each process."""
    # torch's agent must leave SIGTERM alone: ranks get it from Slurm themselves, and end when they have saved.
    values = {"OMP_NUM_THREADS": str(max(threads, 1)), "PET_SIGNALS_TO_HANDLE": "SIGINT,SIGHUP,SIGQUIT"}
    if run.gpus_per_node == 0:
        values["CUDA_VISIBLE_DEVICES"] = ""
        # accelerate starts DeepSpeed only where it is not told to use the CPU; DeepSpeed has a variable of its own.
        values.update({"DS_ACCELERATOR": "cpu"} if uses_deepspeed(run.strategy) else {"ACCELERATE_USE_CPU": "true"})
    return values


# What the launcher says itself; slurm.extra may not say it again.
OURS = {"job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "mem", "time", "partition"}
OURS |= {"account", "qos", "constraint", "exclude", "output", "open-mode", "requeue", "array", "signal", "ntasks"}


def site_directives(slurm: Slurm) -> dict[str, str]:
    """The directives of the ``slurm`` values; an empty value is a directive without one."""
    values = {"cpus-per-task": str(slurm.cpus_per_task), "mem": slurm.memory, "time": slurm.time}
    values |= {"partition": slurm.partition, "account": slurm.account, "qos": slurm.qos}
    values |= {"constraint": slurm.constraint, "exclude": slurm.exclude}
    values = {name: value for name, value in values.items() if value}
    for name, value in slurm.extra.items():
        if name in OURS:
            raise ConfigError(f"slurm.extra.{name}={value!r}: the launcher sets --{name} itself, from its own key")
        if not name.replace("-", "").isalnum():
            raise ConfigError(f"slurm.extra.{name}: {name!r} is not the name of an sbatch directive")
        values[name] = value
    return values


def header(directives: Mapping[str, str]) -> list[str]:
    """The first lines of a batch script."""
    for name, value in directives.items():
        if "\n" in value:
            raise ConfigError(f"--{name}={value!r}: a line break cannot stand in an sbatch directive")
    lines = [f"#SBATCH --{name}" + (f"={shlex.quote(value)}" if value else "") for name, value in directives.items()]
    return ["#!/bin/bash", *lines, ""]


def directives(run: Run, submission: Submission) -> dict[str, str]:
    values = {"job-name": run.name, "nodes": str(run.nodes), "ntasks-per-node": "1"}
    if run.gpus_per_node:
        values["gpus-per-node"] = str(run.gpus_per_node)
    values |= site_directives(run.slurm)
    values["output"] = str(submission.folder / "job-%j.log")
    values["open-mode"] = "append"  # a requeued job writes on
    values["requeue"] = ""  # after a lost node, whatever the site's default is
    return values


def sbatch_script(run: Run, submission: Submission) -> str:
    """The whole batch script of a run, as it is submitted and as it is kept in the run's folder."""
    setup = ["set -eo pipefail"]
    setup.append(f"echo $SLURM_JOB_ID > {shlex.quote(str(submission.folder / 'job_id'))}")
    setup.append(f"cd {shlex.quote(str(submission.code))}  # the code as it was at submission")
    setup.append("export PYTHONPATH=$PWD")
    if not run.slurm.container:
        setup.append(f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH")
    threads = run.slurm.cpus_per_task // run.processes_per_node
    setup += [f"export {name}={shlex.quote(value)}" for name, value in environment(run, threads).items()]
    setup.append("source sbatch/env.sh  # MASTER_ADDR, SRUN_CPUS_PER_TASK, and what the site needs")
    line = accelerate_line(run, submission.run_folder, "$SLURM_NODEID", "$MASTER_ADDR", "$MASTER_PORT")
    words = [f"run={submission.run_folder}", f"log={submission.log('*')}"]
    supervise = " ".join(["exec python3 -m hpc_mm.supervise", *map(shlex.quote, words), "\\\n "])
    node = shlex.quote(f"{IGNORE_SIGNALS}; exec {line}")
    step = " ".join(["srun", *_srun_options(run, submission), "bash", "-c", "\\\n  " + node])
    comment = [
        "# One accelerate per node starts that node's processes; when one node fails, all of them end. Then the",
        "# supervisor starts them again, requeues the job, or says why it does neither.",
    ]
    return "\n".join([*header(directives(run, submission)), *setup, "", *comment, f"{supervise} {step}", ""])


def _srun_options(run: Run, submission: Submission) -> list[str]:
    options = ["--kill-on-bad-exit=1", "--wait=60"]  # seconds that the others get after the first has ended
    options += [f"--output={shlex.quote(str(submission.log('%n')))}", "--open-mode=append"]
    if run.slurm.container:
        mounts = ",".join(f"{folder}:{folder}" for folder in _folders(run, submission))
        options.append(f"--container-image={shlex.quote(run.slurm.container)}")
        options.append(f"--container-mounts={shlex.quote(mounts)}")
        options.append(f"--container-workdir={shlex.quote(str(submission.code))}")
    return options


def _folders(run: Run, submission: Submission) -> list[str]:
    """What a job reads and writes on the node's file systems, each as the folder that holds it."""
    model = run.model
    files = [model.language.name, model.language.tokenizer, model.vision.pretrained, model.weights, run.start]
    found = {str(submission.run_folder.parent), *(source.data for source in run.sources.values()), run.loader.cache}
    found |= {str(Path(file).parent) for file in files}
    return sorted(folder for folder in found if folder.startswith("/"))
