"""Conversations: template and masks by hand, rows, splits, and what is refused."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_moe.data.objectives.chat import Exchange, read_line
from megatron_moe.data.objectives.rng import sample_rng
from megatron_moe.data.objectives.sft import plan_rows, row_starts
from megatron_moe.errors import UsageError
from tests.data.objectives.runs import GLOBAL, Row, data_of, order, rows

EOS = "\x01"
"""Stands for the end of a sequence where ids are written as text."""
SETTINGS = {"objective": "sft", "tokenizer_type": "ByteTokenizer", "vocab_size": None}


def chat(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    """User and assistant in turn."""
    turns = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return turns + [{"role": roles[i % 2], "content": t} for i, t in enumerate(texts)]


def write_lines(path: Path, conversations: Sequence[Any]) -> str:
    path.write_text("".join(json.dumps(value) + "\n" for value in conversations))
    return str(path)


def text_of(ids: Sequence[int]) -> str:
    """Ids as text: bytes stand 3 above, the end is 1, pads are dropped."""
    return "".join(EOS if i == 1 else chr(i - 3) for i in ids if i)


def sft(path: str, **changes: Any) -> list[Row]:
    return rows(data_of(path, **{**SETTINGS, "seq_length": 128, **changes}).train)


def trained_text(row: Row) -> str:
    return text_of([label for label, m in zip(row[1], row[2], strict=True) if m])


def test_template_by_hand() -> None:
    line = json.dumps(chat("Hi", "Yo", "Bye", "Ok", "More?", system="Be brief."))
    assert read_line(line.encode(), "messages", "x") == [
        Exchange("<<SYS>>\nBe brief.\n<</SYS>>\n\n<s>[INST] Hi [/INST]", "Yo"),
        Exchange("<s>[INST] Bye [/INST]", "Ok"),
    ]
    line = json.dumps({"id": 3, "talk": chat("Hi", "Yo")})
    assert read_line(line.encode(), "talk", "x") == [Exchange("<s>[INST] Hi [/INST]", "Yo")]


def test_two_turns_by_hand(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [chat("Hi", "Yo", "Bye", "Ok!", system="Be brief.")])
    row = sft(path)[0]
    head = "<<SYS>>\nBe brief.\n<</SYS>>\n\n<s>[INST] Hi [/INST]"
    middle = "<s>[INST] Bye [/INST]"
    assert text_of(row[0]) == f"{head}Yo{EOS}{middle}Ok!{EOS}"
    assert row[1] == [*row[0][1:], 0]
    assert trained_text(row) == f"Yo{EOS}Ok!{EOS}"
    # the last byte of the question predicts the first of the answer
    first, second = len(head) - 1, len(head) + 3 + len(middle) - 1
    expected = [0.0] * 128
    expected[first : first + 3] = [1.0] * 3
    expected[second : second + 4] = [1.0] * 4
    assert row[2] == expected


def test_truncation_by_hand(tmp_path: Path) -> None:
    """A row of 24 predicts 24 of 25 ids: a question of 20 and the first five of the answer."""
    path = write_lines(tmp_path / "a.jsonl", [chat("Hi", "abcdefghijk")])
    row = sft(path, seq_length=24)[0]
    assert text_of(row[0]) == "<s>[INST] Hi [/INST]abcd"
    assert trained_text(row) == "abcde"
    assert sum(row[2]) == 5


def test_a_question_too_long_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of 20 and 21 ids the rows of 20 hold the shorter one and the answer's first."""
    path = write_lines(tmp_path / "a.jsonl", [chat("Hi", "Yo"), chat("Hi?", "No")])
    assert {trained_text(row) for row in sft(path, seq_length=20)} == {"Y"}
    assert (
        "1 conversations are left out because their first answer would begin after the end of a row"
        in caplog.text
    )
    with pytest.raises(
        UsageError, match=r"train split of .* must be .*got '2 conversations, none with"
    ):
        sft(path, seq_length=19)


def test_rows_are_packed_in_order() -> None:
    assert list(row_starts([4, 3, 3, 1, 10, 2, 9], 10)) == [0, 3, 4, 5, 6]
    assert list(row_starts([0, 0, 0], 10)) == [0, 1, 2]
    assert list(row_starts([10, 10], 10)) == [0, 1]
    assert list(row_starts([5, 5, 1], 10)) == [0, 2]


@pytest.fixture
def many(tmp_path: Path) -> str:
    """Forty short conversations, told apart by their answers."""
    talks = [chat(f"q{i}" * (1 + i % 3), f"a{i:02d}", *(("z", "y") * (i % 2))) for i in range(40)]
    return write_lines(tmp_path / "many.jsonl", talks)


def answers(found: Sequence[Row]) -> list[str]:
    return [part for row in found for part in trained_text(row).split(EOS) if part.startswith("a")]


def test_packing_keeps_conversations_whole(many: str) -> None:
    found = sft(many, train_iters=2)
    for row in found:
        *exchanges, rest = text_of([*row[0], row[1][-1]]).split(EOS)
        assert rest == ""
        assert exchanges[0].startswith("<s>[INST] q")
        assert all(part.startswith("<s>[INST] ") for part in exchanges)
        assert trained_text(row) == "".join(part.split("[/INST]")[1] + EOS for part in exchanges)
    assert any(len(answers([row])) > 1 for row in found)
    # every conversation once before any comes again
    first = answers(found)[:40]
    assert sorted(first) == [f"a{i:02d}" for i in range(40)]


def test_one_conversation_a_row(many: str) -> None:
    found = sft(many, sft_pack=False, train_iters=10)
    assert all(len(answers([row])) == 1 for row in found)
    both = answers(found)
    expected = [f"a{i:02d}" for i in range(40)]
    assert sorted(both[:40]) == sorted(both[40:80]) == expected
    assert both[:40] != both[40:80] != expected


def test_the_same_in_every_layout(many: str) -> None:
    settings = {**SETTINGS, "seq_length": 128}
    expected = order(many, dp_size=1, micro=2, **settings)
    assert order(many, dp_size=4, micro=1, **settings) == expected
    resumed = order(many, dp_size=2, micro=2, consumed=GLOBAL, **settings)
    assert resumed == expected[GLOBAL:]
    assert sft(many, num_workers=2) == expected
    assert sft(many, train_iters=40)[: len(expected)] == expected
    assert sft(many, seed=5) != expected


def test_splits_blends_and_identity(many: str, tmp_path: Path) -> None:
    other = write_lines(tmp_path / "other.jsonl", [chat("other", "b" * 9)] * 3)
    data = data_of(many, **{**SETTINGS, "seq_length": 128, "split": "5,5,0"})
    train, valid = set(answers(rows(data.train))), set(answers(rows(data.valid())))
    assert train == {f"a{i:02d}" for i in range(20)}
    assert valid
    assert not train & valid
    mixed = rows(data_of("0.5", many, "0.5", other, **SETTINGS, seq_length=128).train)
    kinds = ["b" in trained_text(row) for row in mixed]
    assert sum(kinds) == len(kinds) / 2
    prints = {data.fingerprint}
    for change in ({"sft_pack": False}, {"seed": 3}, {"seq_length": 64}):
        changes = {**SETTINGS, "seq_length": 128, "split": "5,5,0", **change}
        prints.add(data_of(many, **changes).fingerprint)
    assert len(prints) == 4


def test_a_changed_file_is_tokenized_again(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [chat("Hi", "Yo")])
    assert trained_text(sft(path)[0]).startswith("Yo")
    write_lines(tmp_path / "a.jsonl", [chat("Hi", "No")])
    assert trained_text(sft(path)[0]).startswith("No")


def test_marks_and_separators_of_other_programs(tmp_path: Path) -> None:
    """A BOM begins each of two joined files, lines end in CR LF, and U+2028 ends none."""
    lines = [json.dumps(chat("Hi", f"{n}\u2028{n}"), ensure_ascii=False) for n in "ab"]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(b"\xef\xbb\xbf" + line.encode() + b"\r\n" for line in lines))
    answers = {trained_text(row) for row in sft(str(path), sft_pack=False)}
    bytes_of = "".join(map(chr, "\u2028".encode()))
    assert answers == {f"{n}{bytes_of}{n}{EOS}" for n in "ab"}


def test_rows_by_hand() -> None:
    lengths = np.array([6, 6, 4])
    conversations, starts = plan_rows(sample_rng(1), np.array([7, 8, 9]), lengths, 10, 3)
    assert sorted(conversations[:3].tolist()) == [7, 8, 9]
    held = [conversations[a:b].tolist() for a, b in itertools.pairwise(starts)]
    assert [c for row in held for c in row] == conversations.tolist()
    assert all(sum({7: 6, 8: 6, 9: 4}[c] for c in row) <= 10 for row in held)


@pytest.mark.slow
def test_beyond_two_to_the_31_ids(tmp_path: Path) -> None:
    """Two conversations of 2^30 ids, then two short ones, in a cache that is mostly hole.

    The cache is that of four short conversations; the first two are then stretched.
    """
    talks = [chat("a", "A"), chat("b", "B"), chat("Hi", "Yo"), chat("Ha", "Ya")]
    path = write_lines(tmp_path / "a.jsonl", talks)
    expected = {trained_text(row): row for row in sft(path, sft_pack=False)}
    (folder,) = (tmp_path / "cache").glob("chat-*")
    ids, counts, bounds, _ = (np.load(folder / f"{i}.npy") for i in range(4))
    assert bounds.dtype == np.int64
    moved = 2**31 - bounds[2]
    for number, values in ((0, ids), (1, counts)):
        grown = np.lib.format.open_memmap(
            folder / f"{number}.npy", "w+", values.dtype, (int(bounds[4] + moved),)
        )
        grown[2**31 :] = values[bounds[2] :]
        grown.flush()
    np.save(folder / "2.npy", np.array([0, 2**30, *(bounds[2:] + moved)]))
    records = {}
    for name in json.loads((folder / "manifest.json").read_text()):
        digest = hashlib.sha256()
        with (folder / name).open("rb") as stream:
            for block in iter(functools.partial(stream.read, 1 << 24), b""):
                digest.update(block)
        records[name] = [(folder / name).stat().st_size, digest.hexdigest()]
    (folder / "manifest.json").write_text(json.dumps(records))
    found = {trained_text(row): row for row in sft(path, sft_pack=False)}
    assert set(found) == {"", f"Yo{EOS}", f"Ya{EOS}"}, "what was stretched is hole"
    assert all(found[answer] == expected[answer] for answer in (f"Yo{EOS}", f"Ya{EOS}"))
    packed = [text_of(row[0]) for row in sft(path)]
    two = {f"<s>[INST] Hi [/INST]Yo{EOS}", f"<s>[INST] Ha [/INST]Ya{EOS}"}
    assert {text for text in packed if text} <= {*two, *map("".join, itertools.permutations(two))}
    assert any(packed)


BAD = {
    "{": "line 2 of",
    "[" * 100_000: "line 2 of",
    '[{"role": ["user"], "content": "x"}]': "turn 1 in line 2",
    '[{"role": "user", "content": "x"}, {"role": "assistant", "content": ["y"]}]': "turn 2 in line",
    '[{"content": "x"}]': "turn 1 in line 2",
    '["role"]': "turn 1 in line 2",
    '{"messages": {"role": "user", "content": "x"}}': "turns in line 2",
    '{"messages": "Hi"}': "turns in line 2",
    "3": "turns in line 2",
    "[]": "turns in line 2",
    '"text"': "turns in line 2",
    '{"talk": []}': "must be a list of turns, or an object with the key 'messages' (got ['talk'])",
    "[3]": "turn 1 in line 2",
    '[{"role": "user"}]': "content of turn 1 in line 2",
    '[{"role": "user", "content": 3}]': "must be a string (got 3); its keys are role, content",
    '[{"role": "user", "content": "hi \\udcb2"}, {"role": "assistant", "content": "x"}]': (
        "content of turn 1 in line 2"
    ),
    '[{"role": "user", "content": "x"}, {"role": "assistant", "content": "\\ud83d"}]': (
        "U+D83D is half of a surrogate pair"
    ),
    json.dumps(chat("Hi")): "answers in line 2",
    json.dumps(chat(system="x")): "answers in line 2",
    json.dumps(chat("Hi", "Yo")[::-1]): "role of turn 1 in line 2",
    json.dumps(chat("Hi", "Yo") * 2 + chat("a", "b")[1:]): "role of turn 5 in line 2",
    json.dumps(chat("Hi", "Yo") + chat("a", system="b")): "role of turn 3 in line 2",
    json.dumps(chat("Hi", "Yo", system="b") + chat(system="b")): "role of turn 4 in line 2",
    '[{"role": "bot", "content": "x"}]': "role of turn 1 in line 2",
}


@pytest.mark.parametrize("line", list(BAD), ids=lambda line: line[:40])
def test_bad_lines_are_refused(line: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(chat("Hi", "Yo")) + "\n" + line + "\n")
    with pytest.raises(UsageError) as caught:
        sft(str(path))
    assert "line 2 of" in str(caught.value)
    assert BAD[line] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    with pytest.raises(UsageError, match=r"data path must be a readable file .*got '.*x.jsonl'"):
        sft(str(path))
    path.write_text("\n\n")
    with pytest.raises(UsageError, match=r"number of conversations in .* must be >= 1 \(got 0\)"):
        sft(str(path))
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UsageError, match=r"data path must be the data itself .*Git LFS pointer"):
        sft(str(path))
    path.write_text(json.dumps(chat("Hi", "Yo")) + "\n", encoding="utf-16")
    with pytest.raises(UsageError, match=r"line 1 of .* must be UTF-8 \(got 'UTF-16'\)"):
        sft(str(path))
    path.write_bytes(b"\xff\n")
    with pytest.raises(UsageError, match=r"line 1 of .* must be UTF-8"):
        sft(str(path))
