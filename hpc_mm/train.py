"""What each rank runs: ``accelerate launch ... -m hpc_mm.train run=runs/NAME``. One loop, whatever the strategy."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hpc_mm import attempt, checkpoint, evaluations, sharding
from hpc_mm.config import ConfigError, Run, parse_arguments, read_run, unknown
from hpc_mm.data.batch import Batch
from hpc_mm.data.stream import make_loader
from hpc_mm.deadline import Deadline, die_with_parent
from hpc_mm.families import Family, Model, family_of, initial
from hpc_mm.meter import Records, memory_gb, peak_flops
from hpc_mm.optimizer import learning_rate, parameter_groups

logger = logging.getLogger("hpc_mm.train")  # __name__ is __main__ on a rank

MicroBatch = dict[str, Batch]  # by source

# One row per source of what a step is made of, summed over ranks and micro-steps.
COUNTS = ("targets", "samples", "tokens", "padded_tokens", "images", "unreadable", "left_out", "cut", "flops")
UNREADABLE_GRACE = 10  # unreadable samples of a source that never stop a run, whatever their share


class TrainingStopped(Exception):
    """The run cannot go on; the message is the reason."""


class Objective(nn.Module):
    """What accelerate wraps: all sources of a micro-step in one forward, so that there is one backward."""

    def __init__(self, model: nn.Module, family: Family) -> None:
        super().__init__()
        self.model, self.loss = model, family.loss
        self._no_split_modules = family.layers  # accelerate asks for it under FSDP

    def forward(self, batches: MicroBatch) -> Tensor:
        """Sums of losses, one per source: (S,)."""
        return torch.stack([self.loss(self.model, batch) for batch in batches.values()])


@dataclass
class Progress:
    """What goes on across restarts, beside weights and moments. The place in every stream is the step itself."""

    step: int = 0
    updates: int = 0  # of the optimizer; the other steps were skipped
    skipped: int = 0
    slowest_save: float = 0.0  # seconds, so that a job knows what to keep free at its end before it has saved
    totals: dict[str, dict[str, float]] = field(default_factory=dict)  # source -> name in COUNTS -> since step 0
    corpora: dict[str, str] = field(default_factory=dict)  # source -> digest of its shards, which decide the order


class Fed(NamedTuple):
    """A rank's share of a step."""

    micro_batches: list[MicroBatch]  # on the device
    counts: Tensor  # (S, len(COUNTS)) float64 on the CPU


@dataclass
class Window:
    """What happened since the last line of metrics.jsonl."""

    losses: Tensor  # (S,) this rank's part of the sources' mean losses, summed over steps
    counts: Tensor  # (S, len(COUNTS)) over all ranks, on the CPU
    steps: int = 0
    waited: float = 0.0  # seconds this rank waited for data
    started: float = field(default_factory=time.perf_counter)


# ---------------------------------------------------------------- pure functions


def count(model: Model, micro_batches: Sequence[MicroBatch]) -> Tensor:
    """This rank's row of COUNTS per source: (S, len(COUNTS)) float64, exact for counts below 2**53."""
    rows = [[_count(model, batch) for batch in batches.values()] for batches in micro_batches]
    return torch.tensor(rows, dtype=torch.float64).sum(0)


def _count(model: Model, batch: Batch) -> list[float]:
    tokens, images = batch.tokens, len(batch.images)
    return [
        batch.targets,
        len(batch.ids),
        tokens,
        batch.padded_tokens,
        images,
        len(batch.unreadable),
        len(batch.left_out),
        len(batch.cut),
        model.training_flops(tokens, batch.pairs, images, batch.targets),
    ]


# ---------------------------------------------------------------- one rank


class Training:
    """One rank of a run: the prepared model and optimizer, the streams, and where we are."""

    def __init__(self, run: Run, folder: Path, deadline: Deadline) -> None:
        self.run, self.folder, self.deadline = run, folder, deadline
        family = family_of(run)
        tokenizer = family.load_tokenizer(run.model.language)
        # Before accelerate: under ZeRO-3 it tells transformers to make empty, already divided parameters.
        self.model = initial(run, family, tokenizer)
        self.accelerator = sharding.make_accelerator(run)
        optimizer = torch.optim.AdamW(
            parameter_groups(self.model, run.train),
            lr=run.train.learning_rate,
            betas=run.train.betas,
            eps=run.train.epsilon,
            fused=True,  # one pass over memory; under offload accelerate puts DeepSpeed's own in its place
        )
        self.objective, self.optimizer = self.accelerator.prepare(Objective(self.model, family), optimizer)
        self.objective.train()
        self.progress = self.resumed() or Progress(totals={name: dict.fromkeys(COUNTS, 0) for name in run.sources})
        awaited = evaluations.awaited(folder, Path.cwd().parent)
        self.saver = checkpoint.Saver(self.accelerator, folder, run.train.keep, run.train.keep_every, awaited)
        self.deadline.saved(self.progress.slowest_save)
        self.saved = self.progress.step  # of the newest checkpoint that was begun
        self.stall = 0.0  # seconds for which training has waited for the checkpoint under way
        self.streams = self.open_streams(tokenizer)
        device = self.accelerator.device
        self.beside: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.following: Fed | None = None  # on a GPU: the next step's batches, on their way
        self.weights = torch.tensor([source.weight for source in run.sources.values()], device=device)
        self.records = Records(run, folder) if self.accelerator.is_main_process else None
        if self.records is not None:
            self.records.cut(self.progress.step)
            attempt.begin(folder, self.progress.step)
        self.newest = 0.0, 0.0  # learning rate and gradient norm of the last step
        self.window = self.new_window()

    def resumed(self) -> Progress | None:
        """Put this rank where the newest whole checkpoint stands, whoever wrote it; None where there is none."""
        found = checkpoint.find(self.accelerator, self.folder)
        if found is None:
            return None
        parts = (self.accelerator, self.objective, self.optimizer)
        checkpoint.load(sharding.held(*parts), found, self.accelerator.process_index, self.accelerator.num_processes)
        progress = Progress(**checkpoint.read_progress(found))
        sharding.restored(*parts, progress.updates)
        logger.info("resuming at step %d", progress.step)
        return progress

    def open_streams(self, tokenizer: Any) -> dict[str, Iterator[list[Batch]]]:
        """This rank's batches from the step we are at. The shards decide the order, so they must be the same."""
        streams: dict[str, Iterator[list[Batch]]] = {}
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

    def loop(self) -> str:
        """Train to the end, or until a rank has to stop; how it ended, one of ``attempt.ENDINGS``."""
        train = self.run.train
        while self.progress.step < train.steps:
            started = time.perf_counter()
            fed = self.following or self.read()
            counts, ending = self.agree(fed.counts)
            if ending:
                break
            rate = learning_rate(train, self.progress.step)
            norm = self.step(fed, counts, rate)
            self.progress.step += 1
            self.newest = rate, norm
            save = self.progress.step == train.steps or self.progress.step % train.save_every == 0
            if save or self.progress.step == 1 or self.progress.step % train.log_every == 0:
                self.log(rate, norm)
            if save:
                self.save()
            self.deadline.stepped(time.perf_counter() - started)
        else:
            ending = attempt.FINISHED
        self.deadline.over()
        self.leave(ending)
        return ending

    def leave(self, ending: str) -> None:
        """Let no step be lost: what is being written is waited for, what has not been saved is saved."""
        if ending != attempt.FINISHED:
            logger.info("%s: leaving at step %d", ending, self.progress.step)
        if self.window.counts.any():  # the counts go on with the checkpoint
            self.log(*self.newest)
        if self.saver.writing is not None:
            self.finish_saving()
        problem = None
        if self.progress.step > self.saved:
            self.save()
            problem = self.finish_saving()
        if self.records is not None:
            self.records.close()
        if problem:
            raise TrainingStopped(f"step {self.progress.step} could not be saved: {problem}")

    def read(self) -> Fed:
        """This rank's share of the next step, on its way to the device."""
        started = time.perf_counter()
        steps = {name: next(stream) for name, stream in self.streams.items()}
        self.window.waited += time.perf_counter() - started
        found = [dict(zip(steps, batches, strict=True)) for batches in zip(*steps.values(), strict=True)]
        for batches in found:
            for name, batch in batches.items():
                for key, reason in batch.unreadable:
                    logger.warning("%s: unreadable sample %s: %s", name, key, reason)
                for key, reason in batch.lost_images:
                    logger.warning("%s: sample %s goes on without an image: %s", name, key, reason)
        with torch.cuda.stream(self.beside):
            moved = [{name: batch.to(self.accelerator.device) for name, batch in part.items()} for part in found]
        return Fed(moved, count(self.model, found))

    def agree(self, counts: Tensor) -> tuple[Tensor, str]:
        """The counts of the step over all ranks, and whether to stop before it: empty, or how it ends.

        One collective, in which every rank also says whether it was told to stop and whether its file is written.
        """
        reason = self.deadline.reason(time.time(), saves=1 if self.saver.writing is None else 2)
        said = torch.tensor([reason == attempt.ENDED, reason == attempt.WARNED, self.saver.written])
        vector = torch.cat([counts.flatten(), said.double()]).to(self.accelerator.device)
        total = self.accelerator.reduce(vector, "sum").cpu()
        ended, warned, written = total[-3:].tolist()
        if written == self.accelerator.num_processes:
            self.finish_saving()
        ending = attempt.ENDED if ended else attempt.WARNED if warned else ""
        return total[:-3].view_as(counts), ending

    def step(self, fed: Fed, counts: Tensor, rate: float) -> float:
        """One optimizer step; the global gradient norm. A step with a non-finite gradient changes no weight.

        The loss of a source is its sum of cross-entropy over its targets in the whole step, over all ranks. A
        non-finite loss anywhere makes the reduced gradient, and so its norm, non-finite on every rank: all agree.
        """
        accelerator = self.accelerator
        torch.manual_seed(hash((self.run.train.seed, self.progress.step, accelerator.process_index)))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        targets = counts[:, 0].clamp(min=1).to(self.weights)
        # accelerate and DeepSpeed divide by micro-steps and by ranks; the loss is a sum over both.
        scale = self.weights / targets * (accelerator.num_processes * len(fed.micro_batches))
        sums = torch.zeros_like(self.weights)
        if self.beside is not None:  # its memory is not used again before update() has waited for the GPU
            torch.cuda.current_stream().wait_stream(self.beside)
        for batches in fed.micro_batches:
            with accelerator.accumulate(self.objective):
                losses = self.objective(batches)
                accelerator.backward((losses * scale).sum())
            sums += losses.detach()
        if self.beside is not None and self.progress.step + 1 < self.run.train.steps:
            self.following = self.read()  # while the GPU computes
        norm = sharding.update(accelerator, self.objective, self.optimizer, self.run.train.clip)
        self.window.counts += counts
        if math.isfinite(norm):
            self.progress.updates += 1
            self.window.losses += sums / targets
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
        return Window(torch.zeros(sources, device=device), torch.zeros(sources, len(COUNTS), dtype=torch.float64))

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
            totals = self.progress.totals[name]
            totals.update({key: totals.get(key, 0) + value for key, value in row.items()})
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
            **{
                key: int(sum(row.get(key, 0) for row in self.progress.totals.values()))
                for key in ("unreadable", "left_out", "cut")
            },
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
        """Begin a checkpoint of where we are. The one before it, should it still be under way, is waited for."""
        started = time.perf_counter()
        if self.saver.writing is not None:
            self.finish_saving()
        fragments = sharding.own(self.accelerator, self.objective, self.optimizer)
        self.saver.start(fragments, vars(self.progress))
        self.saved = self.progress.step
        self.stall += time.perf_counter() - started

    def finish_saving(self) -> str | None:
        """Mark the checkpoint under way. None, or why it could not be written: then the one before it stays."""
        path, problem, seconds = self.saver.finish()
        self.deadline.saved(seconds)
        self.progress.slowest_save = max(self.progress.slowest_save, seconds)
        if problem is None:
            logger.info("saved %s in %.2f s, of which training waited %.2f s", path, seconds, self.stall)
        else:
            logger.error("%s was not saved: %s", path, problem)
            self.saved = -1  # so that leaving tries again
        self.stall = 0.0
        return problem


def read_folder(arguments: Sequence[str]) -> Path:
    values = parse_arguments(arguments)
    for key in values:
        if key != "run":
            raise unknown("key", key, ["run"])
    if "run" not in values:
        raise ConfigError("run=FOLDER is missing; hpc_mm.launch makes such a folder")
    return Path(values["run"])


def main(arguments: Sequence[str] | None = None) -> int:
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    folder: Path | None = None
    training: Training | None = None
    try:
        folder = read_folder(sys.argv[1:] if arguments is None else arguments)
        run = read_run(folder)
        logging.getLogger("hpc_mm").setLevel(logging.INFO)
        die_with_parent()
        training = Training(run, folder, Deadline.from_environment())
        ending = training.loop()
    except ConfigError as error:
        # A reading worker's error comes with the worker's traceback around it.
        reason = str(error).rpartition("ConfigError: ")[2].strip()
        print(reason, file=sys.stderr)
        if folder is not None and folder.is_dir():
            attempt.end(folder, attempt.REFUSED, training.progress.step if training else 0, reason)
        return 2
    except (TrainingStopped, checkpoint.DamagedCheckpoint) as error:
        print(f"stopped: {error}", file=sys.stderr)
        assert folder is not None
        if training is not None and training.saver.writing is not None:  # all ranks stop alike
            training.finish_saving()
        attempt.end(folder, attempt.STOPPED, training.progress.step if training else 0, str(error))
        return 1
    if training.accelerator.is_main_process:
        attempt.end(folder, ending, training.progress.step)
    return 0


if __name__ == "__main__":
    sys.exit(main())
