"""The page of an evaluation: whole in one file; in a browser it sorts, searches and shows, and asks nobody."""

import base64
import hashlib
import io
import json
import math
import re
import socket
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import samples
from browser import Browser, opened
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Picture

from hpc_mm.gallery import Example, Shot, page, thumbnail

EVIL = "</script><!--<script><img src=x onerror=alert(1)>&lt;\u2028\"'"
OWN = "not an origin"  # what a browser's log names as initiator of its own requests, such as for updates
COLORS = ("red", "green", "blue")
texts = st.one_of(
    st.text(st.characters()), st.sampled_from([EVIL, "<!--", "</SCRIPT >", "]]>", "\ud800", "\0", "__proto__"])
)
shots = st.builds(Shot, texts, texts, texts)
some_examples = st.builds(
    Example,
    *(texts, texts, texts, st.lists(shots, max_size=2).map(tuple), texts, st.lists(texts, max_size=2).map(tuple)),
    *(st.floats(0, 10), texts),
)


class Scripts(HTMLParser):
    """What a browser would see."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.policy, self.inside, self.text = "", False, ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "script":
            self.scripts.append((values, ""))
        if tag == "meta" and values.get("http-equiv") == "Content-Security-Policy":
            self.policy = str(values["content"])
        self.inside = tag == "script"

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        else:
            self.text += data


def score(**values: Any) -> dict[str, Any]:
    trials = [{"seed": seed, "folder": f"s{seed}", "score": seed / 2, "low": 1.0, "high": 2.0} for seed in (42, 43)]
    return {
        **{"shots": 4, "selection": "random", "protocol": "coco-test-5@aaaa/cider", "values": {}, "metric": "cider"},
        **{"score": 79.53, "low": 77.12, "high": 81.94, "others": {"bleu4": 21.34, "spice": 17.0}, "trials": trials},
        **values,
    }


def example(number: int) -> Example:
    color = COLORS[number % 3]
    shot = Shot(f"shot{number % 5}", "which shape?", f"shape{number}")
    text_alone = Shot("", "which size?", "large")
    return Example(
        id=f"q{number}",
        image=f"image{number}",
        question="which colour?",
        demonstrations=(shot, text_alone),
        prediction=color if number % 2 else "",
        truth=("red", "red", "dark red"),
        score=(number * 7 % 11) / 10,
        trial=f"4 shots, seed {42 + number % 2}",
    )


@pytest.fixture(scope="module")
def jpeg() -> bytes:
    return thumbnail(samples.encoded(samples.picture(1, 400, 200)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, jpeg: bytes) -> Path:
    made = tmp_path_factory.mktemp("gallery")
    asked = [example(number) for number in range(120)]
    images = {key: jpeg for each in asked for key in (each.image, each.demonstrations[0].image)}
    images["image3"] = thumbnail(b"no picture at all")
    (made / "index.html").write_text(page("coco at step 30", [score()], asked, images), encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def browser(folder: Path) -> Iterator[Browser]:
    with opened(folder / "profile") as made:
        yield made


@pytest.fixture
def tab(browser: Browser, folder: Path) -> Browser:
    browser.visit("about:blank")  # else only the fragment of the address would change
    browser.visit((folder / "index.html").as_uri())
    return browser


def column(tab: Browser, name: str) -> list[str]:
    found: list[str] = tab.run(f"[...document.querySelectorAll('#rows .{name}')].map((cell) => cell.textContent)")
    return found


def said(tab: Browser, place: int) -> list[str]:
    code = f"[...document.querySelectorAll('#rows tr')].map((row) => row.cells[{place}].textContent)"
    found: list[str] = tab.run(code)
    return found


def count(tab: Browser) -> str:
    return str(tab.run("document.getElementById('count').textContent"))


def search(tab: Browser, words: str) -> None:
    """As a person does: a click into the field, letters, the tabulator."""
    tab.run("document.getElementById('search').focus()")
    tab.ask("Input.insertText", text=words)
    tab.press("Tab", 9)


# ---------------------------------------------------------------- the text of the page


@given(st.lists(some_examples, max_size=3), st.dictionaries(texts, st.binary(max_size=4)))
def test_any_text_comes_back_as_itself(examples: list[Example], images: dict[str, bytes]) -> None:
    found = Scripts(page("title", [], examples, images))
    (kind, data), (code, _) = found.scripts
    assert kind == {"type": "application/json", "id": "data"} and not code
    assert "<" not in data and data.isascii()
    read = json.loads(data)
    back = [
        Example(
            **{
                **each,
                "demonstrations": tuple(Shot(**shot) for shot in each["demonstrations"]),
                "truth": tuple(each["truth"]),
            }
        )
        for each in read["examples"]
    ]
    assert back == examples
    shown = {each.image for each in examples} | {shot.image for each in examples for shot in each.demonstrations}
    assert {key: base64.b64decode(text) for key, text in read["images"].items()} == {
        key: data for key, data in images.items() if data and key in shown
    }


def test_only_the_pages_own_script_may_run() -> None:
    found = Scripts(page(EVIL, [score(metric=EVIL, protocol=EVIL, others={EVIL: 1.0})], [], {}))
    digest = base64.b64encode(hashlib.sha256(found.scripts[1][1].encode()).digest()).decode()
    rules = dict(rule.strip().split(" ", 1) for rule in found.policy.split(";"))
    assert rules["script-src"] == f"'sha256-{digest}'"
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data:"
    assert len(found.scripts) == 2 and found.text.count(EVIL) == 5  # title, heading, three cells


def test_an_image_is_there_once(jpeg: bytes) -> None:
    asked = [example(0), example(0)]
    text = page("title", [], asked, {"image0": jpeg, "unused": b"unused"})
    assert text.count(base64.b64encode(jpeg).decode()) == 1
    assert base64.b64encode(b"unused").decode() not in text
    assert page("title", [], asked, {"unused": b"unused", "image0": jpeg}) == text


def test_scores_are_told() -> None:
    one = score(selection="rices", low=-math.inf, high=math.inf, others={}, trials=[{"seed": None, "score": 1.0}])
    text = page("title", [score(), one, score(low=None, high=None)], [], {})
    cells = re.findall('<td role="cell" data-label="(.*?)">(.*?)</td>', text)
    rows = [{name: re.sub("<.*?>", "", told) for name, told in cells[start : start + 8]} for start in (0, 8, 16)]
    assert rows[0] == {
        **{"Shots": "4", "Selection": "random", "Metric": "cider", "Score": "79.5", "95 % interval": "77.1 to 81.9"},
        **{"Seeds": "42 (21.0), 43 (21.5)", "Other metrics": "bleu4 21.3, spice 17.0"},
        "Protocol": "coco-test-5@aaaa/cider",
    }
    changed = {"Selection": "rices", "95 % interval": "not known", "Seeds": "none", "Other metrics": "none"}
    assert rows[1] == {**rows[0], **changed}
    assert rows[2] == {**rows[0], "95 % interval": "not known"}


@pytest.mark.parametrize(("size", "small"), [((640, 480), (160, 120)), ((9, 400), (4, 160)), ((40, 30), (40, 30))])
def test_a_thumbnail_is_a_small_jpeg(size: tuple[int, int], small: tuple[int, int]) -> None:
    data = samples.encoded(samples.picture(5, *size))
    with Picture.open(io.BytesIO(thumbnail(data))) as image:
        assert (image.format, image.size) == ("JPEG", small)
    assert thumbnail(data) == thumbnail(data)


def test_a_thumbnail_is_upright() -> None:
    exif = Picture.Exif()
    exif[0x0112] = 6  # a camera that was held upright
    data = samples.encoded(samples.picture(5, 640, 480), "JPEG", exif=exif)
    with Picture.open(io.BytesIO(thumbnail(data))) as image:
        assert image.size == (120, 160)


@pytest.mark.parametrize("data", [b"", b"no picture", samples.encoded(samples.picture(1))[:300]])
def test_bytes_without_a_picture_have_no_thumbnail(data: bytes) -> None:
    assert thumbnail(data) == b""


# ---------------------------------------------------------------- in a browser


def test_pictures_are_shown(tab: Browser) -> None:
    loaded = "Promise.all([...document.images].map((image) => image.decode())).then(() => {})"
    tab.run(loaded)
    widths = tab.run("[...document.images].map((image) => image.naturalWidth)")
    assert widths == [160] * 49 and tab.run("document.querySelectorAll('#rows .missing').length") == 1
    tab.run("document.querySelector('#rows summary').click()")
    tab.run("new Promise((done) => setTimeout(done))")  # a toggle is told later
    tab.run(loaded)
    assert tab.run("[...document.querySelectorAll('#rows .shot img')].map((image) => image.naturalWidth)") == [160]
    assert tab.run(
        "[...document.querySelectorAll('#rows .shot')].map((shot) => shot.innerText.split(/\\s*\\n\\s*/))"
    ) == [
        ["which shape?", "shape0"],
        ["which size?", "large"],
    ]
    assert not tab.complaints()


def test_a_row_tells_all_of_an_example(tab: Browser) -> None:
    cells = tab.run("[...document.querySelector('#rows tr').cells].map((cell) => cell.innerText.trim())")
    assert cells[1:3] == ["q0", "4 shots, seed 42"] and cells[3].startswith("which colour?")
    assert cells[4] == "(nothing)" and cells[5].split("\n") == ["red \u00d7 2", "dark red"] and cells[6] == "0.0"
    right = "[...document.querySelectorAll('#rows .right')].map((text) => text.textContent)"
    assert set(tab.run(right)) == {"red"}


def test_headings_sort_with_the_keyboard(tab: Browser) -> None:
    scores = sorted(example(number).score for number in range(120))
    told = "[...document.querySelectorAll('[aria-sort]')].map((heading) => heading.ariaSort)"
    assert tab.run(told) == ["none", "none", "none"]
    tab.run("document.querySelector('[data-sort=score]').focus()")
    tab.press("Enter", 13, "\r")
    assert tab.run(told) == ["none", "none", "ascending"]
    assert column(tab, "score") == [f"{100 * value:.1f}" for value in scores[:50]]
    first = column(tab, "id")[:11]
    assert first == [f"q{number}" for number in range(0, 120, 11)]  # equal scores stay as they came
    tab.press("Enter", 13, "\r")
    assert tab.run(told) == ["none", "none", "descending"]
    assert column(tab, "score") == [f"{100 * value:.1f}" for value in scores[:-51:-1]]
    assert tab.run("location.hash") == "#sort=score&order=desc"
    tab.run("document.querySelector('[data-sort=id]').click()")
    assert column(tab, "id") == [f"q{number}" for number in range(50)]


def test_searching_takes_all_words_of_all_texts(tab: Browser) -> None:
    search(tab, " BLUE  Which ")
    hits = [number for number in range(120) if number % 3 == 2 and number % 2]
    assert column(tab, "id") == [f"q{number}" for number in hits]
    assert count(tab) == f"{len(hits)} of 120 examples"
    assert tab.run("new URLSearchParams(location.hash.slice(1)).get('search')") == " BLUE  Which "
    assert tab.run("document.querySelectorAll('#rows details[open]').length") == 0
    tab.run("location.hash = 'search=SHAPE77'")
    tab.run("new Promise((done) => setTimeout(done))")
    assert column(tab, "id") == ["q77"]
    assert tab.run("document.querySelectorAll('#rows details[open]').length") == 1  # there is what was searched for
    tab.run("location.hash = 'search=nowhere'")
    tab.run("new Promise((done) => setTimeout(done))")
    assert count(tab) == "0 of 120 examples" and tab.run("document.getElementById('more').hidden")


def test_a_trial_is_chosen(tab: Browser) -> None:
    assert tab.run("[...document.getElementById('trial').options].map((option) => option.textContent)") == [
        "all",
        "4 shots, seed 42",
        "4 shots, seed 43",
    ]
    tab.run("document.getElementById('trial').focus()")
    tab.press("ArrowDown", 40)
    tab.press("ArrowDown", 40)
    assert set(column(tab, "trial")) == {"4 shots, seed 43"} and count(tab) == "60 of 120 examples"


@pytest.mark.parametrize(
    ("fragment", "ids"),
    [
        ("sort=id&order=desc&search=red&trial=4+shots%2C+seed+43", [f"q{number}" for number in range(119, 19, -2)]),
        ("sort=__proto__&order=up&trial=none%20such&other=1", [f"q{number}" for number in range(50)]),
        ("%", [f"q{number}" for number in range(50)]),
    ],
)
def test_a_view_is_a_link(browser: Browser, folder: Path, fragment: str, ids: list[str]) -> None:
    browser.visit("about:blank")
    browser.visit(f"{(folder / 'index.html').as_uri()}#{fragment}")
    assert column(browser, "id") == ids and not browser.complaints()


def test_more_rows_come_on_request(tab: Browser) -> None:
    label = "document.getElementById('more').textContent"
    assert tab.run(label) == "Show 50 more of 70"
    tab.run("document.getElementById('more').focus()")
    tab.press("Enter", 13, "\r")
    assert column(tab, "id") == [f"q{number}" for number in range(100)]
    assert tab.run("document.activeElement.cells[1].textContent") == "q50"
    assert tab.run(label) == "Show 20 more of 20"
    tab.run("document.getElementById('more').click()")
    assert len(column(tab, "id")) == 120 and tab.run("document.getElementById('more').hidden")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_readable(tab: Browser, scheme: str) -> None:
    """Contrast by WCAG 2.2, 1.4.3: at least 4.5 to 1; and nothing is wider than a telephone."""
    tab.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    tab.ask("Emulation.setDeviceMetricsOverride", width=360, height=640, deviceScaleFactor=1, mobile=False)
    tab.run("document.querySelector('#rows summary').click()")
    assert tab.run("document.documentElement.scrollWidth <= innerWidth")
    names = ("--ink", "--soft", "--accent", "--good", "--card", "--paper")
    style = "getComputedStyle(document.documentElement)"
    values = tab.run(f"{json.dumps(names)}.map((name) => {style}.getPropertyValue(name).trim())")
    colors = dict(zip(names, map(luminance, values), strict=True))
    assert (colors["--ink"] > colors["--paper"]) == (scheme == "dark")
    for ground in ("--card", "--paper"):
        for name in names[:4]:
            low, high = sorted((colors[name], colors[ground]))
            assert (high + 0.05) / (low + 0.05) >= 4.5, f"{name} on {ground}"


def luminance(color: str) -> float:
    parts = [int(part, 16) / 255 for part in re.findall("[0-9a-f]{2}", color)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_a_telephone_still_sees_a_table(tab: Browser) -> None:
    tab.ask("Emulation.setDeviceMetricsOverride", width=360, height=640, deviceScaleFactor=1, mobile=False)
    nodes = tab.ask("Accessibility.getFullAXTree")["nodes"]
    roles = [node["role"]["value"] for node in nodes if not node["ignored"]]
    assert roles.count("table") == 2 and roles.count("row") == 2 + 51 and roles.count("columnheader") == 8 + 7
    assert {"searchbox", "combobox", "status"} <= set(roles)
    names = {node["name"]["value"] for node in nodes if not node["ignored"] and "name" in node}
    assert {"Search all texts", "Trial", "Scores", "Examples", "Image image0"} <= names


def test_texts_are_never_markup(browser: Browser, folder: Path, jpeg: bytes) -> None:
    asked = Example(EVIL, "__proto__", EVIL, (Shot("constructor", EVIL, EVIL),), EVIL, (EVIL, "\ud800\0"), 1.0, EVIL)
    path = folder / "evil.html"
    path.write_text(page(EVIL, [score(selection=EVIL)], [asked], {"__proto__": jpeg}), encoding="utf-8")
    browser.visit(path.as_uri())
    browser.run("document.querySelector('#rows summary').click()")
    browser.run("new Promise((done) => setTimeout(done))")
    assert [*column(browser, "id"), *column(browser, "trial"), *said(browser, 4)] == [EVIL] * 3
    assert said(browser, 5) == [f"{EVIL}\ud800\0"]
    assert browser.run("[...document.querySelectorAll('.shot p')].map((text) => text.textContent)") == [EVIL, EVIL]
    assert browser.run("[...document.scripts].length") == 2 and browser.run("document.images.length") == 1
    assert browser.run("document.title") == EVIL
    assert not browser.complaints()
    browser.run("document.getElementById('trial').selectedIndex = 1")
    browser.run("document.getElementById('trial').dispatchEvent(new Event('change'))")
    assert count(browser) == "1 example"


def test_the_policy_holds(tab: Browser) -> None:
    tab.run("window.ran = false")
    tab.run("document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.ran = true'}))")
    assert tab.run("window.ran") is False
    assert any("script-src" in text for text in tab.complaints())


def test_the_page_asks_nobody(folder: Path, tmp_path: Path) -> None:
    """By what the browser tells of the page, and by its log of all that it asks for; both do see a page that asks."""
    log, control = tmp_path / "net.json", tmp_path / "control.html"
    with socket.socket() as nobody, opened(tmp_path / "profile", f"--log-net-log={log}") as browser:
        nobody.bind(("127.0.0.1", 0))
        there = f"127.0.0.1:{nobody.getsockname()[1]}"
        address = f"http://{there}/"
        control.write_text(f"<img src={address}control>")
        browser.visit((folder / "index.html").as_uri() + "#search=shape1&sort=score")
        browser.run("document.querySelectorAll('summary').forEach((summary) => summary.click())")
        assert {asked.split(":")[0] for asked in browser.requests()} == {"file", "data"}
        assert browser.run(f"fetch('{address}forbidden').then(() => 'answered', () => 'refused')") == "refused"
        browser.visit(control.as_uri())
        assert f"{address}control" in browser.requests()
    seen = json.loads(log.read_text())
    kinds = seen["constants"]["logEventTypes"]
    values = {
        kind: [event.get("params", {}) for event in seen["events"] if event["type"] == kinds[kind]]
        for kind in ("URL_REQUEST_START_JOB", "TCP_CONNECT_ATTEMPT")
    }
    by_pages = [value for value in values["URL_REQUEST_START_JOB"] if value.get("initiator", OWN) != OWN]
    assert [value["url"] for value in by_pages] == [f"{address}control"]
    assert {value.get("address", there) for value in values["TCP_CONNECT_ATTEMPT"]} == {there}
