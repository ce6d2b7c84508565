import os
import subprocess
from pathlib import Path

import chat_samples
import pytest
import samples
from checkout import ROOT
from tokenizers import Tokenizer, models, pre_tokenizers

from hpc_mm import launch, measure, slurm
from hpc_mm.config import PAD_TOKEN, Run
from hpc_mm.data.lengths import check_lengths, lengths_of
from hpc_mm.data.shards import ShardWriter, read_manifest
from hpc_mm.data.store import FolderStore, open_store
from hpc_mm.site import read_site

RECIPE = "clip_flant5_toy_stage2"
VALUES = {"start": "", "sources.questions.order": "length", "sources.questions.batch": "4"}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FolderStore:
    """A site's store with chats and a tokenizer, in the working directory's ``data``."""
    monkeypatch.setenv("HPC_MM_STORE", str(tmp_path / "data"))
    monkeypatch.setenv("HPC_MM_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    words = [PAD_TOKEN, "<unk>", "</s>", *samples.WORDS]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    (tmp_path / "data" / "shapes").mkdir(parents=True)
    made.save(str(tmp_path / "data" / "shapes" / "chat-tokenizer.json"))
    found = open_store(str(tmp_path / "data" / "shapes" / "train-chats"), make=True)
    with ShardWriter(found, "chats", max_bytes=10_000) as writer:
        for number in range(20):
            writer.add(chat_samples.chat(number, images=number % 2))
    assert len(read_manifest(found)) > 3
    assert isinstance(found, FolderStore)
    return found


def words(**more: str) -> list[str]:
    return [f"{key}={value}" for key, value in {"recipe": RECIPE, "cluster": "local", **VALUES, **more}.items()]


def the_run() -> Run:
    return launch.resolve(RECIPE, VALUES, read_site())


def files(store: FolderStore) -> dict[str, bytes]:
    return {entry.key: store.read(entry.key) for entry in store.list("lengths/")}


def test_a_run_is_refused_until_its_samples_are_counted(
    store: FolderStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    launched = ["recipe=" + RECIPE, "cluster=local", *(f"{key}={value}" for key, value in VALUES.items())]
    assert launch.main(launched) == 2
    assert "sources.questions: order=length goes by lengths" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    assert measure.main(words()) == 0
    assert "lengths to count: questions (" in capsys.readouterr().out
    source, language = the_run().sources["questions"], the_run().model.language
    check_lengths(source, language)
    lengths = lengths_of(source, language)
    assert lengths is not None and lengths.images.tolist() == [number % 2 for number in range(20)]
    before = files(store)
    assert measure.main(words()) == 0
    assert capsys.readouterr().out == f"{RECIPE}: no lengths are to be counted\n"
    assert files(store) == before


def test_tasks_make_the_same_files_and_a_frozen_run_too(store: FolderStore, tmp_path: Path) -> None:
    assert measure.main(words()) == 0
    whole = files(store)
    for key in whole:
        store.delete(key)
    assert measure.main(words(tasks="3", task="1")) == 0  # and then the others were killed
    assert 0 < len(files(store)) < len(whole)
    assert measure.main(words(tasks="3", task="0")) == measure.main(words(tasks="3", task="2")) == 0
    assert files(store) == whole
    store.delete(next(iter(whole)))  # the other task finds nothing to do, and ends at once
    (tmp_path / "runs" / RECIPE).mkdir(parents=True)
    (tmp_path / "runs" / RECIPE / "run.json").write_text(the_run().model_dump_json())
    assert measure.main([f"run={tmp_path / 'runs' / RECIPE}", "cluster=local", "tasks=2"]) == 0
    assert files(store) == whole


def test_the_array_on_the_screen_has_whole_addresses(
    store: FolderStore, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job runs in another folder than the one where relative names were right."""
    monkeypatch.setattr(slurm, "is_here", lambda: False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HPC_MM_STORE", "data")
    assert measure.main(words(cluster="print", tasks="4", **{"slurm.time": "1:00:00"})) == 0
    script = capsys.readouterr().out
    for line in (f"#SBATCH --job-name={RECIPE}-lengths", "#SBATCH --array=0-3", "#SBATCH --time=1:00:00"):
        assert line in script
    command = next(line for line in script.splitlines() if "sbatch/stage.sh" in line)
    for word in (f"data={store.address} ", f"tokenizer={tmp_path}/data/shapes/chat-tokenizer.json ", "tasks=4 "):
        assert word in command
    monkeypatch.chdir(ROOT)
    environment = {**os.environ, "HPC_MM_STORE": "elsewhere", "SLURM_ARRAY_TASK_ID": "2"}
    ended = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert len(files(store)) == len(read_manifest(store).names[2::4])


def test_nothing_goes_by_length(store: FolderStore, capsys: pytest.CaptureFixture[str]) -> None:
    assert measure.main(words(**{"sources.questions.order": "random"})) == 0
    assert capsys.readouterr().out == f"{RECIPE}: no lengths are to be counted\n"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"recipe": ""}, "recipe=NAME or run=FOLDER is missing"),
        ({"run": "runs/x"}, "recipe=NAME or run=FOLDER is missing"),
        ({"recipe": "clip_flant5_toy_stage3"}, "clip_flant5_toy_stage2"),
        ({"sources.questions.ordr": "length"}, "order"),
        ({"tasks": "0"}, "tasks"),
        ({"tasks": "2", "task": "2"}, "task=2 must be below tasks=2"),
        ({"cluster": "slrum"}, "slurm"),
        ({"sources.questions.data": "nowhere"}, "no folder"),
        ({"model.language.tokenizer": "store:none.json"}, "there is no none.json"),
    ],
)
def test_mistakes(store: FolderStore, more: dict[str, str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert measure.main(words(**more)) == 2
    told = capsys.readouterr().err
    assert said in told and told.count("\n") == 1
    assert not files(store)
