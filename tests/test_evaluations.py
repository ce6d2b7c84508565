"""Evaluations while a run trains: what a launch refuses, what is begun when and in which environment, a whole run."""

import errno
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import questions
import samples
from checkout import ROOT, environment, launch, make_checkout, make_store
from runs import lines, small

from hpc_mm import attempt, checkpoint, evaluations, scheduled
from hpc_mm.command import Submission
from hpc_mm.config import ConfigError, Run, read_run, with_overrides
from hpc_mm.evaluate import Evaluation
from hpc_mm.faithfulness import BENCHMARKS
from hpc_mm.launch import main
from hpc_mm.local import node_environments
from hpc_mm.meter import Records
from hpc_mm.recipes.clip_flant5_toy_stage1 import clip_flant5_toy_stage1
from hpc_mm.recipes.toy import toy
from hpc_mm.submission import next_submission

COCO = "evaluate.benchmarks.coco"
PAIRS = "evaluate.benchmarks.pairs"
JUDGE = ["recipe=clip_flant5_toy_stage1", "nodes=1", "strategy=ddp"]
EVERY = ["recipe=toy", "train.save_every=2", "evaluate.every=4"]
# sbatch of a site: notes its environment and what it was given, and says the number of the job.
SBATCH = """#!/bin/sh
[ -e "$TEST/refuses" ] && { echo 'sbatch: error: Access/permission denied' >&2; exit 1; }
env > "$TEST/environment"
echo "$@" >> "$TEST/submitted"
wc -l < "$TEST/submitted"
"""
# squeue of a site, which is silent where it has no queue.
SQUEUE = '#!/bin/sh\necho >> "$TEST/looks"\ncat "$TEST/queue"\n'


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Slurm of small scripts, an empty site, and a run's folder."""
    for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE), ("scontrol", "#!/bin/sh\n")):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(text)
        program.chmod(0o755)
    for name in [name for name in os.environ if name.startswith(("SBATCH_", "HPC_MM_"))]:
        monkeypatch.delenv(name)
    for name, value in environment(ROOT, tmp_path, PATH=f"{tmp_path}/bin:/bin:/usr/bin", TEST=str(tmp_path)).items():
        monkeypatch.setenv(name, value)
    (tmp_path / "queue").touch()
    return tmp_path


def written(here: Path, **benchmarks: str) -> Submission:
    """A submission of a toy run of 6 steps that evaluates every 4th."""
    values = {f"evaluate.benchmarks.{name}": words for name, words in benchmarks.items()}
    run: Run = with_overrides(
        toy(), {"train.save_every": "2", "train.steps": "6", "slurm.account": "lab", "evaluate.every": "4", **values}
    )
    submission = next_submission(here / "run")
    submission.folder.mkdir(parents=True)
    for name, text in scheduled.texts(run, submission).items():
        (submission.folder / name).write_text(text)
    return submission


def saved(run_folder: Path, *steps: int) -> None:
    for step in steps:
        folder = checkpoint.path_of(run_folder, step)
        folder.mkdir(parents=True)
        (folder / checkpoint.MANIFEST).write_text("{}")


def scored(run_folder: Path, name: str, step: int, **scores: float) -> None:
    """Results with a score by metric."""
    folder = evaluations.place_of(run_folder, name, step)
    folder.mkdir(parents=True)
    entries: list[dict[str, Any]] = [
        {"shots": 4, "selection": "random", "metric": metric, "rules": "openflamingo", "score": score}
        for metric, score in scores.items()
    ]
    more = {"low": None, "high": None, "others": {}, "trials": [], "protocol": "p", "values": {}}
    about = {"benchmark": name, "data": "d", "checkpoint": str(run_folder), "step": str(step), "questions": 1}
    (folder / "results.json").write_text(json.dumps({**about, "scores": [{**entry, **more} for entry in entries]}))


# ---------------------------------------------------------------- launch


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluate.every=3", f"{COCO}=data=coco"], "evaluate.every=3 must be a multiple of train.save_every=2"),
        ([], "evaluate.every=4 wants a benchmark: evaluate.benchmarks.NAME="),
        (["evaluate.benchmarks.cocco=data=coco"], "'cocco': did you mean coco?"),
        ([f"{COCO}=data=coco shotz=4"], "evaluate.benchmarks.coco='data=coco shotz=4': unknown key 'shotz'"),
        ([f"{COCO}=data=coco step=4"], "step= is not to be given here"),
        ([f"{COCO}=data=coco shots=many"], "shots.0='many'"),
        ([f"{COCO}=shots=4"], "data=... is missing"),
        ([f"{COCO}=data='coco"], "No closing quotation"),
        ([f"{COCO}=data=coco ; rm x"], "';' is not key=value"),
        (
            [*JUDGE, f"{COCO}=data=coco"],
            "coco: model.family=clip_flant5 judges images and answers no questions; known: w",
        ),
        ([f"{PAIRS}=data=pairs"], "pairs: model.family=flamingo answers questions and judges no images; known: coco, "),
        (["evaluate.benchmarks.vqascore=data=coco"], "'vqascore': "),
        ([*JUDGE, "evaluate.benchmarks.vqascore=data=pairs"], "'vqascore': "),
        ([*JUDGE, "evaluate.benchmarks.winogrond=data=x"], "'winogrond': did you mean winoground?"),
        (
            [*JUDGE, f"{PAIRS}=data=pairs shots=4"],
            "evaluate.benchmarks.pairs='data=pairs shots=4': unknown key 'shots'",
        ),
        ([*JUDGE, f"{PAIRS}=data=pairs benchmark=eqben"], "benchmark= is not to be given here"),
        ([*JUDGE, f"{PAIRS}=data=s3://bucket/pairs"], "published files are read from a folder"),
        ([*JUDGE, "cluster=local", f"{PAIRS}=data=pairs"], "store/pairs has no pairs.jsonl"),
        (["cluster=local", f"{COCO}=data=coco"], "coco"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    make_store(str(here / "store"))
    given = {word.partition("=")[0] for word in words}
    rest = [word for word in [*EVERY, "cluster=print"] if word.partition("=")[0] not in given]
    assert main([*rest, *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("hpc_mm: ")
    assert not (here / "runs").exists()


def test_a_scripts_own_values_need_not_be_given(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = json.loads((written(here, toy="", toy_vqa="shots=4").folder / evaluations.FILE).read_text())
    for name in ("toy", "toy_vqa"):
        assert f"data={here}/store/shapes/benchmark" in text["benchmarks"][name]["command"]
    run: Run = with_overrides(toy(), {"evaluate.benchmarks.toy": "", "evaluate.benchmarks.toy_vqa": "shots=4"})
    found = [one.options for one in scheduled.scheduled(run, here / "run")]
    assert [options.shots for options in found if isinstance(options, Evaluation)] == [(0, 2), (4,)]
    assert main([*EVERY, "cluster=print", "evaluate.benchmarks.toy="]) == 0, capsys.readouterr().err


def test_a_name_is_of_a_script_or_of_images_that_are_judged() -> None:
    assert not scheduled.scripts_that_ask().keys() & BENCHMARKS.keys()


def test_a_run_that_judges_is_evaluated_by_stages_of_its_own(here: Path) -> None:
    words = "data=/benchmarks/pairs tasks=3 gpus=0 template=t5_v1"
    run = with_overrides(clip_flant5_toy_stage1(), {"evaluate.every": "50", PAIRS: words})
    submission = next_submission(here / "run")
    (values,) = json.loads(scheduled.texts(run, submission)[evaluations.FILE])["benchmarks"].values()
    fixed = ["benchmark=pairs", f"checkpoint={here}/run", "step=@STEP@", f"out={here}/run/eval/pairs/step-@STEP@"]
    assert values["command"][2:4] == ["eval/vqascore.py", "cluster=local"]
    assert sorted(values["command"][4:]) == sorted([*fixed, *words.split()])
    assert [*values["stages"]] == ["plan", "score", "collect"]
    (text,) = values["stages"]["score"].values()
    assert "--array=0-2" in text and "--job-name=clip_flant5_toy_stage1-pairs-step-@STEP@-score" in text


def test_a_split_without_public_answers_is_refused(here: Path) -> None:
    asked = questions.asked(0, 1)
    for image in asked.values():
        for question in image["questions"]:
            del question["answers"]
    data = questions.write_splits(here / "vqa", **{"test-dev": asked, "train": questions.asked(2)})
    run: Run = with_overrides(toy(), {"evaluate.benchmarks.vqav2": f"data={data} split=test-dev"})
    with pytest.raises(ConfigError, match=r"^evaluate.benchmarks.vqav2: the answers of split=test-dev are not public"):
        scheduled.check_data(run, here / "run")
    scheduled.check_data(with_overrides(run, {"evaluate.benchmarks.vqav2": f"data={data} split=train"}), here / "run")


def test_old_checkpoints_are_not_evaluated_but_the_newest_is(here: Path) -> None:
    """Those of before a benchmark was asked for neither begin nor stay, however often the run is launched again."""
    run_folder, words = here / "run", "data=/benchmarks/x"

    def due(submission: Submission) -> list[tuple[str, int]]:
        found = evaluations.read_plan(run_folder, submission.folder).due()
        waits = evaluations.awaited(run_folder, submission.folder)
        kept = {checkpoint.step_of(path) for path in checkpoint.finished(run_folder)}
        assert {step for step in kept if waits(step)} == {step for _, step in found}
        return found

    saved(run_folder, *range(4, 20, 4))
    first = written(here, coco=words)
    assert due(first) == [("coco", 16)]
    saved(run_folder, 20, 24)
    assert due(first) == [("coco", 16), ("coco", 20), ("coco", 24)]
    assert due(written(here, coco=words, vqav2=words)) == [
        *(("coco", 16), ("coco", 20)),
        *(("coco", 24), ("vqav2", 24)),
    ]
    both = due(written(here, coco=words, vqav2=words))
    written(here, vqav2=words)
    saved(run_folder, 28)
    assert due(written(here, coco=words, vqav2=words)) == [*both, ("coco", 28), ("vqav2", 28)], "coco was paused"


# ---------------------------------------------------------------- jobs


def test_jobs_are_submitted_once_and_again_where_they_were_lost(here: Path) -> None:
    submission, said = written(here, coco="data=/benchmarks/coco shots=0,4 tasks=4 gpus=0"), list[str]()

    def update() -> list[str]:
        (here / "submitted").unlink(missing_ok=True)
        evaluations.Jobs(submission.run_folder, submission.folder, said.append).update()
        return (here / "submitted").read_text().splitlines() if (here / "submitted").exists() else []

    assert update() == []
    saved(submission.run_folder, 2, 4)
    logs = submission.run_folder / "eval" / "logs" / "coco-step-4"
    assert update() == [
        f"--parsable {logs}/plan.sbatch",
        f"--parsable --dependency=afterok:1 --kill-on-invalid-dep=yes {logs}/answer.sbatch",
        f"--parsable --dependency=afterok:2 --kill-on-invalid-dep=yes {logs}/collect.sbatch",
    ]
    assert said == [f"step 4 is evaluated by coco: jobs 1 2 3, logs {logs}"]
    text = (logs / "answer.sbatch").read_text()
    assert "--job-name=toy-coco-step-4-answer" in text and "--array=0-3" in text and "--account=lab" in text
    assert f"cd {submission.code} " in text and "gpus-per-node" not in text
    place = evaluations.place_of(submission.run_folder, "coco", 4)
    for word in (f"checkpoint={submission.run_folder}", "step=4", f"out={place}", "shots=0,4", "stage=answer"):
        assert f" {word}" in text
    (here / "queue").write_text("toy\ntoy-coco-step-4-answer\n")  # Slurm requeued the job that trains
    assert update() == []
    (here / "queue").write_text("toy-coco-step-40-answer\n")
    assert len(update()) == 3
    saved(submission.run_folder, 6)
    scored(submission.run_folder, "coco", 4, cider=1.0)
    assert len(update()) == 3  # of the last step
    scored(submission.run_folder, "coco", 6, cider=1.0)
    assert update() == []


def test_a_job_of_evaluation_knows_nothing_of_the_job_that_trains(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_training = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "8", "SRUN_CPUS_PER_TASK": "4", "SLURM_MEM_PER_NODE": "9"}
    of_training |= {"MASTER_ADDR": "node1", "MASTER_PORT": "1", "RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "4"}
    of_training |= {"OMP_NUM_THREADS": "1", "PET_SIGNALS_TO_HANDLE": "SIGINT", "TORCHELASTIC_RUN_ID": "x"}
    of_training |= {"ACCELERATE_USE_CPU": "true", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    for name, value in {**of_training, "SLURM_CONF": "/conf", "AWS_PROFILE": "mine"}.items():
        monkeypatch.setenv(name, value)
    submission = written(here, coco="data=/benchmarks/coco")
    saved(submission.run_folder, 4)
    evaluations.Jobs(submission.run_folder, submission.folder, print).update()
    found = dict(line.split("=", 1) for line in (here / "environment").read_text().splitlines() if "=" in line)
    assert not of_training.keys() & found.keys()
    assert found["SLURM_CONF"] == "/conf" and found["AWS_PROFILE"] == "mine" and found["HPC_MM_RUNS"]


def test_a_refused_evaluation_is_a_line_and_no_more(here: Path) -> None:
    submission, said = written(here, coco="data=/benchmarks/coco"), list[str]()
    saved(submission.run_folder, 4, 6)
    (here / "refuses").touch()
    jobs = evaluations.Jobs(submission.run_folder, submission.folder, said.append)
    jobs.update()
    jobs.update()
    assert [line.partition(": ")[0] for line in said] == [f"step {step} is not evaluated by coco" for step in (4, 6)]
    assert said[0].endswith("Access/permission denied")


def test_no_problem_of_evaluation_is_one_of_training(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    submission, said = written(here, coco="data=/benchmarks/coco"), list[str]()
    jobs = evaluations.Jobs(submission.run_folder, submission.folder, said.append)
    monkeypatch.setattr(evaluations, "LOOK", 0)

    def stale(*_: object) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with monkeypatch.context() as away:
        away.setattr(Path, "glob", stale)
        for _ in range(3):
            jobs.update()
    assert said == [f"evaluations: [Errno {errno.ESTALE}] Stale file handle"]
    saved(submission.run_folder, 4)
    (here / "queue").write_bytes(b"caf\xe9\ntoy-coco-step-40-answer\n")  # names of jobs are not always UTF-8
    for _ in range(3):
        jobs.update()
    assert len(said) == 3 and "is evaluated by coco" in said[1] and "ended without results" in said[2]
    saved(submission.run_folder, 6)
    (here / "bin" / "sbatch").write_bytes(b"\x7fELF")  # cannot be executed
    (here / "bin" / "squeue").write_bytes(b"\x7fELF")
    for _ in range(3):
        jobs.update()
    assert len(said) == 4 and said[3].startswith("step 6 is not evaluated by coco: ")


def test_an_evaluation_that_ended_without_results_is_told_once(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    submission, said = written(here, coco="data=/benchmarks/coco shots=0,4", vqav2="data='/with space'"), list[str]()
    saved(submission.run_folder, 4)
    jobs = evaluations.Jobs(submission.run_folder, submission.folder, said.append)
    monkeypatch.setattr(evaluations, "LOOK", 0)
    queue = here / "queue"

    def told(text: str | None = None, times: int = 1) -> list[str]:
        queue.unlink(missing_ok=True)
        if text is not None:
            queue.write_text(text)
        said.clear()
        for _ in range(times):
            jobs.update()
        return said

    both = "toy\ntoy-coco-step-4-answer\ntoy-vqav2-step-4-collect\n"
    jobs.update()
    assert told(both, 3) == []
    assert told(None, 3) == [], "Slurm does not say"
    assert told("toy\n") == [], "results may be there and not be seen yet"
    assert told(both) == [] and told("toy\n") == []
    scored(submission.run_folder, "vqav2", 4, vqa=1.0)
    (line,) = told("toy\n", 3)
    logs, place = (submission.run_folder / "eval" / name for name in ("logs/coco-step-4", "coco/step-4"))
    start = f"evaluating step 4 by coco ended without results; logs {logs}; by hand: "
    assert line.startswith(start)
    change, _, command = line.removeprefix(start).partition(" && ")
    assert change == f"cd {submission.code}"
    words = shlex.split(command)
    assert words[:4] == [f"PYTHONPATH={submission.code}", sys.executable, "-u", "eval/coco.py"]
    assert {"step=4", f"out={place}", "data=/benchmarks/coco", "shots=0,4"} < set(words)
    assert not [word for word in words if word.startswith(("cluster=", "stage="))]
    saved(submission.run_folder, 6)
    assert told("toy\n") == [
        f"step 6 is evaluated by {name}: jobs {jobs}, logs {logs.parent}/{name}-step-6"
        for name, jobs in (("coco", "7 8 9"), ("vqav2", "10 11 12"))
    ]
    assert [line.partition(";")[0] for line in told("toy\n", 3)] == [
        f"evaluating step 6 by {name} ended without results" for name in ("coco", "vqav2")
    ]


def test_slurm_is_asked_seldom_and_only_for_what_is_under_way(here: Path) -> None:
    submission = written(here, coco="data=/benchmarks/coco")
    jobs = evaluations.Jobs(submission.run_folder, submission.folder, print)
    looks = here / "looks"
    for _ in range(3):
        jobs.update()
    assert not looks.exists()
    saved(submission.run_folder, 4)
    for _ in range(9):
        jobs.update()
    assert len(looks.read_text()) == 2, "before it was submitted, and a look"


# ---------------------------------------------------------------- processes


def test_processes_follow_one_another_and_may_fail(here: Path) -> None:
    """In low priority, in the snapshot; what is done is not done again."""
    submission, said = written(here, coco="data=/x", vqav2="data=/x"), list[str]()
    submission.code.mkdir()
    file = submission.folder / evaluations.FILE
    plan = json.loads(file.read_text())
    code = "import os, sys; print(os.nice(0), os.getcwd(), *sys.argv[1:]); sys.exit(sys.argv[1])"
    plan["benchmarks"]["coco"]["command"] = [
        sys.executable,
        "-c",
        code.replace("argv[1])", "argv[1] == '4')"),
        "@STEP@",
    ]
    plan["benchmarks"]["vqav2"]["command"] = ["/none"]
    file.write_text(json.dumps(plan))
    saved(submission.run_folder, 2, 4, 6)
    scored(submission.run_folder, "vqav2", 6, vqa=1.0)
    begun = evaluations.Processes(submission.run_folder, submission.folder, said.append, {})
    while begun.update():
        time.sleep(0.01)
    logs = submission.run_folder / "eval" / "logs"
    for step in (4, 6):
        assert (logs / f"coco-step-{step}.log").read_text() == f"19 {submission.code} {step}\n"
    assert [line.partition(":")[0] for line in said] == [
        "evaluating step 4 by coco failed (exit code 1)",
        "evaluating step 4 by vqav2 failed (exit code 127)",
    ]
    assert f"19 {submission.code} 4; its log: {logs}/coco-step-4.log; by hand: cd {submission.code} && " in said[0]
    assert said[0].endswith(" 4") and said[1].endswith(f"PYTHONPATH={submission.code} /none")
    assert not (logs / "vqav2-step-6.log").exists()


# ---------------------------------------------------------------- checkpoints and metrics


def test_a_checkpoint_stays_until_its_scores_are_there(here: Path) -> None:
    submission = written(here, coco="data=x", vqav2="data=x")
    run, awaited = submission.run_folder, evaluations.awaited(submission.run_folder, submission.folder)
    saved(run, 2, 4, 8, 10, 12)
    scored(run, "coco", 4, cider=1.0)
    scored(run, "coco", 8, cider=1.0)
    scored(run, "vqav2", 8, vqa=1.0)
    checkpoint.prune(run, keep=1, awaited=awaited)
    assert [checkpoint.step_of(path) for path in checkpoint.finished(run)] == [4, 12]
    scored(run, "vqav2", 4, vqa=1.0)
    checkpoint.prune(run, keep=1, awaited=awaited)
    assert [checkpoint.step_of(path) for path in checkpoint.finished(run)] == [12]


def test_a_line_of_metrics_has_each_score_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = {"loss": 2.5, "lr": 1e-3, "samples_per_s": 3.0, "data_wait": 0.5}

    def told(records: Records, step: int) -> dict[str, float]:
        records.write({"step": step, **values})
        return {name: value for name, value in lines(tmp_path)[-1].items() if name.startswith("eval/")}

    records = Records(toy(), tmp_path)
    assert told(records, 1) == {}
    scored(tmp_path, "coco", 2, cider=20.5)
    scored(tmp_path, "coco", 4, cider=30.5)
    assert told(records, 5) == {"eval/step": 2, "eval/coco/4shot/cider": 20.5}
    scored(tmp_path, "vqav2", 2, **{"vqa-accuracy": 40.0})
    assert told(records, 6) == {"eval/step": 2, "eval/vqav2/4shot/vqa-accuracy": 40.0}
    assert told(records, 7) == {"eval/step": 4, "eval/coco/4shot/cider": 30.5}
    assert told(records, 8) == {}
    again = Records(toy(), tmp_path)
    again.cut(6)  # the line with the scores of step 4 is gone
    assert told(again, 7) == {"eval/step": 4, "eval/coco/4shot/cider": 30.5}
    assert told(again, 8) == {}
    evaluations.place_of(tmp_path, "vqav2", 2).joinpath("results.json").write_text("{")
    assert told(again, 9) == {} and "damaged" in caplog.text


# ---------------------------------------------------------------- whole runs

# In place of evaluating: it takes for ever while there is a file, else there are results at once.
ANSWER = """
    import os, pathlib, time
    values = dict(word.split("=", 1) for word in sys.argv[1:])
    print("process", os.getpid(), flush=True)
    while pathlib.Path(os.environ["TEST_SLOW"]).exists():
        time.sleep(0.05)
    (folder := pathlib.Path(values["out"])).mkdir(parents=True)
    (folder / "results.json").write_text("{}")
"""


def test_what_ends_with_the_run_is_begun_again_with_it_and_once(tmp_path: Path) -> None:
    checkout = make_checkout(tmp_path / "checkout")
    make_store(str(tmp_path / "store"))
    script = checkout / "eval" / "coco.py"
    script.write_text(script.read_text().replace("\n    sys.exit(main(BENCHMARK))\n", ANSWER))
    data = questions.write_splits(tmp_path / "coco", test=captions(range(1)), train=captions(range(1, 2)))
    words = ["recipe=toy", "cluster=local", "nodes=1", "train.save_every=1", "evaluate.every=1", f"{COCO}=data={data}"]
    values = environment(checkout, tmp_path, TEST_SLOW=str(tmp_path / "slow"))
    (tmp_path / "slow").touch()
    command = [sys.executable, "-m", "hpc_mm.launch", *words]
    first = subprocess.Popen(command, env={**values, "TEST_SLEEP": "300"}, cwd="/", stdout=subprocess.DEVNULL)
    run = tmp_path / "runs" / "toy"
    log = run / "eval" / "logs" / "coco-step-1.log"
    while not log.exists() or not log.read_text():
        assert first.poll() is None
        time.sleep(0.02)
    first.terminate()
    assert first.wait() == 1
    assert attempt.read(run)["ending"] == attempt.ENDED
    assert not Path(f"/proc/{log.read_text().split()[-1]}").exists()
    (tmp_path / "slow").unlink()
    result = launch(values, *words)
    assert (result.returncode, result.stderr) == (0, "")
    assert len(log.read_text().splitlines()) == 2, "begun twice: lost, and well"
    assert not evaluations.Processes(run, run / "submissions" / "002", print, {}).update()
    assert [path.name for path in (run / "eval" / "coco").iterdir()] == ["step-1"]


@pytest.mark.chaos  # on Slurm, and a judge here, every time
def test_a_local_run_is_evaluated_while_it_trains(shapes: Path, tmp_path: Path) -> None:
    data = questions.write_splits(tmp_path / "coco", test=captions(range(3)), train=captions(range(3, 9)))
    words = f"data={data} shots=2 query_set=6 decoding.beams=1 decoding.max_new_tokens=4 examples=0"
    values = environment(ROOT, tmp_path, HPC_MM_STORE=str(shapes))
    command = ["nodes=1", "strategy=ddp", "train.steps=2", "train.save_every=1", "train.keep=1", "evaluate.every=2"]
    result = launch(values, "cluster=local", *small(*command, f"{COCO}={words}"))
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == ""
    run = tmp_path / "runs" / "toy"
    found = json.loads((run / "eval/coco/step-2/results.json").read_text())
    assert (found["benchmark"], found["step"], found["questions"]) == ("coco", "2", 3)
    assert not (run / "eval/coco/step-1").exists()
    assert not evaluations.Processes(run, run / "submissions/001", print, {}).plan.due()


def test_a_judge_is_evaluated_while_it_trains_as_by_hand(shapes: Path, tmp_path: Path) -> None:
    """Figures are in the next line of metrics.jsonl, here of a step that is done again."""
    values = environment(ROOT, tmp_path, HPC_MM_STORE=str(shapes))
    small = ["sources.captions.batch=8", "model.language.architecture.num_layers=1", "train.log_every=1"]
    words = [
        *JUDGE,
        *small,
        "cluster=local",
        "train.steps=2",
        "train.save_every=1",
        "train.warmup=1",
        "evaluate.every=2",
    ]
    run, data = tmp_path / "runs" / "clip_flant5_toy_stage1", "shapes/faithfulness"

    def train() -> list[dict[str, float]]:
        result = launch(values, *words, f"{PAIRS}=data={data} part=5")
        assert (result.returncode, result.stderr) == (0, ""), result.stdout
        return [{name: line[name] for name in line if name.startswith("eval/")} for line in lines(run)]

    assert train() == [{}, {}], "evaluated after the last line"
    assert [path.name for path in (run / "eval" / "pairs").iterdir()] == ["step-2"]
    by_hand = ["eval/vqascore.py", "benchmark=pairs", f"checkpoint={run}", f"data={data}", "cluster=local"]
    threads = node_environments(read_run(run), Submission(run, 1))[0]  # decide how products are rounded
    subprocess.run([sys.executable, *by_hand, f"out={tmp_path}"], check=True, cwd=ROOT, env={**values, **threads})
    for name in ("results.json", "scores.jsonl"):
        assert (tmp_path / name).read_bytes() == (run / "eval/pairs/step-2" / name).read_bytes()
    shutil.rmtree(checkpoint.path_of(run, 2))
    scores = json.loads((tmp_path / "results.json").read_text())["scores"]
    named = {f"eval/pairs/{entry['metric']}/{entry['figure']}": entry["score"] for entry in scores}
    assert train() == [{}, {"eval/step": 2, **named}] and len(named) == 6


def captions(numbers: range) -> dict[str, dict[str, Any]]:
    return {str(i): {"captions": [samples.sentence(random.Random(i * 5 + k)) for k in range(5)]} for i in numbers}
