"""What is counted, by hand."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import pytest
import torch

from megatron_moe.moe import LayerStatistics, collect_statistics, reset_statistics
from megatron_moe.moe import counter as counter_module
from megatron_moe.moe.counter import RoutingCounter, TokenFates
from megatron_moe.moe.scoring import Scores
from megatron_moe.moe.statistics import LedgerError, check_ledger
from tests.moe.cases import layer_of, moe_config, tokens


def one_pass(counter: RoutingCounter) -> None:
    logits = torch.tensor([[5.0, 5.0, -95.0, -95.0], [1.0] * 4])
    choices = torch.tensor([[0, 1], [0, 2]])
    probs = logits.softmax(-1)
    weights, log_z = probs.gather(1, choices), logits.logsumexp(-1)
    scores = Scores(logits, logits.log_softmax(-1), log_z, probs, choices, weights)
    # The first choice of the second token was dropped.
    load, kept = (
        torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0]]),
        torch.tensor([[1, 1, 0, 0], [0, 0, 1, 0]]),
    )
    kept_TK = torch.tensor([[True, True], [False, True]])
    fates = TokenFates(kept_TK=kept_TK, batch=1, slots=12)
    counter.add(scores, load, kept, (torch.tensor(2.5), torch.tensor(0.5)), fates)


def test_two_micro_batches_by_hand() -> None:
    counter = RoutingCounter(7, 4, 2, None)
    one_pass(counter)
    one_pass(counter)
    (found,) = collect_statistics([counter], None).items()
    expected = LayerStatistics(
        load=(4, 2, 2, 0),
        kept=(2, 2, 2, 0),
        tokens=4,
        router_entropy=(math.log(2) + math.log(4)) / 2,
        router_confidence=(1 / 2 + 1 / 4) / 2,
        logit_rms=math.sqrt((2 * 25 + 2 * 95**2 + 4) / 8),
        aux_loss=2.5,
        z_loss=0.5,
        micro_batches=2,
        # A row of two positions: the first is in the first of eight parts, the second in the fifth.
        tokens_at=((2, 0, 0, 0, 2, 0, 0, 0), (0,) * 8),
        kept_at=(((2, 2), *[(0, 0)] * 3, (0, 2), *[(0, 0)] * 3), ((0, 0),) * 8),
        slots=24,
    )
    assert found[0] == 7
    for name in ("router_entropy", "router_confidence", "logit_rms"):
        assert getattr(found[1], name) == pytest.approx(getattr(expected, name)), name
        expected = replace(expected, **{name: getattr(found[1], name)})
    assert found[1] == expected
    assert found[1].drop_rate == pytest.approx(2 / 8)
    assert found[1].max_over_mean_load == pytest.approx(4 / 2)
    assert found[1].max_violation == pytest.approx((4 - 2) / 2)
    assert found[1].dead_experts == 1
    assert found[1].drop_rate_by_choice == (0.5, 0.0)
    assert found[1].drop_rate_by_position == (0.0, None, None, None, 0.5, None, None, None)
    assert (found[1].drop_rate_of_real, found[1].drop_rate_of_padding) == (0.25, None)


class Fates:
    """Random choices of three passes of 12 positions and 3 rows, the last without padding."""

    length, rows, topk = 12, 3, 2

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(3)
        shape = (3, self.length, self.rows)
        self.kept = torch.rand(*shape, self.topk, generator=draw) < 0.6
        self.pads = torch.rand(shape, generator=draw) < 0.3
        self.pads[2] = False

    def counter(self, shard: int, shards: int) -> RoutingCounter:
        """What one of several ranks counts, each of which has a part of the positions."""
        counter = RoutingCounter(0, 4, self.topk, None)
        mine = slice(shard * self.length // shards, (shard + 1) * self.length // shards)
        for number in range(3):
            kept, pads = self.kept[number, mine].flatten(0, 1), self.pads[number, mine].flatten()
            none = torch.zeros(len(pads), 4)
            scores = Scores(none, none, none[:, 0], none, kept.long(), none[:, :2])
            fates = TokenFates(
                kept_TK=kept,
                batch=self.rows,
                shard=shard,
                shards=shards,
                padding_T=None if number == 2 else pads,
            )
            empty = torch.zeros(0, 4, dtype=torch.int64)
            counter.add(scores, empty, empty, (torch.zeros(()), torch.zeros(())), fates)
        return counter

    def by_loops(self) -> tuple[list[list[int]], list[list[list[int]]]]:
        tokens = [[0] * 8 for _ in range(2)]
        kept = [[[0] * self.topk for _ in range(8)] for _ in range(2)]
        for number in range(3):
            for place in range(self.length):
                for row in range(self.rows):
                    kind = int(self.pads[number, place, row])
                    tokens[kind][place * 8 // self.length] += 1
                    for choice in range(self.topk):
                        hit = int(self.kept[number, place, row, choice])
                        kept[kind][place * 8 // self.length][choice] += hit
        return tokens, kept


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_drops_by_kind_position_and_choice_equal_plain_loops(shards: int) -> None:
    fates = Fates()
    tokens, kept = fates.by_loops()
    parts = [fates.counter(shard, shards) for shard in range(shards)]
    whole = RoutingCounter(0, 4, fates.topk, None)
    for part in parts:
        whole.sums.add_(part.sums)
    found = collect_statistics([whole], None)[0]
    assert [list(kind) for kind in found.tokens_at] == tokens
    assert [[list(counts) for counts in kind] for kind in found.kept_at] == kept
    for kind, rate in enumerate((found.drop_rate_of_real, found.drop_rate_of_padding)):
        choices = sum(tokens[kind]) * fates.topk
        assert rate == pytest.approx(1 - sum(map(sum, kept[kind])) / choices)
    second = sum(counts[1] for kind in kept for counts in kind)
    assert found.drop_rate_by_choice[1] == pytest.approx(1 - second / sum(map(sum, tokens)))
    last = sum(sum(kind[7]) for kind in kept) / (tokens[0][7] + tokens[1][7]) / fates.topk
    assert found.drop_rate_by_position[7] == pytest.approx(1 - last)
    json.dumps(found.to_json(), allow_nan=False)


def test_what_waits_is_added_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether nothing, something or everything waits when somebody reads."""
    whole = RoutingCounter(0, 4, 2, None)
    for _ in range(5):
        one_pass(whole)
    monkeypatch.setattr(counter_module, "MOST_PENDING", 2)
    parts = RoutingCounter(0, 4, 2, None)
    for number in range(5):
        one_pass(parts)
        assert len(parts._loads) == (number + 1) % 2
    torch.testing.assert_close(parts.sums, whole.sums)
    assert torch.equal(parts.sums, parts.sums)


@pytest.mark.parametrize("read_before", [False, True])
def test_reset_forgets(read_before: bool) -> None:
    counter = RoutingCounter(0, 4, 2, None)
    one_pass(counter)
    if read_before:
        assert counter.sums.any()
    reset_statistics([counter])
    empty = collect_statistics([counter], None)[0]
    assert empty.tokens == empty.drop_rate == 0


def test_a_model_without_expert_layers_has_no_statistics() -> None:
    assert collect_statistics([torch.nn.Linear(2, 2)], None) == {}


def test_training_without_gradients_is_not_counted_and_evaluation_is() -> None:
    layer = layer_of(moe_config())
    with torch.no_grad():
        layer(tokens(0))
        assert collect_statistics([layer], None)[3].micro_batches == 0
        layer.eval()(tokens(0))
    assert collect_statistics([layer], None)[3].micro_batches == 1


def test_counters_are_no_part_of_a_checkpoint() -> None:
    names = set(layer_of(moe_config()).state_dict())
    assert names == {"router.weight", "experts.weight_in", "experts.weight_out"}


def test_every_position_is_accounted_for() -> None:
    """Four tokens with two choices each: eight, of which two were dropped."""
    counter = RoutingCounter(7, 4, 2, None)
    one_pass(counter)
    one_pass(counter)
    layers = collect_statistics([counter], None)
    check_ledger(layers, 4, 2)
    assert (layers[7].kept_choices, layers[7].dropped_choices) == (6, 2)
    for positions, topk, said in ((5, 2, "5, the positions of the steps (got 4 tokens routed)"),):
        with pytest.raises(LedgerError, match=re.escape(f"layer 7: tokens must add up to {said}")):
            check_ledger(layers, positions, topk)
    with pytest.raises(LedgerError, match=re.escape("12, 3 for each of 4 tokens (got 8 choices")):
        check_ledger(layers, 4, 3)
    lost = {7: replace(layers[7], load=(4, 2, 1, 1))}
    with pytest.raises(LedgerError, match="no more kept than chosen"):
        check_ledger(lost, 4, 2)
