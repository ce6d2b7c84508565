from hpc_mm.data.parts import SourcePart


def name(key: str) -> str:
    return SourcePart(key, 1).name


def test_names_of_files_whose_letters_are_lost_differ() -> None:
    assert name("part-0.jsonl") == "part-0" and name("a/b_c (1).jsonl.gz") == "a-b-c-1"
    found = [name(key) for key in ("\u4e00.jsonl", "\u4e8c.jsonl", "\u00e9-1.jsonl", "\u00e8-1.jsonl", "\udcff.jsonl")]
    assert len(set(found)) == 5 and all(text.isascii() for text in found)
    assert found[0] == "part-c2ee9516" and found[2].startswith("1-")
    assert SourcePart("\u4e00.json", 1, "test").name == "test"
