"""OK-VQA stems equal OpenFlamingo's, on small data of our own in NLTK's formats; missing data are told in a line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT
from peers import peer

from hpc_mm.ok_vqa import DATA, STEMS

VERBS = {"run": "running", "swim": "swimming", "ski": "skiing", "sing": "singing", "bring": "bringing"}
EXCEPTIONS = {"running": "run", "swimming": "swim"}  # WordNet's verb.exc
PLURALS = ["dogs", "boxes", "children", "buses", "jeans", "Beatles", "leaves", "glasses"]
TEXTS = [
    *("dogs", "dogs running", "a box of boxes", "riding the buses", "Dogs", "morning sing-along", "spring", "jeans"),
    *(
        "children's swimming pool",
        "the Beatles singing.",
        "men's tennis; Christmas",
        "bringing (leaves)",
        "it isn't",
        "",
    ),
    *("skiing, skating", "Mr. Smith's glasses. He runs", "buildings", "hot\ndogs"),
]
PROGRAM = """
import json, sys
from pathlib import Path
sys.path.insert(0, "tests")
from hpc_mm import ok_vqa
from hpc_mm.config import ConfigError
texts = json.load(sys.stdin)
try:
    ours = [ok_vqa.stem(text) for text in texts]
except ConfigError as error:
    sys.exit(str(error))
from peers import peer
print(json.dumps([ours, [peer("open_flamingo", "eval/ok_vqa_utils.py").stemmer.stem(text) for text in texts]]))
"""


def stemmed(data: Path, home: Path) -> "subprocess.CompletedProcess[str]":
    """In a process of its own that finds no other data, and no way out of the machine to fetch some."""
    environment = {**os.environ, "NLTK_DATA": str(data), "HOME": str(home), "PYTHONPATH": str(ROOT)}
    environment |= {"https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(TEXTS),
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def data(tmp_path: Path) -> Path:
    files = {
        "tokenizers/punkt_tab/english/collocations.tab": "",
        "tokenizers/punkt_tab/english/sent_starters.txt": "",
        "tokenizers/punkt_tab/english/abbrev_types.txt": "mr\n",
        "tokenizers/punkt_tab/english/ortho_context.tab": "",
        "corpora/wordnet/lexnames": "00\tverb.all\t2\n",
        "corpora/wordnet/index.sense": "",
        "corpora/wordnet/index.verb": "".join(f"{verb} v 1 0 1 0 00000000\n" for verb in VERBS),
        "corpora/wordnet/verb.exc": "".join(f"{form} {verb}\n" for form, verb in EXCEPTIONS.items()),
        **{f"corpora/wordnet/data.{part}": "" for part in ("adj", "adv", "noun", "verb")},
        **{f"corpora/wordnet/index.{part}": "" for part in ("adj", "adv", "noun")},
        **{f"corpora/wordnet/{part}.exc": "" for part in ("adj", "adv", "noun")},
    }
    tagger = {
        "weights": {"bias": {"NN": 1.0}},
        "tagdict": dict.fromkeys(PLURALS, "NNS"),
        "classes": ["NN", "NNS", "NNPS"],
    }
    tagger["tagdict"]["Beatles"] = "NNPS"
    name = "averaged_perceptron_tagger_eng"
    files |= {f"taggers/{name}/{name}.{part}.json": json.dumps(value) for part, value in tagger.items()}
    for path, text in files.items():
        (tmp_path / "nltk" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "nltk" / path).write_text(text)
    return tmp_path / "nltk"


def test_stems_equal_openflamingos(data: Path, tmp_path: Path) -> None:
    ended = stemmed(data, tmp_path)
    assert ended.returncode == 0, ended.stderr
    ours, theirs = json.loads(ended.stdout)
    assert ours == theirs
    found = dict(zip(TEXTS, ours, strict=True))
    assert found["dogs running"] == "dog run"
    assert found["riding the buses"] == "ride the bus"
    assert found["the Beatles singing."] == "the Beatle sing ."
    assert found["spring"] == "spring"
    assert found["jeans"] == "jean"


def test_exceptions_are_openflamingos(data: Path) -> None:
    assert peer("open_flamingo", "eval/ok_vqa_utils.py")._MANUAL_MATCHES == STEMS


def test_missing_data_are_told_in_one_line(tmp_path: Path) -> None:
    ended = stemmed(tmp_path, tmp_path)
    assert ended.returncode == 1
    assert ended.stderr == (
        f"NLTK's {', '.join(DATA)}, which stem OK-VQA's answers, cannot be found or fetched: where there is a "
        f"network run python -m nltk.downloader -x -d FOLDER {' '.join(DATA)}, then set NLTK_DATA=FOLDER here\n"
    )


def test_only_what_is_missing_is_named(data: Path, tmp_path: Path) -> None:
    (data / "corpora/wordnet").rename(data / "corpora/elsewhere")
    ended = stemmed(data, tmp_path)
    assert ended.returncode == 1
    assert ended.stderr.startswith("NLTK's wordnet, which stem")
