"""Save, find, verify and load the newest whole checkpoint.

A checkpoint is a folder ``checkpoints/step-00000100`` of the run folder:

- ``rank-00000.safetensors``, one per rank: the runs of elements of trainable parameters (fp32 masters) and of Adam's
  moments that this rank kept. Any number of ranks and any strategy finds its own share in them.
- ``progress.json``: the step and the counters that go on with it
- ``manifest.json``: size and digest of every file above, written last

Every rank copies its share into memory, trains on, and writes it in the background into ``step-00000100.partial``;
when all have written, rank 0 marks the folder and moves it into place. So a folder without ``.partial`` in its name was
whole once; digests tell whether it still is. Finding one needs no torch.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hpc_mm.sharding import Fragment

MANIFEST = "manifest.json"
PROGRESS = "progress.json"
PARTIAL = ".partial"
DAMAGED = ".damaged"
LATEST = "latest"
CHUNK = 16 * 2**20  # bytes that are written and digested at a time

logger = logging.getLogger(__name__)


class DamagedCheckpoint(Exception):
    """A checkpoint of this name is not what was written, or not of this model; the message says where."""


# ---------------------------------------------------------------- finding


def path_of(run_folder: Path, step: int) -> Path:
    return run_folder / "checkpoints" / f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def finished(run_folder: Path) -> list[Path]:
    """Checkpoints that were marked whole, oldest first."""
    found = (path.parent for path in run_folder.glob(f"checkpoints/step-*/{MANIFEST}"))
    return sorted(path for path in found if path.name.removeprefix("step-").isdigit())


def newest(run_folder: Path, digests: bool = True) -> Path | None:
    """The newest checkpoint whose every byte is as it was written; damaged ones are named and passed over."""
    for checkpoint in reversed(finished(run_folder)):
        problem = damage(checkpoint, digests=digests)
        if problem is None:
            return checkpoint
        pass_over(checkpoint, problem)
    return None


def chosen(run_folder: Path, step: str, digests: bool = True) -> Path:
    """The checkpoint of a step, or the newest whole one for ``latest``. ConfigError where none is whole.

    Without ``digests`` whole is what has all its files at their sizes.
    """
    from hpc_mm.config import ConfigError, unknown  # not above: the supervisor runs on a bare Python

    if step == LATEST:
        found = newest(run_folder, digests)
        if found is None:
            raise ConfigError(f"{run_folder} has no whole checkpoint yet")
        return found
    whole = {str(step_of(path)): path for path in finished(run_folder)}
    if step not in whole:
        raise unknown(f"step in {run_folder}", step, [LATEST, *whole])
    problem = damage(whole[step], digests=digests)
    if problem is not None:
        raise ConfigError(f"checkpoint {whole[step]} is damaged: {problem}")
    return whole[step]


def pass_over(checkpoint: Path, problem: str) -> None:
    logger.warning("checkpoint %s is damaged (%s); using the one before it", checkpoint, problem)


def damage(checkpoint: Path, share: int = 0, shares: int = 1, digests: bool = True) -> str | None:
    """What is wrong with a checkpoint: a missing, cut or changed file; None if nothing is.

    With ``shares``, only every ``shares``-th file is looked at, from ``share`` on: ranks divide the reading. Without
    ``digests`` none is read.
    """
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        if PROGRESS not in manifest or len(manifest) < 2:
            return f"{MANIFEST} names no files"
        for name, expected in list(manifest.items())[share::shares]:
            file = checkpoint / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != expected["bytes"]:
                return f"{name} has {file.stat().st_size} bytes, not {expected['bytes']}"
            if digests and digest(file) != expected["blake2b"]:
                return f"{name} has other bytes than were written"
    except (OSError, ValueError) as error:  # a disk that cannot read it, too
        return f"{getattr(error, 'filename', None) or MANIFEST}: {error}"
    return None


def digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, _hash).hexdigest()


def _hash() -> Any:
    return hashlib.blake2b(digest_size=16)


def read_progress(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / PROGRESS).read_text())  # type: ignore[no-any-return]


# ---------------------------------------------------------------- saving

Awaited = Callable[[int], bool]  # whether the checkpoint of a step must stay


def nobody(step: int) -> bool:
    return False


class Saver:
    """This rank's side of saving. Every method that says so is a collective: all ranks call it at the same step."""

    def __init__(
        self, accelerator: Any, run_folder: Path, keep: int, keep_every: int = 0, awaited: Awaited = nobody
    ) -> None:
        self.accelerator, self.run_folder = accelerator, run_folder
        self.keep, self.keep_every, self.awaited = keep, keep_every, awaited
        self.writing: Writing | None = None
        self._memory: Tensor | None = None  # of the snapshot; kept, because getting fresh pages takes most of the time
        self.removing: threading.Thread | None = None

    def start(self, fragments: Sequence[Fragment], progress: dict[str, Any]) -> None:
        """Take a snapshot and write it in the background. Nothing else may be under way.

        ``progress["step"]`` names the checkpoint. Training waits for the snapshot alone.
        """
        assert self.writing is None, "the checkpoint before this one is still being written"
        final = path_of(self.run_folder, progress["step"])
        partial = final.with_name(final.name + PARTIAL)
        started = time.perf_counter()
        memory = self._snapshot(fragments)
        name = f"rank-{self.accelerator.process_index:05d}.safetensors"
        facts = json.dumps(progress) if self.accelerator.is_main_process else None
        self.writing = Writing(partial / name, header(fragments), memory, facts, started)

    def _snapshot(self, fragments: Sequence[Fragment]) -> Tensor:
        import torch

        views = [tensor for fragment in fragments for tensor in fragment.tensors.values()]
        size = sum(len(view) for view in views)
        if self._memory is None or len(self._memory) != size:
            self._memory = torch.empty(size, dtype=torch.float32, pin_memory=torch.cuda.is_available())
        place = 0
        for view in views:
            self._memory[place : place + len(view)].copy_(view, non_blocking=True)
            place += len(view)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return self._memory

    @property
    def written(self) -> bool:
        """Whether this rank's file is on disk, or never will be."""
        return self.writing is not None and not self.writing.is_alive()

    def finish(self) -> tuple[Path, str | None, float]:
        """Wait for all ranks' files, then mark and move the folder, or remove it if one could not be written.

        A collective. The folder's name; None, or why there is none; and the seconds since ``start``.
        """
        from accelerate.utils import gather_object

        writing, self.writing = self.writing, None
        assert writing is not None
        writing.join()
        manifest: dict[str, Any] = {}
        problems = []
        for facts, problem in gather_object([(writing.facts, writing.problem)]):
            manifest.update(facts)
            problems += [problem] if problem else []
        if writing.bug is not None:  # only here, where no rank waits for this one any more
            raise writing.bug
        partial = writing.file.parent
        final = partial.with_name(partial.name.removesuffix(PARTIAL))
        problem = min(problems, default=None)
        if self.accelerator.is_main_process:
            problem = problem or self._publish(partial, final, manifest)
            if problem:
                shutil.rmtree(partial, ignore_errors=True)
        problem = _from_main(self.accelerator, problem)
        return final, problem, time.perf_counter() - writing.started

    def _publish(self, partial: Path, final: Path, manifest: dict[str, Any]) -> str | None:
        """Mark and move, then make room. None, or why not."""
        try:
            (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
            _flush(partial / MANIFEST)
            shutil.rmtree(final, ignore_errors=True)  # a damaged one of the same step
            partial.rename(final)
            _flush(final.parent)
        except OSError as error:
            return str(error)
        if self.removing is not None:
            self.removing.join()
        arguments = (self.run_folder, self.keep, self.keep_every, self.awaited)
        self.removing = threading.Thread(target=prune, args=arguments, daemon=True)  # it may be cut off at any time
        self.removing.start()  # deleting hundreds of GB takes a while, too
        return None


class Writing(threading.Thread):
    """One rank's file on its way to the disk: flushed, with its digest. A full disk is a problem, not an error."""

    def __init__(self, file: Path, head: bytes, memory: Tensor, progress: str | None, started: float) -> None:
        super().__init__(name="checkpoint", daemon=True)  # a rank that fails must not wait for its disk
        self.file, self.head, self.memory, self.progress, self.started = file, head, memory, progress, started
        self.facts: dict[str, Any] = {}  # file name -> bytes, blake2b
        self.problem: str | None = None
        self.bug: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self._write(self.file, [self.head, self.memory.numpy().data.cast("B")])
            if self.progress is not None:
                self._write(self.file.with_name(PROGRESS), [self.progress.encode()])
        except OSError as error:
            self.problem = f"{self.file}: {error.strerror or error}"
            self.file.unlink(missing_ok=True)  # at once: it fills the disk
        except BaseException as error:  # raised again where all ranks meet
            self.bug, self.problem = error, f"{self.file}: {type(error).__name__}: {error}"

    def _write(self, file: Path, blocks: Iterable[bytes | memoryview]) -> None:
        found = _hash()
        with file.open("wb") as stream:
            for block in blocks:
                for start in range(0, len(block), CHUNK):  # the interpreter is free while a chunk is written
                    chunk = block[start : start + CHUNK]
                    stream.write(chunk)
                    found.update(chunk)
            stream.flush()
            os.fsync(stream.fileno())
            size = stream.tell()
        self.facts[file.name] = {"bytes": size, "blake2b": found.hexdigest()}


def header(fragments: Sequence[Fragment]) -> bytes:
    """The head of a safetensors file whose data are the fragments' tensors in order (8 bytes of length, then JSON)."""
    shapes = {fragment.name: fragment.shape for fragment in fragments}
    entries: dict[str, Any] = {"__metadata__": {"shapes": json.dumps(shapes)}}
    place = 0
    for fragment in fragments:
        for kind in fragment.tensors:
            end = place + 4 * len(fragment)
            entry = {"dtype": "F32", "shape": [len(fragment)], "data_offsets": [place, end]}
            entries[f"{kind}:{fragment.start}:{fragment.name}"] = entry
            place = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def prune(run_folder: Path, keep: int, keep_every: int = 0, awaited: Awaited = nobody) -> None:
    """Remove older ones, damaged ones too.

    The ``keep`` newest stay, those of every ``keep_every``-th step, and those for whose evaluation somebody waits.
    """
    whole = finished(run_folder)
    if not whole:
        return
    kept = {path for path in whole if keep_every and step_of(path) % keep_every == 0} | set(whole[-keep:])
    kept |= {path for path in whole if awaited(step_of(path))}
    for old in run_folder.glob("checkpoints/step-*"):
        if old.name < whole[-1].name and old not in kept and not old.name.endswith(PARTIAL):
            try:
                (old / MANIFEST).unlink(missing_ok=True)  # no longer a checkpoint, whatever happens next
                shutil.rmtree(old)
            except OSError as error:  # it only takes room
                logger.warning("the old checkpoint %s could not be removed: %s", old, error)


# ---------------------------------------------------------------- loading


def find(accelerator: Any, run_folder: Path) -> Path | None:
    """``newest`` with the reading divided over the ranks. A collective.

    What was never finished is removed, and a damaged one renamed, so that it takes no place among those that are kept.
    """
    from accelerate.utils import gather_object

    if accelerator.is_main_process:
        for left in run_folder.glob(f"checkpoints/*{PARTIAL}"):  # by a process that was killed
            shutil.rmtree(left)
    names: list[str] = _from_main(accelerator, [path.name for path in finished(run_folder)])
    for name in reversed(names):
        checkpoint = run_folder / "checkpoints" / name
        problems = gather_object([damage(checkpoint, accelerator.process_index, accelerator.num_processes)])
        problem = next((found for found in problems if found), None)
        if problem is None:
            return checkpoint
        if accelerator.is_main_process:
            pass_over(checkpoint, problem)
            shutil.rmtree(run_folder / "checkpoints" / (name + DAMAGED), ignore_errors=True)
            checkpoint.rename(run_folder / "checkpoints" / (name + DAMAGED))
    return None


def _from_main(accelerator: Any, value: Any) -> Any:
    """Rank 0's value on every rank."""
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def load(fragments: Sequence[Fragment], checkpoint: Path, rank: int = 0, ranks: int = 1) -> None:
    """Fill ``fragments`` from the files of any split. DamagedCheckpoint where something is missing or of another model.

    ``rank`` of ``ranks`` says with which file to begin: its own one, if nothing has changed.
    """
    files = sorted(checkpoint.glob("rank-*.safetensors"))
    first = len(files) * rank // ranks
    wanted = {fragment.name: fragment for fragment in fragments}
    left = sum(len(tensor) for fragment in fragments for tensor in fragment.tensors.values())
    for file in files[first:] + files[:first]:
        if not left:
            return
        with opened(file) as stored:
            left -= _fill(wanted, stored, checkpoint)
    if left:
        raise DamagedCheckpoint(f"{checkpoint} lacks {left} values of what this model trains: it is of another model")


@contextmanager
def opened(file: Path, framework: str = "pt") -> Iterator[Any]:
    """A file of weights. DamagedCheckpoint where its head is not that of its bytes."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework=framework) as stored:
            yield stored
    except SafetensorError as error:
        raise DamagedCheckpoint(f"{file} is damaged: {error}") from None


def _fill(wanted: dict[str, Fragment], stored: Any, checkpoint: Path) -> int:
    """Copy what one file has of what is wanted; how many values that were."""
    shapes = json.loads(stored.metadata()["shapes"])
    for name, shape in shapes.items():
        if name in wanted and tuple(shape) != wanted[name].shape:
            raise DamagedCheckpoint(f"{checkpoint}: {name} has shape {tuple(shape)}, not {wanted[name].shape}")
    copied = 0
    for key in stored.keys():  # noqa: SIM118, it is no dictionary
        kind, start, name = key.split(":", 2)
        if name not in wanted or kind not in wanted[name].tensors:
            continue
        fragment, run = wanted[name], stored.get_slice(key)
        begin = max(int(start), fragment.start)
        end = min(int(start) + run.get_shape()[0], fragment.start + len(fragment))
        if begin < end:
            values = run[begin - int(start) : end - int(start)]
            fragment.tensors[kind][begin - fragment.start : end - fragment.start].copy_(values)
            copied += end - begin
    return copied


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """Every trained parameter, whole, fp32, by name."""
    import torch

    from hpc_mm.sharding import Fragment

    weights = {name: torch.empty(shape) for name, shape in shapes_of(checkpoint).items()}
    load(
        [Fragment(name, tuple(value.shape), 0, {"weight": value.view(-1)}) for name, value in weights.items()],
        checkpoint,
    )
    return weights


def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Copy the trainable parameters of ``checkpoint`` into ``model``, which is whole in this process."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    weights = read_weights(checkpoint)
    if weights.keys() != parameters.keys():
        odd = sorted(weights.keys() ^ parameters.keys())
        raise DamagedCheckpoint(f"{checkpoint} is of another model: {len(odd)} names differ, such as {odd[0]}")
    for name, parameter in parameters.items():
        if parameter.shape != weights[name].shape:
            shapes = f"{tuple(weights[name].shape)}, not {tuple(parameter.shape)}"
            raise DamagedCheckpoint(f"{checkpoint}: {name} has shape {shapes}")
        parameter.data.copy_(weights[name])


def shapes_of(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """Every parameter of a checkpoint by name. Needs no torch."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in checkpoint.glob("rank-*.safetensors"):
        with opened(file, "np") as stored:
            found = json.loads(stored.metadata()["shapes"])
        shapes.update({name: tuple(shape) for name, shape in found.items()})
    return shapes
