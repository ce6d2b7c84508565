from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import given
from hypothesis import strategies as st

from hpc_mm.data.schema import image_key
from hpc_mm.data.store import open_store
from hpc_mm.data.wanted import host_of, interleaved, make_plan, read_plan, read_urls

URLS = st.lists(
    st.builds("http://h{}.org/{}".format, st.integers(0, 4), st.integers(0, 20))
    | st.sampled_from(["", "no url", "http://[", "http://h1.org/a\nb", "http://h1.org/ä"]),
    max_size=60,
)


@given(URLS, st.sets(st.integers(0, 59)), st.integers(1, 9))
def test_every_url_is_wanted_once_unless_it_is_there(urls: list[str], there: set[int], part_urls: int) -> None:
    with TemporaryDirectory() as folder:
        out, images = (open_store(f"{folder}/{name}", make=True) for name in ("out", "images"))
        present = {url for number, url in enumerate(urls) if number in there}
        for url in present:
            images.write(image_key(url), b"image")
        plan = make_plan(urls, {"a.jsonl": 1}, {}, images, out, part_urls)
        assert read_plan(out) == plan
        found = {part.name: read_urls(out, part) for part in plan.parts}
        listed = [url for one in found.values() for url in one]
        assert sorted(listed) == sorted(set(urls) - present)
        assert (plan.named, plan.unique, plan.present) == (len(urls), len(set(urls)), len(present))
        assert plan.wanted == len(listed) and plan.hosts == len({host_of(url) for url in listed})
        groups: dict[str, set[int]] = {}
        for part in plan.parts:
            assert 0 < part.urls == len(found[part.name]) <= part_urls
            for url in found[part.name]:
                groups.setdefault(host_of(url), set()).add(part.group)
        assert all(len(numbers) == 1 for numbers in groups.values()), "one host in two groups is asked by two tasks"


def test_a_plan_is_a_function_of_urls_and_store(tmp_path: Path) -> None:
    urls = [f"http://h{number % 7}.org/{number}" for number in range(500)]
    for name in ("one", "two"):
        out, images = (open_store(f"{tmp_path}/{name}/{kind}", make=True) for kind in ("out", "images"))
        make_plan(urls if name == "one" else reversed(urls), {}, {}, images, out, 64)
    files = [
        {path.name: path.read_bytes() for path in (tmp_path / name / "out/plan").iterdir()} for name in ("one", "two")
    ]
    assert files[0] == files[1] and len(files[0]) > 7


def test_hosts_take_turns() -> None:
    urls = [f"http://h{host}.org/{number}" for host in range(3) for number in range(4 - host)]
    ordered, hosts = interleaved(urls)
    assert hosts == 3
    rounds = [Counter(host_of(url) for url in part) for part in (ordered[:3], ordered[3:6], ordered[6:8], ordered[8:])]
    assert [set(one.values()) for one in rounds] == [{1}] * 4
