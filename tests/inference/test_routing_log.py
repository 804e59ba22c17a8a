"""How decisions of routers are shown."""

from __future__ import annotations

import torch

from megatron_moe.inference.routing_log import RoutingLog, routing_json, routing_table
from megatron_moe.inference.text import TextTokenizer
from megatron_moe.model.reference.routing import Routing
from megatron_moe.tokenizer.simple import ByteTokenizer
from tests.inference.cases import CONFIG

TEXT = TextTokenizer(ByteTokenizer(), CONFIG.data)


def _routing(layer: int, ids: list[list[int]], kept: list[list[bool]]) -> Routing:
    nothing = torch.zeros(())
    return Routing(
        layer=layer,
        router_probs_TE=nothing,
        scores_TE=nothing,
        ids_TK=torch.tensor(ids),
        probs_TK=torch.tensor([[0.5, 0.25]] * len(ids)),
        kept_TK=torch.tensor(kept),
        counts_E=nothing,
        balance_losses=(nothing,),
        z_loss=nothing,
        preferred_E=nothing,
    )


def _log() -> RoutingLog:
    """Two texts of two tokens and one; then a token of the second alone."""
    log = RoutingLog(2)
    yes, pad = [True, True], [False, False]
    first = _routing(3, [[0, 1], [2, 3], [4, 5], [9, 9]], [yes, [True, False], yes, pad])
    last = _routing(7, [[1, 0], [3, 2], [5, 4], [9, 9]], [yes, yes, yes, pad])
    log.add([0, 1], [2, 1], [first, last])
    log.add([1], [1], [_routing(3, [[6, 7]], [yes]), _routing(7, [[7, 6]], [[False, True]])])
    return log


def test_table() -> None:
    ids = TEXT.encode("abc")
    assert routing_table(_log().layers(0), ids, TEXT).splitlines() == [
        "   token  layer 3          layer 7",
        "0  'a'    0:0.50 1:0.25    1:0.50 0:0.25",
        "1  'b'    2:0.50 (3:0.25)  3:0.50 2:0.25",
    ]
    assert routing_table(_log().layers(1), ids, TEXT).splitlines()[1:] == [
        "0  'a'    4:0.50 5:0.25  5:0.50 4:0.25",
        "1  'b'    6:0.50 7:0.25  (7:0.50) 6:0.25",
    ]


def test_json() -> None:
    first, last = routing_json(_log().layers(1))
    assert first == {
        "layer": 3,
        "experts": [[4, 5], [6, 7]],
        "probabilities": [[0.5, 0.25]] * 2,
        "kept": [[True, True]] * 2,
    }
    assert (last["layer"], last["kept"]) == (7, [[True, True], [False, True]])


def test_a_text_that_is_read_again_begins_anew() -> None:
    log = _log()
    log.clear(1)
    assert routing_json(log.layers(1)) == []
    log.add([1], [1], [_routing(3, [[1, 2]], [[True, True]])])
    assert [layer.experts_TK for layer in log.layers(1)] == [[[1, 2]]]
    assert len(log.layers(0)) == 2


def test_a_dense_model_has_no_decisions() -> None:
    log = RoutingLog(1)
    log.add([0], [3], [])
    assert routing_table(log.layers(0), [5, 6], TEXT) == "the model has no MoE layer"
