"""Pickles that would exhaust time, memory or the interpreter's stack: one line, at once."""

from __future__ import annotations

import pytest

from megatron_moe.convert.pickled import Built, Name, describe, read_pickle
from megatron_moe.errors import Corrupt

DEEP = b"N" + b"\x85" * 100_000
DOUBLED = b"N" + b"".join(b"q\x00h\x00\x86" for _ in range(60))
"""A tuple of the same tuple twice, and so on: 2^60 elements."""
HUGE = b"\x8b\x00\x08\x00\x00" + b"\x7f" * 2048
"""An integer of 4932 digits, more than Python prints."""


@pytest.mark.parametrize(
    "stream",
    [b"}%sNs.", b"}(%sNu.", b"\x8f(%s\x90.", b"(%s\x91.", b"(%sNd.", b"}%sQNs."],
    ids=["SETITEM", "SETITEMS", "ADDITEMS", "FROZENSET", "DICT", "BINPERSID"],
)
def test_nested_tuples_are_no_keys(stream: bytes) -> None:
    data = stream % (DEEP if stream.startswith(b"}%s") else DOUBLED)
    if b"Q" in stream:
        assert len(read_pickle(data, "x")) == 1  # a persistent id is compared by identity
        return
    with pytest.raises(Corrupt, match=r"^x must be a whole pickle \(got .*with the key") as error:
        read_pickle(data, "x")
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("value", [DEEP, DOUBLED, HUGE], ids=["deep", "doubled", "huge"])
def test_names_and_descriptions_are_bounded(value: bytes) -> None:
    assert len(describe(read_pickle(value + b".", "x"))) <= 60
    assert len(describe(read_pickle(value + b")R.", "x"))) <= 60  # the object of such a class
    assert len(describe(read_pickle(value + b")R)R\x85.", "x"))) <= 60
    with pytest.raises(Corrupt, match="something without a name"):
        read_pickle(value + b"\x8c\x01a\x93.", "x")


def test_keys_that_pytorch_writes_are_read() -> None:
    data = b"}(X\x01\x00\x00\x00aK\x01\x86NK\x02Nctorch\nfloat\nNctorch\nSize\n)RNu."
    keys = list(read_pickle(data, "x"))
    assert keys[:3] == [("a", 1), 2, Name("torch", "float")]
    assert isinstance(keys[3], Built)


def test_arguments_that_are_copied_are_few() -> None:
    data = b"(" + b"N" * 1000 + b"tq\x00cos\nx\nh\x00}\x92."
    with pytest.raises(Corrupt, match="with the arguments"):
        read_pickle(data, "x")
