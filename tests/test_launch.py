"""The launcher without a cluster: the printed job, bad input, precedence, the run folder, and local runs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkout import ROOT, environment, facts, launch, make_checkout, make_store, write_train

from hpc_mm import attempt
from hpc_mm.command import STRATEGIES, uses_deepspeed
from hpc_mm.command import environment as job_environment
from hpc_mm.launch import main, resolve
from hpc_mm.local import _end, _running
from hpc_mm.progress import Metrics
from hpc_mm.site import read_site
from hpc_mm.slurm import minutes
from hpc_mm.submission import frozen_tokenizer, next_submission, withdraw, write

GOLD = ROOT / "tests" / "gold" / "omnicorpus-8-nodes.sbatch"


@pytest.fixture
def user(tmp_path: Path) -> dict[str, str]:
    """A user with a checkout and a store, as an environment."""
    checkout = make_checkout(tmp_path / "checkout")
    make_store(str(tmp_path / "store"))
    return environment(checkout, tmp_path)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This process with an empty site, no Slurm, and runs and a store below a new folder."""
    for name in [name for name in os.environ if name.startswith(("SBATCH_", "HPC_MM_"))]:
        monkeypatch.delenv(name)
    for name, value in environment(ROOT, tmp_path, PATH=str(Path(sys.executable).parent)).items():
        monkeypatch.setenv(name, value)
    return tmp_path


# ---------------------------------------------------------------- print


def test_the_printed_job_of_omnicorpus(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HPC_MM_RUNS", "/scratch/runs")
    monkeypatch.setenv("HPC_MM_STORE", "s3://corpora")
    assert main(["recipe=omnicorpus", "nodes=8", "cluster=print"]) == 0
    printed = capsys.readouterr().out.replace(str(Path(sys.executable).parent), "/home/me/hpc_mm/.venv/bin")
    assert printed == GOLD.read_text(), f"if this change is meant, write the printed job into {GOLD}"
    assert GOLD.read_text().rstrip() in (ROOT / "README.md").read_text()
    assert subprocess.run(["/bin/bash", "-n"], input=printed, text=True).returncode == 0


def test_print_writes_nothing_and_imports_no_torch(here: Path) -> None:
    before = sorted(here.rglob("*"))
    code = (
        "import sys; from hpc_mm.launch import main; main(sys.argv[1:]); assert not {'torch', 'boto3'} & {*sys.modules}"
    )
    words = [sys.executable, "-c", code, "recipe=toy", "cluster=print"]
    assert subprocess.run(words, capture_output=True).returncode == 0
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize("argument", ["--help", None])
def test_help_imports_no_pydantic(argument: str | None) -> None:
    code = "import sys; from hpc_mm.launch import main; main(sys.argv[1:]); assert 'pydantic' not in sys.modules"
    words = [sys.executable, "-c", code, *([argument] if argument else [])]
    result = subprocess.run(words, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "train.learning_rate" in result.stdout and "toy" in result.stdout


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["gpus_per_node=0", "sources.documents.batch=8", "sources.pairs.batch=8"], "export ACCELERATE_USE_CPU=true"),
        (["slurm.memory=0"], "#SBATCH --mem=0"),
        (["slurm.account=lab", "slurm.qos=high"], "#SBATCH --account=lab\n#SBATCH --qos=high"),
        (["slurm.exclude=node[3-5]"], "#SBATCH --exclude='node[3-5]'"),
        (["slurm.extra.exclusive="], "#SBATCH --exclusive\n"),
        (["slurm.extra.mail-type=END"], "#SBATCH --mail-type=END\n"),
        (["slurm.container=nvcr.io#nvidia/pytorch:25.01"], "--container-image='nvcr.io#nvidia/pytorch:25.01'"),
        (["slurm.container=image", "sources.documents.data=/corpora/mine"], "/corpora/mine:/corpora/mine,"),
        (["slurm.container=image", "model.vision.pretrained=/weights/vit.pt"], "/weights:/weights"),
        (["precision=fp32"], "--mixed_precision no "),
        (["slurm.cpus_per_task=64"], "export OMP_NUM_THREADS=8\n"),
    ],
)
def test_config_reaches_the_job(here: Path, capsys: pytest.CaptureFixture[str], words: list[str], line: str) -> None:
    assert main(["recipe=omnicorpus", "nodes=8", "strategy=ddp", "cluster=print", *words]) == 0
    assert line in capsys.readouterr().out


def test_a_run_on_gpus_asks_for_them_and_one_on_cpus_does_not(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["recipe=omnicorpus", "cluster=print"])
    assert "#SBATCH --gpus-per-node=8" in capsys.readouterr().out
    main(["recipe=toy", "cluster=print"])
    assert "--gpus-per-node" not in capsys.readouterr().out


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["recipe=omnicorpsu"], "unknown recipe 'omnicorpsu': did you mean omnicorpus?"),
        (["nodes=2"], "recipe=NAME is missing; known: clip_flant5_toy_stage1, "),
        (["recipe=toy", "train.step=5"], "unknown key 'train.step': did you mean train.steps?"),
        (["recipe=toy", "train.steps=many"], "train.steps='many'"),
        (["recipe=toy", "precision=fp16"], "'bf16' or 'fp32'"),
        (["recipe=toy", "nodes=0"], "nodes='0': input should be greater than or equal to 1"),
        (["recipe=toy", "nodes=5"], "sources.documents.batch=4 leaves ranks without samples: 5 nodes"),
        (["recipe=toy", "slurm.time=tomorrow"], "slurm.time='tomorrow'"),
        (["recipe=toy", "cluster=slrm"], "unknown cluster 'slrm': did you mean slurm?"),
        (["recipe=toy", "cluster=slurm"], "cluster=slurm: sbatch is not on PATH"),
        (["recipe=toy", "strategy=zero4"], "unknown strategy 'zero4': did you mean zero3?"),
        (["recipe=toy", "strategy=/none/mine.yaml"], "strategy='/none/mine.yaml': there is no such file"),
        (["recipe=toy", "train"], "'train' is not key=value"),
        (["recipe=toy", "nodes=1", "nodes=2"], "nodes is given twice"),
        (["recipe=toy", "gpus_per_node=1"], "needs 2 GPUs, and this machine has 0"),
        (["recipe=toy", "slurm.extra.nodes=3", "cluster=print"], "the launcher sets --nodes itself"),
        (["recipe=toy", "slurm.extra.comment=a\nrm -rf x", "cluster=print"], "a line break cannot stand"),
        (["recipe=toy"], "sources.documents: no folder"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("hpc_mm: ") and error.count("\n") == 1
    assert not (here / "runs").exists()


def test_shards_that_are_empty_or_cut_are_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_store(str(here / "store"))
    pairs = here / "store" / "shapes" / "train-pairs"
    tar = next(pairs.glob("*.tar"))
    tar.write_bytes(tar.read_bytes()[:-512])
    assert main(["recipe=toy"]) == 2
    assert f"{tar.name} has" in capsys.readouterr().err
    next(pairs.glob(f"{tar.name}.*")).unlink()  # as shards that others made
    chats = ["sources.questions.data=shapes/train-pairs", "sources.questions.order=length"]
    assert main(["recipe=clip_flant5_toy_stage2", *chats]) == 2
    assert "2 problems in all" in capsys.readouterr().err, "not that it has no lengths"
    (pairs / "index.json").write_text("[]")
    assert main(["recipe=toy"]) == 2
    assert "sources.pairs: the shards at" in capsys.readouterr().err
    assert not (here / "runs").exists()


def test_weights_that_are_not_there_are_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_store(str(here / "store"))
    assert main(["recipe=toy", "model.weights=zhiqiulin/clip-flant5-xl"]) == 2
    assert capsys.readouterr().err == (
        "hpc_mm: model.weights=zhiqiulin/clip-flant5-xl: there is no such file or folder\n"
    )
    assert not (here / "runs").exists()


# ---------------------------------------------------------------- precedence


def test_command_line_over_environment_over_site_over_recipe(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "site.toml").write_text('store = "/site"\n[slurm]\npartition = "site"\naccount = "site"\nqos = "site"\n')
    monkeypatch.delenv("HPC_MM_STORE")
    monkeypatch.setenv("SBATCH_ACCOUNT", "environment")
    monkeypatch.setenv("SBATCH_QOS", "environment")
    run = resolve("toy", {"slurm.qos": "line", "sources.pairs.data": "other"}, read_site())
    assert (run.slurm.partition, run.slurm.account, run.slurm.qos) == ("site", "environment", "line")
    assert run.slurm.memory == "4G"  # the recipe's
    assert run.sources["pairs"].data == "/site/other"
    monkeypatch.setenv("HPC_MM_STORE", "s3://bucket/corpora")
    run = resolve("toy", {}, read_site())
    assert run.sources["pairs"].data == "s3://bucket/corpora/shapes/train-pairs"
    assert run.model.language.tokenizer == "s3://bucket/corpora/shapes/tokenizer.json"


@pytest.mark.parametrize(
    ("time", "expected"),
    [("90", 90), ("90:30", 90.5), ("1:30:00", 90), ("2-0", 2880), ("1-02:03", 1563), ("1-00:00:30", 1440.5)],
)
def test_minutes_of_slurm_times(time: str, expected: float) -> None:
    assert minutes(time) == expected


# ---------------------------------------------------------------- strategies


@pytest.mark.parametrize("file", sorted(STRATEGIES.glob("*.yaml")), ids=lambda file: file.stem)
def test_strategy_files_leave_to_others_what_is_theirs(file: Path) -> None:
    lines = file.read_text().splitlines()
    assert all("#" in line or line.endswith(":") for line in lines), "one comment per line"
    for word in ("num_machines", "num_processes", "mixed_precision", "gradient_clipping", "gradient_accumulation"):
        assert not any(word in line.split("#")[0] for line in lines)
    assert uses_deepspeed(file.stem) == file.stem.startswith("zero")


def test_all_strategies_are_there() -> None:
    expected = {"ddp", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload", "fsdp"}
    assert {file.stem for file in STRATEGIES.glob("*.yaml")} == expected


def test_threads_are_never_zero(here: Path) -> None:
    assert job_environment(resolve("toy", {}, read_site()), 0)["OMP_NUM_THREADS"] == "1"


# ---------------------------------------------------------------- local runs


def test_a_local_run_from_start_to_resumption(user: dict[str, str], tmp_path: Path) -> None:
    words = ["recipe=toy", "cluster=local", "strategy=ddp", "train.steps=600"]
    result = launch(user, *words)
    assert result.returncode == 0, result.stderr
    run = tmp_path / "runs" / "toy"
    ranks = [facts(run, rank) for rank in range(2)]
    assert [rank["WORLD_SIZE"] for rank in ranks] == ["2", "2"]
    assert ranks[0]["ACCELERATE_USE_CPU"] == "true"
    assert Path(ranks[1]["file"]).is_relative_to(run / "submissions" / "001" / "code")
    assert "step 20/600  loss 1.500  3.0 samples/s" in result.stdout
    assert (run / "submissions" / "001" / "command.txt").read_text().count("accelerate-launch") == 2
    frozen = json.loads((run / "run.json").read_text())
    assert frozen["model"]["language"]["tokenizer"] == str(run / "tokenizer.json")

    refused = launch(user, *words[:-1], "train.steps=700", "nodes=1")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert "train.steps: 600 -> 700" in refused.stderr and "nodes" not in refused.stderr

    write_train(tmp_path / "checkout", 2)
    again = launch(user, *words, "loader.workers=1", "slurm.time=5")
    assert again.returncode == 0, again.stderr
    assert "loader.workers: 0 -> 1" in again.stdout and "slurm.time" in again.stdout
    assert facts(run, 0)["version"] == 2
    assert sorted(path.name for path in (run / "submissions").iterdir()) == ["001", "002"]
    assert json.loads((run / "run.json").read_text())["loader"]["workers"] == 1

    fewer = launch(user, *words, "nodes=1")  # micro-steps keep a rank's share of samples as it was
    assert fewer.returncode == 0, fewer.stderr
    for said in ("nodes: 2 -> 1", "train.accumulate: 1 -> 2", "over 1 ranks x 2 micro-steps"):
        assert said in fewer.stdout


def test_another_tokenizer_of_the_same_name_is_another_run(user: dict[str, str], tmp_path: Path) -> None:
    words = ["recipe=toy", "cluster=local", "strategy=ddp", "nodes=1"]
    assert launch(user, *words).returncode == 0
    (tmp_path / "store" / "shapes" / "tokenizer.json").write_text('{"other": 1}')
    refused = launch(user, *words)
    assert refused.returncode == 2
    assert "model.language.tokenizer: the file has other contents now" in refused.stderr


def test_a_dead_node_ends_the_others(user: dict[str, str], tmp_path: Path) -> None:
    result = launch({**user, "TEST_FAILS": "1", "TEST_SLEEP": "600"}, "recipe=toy", "cluster=local", "strategy=ddp")
    log = tmp_path / "runs" / "toy" / "submissions" / "001" / "node1.log"
    assert result.returncode == 1
    assert "the reason of the failure" in result.stderr
    assert f"node 1 failed (exit code 1); its log: {log}" in result.stderr
    assert not trainers(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_all_nodes(user: dict[str, str], tmp_path: Path, number: int) -> None:
    command = [sys.executable, "-m", "hpc_mm.launch", "recipe=toy", "cluster=local", "strategy=ddp"]
    process = subprocess.Popen(
        command,
        env={**user, "TEST_SLEEP": "600"},
        cwd="/",
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # nohup and & leave it ignored, which we honour
    )
    while not all((tmp_path / "runs" / "toy" / f"rank{rank}.json").exists() for rank in range(2)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    held = launch(user, "recipe=toy", "cluster=local", "strategy=ddp")
    assert held.returncode == 2 and "another process on this machine" in held.stderr
    process.send_signal(number)
    said = process.communicate()[1]
    assert "goes on from the newest checkpoint" in said and "Traceback" not in said
    assert process.returncode == 1
    assert attempt.read(tmp_path / "runs" / "toy")["ending"] == attempt.ENDED
    assert not trainers(tmp_path)


def test_ranks_that_are_still_importing_hear_the_signal_later(user: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "runs" / "toy"
    process = subprocess.Popen(
        [sys.executable, "-m", "hpc_mm.launch", "recipe=toy", "cluster=local", "strategy=ddp"],
        env={**user, "TEST_SLEEP": "600", "TEST_IMPORTS": "4"},
        cwd="/",
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not all((run / f"importing{rank}").exists() for rank in range(2)):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 1
    assert attempt.read(run)["ending"] == attempt.ENDED


def test_a_killed_launcher_leaves_the_run_locked(user: dict[str, str], tmp_path: Path) -> None:
    words = ["recipe=toy", "cluster=local", "strategy=ddp"]
    process = subprocess.Popen(
        [sys.executable, "-m", "hpc_mm.launch", *words],
        env={**user, "TEST_SLEEP": "600"},
        cwd="/",
        stdout=subprocess.DEVNULL,
    )
    while not all((tmp_path / "runs" / "toy" / f"rank{rank}.json").exists() for rank in range(2)):
        assert process.poll() is None
        time.sleep(0.1)
    process.kill()
    process.wait()
    try:
        again = launch(user, *words)
    finally:
        for group in _running(tmp_path / "runs" / "toy" / "submissions" / "001" / "code"):
            os.killpg(group, signal.SIGKILL)
    assert again.returncode == 2 and "another process on this machine" in again.stderr


def test_workers_of_a_dead_accelerate_end_with_the_run(tmp_path: Path) -> None:
    """torch starts each in a session of its own, so no signal to accelerate's group reaches it."""
    orphan = "import subprocess, sys; subprocess.Popen(['sleep', '600'], start_new_session=True)"
    node = subprocess.Popen(
        [sys.executable, "-c", orphan], env={**os.environ, "PYTHONPATH": str(tmp_path)}, start_new_session=True
    )
    node.wait()
    assert len(_running(tmp_path)) == 1
    _end([node], tmp_path)
    while _running(tmp_path):
        time.sleep(0.01)


def trainers(folder: Path) -> list[str]:
    """Processes that still run this folder's code."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = file.read_bytes().decode(errors="replace")
        except OSError:
            continue  # it has ended since
        if str(folder / "runs") in words:
            found.append(words.replace("\0", " "))
    return found


def test_metrics_are_read_as_whole_lines(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n')
    metrics = Metrics(file)  # what a run had written before is not news
    with file.open("a") as stream:
        stream.write('{"step": 2}\n{"st')
        stream.flush()
        assert metrics.news() == [{"step": 2}]
        stream.write('ep": 3}\n')
    assert metrics.news() == [{"step": 3}]
    assert metrics.news() == []


def test_metrics_that_a_run_cuts_and_writes_on_are_read_from_their_cut(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps({"step": step, "time": 1.0}) + "\n" for step in range(9)))
    metrics = Metrics(file)
    again = {"step": 5, "time": time.time() + 1, "loss": "a line that makes the file longer than it was" * 9}
    aside = tmp_path / "aside"
    aside.write_text(json.dumps({"step": 4, "time": 1.0}) + "\n" + json.dumps(again) + "\n")
    aside.replace(file)
    assert metrics.news() == [again]
    assert metrics.news() == []


# ---------------------------------------------------------------- the run folder


def test_withdrawing_a_refused_job_leaves_what_was_there(here: Path) -> None:
    run = resolve("toy", {}, read_site())
    first = next_submission(here / "runs" / "toy")
    write(run, b"{}", None, first, {"job.sbatch": ""})
    before = (here / "runs" / "toy" / "run.json").read_bytes()
    second = next_submission(here / "runs" / "toy")
    write(run.model_copy(update={"nodes": 1}), b"{}", None, second, {"job.sbatch": ""})
    withdraw(second, before)
    assert (here / "runs" / "toy" / "run.json").read_bytes() == before and not second.folder.exists()
    withdraw(first, None)
    assert not (here / "runs" / "toy").exists()


def test_a_tokenizer_beside_the_run_folder_is_not_inside_it(here: Path) -> None:
    (here / "toy-2").mkdir()
    (here / "toy-2" / "tokenizer.json").write_text("{}")
    address = str(here / "toy-2" / "tokenizer.json")
    run = resolve("toy", {"model.language.tokenizer": address}, read_site())
    frozen, content = frozen_tokenizer(run, here / "toy")
    assert content == b"{}" and frozen.model.language.tokenizer == str(here / "toy" / "tokenizer.json")


def test_what_disks_refuse_is_one_line(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_store(str(here / "store"))
    (here / "file").touch()
    monkeypatch.setenv("HPC_MM_RUNS", str(here / "file" / "runs"))
    assert main(["recipe=toy", "cluster=local"]) == 2
    assert "cannot be made: Not a directory; set HPC_MM_RUNS" in capsys.readouterr().err
    (here / "mine.yaml").write_bytes(b"\xff\xfe\xfa")
    assert main(["recipe=toy", "cluster=print", f"strategy={here / 'mine.yaml'}"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


# ---------------------------------------------------------------- the console command


def test_the_console_command_knows_its_verbs() -> None:
    command = [sys.executable, "-m", "hpc_mm"]
    assert "launch" in subprocess.run([*command, "--help"], capture_output=True, text=True).stdout
    wrong = subprocess.run([*command, "lanch"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "did you mean launch?" in wrong.stderr
    help_page = subprocess.run([*command, "launch", "--help"], capture_output=True, text=True)
    assert help_page.returncode == 0 and "Recipes" in help_page.stdout
