"""Named mixtures: the paper's three, the files of users, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_moe.config import DataConfig
from megatron_moe.data.blend import blends_of, domains_of
from megatron_moe.data.named_mixture import read_named_mixture, shipped_mixtures
from megatron_moe.errors import UsageError

PAPER = {
    "v1": [7.5, 2.25, 1, 1.25, 2.25, 2.25, 33.5, 50],
    "v2": [15, 6.5, 2.5, 4.5, 6.5, 5, 43.5, 6.5, 10],
    "v3": [15, 4.5, 1, 4.5, 4.5, 5, 33, 2.5, 30],
}
"""Percent of C4, Wikipedia, StackExchange, ArXiv, Books, GitHub, CommonCrawl, Wikipedia-en (v1 has
none) and The Stack."""

GOOD = """
[domains]
web = "pages"
code = "programs"

[[source]]
domain = "web"
prefix = "a"
weight = 3

[[source]]
domain = "code"
prefix = "/abs/b"
weight = 0.5

[[source]]
domain = "web"
prefix = "sub/c"
weight = 1

[[source]]
domain = "code"
prefix = "unread"
weight = 0
"""


def test_the_papers_mixtures() -> None:
    assert shipped_mixtures() == sorted(PAPER)
    for name, weights in PAPER.items():
        found = read_named_mixture(name, "/data")
        assert list(found.weights) == weights
        assert sum(found.weights) == 100
        assert found.prefixes[0] == "/data/c4_text_document"
        assert found.domains[-1] == "the-stack"
        assert len(set(found.domains)) == len(found.domains) == len(weights)
        assert ("wikipedia-en" in found.domains) == (name != "v1")


def test_prefixes_are_below_the_root(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text(GOOD)
    found = read_named_mixture(str(path), None)
    assert found.prefixes == (f"{tmp_path}/a", "/abs/b", f"{tmp_path}/sub/c")
    assert (found.weights, found.domains) == ((3.0, 0.5, 1.0), ("web", "code", "web"))
    assert read_named_mixture(str(path), "/d").prefixes == ("/d/a", "/abs/b", "/d/sub/c")
    assert read_named_mixture("v1", None).prefixes[0] == "c4_text_document"


def test_a_mixture_is_a_blend(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text(GOOD)
    train = blends_of(DataConfig(mixture=str(path), split="8,2,0"))["train"]
    assert train is not None
    assert (train.flag, train.weights, train.bounds) == ("--mixture", (3.0, 0.5, 1.0), (0.0, 0.8))
    parts = train.by_domain()
    assert list(parts) == ["web", "code"]
    assert (parts["web"].prefixes, parts["web"].weights) == (
        (f"{tmp_path}/a", f"{tmp_path}/sub/c"),
        (3.0, 1.0),
    )
    assert (parts["code"].prefixes, parts["code"].bounds) == (("/abs/b",), (0.0, 0.8))


BAD = {
    "no toml": ("[domains", r"--mixture must be a TOML file \(got"),
    "too deep": ("a = " + "[" * 100_000, r"--mixture must be a TOML file \(got"),
    "no domains": (
        GOOD.replace("[domains]", "[names]"),
        r"content of --mixture must be a table \[domains\]",
    ),
    "no source": ('[domains]\na = "a"\n', r"one or more \[\[source\]\] tables"),
    "another table": (GOOD + "[more]\n", "and nothing else"),
    "unknown domain": (
        GOOD.replace('domain = "web"', 'domain = "wbe"', 1),
        r"domain of source 1 of --mixture must be one of \[domains\]: code, web \(got 'wbe'\)",
    ),
    "no weight": (GOOD.replace("weight = 3\n", "", 1), "keys of source 1 of --mixture"),
    "another key": (GOOD.replace("weight = 3", "weight = 3\nx = 1", 1), "keys of source 1"),
    "negative": (
        GOOD.replace("0.5", "-0.5"),
        r"weight of source 2 of --mixture must be a number >= 0 \(got -0.5\)",
    ),
    "not a number": (
        GOOD.replace("0.5", "nan"),
        "--mixture must be a TOML file .* nan in it is not a finite number",
    ),
    "infinite": (
        GOOD.replace("0.5", "inf"),
        "--mixture must be a TOML file .* inf in it is not a finite number",
    ),
    "a text": (
        GOOD.replace("0.5", '"1"'),
        r"weight of source 2 of --mixture must be .*\(got '1'\)",
    ),
    "a truth": (
        GOOD.replace("0.5", "true"),
        r"weight of source 2 of --mixture must be .*\(got True\)",
    ),
    "all zero": (
        GOOD.replace("weight = 3", "weight = 0").replace("0.5", "0").replace("= 1", "= 0"),
        r"one of the weights in .* must be > 0 \(got \[0, 0, 0, 0\]\)",
    ),
    "no prefix": (
        GOOD.replace('"a"', '""', 1),
        r"prefix of source 1 of --mixture must be .*\(got ''\)",
    ),
    "a prefix that is no text": (
        GOOD.replace('"a"', "7", 1),
        r"prefix of source 1 of --mixture must be .*\(got 7\)",
    ),
    "prefixes": (
        GOOD.replace('"a"', '["a"]', 1),
        r"prefix of source 1 of --mixture must be .*\(got \['a'\]\)",
    ),
    "a domain that is no text": (
        GOOD.replace('"web"', '["web"]', 1),
        r"domain of source 1 of .* must be .*\(got \['web'\]\)",
    ),
    "domains that are no table": (
        GOOD.replace("[domains]", "[[domains]]"),
        "--mixture must be a table",
    ),
    "sources that are one table": (
        '[domains]\na = "a"\n[source]\nx = 1\n',
        r"one or more \[\[source\]\] tables",
    ),
    "a source that is no table": (
        'source = [1]\n[domains]\na = "a"\n',
        r"keys of source 1 of --mixture must be domain, prefix, weight \(got 1\)",
    ),
    "weights": (
        GOOD.replace("0.5", "[0.5]"),
        r"weight of source 2 of --mixture must be .*\(got \[0.5\]\)",
    ),
    "twice": (GOOD.replace('"sub/c"', '"a"'), r"prefix in .* must be given once \(got 'a'\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_in_one_line(name: str, tmp_path: Path) -> None:
    content, says = BAD[name]
    path = tmp_path / "own.toml"
    path.write_text(content)
    with pytest.raises(UsageError, match=says) as caught:
        read_named_mixture(str(path), None)
    assert "\n" not in str(caught.value)


def test_no_such_mixture(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"--mixture must be one of v1, v2, v3, or a readable .*got 'v9'"
    ):
        read_named_mixture("v9", None)
    with pytest.raises(UsageError, match="Is a directory"):
        read_named_mixture(str(tmp_path), None)


def test_names_of_prefixes() -> None:
    assert domains_of(["x/c4_text_document", "y/code", "chat.jsonl"]) == (
        "c4",
        "code",
        "chat.jsonl",
    )
    assert domains_of(["x/a", "y/a", "b"]) == ("x/a", "y/a", "b")
