"""Continuations: the model's own, the same alone and in a batch, with a cache and without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from megatron_moe.config import MoEConfig
from megatron_moe.errors import UsageError
from megatron_moe.inference.generation import (
    GREEDY,
    GeneratedToken,
    GenerationConfig,
    SamplingParams,
    generate,
)
from megatron_moe.inference.routing_log import RoutingLog
from tests.inference.cases import CONFIG, DROPLESS, greedy, model

PROMPTS = [[70, 71, 72], [100, 90, 80, 70, 60, 50, 40], [33]]
SETTINGS = GenerationConfig(max_new_tokens=10, vocab_size=259, eod=1, sampling=GREEDY)
# Slots for all but an adversary's tokens of a text this short: some drop, most do not.
DROPPING = replace(CONFIG.moe, moe_eval_capacity_factor=1.0)


def _texts(
    settings: GenerationConfig = SETTINGS,
    prompts: Sequence[Sequence[int]] = PROMPTS,
    moe: MoEConfig = DROPLESS,
    seeds: Sequence[int] = (5, 6, 7),
    log: RoutingLog | None = None,
) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in prompts]
    for drawn in generate(model(moe), prompts, settings, seeds, log):
        if drawn.token is not None:
            found[drawn.text].append(drawn.token)
    return found


@pytest.mark.parametrize("cached", [True, False])
def test_greedy_texts_are_the_models_own(cached: bool) -> None:
    expected = [greedy(model(), prompt, 10) for prompt in PROMPTS]
    assert _texts(replace(SETTINGS, use_cache=cached)) == expected
    assert len({tuple(ids) for ids in expected}) == 3


@pytest.mark.parametrize("rule", ["t5x", "port"])
def test_under_a_capacity_a_text_is_the_models_own_and_has_its_slots_to_itself(rule: str) -> None:
    moe = replace(DROPPING, moe_capacity_rule=rule)
    found = _texts(replace(SETTINGS, use_cache=False), moe=moe)
    assert found == [greedy(model(moe), prompt, 10) for prompt in PROMPTS]
    assert found != _texts(), "the case cannot tell dropless from dropping"


def test_a_cache_refuses_a_capacity() -> None:
    with pytest.raises(UsageError, match="dropless"):
        _texts(moe=DROPPING)


def test_a_drawn_text_depends_on_its_prompt_and_seed_alone() -> None:
    rules = replace(SETTINGS, sampling=SamplingParams(temperature=1.5, top_k=50))
    together = _texts(rules)
    for row, (prompt, seed) in enumerate(zip(PROMPTS, (5, 6, 7), strict=True)):
        assert _texts(rules, [prompt], seeds=[seed]) == [together[row]]
        assert _texts(replace(rules, use_cache=False), [prompt], seeds=[seed]) == [together[row]]
    assert _texts(rules, seeds=(5, 6, 8))[2] != together[2]


@pytest.mark.parametrize("cached", [True, False])
def test_texts_end_one_by_one(cached: bool) -> None:
    free = _texts()
    eod = free[0][3]
    stops = free[1][5]
    assert eod not in free[0][:3] + free[1][:6], "the case needs other texts that go on"
    rules = replace(
        SETTINGS,
        use_cache=cached,
        eod=eod,
        stop=lambda text, token: text == 1 and token == stops,
    )
    drawn = list(generate(model(), PROMPTS, rules, (0, 0, 0)))
    texts = [[d for d in drawn if d.text == text] for text in range(3)]
    assert [d.token for d in texts[0]] == [*free[0][:3], None]
    assert texts[0][-1] == GeneratedToken(0, None, "eod")
    assert texts[1][-1].finish_reason == "stop"
    assert [d.token for d in texts[1]] == free[1][: free[1].index(stops) + 1]
    end = free[2].index(eod) if eod in free[2] else 10
    assert [d.token for d in texts[2] if d.token is not None] == free[2][:end]
    assert texts[2][-1].finish_reason == ("length" if end == 10 else "eod")
    assert all(d.finish_reason is None for text in texts for d in text[:-1])


def test_the_last_position_is_used_and_not_one_more() -> None:
    longest = CONFIG.model.max_position_embeddings
    prompt = list(range(50, 50 + longest - 4))
    assert len(_texts(replace(SETTINGS, max_new_tokens=4), [prompt], seeds=[0])[0]) == 4
    message = rf"--max-new-tokens must be <= 4 \(got 5\); the prompt has {longest - 4} tokens"
    with pytest.raises(UsageError, match=message):
        _texts(replace(SETTINGS, max_new_tokens=5), [prompt], seeds=[0])
    with pytest.raises(UsageError, match="prompt 2 has 36 tokens"):
        _texts(replace(SETTINGS, max_new_tokens=5), [[50], prompt], seeds=[0, 0])


@pytest.mark.parametrize("cached", [True, False])
def test_the_log_says_what_one_pass_over_the_text_decides(cached: bool) -> None:
    log = RoutingLog(3)
    # The first text ends early, so that rows move.
    eod = _texts()[0][3]
    found = _texts(replace(SETTINGS, use_cache=cached, eod=eod), log=log)
    for text, (prompt, new) in enumerate(zip(PROMPTS, found, strict=True)):
        ended = len(new) < 10
        read = [*prompt, *(new if ended else new[:-1])]
        (routing,) = model()(torch.tensor([read]), training_capacity=False).routing
        (layer,) = log.layers(text)
        assert layer.layer == 1
        assert layer.experts_TK == routing.ids_TK.tolist()
        torch.testing.assert_close(torch.tensor(layer.probs_TK), routing.probs_TK)
        assert layer.kept_TK == routing.kept_TK.tolist()


def test_the_log_says_what_was_dropped() -> None:
    log = RoutingLog(3)
    _texts(replace(SETTINGS, use_cache=False), moe=DROPPING, log=log)
    kept = torch.tensor(log.layers(1)[0].kept_TK)
    assert kept.shape == (7 + 9, 2)
    assert kept.any() and not kept.all()
