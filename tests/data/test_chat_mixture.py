"""Conversations among the rows of another objective: which row holds what, and from which file."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import pytest

from megatron_moe.config.cli import parse_args
from megatron_moe.config.validate import validate
from megatron_moe.data.chat_mixture import place_of
from megatron_moe.data.composition import described_shares, rows_before, share_of
from megatron_moe.errors import UsageError
from tests.data.corpus import write
from tests.data.objectives.runs import Row, data_of, objective_config, order, rows
from tests.data.objectives.test_sft import chat, write_lines

SETTINGS: dict[str, Any] = {
    "tokenizer_type": "ByteTokenizer",
    "vocab_size": None,
    "seq_length": 96,
    "split": "8,2,0",
}
SHARE = 0.3


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Texts and conversations, both in bytes."""
    folder = tmp_path_factory.mktemp("mixed")
    texts = [[3 + (7 * i + j) % 250 for j in range(60 + i)] + [1] for i in range(120)]
    talks = [chat(f"Question {i}?", f"Answer {i}.") for i in range(60)]
    return write(folder / "text", texts, 259), write_lines(folder / "chat.jsonl", talks)


def mixed(files: tuple[str, str], **changes: Any) -> dict[str, Any]:
    return {**SETTINGS, "sft_data_path": (files[1],), "sft_share": SHARE, **changes}


def parted(found: list[Row], share: Fraction = Fraction(3, 10)) -> tuple[list[Row], list[Row]]:
    """Rows of text and of conversations, in their order."""
    places = [place_of(share, number)[0] for number in range(len(found))]
    text = [row for row, is_chat in zip(found, places, strict=True) if not is_chat]
    return text, [row for row, is_chat in zip(found, places, strict=True) if is_chat]


def test_two_of_five_by_hand() -> None:
    found = [place_of(Fraction(2, 5), row) for row in range(8)]
    assert found == [
        *((False, 0), (False, 1), (True, 0), (False, 2)),
        *((True, 1), (False, 3), (False, 4), (True, 2)),
    ]


@pytest.mark.parametrize("share", ["1/10", "3/10", "1/3", "99/100", "1/1000"])
def test_every_row_of_both_comes_once_and_the_share_holds_everywhere(share: str) -> None:
    part = Fraction(share)
    found = [place_of(part, row) for row in range(3000)]
    for kind in (False, True):
        numbers = [place for is_chat, place in found if is_chat == kind]
        assert numbers == list(range(len(numbers)))
    so_far = 0
    for row, (is_chat, _) in enumerate(found, 1):
        so_far += is_chat
        assert 0 <= row * part - so_far < 1


@pytest.mark.parametrize("objective", ["causal", "prefix-lm", "ul2"])
def test_rows_are_those_of_runs_of_either_alone(files: tuple[str, str], objective: str) -> None:
    """Token by token, target by target."""
    own = {"objective": objective}
    if objective == "ul2":
        own |= {"vocab_extra_ids": 20}
    text, talks = parted(rows(data_of(files[0], **mixed(files, **own)).train))
    assert (len(text), len(talks)) == (28, 12)
    alone = rows(data_of(files[0], **{**SETTINGS, **own}).train)
    assert text == alone[:28]
    of_chat = {**SETTINGS, **own, "objective": "sft"}
    assert talks == rows(data_of(files[1], **of_chat).train)[:12]


def test_the_order_is_that_of_every_layout_and_after_a_resume(files: tuple[str, str]) -> None:
    whole = order(files[0], dp_size=1, micro=2, **mixed(files))
    assert order(files[0], dp_size=4, micro=1, **mixed(files)) == whole
    assert order(files[0], dp_size=2, micro=2, consumed=16, **mixed(files)) == whole[16:]


def _padding(batches: Iterator[Any] | None) -> list[int]:
    assert batches is not None
    return [int(row.sum()) for batch in batches for row in batch.padding_BS]


@pytest.mark.parametrize("start", [None, 2])
def test_conversations_have_padding_and_texts_have_none(
    files: tuple[str, str], start: int | None
) -> None:
    settings = mixed(files, decoder_start_token_id=start, reset_position_ids=True)
    data = data_of(files[0], **settings)
    assert data.extra == ("positions", "padding")
    pads = _padding(data.train)
    chats = [place_of(Fraction(3, 10), row)[0] for row in range(40)]
    assert all((count > 0) == is_chat for count, is_chat in zip(pads, chats, strict=True))
    assert set(_padding(data.valid())) == {0}


def test_held_out_rows_and_probes_are_those_of_texts(files: tuple[str, str]) -> None:
    data, alone = data_of(files[0], **mixed(files)), data_of(files[0], **SETTINGS)
    assert rows(data.valid()) == rows(alone.valid())
    assert data.probe_domains == alone.probe_domains
    without = {**mixed(files), "eval_iters": 0}
    probe = data_of(files[0], **without).probe
    assert probe is not None
    _, packed = probe.rows(4)
    text, _ = parted(rows(data_of(files[0], **without).train))
    assert packed[0].tolist() == [row[0] for row in text[:4]]


def test_domains_and_shares_say_what_rows_hold(files: tuple[str, str]) -> None:
    data = data_of(files[0], **mixed(files))
    names = data.train_domains(range(10))
    assert [name == "chat.jsonl" for name in names] == [
        place_of(Fraction(3, 10), row)[0] for row in range(10)
    ]
    assert {name for name in names if name != "chat.jsonl"} == {"text"}
    for shares in (
        data.shares,
        described_shares(objective_config(files[0], train_iters=5, **mixed(files)), 8),
    ):
        assert [(s.domain, s.exists) for s in shares] == [("text", True), ("chat.jsonl", True)]
        assert [s.weight for s in shares] == pytest.approx([0.7, 0.3])
        assert shares[1].epochs is None
    half = data_of(files[0], **mixed(files, sft_share=0.65)).shares[0]
    alone = data_of(files[0], **SETTINGS).shares[0]
    assert half.epochs is not None and alone.epochs is not None
    assert half.epochs == pytest.approx(alone.epochs * 14 / 40)


def test_the_fingerprint_changes_with_conversations_and_share(files: tuple[str, str]) -> None:
    cases = [
        SETTINGS,
        mixed(files),
        mixed(files, sft_share=0.31),
        mixed(files, sft_pack=False),
        mixed(files, sft_data_path=("2", files[1])),
    ]
    found = [data_of(files[0], **case).fingerprint for case in cases]
    assert len(set(found)) == len(cases)
    assert "conversations" not in data_of(files[0], **SETTINGS).identity


def test_a_file_that_is_none_of_conversations_is_named(files: tuple[str, str]) -> None:
    with pytest.raises(UsageError, match=r"missing\.jsonl"):
        data_of(files[0], **mixed(files, sft_data_path=("missing.jsonl",)))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--sft-share 0.1", "--sft-share must be used with --sft-data-path"),
        ("--sft-data-path c.jsonl", "--sft-data-path must be used with --sft-share"),
        ("--sft-data-path c.jsonl --sft-share 1", "--sft-share must be >= 0 and < 1 (got 1"),
        (
            "--sft-data-path c.jsonl --sft-share 0.1 --objective sft",
            "--sft-share must be 0 with --objective sft",
        ),
    ],
)
def test_what_cannot_be_mixed_is_an_error(line: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        validate(parse_args(["--data-path", "d", "--train-iters", "2", *line.split()]).config)
    assert message in str(error.value)


def test_rows_of_conversations_are_exact() -> None:
    """29 of the first hundred, where 100 x 0.29 in floating point is below 29."""
    assert int(100 * 0.29) == 28
    config = parse_args(["--sft-data-path", "chat", "--sft-share", "0.29"]).config
    assert rows_before(share_of(config), 100) == 29
