"""Answers to a harness, against plain forward passes over single rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_moe.errors import UsageError
from megatron_moe.inference.loading import LoadedModel
from megatron_moe.inference.scoring import Scorer
from megatron_moe.inference.text import TextTokenizer
from tests.inference.cases import CONFIG, DROPLESS, TOKENIZER, greedy, model

TEXT = TextTokenizer(TOKENIZER, CONFIG.data)
LONGEST = 40


def _scorer(batch_size: int = 3, factor: float | None = None) -> Scorer:
    moe = replace(DROPLESS, moe_eval_capacity_factor=factor)
    config = replace(CONFIG, moe=moe)
    loaded = LoadedModel(model=model(moe), config=config, tokenizer=TEXT, source="the case", step=7)
    return Scorer(loaded, batch_size)


def _plain(context: Sequence[int], more: Sequence[int], factor: float | None = None) -> Any:
    """One row alone, of the last 41 ids: 40 are read."""
    made = model(replace(DROPLESS, moe_eval_capacity_factor=factor))
    ids = [*context, *more][-(LONGEST + 1) :]
    logits = made(torch.tensor([ids[:-1]]), training_capacity=False).logits[0].double()
    probs = logits[-len(more) :].softmax(dim=-1)
    likely = sum(math.log(p[token].item()) for p, token in zip(probs, more, strict=True))
    return likely, bool((probs[:, :259].argmax(dim=-1) == torch.tensor(more)).all())


CONTEXT = TEXT.encode("def read(self, size):")
PAIRS = [
    (CONTEXT, TEXT.encode(" return size")),
    (CONTEXT[:3], [80]),
    (CONTEXT * 3, TEXT.encode("too long a context")),  # 63 + 18 ids
    (CONTEXT[:4], greedy(model(), CONTEXT[:4], 5)),
    (CONTEXT, list(range(60, 60 + LONGEST))),  # nothing of the context but its last id
    (CONTEXT[:9], TEXT.encode("same")),
]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("factor", [None, 0.5])
def test_log_likelihoods_are_those_of_single_rows(batch_size: int, factor: float | None) -> None:
    found = _scorer(batch_size, factor).loglikelihoods(PAIRS)
    expected = [_plain(context, more, factor) for context, more in PAIRS]
    for mine, right in zip(found, expected, strict=True):
        assert mine[0] == pytest.approx(right[0], rel=1e-5)
        assert mine[1] == right[1]
    if factor is None:
        assert [likeliest for _, likeliest in found] == [False, False, False, True, False, False]


def test_without_a_context_a_document_begins() -> None:
    ((found, _),) = _scorer().loglikelihoods([([], [70, 80])])
    assert found == pytest.approx(_plain([1], [70, 80])[0], rel=1e-5)


def test_a_continuation_that_cannot_fit_is_refused() -> None:
    with pytest.raises(UsageError, match=r"continuation must be <= .* \(40\) \(got 41\)"):
        _scorer().loglikelihoods([([5], [70] * (LONGEST + 1))])


def _greedy_text(prompt: str, tokens: int) -> str:
    ids = TEXT.encode(prompt)[-(LONGEST - tokens) :] or [1]
    return TOKENIZER.detokenize(greedy(model(), ids, tokens))


def test_texts_are_greedy_and_end_before_the_first_stop() -> None:
    whole = _greedy_text("abcd", 12)
    late, early = whole[7:9], whole[4:6]
    assert whole.index(late) > whole.index(early) > 0, "the case needs stops in this order"
    options = {"max_gen_toks": 12}
    found = _scorer(2).continuations(
        [
            ("abcd", options),
            ("x", {"until": [], "max_gen_toks": 9}),
            ("abcd", options | {"until": [late, early]}),
            ("abcd", options | {"until": late}),
            ("y", options),
            ("z", options | {"do_sample": False, "temperature": 3.0}),
        ]
    )
    assert found == [
        whole,
        _greedy_text("x", 9),
        whole[: whole.index(early)],
        whole[: whole.index(late)],
        _greedy_text("y", 12),
        _greedy_text("z", 12),
    ]


def test_what_does_not_fit_is_cut_off_the_context() -> None:
    prompt = "0123456789" * 4
    assert _scorer().continuations([(prompt, {"max_gen_toks": 12})]) == [_greedy_text(prompt, 12)]
    # Without a number of tokens, half of the longest row.
    assert _scorer().continuations([("ab", {})]) == [_greedy_text("ab", 20)]


def test_sampling_on_request_does_not_depend_on_the_batch() -> None:
    options = {"max_gen_toks": 12, "do_sample": True, "temperature": 2.0, "top_k": 90}
    requests = [("ab", options), ("cd", {"max_gen_toks": 3}), ("ab", options), ("ef", options)]
    found = _scorer(3).continuations(requests)
    assert found == _scorer(1).continuations(requests)
    assert found[0] not in (found[2], _greedy_text("ab", 12))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_beams": 3}, "generation option of a task must be .*num_beams"),
        ({"max_gen_toks": 40}, "from 1 to 39"),
        ({"max_gen_toks": 0}, "max_gen_toks"),
        ({"top_p": 2.0}, "--top-p"),
    ],
)
def test_options_that_cannot_be_kept_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        _scorer().continuations([("a", options)])
