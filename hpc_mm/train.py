"""What each rank runs: ``accelerate launch ... -m hpc_mm.train run=runs/NAME``. One loop, whatever the strategy."""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hpc_mm import checkpoint
from hpc_mm.config import ConfigError, Run, Train, parse_arguments, read_run, unknown
from hpc_mm.data.batch import Batch
from hpc_mm.data.stream import make_loader
from hpc_mm.meter import Records, memory_gb, peak_flops
from hpc_mm.models.flamingo import FlamingoModel, build, load_tokenizer
from hpc_mm.objectives.next_token import next_token

logger = logging.getLogger("hpc_mm.train")  # __name__ is __main__ on a rank

MicroBatch = dict[str, Batch]  # by source

# One row per source of what a step is made of, summed over ranks and micro-steps.
COUNTS = ("targets", "samples", "tokens", "padded_tokens", "images", "unreadable", "left_out", "flops")
COLLECTIVE_TIMEOUT = timedelta(hours=1)  # the others wait while rank 0 digests a checkpoint of hundreds of GB
UNREADABLE_GRACE = 10  # unreadable samples of a source that never stop a run, whatever their share


class TrainingStopped(Exception):
    """The run cannot go on; the message is the reason."""


class Objective(nn.Module):
    """What accelerate wraps: all sources of a micro-step in one forward, so that there is one backward."""

    _no_split_modules = ("ConditionedLayer",)  # what FSDP gathers at a time: a decoder layer with its cross-attention

    def __init__(self, model: FlamingoModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batches: MicroBatch) -> Tensor:
        """Cross-entropy sums, one per source: (S,)."""
        return torch.stack([next_token(self.model, batch) for batch in batches.values()])


@dataclass
class Progress:
    """What goes on across restarts, beside weights and optimizer. The place in every stream is the step itself."""

    step: int = 0
    skipped: int = 0
    totals: dict[str, dict[str, float]] = field(default_factory=dict)  # source -> name in COUNTS -> since step 0
    corpora: dict[str, str] = field(default_factory=dict)  # source -> digest of its shards, which decide the order


@dataclass
class Window:
    """What happened since the last line of metrics.jsonl."""

    losses: Tensor  # (S,) this rank's part of the sources' mean losses, summed over steps
    counts: Tensor  # (S, len(COUNTS)) over all ranks
    steps: int = 0
    waited: float = 0.0  # seconds this rank waited for data
    started: float = field(default_factory=time.perf_counter)


# ---------------------------------------------------------------- pure functions


def learning_rate(train: Train, step: int) -> float:
    """Rate of optimizer step ``step`` (from 0): linear warm-up, then constant, linear or cosine decay to 0."""
    if step < train.warmup:
        return train.learning_rate * step / train.warmup
    done = (step - train.warmup) / max(1, train.steps - train.warmup)
    if train.schedule == "linear":
        return train.learning_rate * max(0.0, 1.0 - done)
    if train.schedule == "cosine":
        return train.learning_rate * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
    return train.learning_rate


def count(model: FlamingoModel, micro_batches: Sequence[MicroBatch]) -> Tensor:
    """This rank's row of COUNTS per source: (S, len(COUNTS)) float64, exact for counts below 2**53."""
    rows = [[_count(model, batch) for batch in batches.values()] for batches in micro_batches]
    return torch.tensor(rows, dtype=torch.float64).sum(0)


def _count(model: FlamingoModel, batch: Batch) -> list[float]:
    lengths = batch.attention_mask.sum(1)
    tokens, images = int(lengths.sum()), len(batch.images)
    return [
        batch.targets,
        len(batch.ids),
        tokens,
        batch.input_ids.numel(),
        images,
        len(batch.unreadable),
        len(batch.left_out),
        model.training_flops(tokens, int((lengths**2).sum()), images, batch.targets),
    ]


def parameter_groups(model: FlamingoModel, train: Train) -> list[dict[str, Any]]:
    """Trainable parameters with and without weight decay; the model says which."""
    learning = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    decayed = [parameter for name, parameter in learning if model.decays(name, parameter)]
    others = [parameter for name, parameter in learning if not model.decays(name, parameter)]
    groups = [{"params": decayed, "weight_decay": train.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


# ---------------------------------------------------------------- one rank


class Training:
    """One rank of a run: the prepared model and optimizer, the streams, and where we are."""

    def __init__(self, run: Run, folder: Path) -> None:
        self.run, self.folder = run, folder
        tokenizer = load_tokenizer(run.model.language)
        # Before accelerate: under ZeRO-3 it tells transformers to make empty, already divided parameters.
        self.model = build(run.model, tokenizer, run.train.seed)
        self.accelerator = make_accelerator(run)
        optimizer = torch.optim.AdamW(
            parameter_groups(self.model, run.train),
            lr=run.train.learning_rate,
            betas=run.train.betas,
            eps=run.train.epsilon,
        )
        self.objective, self.optimizer = self.accelerator.prepare(Objective(self.model), optimizer)
        self.objective.train()
        self.progress = Progress(totals={name: dict.fromkeys(COUNTS, 0) for name in run.sources})
        found = checkpoint.resume(self.accelerator, self.objective, folder)
        if found is not None:
            self.progress = Progress(**found)
            logger.info("resuming at step %d", self.progress.step)
        self.streams = self.open_streams(tokenizer)
        device = self.accelerator.device
        self.weights = torch.tensor([source.weight for source in run.sources.values()], device=device)
        self.records = Records(run, folder) if self.accelerator.is_main_process else None
        if self.records is not None:
            self.records.cut(self.progress.step)
        self.window = self.new_window()

    def open_streams(self, tokenizer: Any) -> dict[str, Iterator[Batch]]:
        """This rank's micro-batches from the step we are at. The shards decide the order, so they must be the same."""
        streams: dict[str, Iterator[Batch]] = {}
        for name, source in self.run.sources.items():
            loader = make_loader(
                source,
                self.run.loader,
                self.run.train.seed,
                tokenizer,
                self.model.image_spec,
                self.accelerator.process_index,
                self.accelerator.num_processes,
                self.run.train.accumulate,
                self.progress.step,
                self.run.train.steps,
            )
            corpus = loader.dataset.corpus  # type: ignore[attr-defined]
            if self.progress.corpora.setdefault(name, corpus) != corpus:
                raise ConfigError(
                    f"sources.{name}: the shards at {source.data} are not those that this run was at step "
                    f"{self.progress.step} with; put them back, or start under another name"
                )
            streams[name] = iter(loader)
        return streams

    # -------------------------------------------------- the loop

    def loop(self) -> None:
        train = self.run.train
        while self.progress.step < train.steps:
            micro_batches = self.read()
            rate = learning_rate(train, self.progress.step)
            norm = self.step(micro_batches, rate)
            self.progress.step += 1
            save = self.progress.step == train.steps or self.progress.step % train.save_every == 0
            if save or self.progress.step == 1 or self.progress.step % train.log_every == 0:
                self.log(rate, norm)
            if save:
                self.save()
        if self.records is not None:
            self.records.close()

    def read(self) -> list[MicroBatch]:
        """This rank's micro-batches of the next step."""
        started = time.perf_counter()
        found = [
            {name: next(stream) for name, stream in self.streams.items()} for _ in range(self.run.train.accumulate)
        ]
        self.window.waited += time.perf_counter() - started
        for batches in found:
            for name, batch in batches.items():
                for key, reason in batch.unreadable:
                    logger.warning("%s: unreadable sample %s: %s", name, key, reason)
                for key, reason in batch.lost_images:
                    logger.warning("%s: sample %s goes on without an image: %s", name, key, reason)
        return found

    def step(self, micro_batches: list[MicroBatch], rate: float) -> float:
        """One optimizer step; the global gradient norm. A step with a non-finite gradient changes no weight.

        The loss of a source is its sum of cross-entropy over its targets in the whole step, over all ranks. A
        non-finite loss anywhere makes the reduced gradient, and so its norm, non-finite on every rank: all agree.
        """
        accelerator, device = self.accelerator, self.accelerator.device
        torch.manual_seed(hash((self.run.train.seed, self.progress.step, accelerator.process_index)))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        counts = accelerator.reduce(count(self.model, micro_batches).to(device), "sum")
        targets = counts[:, 0].clamp(min=1)
        # accelerate and DeepSpeed divide by micro-steps and by ranks; the loss is a sum over both.
        scale = self.weights / targets.float() * (accelerator.num_processes * len(micro_batches))
        sums = torch.zeros(len(self.weights), device=device)
        for batches in micro_batches:
            with accelerator.accumulate(self.objective):
                losses = self.objective({name: batch.to(device) for name, batch in batches.items()})
                accelerator.backward((losses * scale).sum())
            sums += losses.detach()
        norm = update(accelerator, self.objective, self.optimizer, self.run.train.clip)
        self.window.counts += counts
        if math.isfinite(norm):
            self.window.losses += sums / targets.float()
            self.window.steps += 1
        else:
            self.skip(norm)
        return norm

    def skip(self, norm: float) -> None:
        self.progress.skipped += 1
        logger.warning("step %d is skipped: gradient norm is %s", self.progress.step, norm)
        if self.progress.skipped > self.run.train.max_nonfinite:
            raise TrainingStopped(
                f"{self.progress.skipped} steps had a non-finite loss or gradient, "
                f"more than train.max_nonfinite={self.run.train.max_nonfinite}; the last at step {self.progress.step}"
            )

    # -------------------------------------------------- telling and saving

    def new_window(self) -> Window:
        device, sources = self.accelerator.device, len(self.run.sources)
        return Window(
            torch.zeros(sources, device=device), torch.zeros(sources, len(COUNTS), dtype=torch.float64, device=device)
        )

    def log(self, rate: float, norm: float) -> None:
        """Write a line of metrics over the steps since the last one, and judge what was unreadable."""
        window, self.window = self.window, self.new_window()
        seconds = self.window.started - window.started
        losses = (self.accelerator.reduce(window.losses, "sum") / max(1, window.steps)).tolist()
        counts = {
            name: dict(zip(COUNTS, row, strict=True))
            for name, row in zip(self.run.sources, window.counts.tolist(), strict=True)
        }
        for name, row in counts.items():
            for key, value in row.items():
                self.progress.totals[name][key] += value
        if self.records is not None:
            self.records.write(self.record(window, losses, counts, seconds, rate, norm))
        self.judge()

    def record(
        self,
        window: Window,
        losses: list[float],
        counts: dict[str, dict[str, float]],
        seconds: float,
        rate: float,
        norm: float,
    ) -> dict[str, Any]:
        total = {key: sum(row[key] for row in counts.values()) for key in COUNTS}
        weighted = sum(loss * source.weight for loss, source in zip(losses, self.run.sources.values(), strict=True))
        peak = peak_flops(self.accelerator.device) if self.run.precision == "bf16" else None
        return {
            "step": self.progress.step,
            "loss": weighted if window.steps else None,
            **{
                f"loss/{name}": loss if window.steps else None
                for name, loss in zip(self.run.sources, losses, strict=True)
            },
            "lr": rate,
            "grad_norm": norm if math.isfinite(norm) else None,
            "samples_per_s": total["samples"] / seconds,
            "tokens_per_s": total["tokens"] / seconds,
            "mfu": total["flops"] / seconds / self.accelerator.num_processes / peak if peak else None,
            "data_wait": window.waited / seconds,
            "padding": 1 - total["tokens"] / max(1, total["padded_tokens"]),
            "memory_gb": memory_gb(self.accelerator.device),
            "skipped": self.progress.skipped,
            "unreadable": int(sum(row["unreadable"] for row in self.progress.totals.values())),
            "left_out": int(sum(row["left_out"] for row in self.progress.totals.values())),
        }

    def judge(self) -> None:
        """Stop the run, on all ranks alike, when too much of a source cannot be read."""
        for name, source in self.run.sources.items():
            total = self.progress.totals[name]
            seen = total["samples"] + total["unreadable"] + total["left_out"]
            if total["unreadable"] > max(UNREADABLE_GRACE, source.max_unreadable * seen):
                raise TrainingStopped(
                    f"{total['unreadable']:.0f} of {seen:.0f} samples of {name} ({source.data}) are unreadable, "
                    f"more than sources.{name}.max_unreadable={source.max_unreadable}; the log names them"
                )

    def save(self) -> None:
        progress = vars(self.progress)
        path = checkpoint.save(self.accelerator, self.objective, self.folder, progress, self.run.train.keep)
        logger.info("saved %s", path)


def update(accelerator: Any, objective: Any, optimizer: Any, clip: float) -> float:
    """Clip and step, where DeepSpeed has not done both inside backward already; the global gradient norm.

    A norm that is not finite is told as inf or nan, on all ranks alike, and no weight is changed.
    """
    if accelerator.distributed_type == "DEEPSPEED":
        norm = float(objective.get_global_grad_norm())
        return math.inf if accelerator.optimizer_step_was_skipped or norm < 0 else norm  # -1 is its NaN
    norm = float(accelerator.clip_grad_norm_(objective.parameters(), clip))
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad()
    return norm


def make_accelerator(run: Run) -> Any:
    """accelerate with this run's values; the launch command has said how to split the model."""
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

    cpu = run.gpus_per_node == 0
    handlers: list[Any] = [
        DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        InitProcessGroupKwargs(backend="gloo" if cpu else "nccl", timeout=COLLECTIVE_TIMEOUT),
    ]
    if cpu:  # not Accelerator(cpu=True), which turns DeepSpeed off without a word
        _without_shared_memory_op()
    accelerator = Accelerator(gradient_accumulation_steps=run.train.accumulate, kwargs_handlers=handlers)
    if accelerator.num_processes != run.world_size:
        raise ConfigError(f"{accelerator.num_processes} processes were started, but the run wants {run.world_size}")
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        share = run.world_size * run.train.accumulate
        plugin.deepspeed_config.update(
            train_micro_batch_size_per_gpu=sum(source.batch for source in run.sources.values()) // share,
            gradient_accumulation_steps=run.train.accumulate,
            gradient_clipping=run.train.clip,
        )
        if run.precision == "bf16":
            plugin.deepspeed_config["bf16"] = {"enabled": True, "check_grad_overflow": True}
    return accelerator


def _without_shared_memory_op() -> None:
    """On CPU, let DeepSpeed use gloo alone.

    Its own shared-memory reduction is compiled at the first use, for a minute or more, and a build that is killed
    leaves a lock on which every later run waits for ever.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def read_arguments(arguments: Sequence[str]) -> tuple[Run, Path]:
    values = parse_arguments(arguments)
    for key in values:
        if key != "run":
            raise unknown("key", key, ["run"])
    if "run" not in values:
        raise ConfigError("run=FOLDER is missing; hpc_mm.launch makes such a folder")
    folder = Path(values["run"])
    return read_run(folder), folder


def main(arguments: Sequence[str] | None = None) -> int:
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    try:
        run, folder = read_arguments(sys.argv[1:] if arguments is None else arguments)
        logging.getLogger("hpc_mm").setLevel(logging.INFO)
        Training(run, folder).loop()
    except ConfigError as error:
        # A reading worker's error comes with the worker's traceback around it.
        print(str(error).rpartition("ConfigError: ")[2].strip(), file=sys.stderr)
        return 2
    except TrainingStopped as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
