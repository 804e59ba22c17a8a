"""The paper's mixture, how much text fits into a row, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_moe.data.objectives.denoiser import Denoiser, read_denoisers
from megatron_moe.data.objectives.rng import sample_rng
from megatron_moe.data.objectives.spans import span_counts
from megatron_moe.data.objectives.ul2 import FittedDenoiser
from megatron_moe.errors import UsageError


def span(rate: float = 0.15, mean_span: float = 3.0) -> Denoiser:
    return Denoiser(prefix="", kind="span", mean_span=mean_span, rate=rate, weight=1.0)


SPLIT = Denoiser(prefix="", kind="prefix-lm", mean_span=0.0, rate=0.0, weight=1.0)


def test_the_papers_mixture() -> None:
    rows = [(d.prefix, d.kind, d.mean_span, d.rate, d.weight) for d in read_denoisers(None)]
    assert rows == [
        ("[NLU] ", "span", 3, 0.15, 0.1),
        ("[NLU] ", "span", 8, 0.15, 0.1),
        ("[NLG] ", "span", 3, 0.5, 0.1),
        ("[NLG] ", "span", 8, 0.5, 0.1),
        ("[NLG] ", "span", 64, 0.5, 0.1),
        ("[S2S] ", "prefix-lm", 0, 0, 0.5),
    ]


def test_t5s_numbers() -> None:
    """T5: 568 tokens become 512 inputs and 114 targets, both with their ends."""
    assert span().lengths(568, 0) == (512, 114)
    assert span().lengths(569, 0)[0] > 512
    assert span().fit(0, 1024, 512) == 568


def test_fit_by_hand() -> None:
    # 10 tokens, 5 hidden in 2 spans: 5 + 2 + 1 inputs after 2 of prefix, 5 + 2 + 1 targets
    assert span(0.5).lengths(10, 2) == (10, 8)
    assert span(0.5).total(10, 2) == 18
    assert span(0.5).fit(2, 18, None) == 10
    # 11: 6 hidden in 2 spans, 5 + 2 + 1 inputs after the prefix, 6 + 2 + 1 targets
    assert span(0.5).fit(2, 20, 10) == 11
    # the whole text but one may be on either side of the split
    assert SPLIT.lengths(8, 2) == (10, 8)
    assert SPLIT.fit(2, 20, 10) == 8
    assert SPLIT.fit(2, 20, None) == 16
    assert SPLIT.fit(2, 20, 13) == 7
    assert span().fit(9, 20, 10) == 0


@pytest.mark.parametrize("prefix", [0, 3, 7])
@pytest.mark.parametrize("inputs", [1024, 700, None])
def test_one_more_token_would_not_fit(prefix: int, inputs: int | None) -> None:
    """And what is taken fits, counted from the definition of each denoiser."""
    row = 2048
    for denoiser in read_denoisers(None):
        length = denoiser.fit(prefix, row, inputs)
        assert fits(denoiser, length, prefix, row, inputs)
        assert not fits(denoiser, length + 1, prefix, row, inputs)


def fits(d: Denoiser, length: int, prefix: int, row: int, inputs: int | None) -> bool:
    if d.kind == "span":
        hidden = round(length * d.rate)
        spans = round(hidden / d.mean_span)
        pairs = [(prefix + length - hidden + spans + 1, hidden + spans + 1)]
    else:
        pairs = [(prefix + s + 1, length - s + 1) for s in range(1, length)]
    limit = (row, row) if inputs is None else (inputs, row - inputs)
    return all(i <= limit[0] and t <= limit[1] and i + t <= row for i, t in pairs)


def test_rates_of_full_rows() -> None:
    """As near to the paper's as whole tokens and spans allow."""
    for denoiser in read_denoisers(None)[:5]:
        length = denoiser.fit(5, 2048, 1024)
        hidden, spans = span_counts(length, denoiser.rate, denoiser.mean_span)
        assert abs(hidden - denoiser.rate * length) <= 0.5
        assert abs(hidden - denoiser.mean_span * spans) <= denoiser.mean_span / 2


BAD = {
    "not = [toml": "a TOML file",
    "a = " + "[" * 100_000: "a TOML file",
    "": "[[denoiser]] tables",
    "[[denoisers]]": "[[denoiser]] tables",
    "[[denoiser]]\nprefix = 'a'": "keys of denoiser 1",
    "[[denoiser]]\nprefix = 'a'\nkind = 'suffix'": "span or prefix-lm",
    "[[denoiser]]\nprefix = 3\nkind = 'prefix-lm'\nweight = 1": "a string, which may be empty",
    "[[denoiser]]\nprefix = ''\nkind = 'prefix-lm'\nweight = -1": "must be a number >= 0 (got -1)",
    "[[denoiser]]\nprefix = ''\nkind = 'prefix-lm'\nweight = 'x'": "a number",
    "[[denoiser]]\nprefix = ''\nkind = 'prefix-lm'\nweight = nan": "nan in it is not a finite",
    "[[denoiser]]\nprefix = ''\nkind = 'prefix-lm'\nweight = 0": "must be > 0 (got [0])",
    "[[denoiser]]\nprefix = ''\nrate = 0\nmean_span = 3\nweight = 1": "> 0 and <= mean_span",
    "[[denoiser]]\nprefix = ''\nrate = 0.9\nmean_span = 3\nweight = 1": "mean_span / (1 +",
    "[[denoiser]]\nprefix = ''\nrate = 0.1\nmean_span = 0.5\nweight = 1": "must be >= 1 (got 0.5)",
    "[[denoiser]]\nprefix = ''\nrate = 0.1\nmean_span = 3\nweight = 1\nspan = 2": "keys of",
}


@pytest.mark.parametrize("text", list(BAD), ids=lambda text: text[:40])
def test_bad_mixtures_are_refused_in_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "mixture.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        read_denoisers(str(path))
    assert BAD[text] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file() -> None:
    with pytest.raises(UsageError, match=r"--ul2-mixture must be a readable file .*got '/no/such'"):
        read_denoisers("/no/such")


def test_a_denoiser_of_weight_0_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "mixture.toml"
    entry = "[[denoiser]]\nprefix = '{}'\nkind = 'prefix-lm'\nweight = {}\n"
    path.write_text(entry.format("a", 0) + entry.format("b", 2))
    assert [denoiser.prefix for denoiser in read_denoisers(str(path))] == ["b"]


def test_a_kind_without_a_branch_is_an_error() -> None:
    """A new kind is never computed as one of the others."""
    new = Denoiser(prefix="", kind="new", mean_span=3.0, rate=0.15, weight=1.0)  # type: ignore[arg-type]
    fitted = FittedDenoiser(denoiser=new, prefix_ids=(), text=4)
    calls = {
        "lengths": lambda: new.lengths(4, 0),
        "total": lambda: new.total(4, 0),
        "spans": fitted.spans,
        "hide": lambda: fitted.hide(sample_rng(1, "ul2"), 0, np.arange(4), range(9, 8, -1)),
    }
    for call in calls.values():
        with pytest.raises(NotImplementedError, match="denoisers of kind 'new'"):
            call()
