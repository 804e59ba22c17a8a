"""What is counted, by hand."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch

from megatron_moe.moe import LayerStatistics, collect_statistics, reset_statistics, statistics
from megatron_moe.moe.router import Scores
from megatron_moe.moe.statistics import LedgerError, RoutingCounter, check_ledger
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
    counter.add(scores, load, kept, (torch.tensor(2.5), torch.tensor(0.5)))


def test_two_micro_batches_by_hand() -> None:
    counter = RoutingCounter(7, 4, None)
    one_pass(counter)
    one_pass(counter)
    (found,) = collect_statistics([counter], None).items()
    expected = LayerStatistics(
        load=(4, 2, 2, 0),
        kept=(2, 2, 2, 0),
        tokens=4,
        router_entropy=(math.log(2) + math.log(4)) / 2,
        aux_loss=2.5,
        z_loss=0.5,
        micro_batches=2,
    )
    assert found[0] == 7
    assert found[1].router_entropy == pytest.approx(expected.router_entropy)
    assert vars(found[1]) == {**vars(expected), "router_entropy": found[1].router_entropy}
    assert found[1].drop_rate == pytest.approx(2 / 8)
    assert found[1].max_over_mean_load == pytest.approx(4 / 2)


def test_what_waits_is_added_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether nothing, something or everything waits when somebody reads."""
    whole = RoutingCounter(0, 4, None)
    for _ in range(5):
        one_pass(whole)
    monkeypatch.setattr(statistics, "MOST_PENDING", 2)
    parts = RoutingCounter(0, 4, None)
    for number in range(5):
        one_pass(parts)
        assert len(parts._loads) == (number + 1) % 2
    torch.testing.assert_close(parts.sums, whole.sums)
    assert torch.equal(parts.sums, parts.sums)


@pytest.mark.parametrize("read_before", [False, True])
def test_reset_forgets(read_before: bool) -> None:
    counter = RoutingCounter(0, 4, None)
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
    counter = RoutingCounter(7, 4, None)
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
