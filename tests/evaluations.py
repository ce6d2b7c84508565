"""Evaluations as they lie in a run's folder, planned, scored and saved by the code that does so, without a model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpc_mm import benchmark, results, trials
from hpc_mm.benchmark import Benchmark
from hpc_mm.data.store import open_store
from hpc_mm.trials import Choice, Planned, Pool

TOY = Benchmark(name="toy", kind="caption", prompt=benchmark.CAPTION, metric="cider")
VQA = Benchmark(name="vqav2", kind="vqa", prompt=benchmark.VQA, metric="vqa-accuracy")


def evaluate(
    run_folder: Path,
    one: Benchmark,
    step: int | str,
    data: str,
    said: Sequence[str],
    shots: Sequence[int] = (2,),
    seeds: Sequence[int] = (42,),
    rules: Sequence[str] = ("openflamingo",),
    samples: int = 0,
) -> list[dict[str, Any]]:
    """Every trial says ``said`` to the questions in their order. The scores, as they are in results.json."""
    out = f"{run_folder}/eval/{one.name}/step-{step}"
    asked = trials.some_of(benchmark.questions(data, one.split, one), samples)
    pool = benchmark.questions(data, one.demonstrations, one)
    planned = Planned(out, Choice(tuple(shots), tuple(seeds), 8, ""), asked, Pool.of(one, pool), {})
    trials.save(planned, planned.choice.shown(pool), one, {}, 64)
    rows = [{"id": question.id, "text": text} for question, text in zip(asked, said, strict=True)]
    entries = [
        results.score(planned, one, {trial: rows for trial in planned.choice.trials if trial.shots == number}, name)
        for name in rules
        for number in shots
    ]
    results.save(open_store(out), one, results.Origin(data, str(run_folder), str(step)), entries)
    return entries
