"""Other choices for an MoE layer of the reference model, within a context.

Hooks replace what the experts are given and what the layer records; the model does not change.

Shapes: T tokens, K choices, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor

from megatron_moe.model.reference import Routing
from megatron_moe.model.reference.ffn import MoE

Decide = Callable[[Tensor, int], dict[str, Any]]
"""From the input [T, H] of a layer and the number of rows: the fields of `Routing` that change,
among them `ids_TK`, `probs_TK` and `kept_TK`."""


@contextmanager
def rerouted(part: MoE, decide: Decide) -> Iterator[None]:
    """Within this context the layer routes as `decide` says. Padding is processed by no expert."""
    hooks = _Hooks(decide)
    with ExitStack() as contexts:
        for handle in (
            part.register_forward_pre_hook(hooks.enter, with_kwargs=True),
            part.experts.register_forward_pre_hook(hooks.choose),
            part.register_forward_hook(hooks.leave),
        ):
            contexts.callback(handle.remove)
        yield


class _Hooks:
    def __init__(self, decide: Decide) -> None:
        self._decide = decide
        self._rows = 0
        self._valid_BS: Tensor | None = None
        self._fields: dict[str, Any] = {}

    def enter(self, _module: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Before the layer."""
        x_BSH, _, valid_BS = (*given, *named.values(), None)[:3]
        self._rows, self._valid_BS = x_BSH.shape[0], valid_BS

    def choose(self, _module: Any, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Before the experts."""
        x_TH, ids_TK, probs_TK, _ = given
        fields = self._decide(x_TH, self._rows)
        if len(fields["ids_TK"]) != len(ids_TK):
            raise ValueError(f"choices of {len(fields['ids_TK'])} tokens for {len(ids_TK)}")
        kept_TK = fields["kept_TK"].to(ids_TK.device)
        if self._valid_BS is not None:
            kept_TK = kept_TK & self._valid_BS.flatten()[:, None]
        changed = {
            "ids_TK": fields["ids_TK"].to(ids_TK),
            "probs_TK": fields["probs_TK"].to(probs_TK),
            "kept_TK": kept_TK,
        }
        self._fields = fields | changed
        return (x_TH, *changed.values())

    def leave(
        self, _module: Any, _given: Any, result: tuple[Tensor, Routing]
    ) -> tuple[Tensor, Routing]:
        """After the layer."""
        y_BSH, routing = result
        return y_BSH, replace(routing, **self._fields)
