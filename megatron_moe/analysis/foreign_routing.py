"""What other programs' mixtures choose for given tokens, as their own routers say it.

The family's own class from `transformers` computes; hooks on its routers listen. Names are those of
`megatron_moe.model.reference.routing.Routing`, so that an analysis reads either.

Shapes: B rows, S tokens of a row, T = B S tokens row by row, E experts, K choices, H hidden, V
vocabulary.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_moe.analysis.foreign import ForeignModel
from megatron_moe.analysis.foreign_config import transformers
from megatron_moe.errors import Corrupt, UsageError


@dataclass(frozen=True, kw_only=True)
class LayerRouting:
    """What the router of one layer decided about T tokens.

    Args:
        layer: index of the layer in the network, from 0.
        router_probs_TE: scores of all experts, fp32: softmax or sigmoid, as the family's rule says.
        ids_TK: the experts that were used, by falling weight; equal ones in the order of experts.
        probs_TK: their scores.
        weights_TK: what their outputs were multiplied with, fp32.
        kept_TK: all true: these families drop nothing.
        counts_E: choices per expert.
        inputs_TH: what router and experts were given; `None` if it was not asked for.
    """

    layer: int
    router_probs_TE: Tensor
    ids_TK: Tensor
    probs_TK: Tensor
    weights_TK: Tensor
    kept_TK: Tensor
    counts_E: Tensor
    inputs_TH: Tensor | None


@dataclass(frozen=True, kw_only=True)
class ForeignOutput:
    """Of one forward pass: a record for every layer with experts, and logits [B, S, V] if asked."""

    routing: list[LayerRouting]
    logits_BSV: Tensor | None


class ForeignRunner:
    """A model in memory, for inference alone."""

    def __init__(self, model: ForeignModel, module: Any) -> None:
        self.model = model
        self.module = module

    @torch.no_grad()
    def run(
        self, tokens_BS: Tensor, *, inputs: bool = False, logits: bool = False
    ) -> ForeignOutput:
        """One causal forward pass over full rows.

        Args:
            tokens_BS: ids, none of them padding.
            inputs: keep what the routers were given.
            logits: compute them.

        Raises:
            UsageError: an id is not in the vocabulary.
        """
        size = self.model.settings.config.vocab_size
        outside = tokens_BS[(tokens_BS < 0) | (tokens_BS >= size)]
        if len(outside):
            raise UsageError("a token id", int(outside[0]), f"from 0 to {size - 1}")
        heard: list[tuple[Tensor, tuple[Tensor, Tensor, Tensor]]] = []
        with ExitStack() as hooks:
            for weights in self.model.layers:
                router = self.module.model.layers[weights.layer].mlp.gate
                handle = router.register_forward_hook(
                    lambda _, given, said: heard.append((given[0], said))
                )
                hooks.callback(handle.remove)
            body = self.module if logits else self.module.model
            found = body(tokens_BS.to(self.module.device), use_cache=False)
        records = [
            self._record(weights.layer, given, said, inputs)
            for weights, (given, said) in zip(self.model.layers, heard, strict=True)
        ]
        return ForeignOutput(routing=records, logits_BSV=found.logits if logits else None)

    def _record(
        self, layer: int, given: Tensor, said: tuple[Tensor, Tensor, Tensor], inputs: bool
    ) -> LayerRouting:
        """From a router's input, and its output: logits [T, E], weights and ids [T, K]."""
        logits_TE, weights_TK, ids_TK = said
        ids_TK, order_TK = ids_TK.sort(dim=-1)
        weights_TK = weights_TK.float().gather(1, order_TK)
        weights_TK, order_TK = weights_TK.sort(dim=-1, descending=True, stable=True)
        ids_TK = ids_TK.gather(1, order_TK)
        soft = self.model.settings.rule.score == "softmax"
        probs_TE = logits_TE.float().softmax(-1) if soft else logits_TE.float().sigmoid()
        return LayerRouting(
            layer=layer,
            router_probs_TE=probs_TE,
            ids_TK=ids_TK,
            probs_TK=probs_TE.gather(1, ids_TK),
            weights_TK=weights_TK,
            kept_TK=torch.ones_like(ids_TK, dtype=torch.bool),
            counts_E=ids_TK.flatten().bincount(minlength=self.model.settings.num_experts),
            inputs_TH=given.flatten(0, -2) if inputs else None,
        )


def load_foreign(
    model: ForeignModel, *, device: str = "cpu", dtype: torch.dtype | None = None
) -> ForeignRunner:
    """Load a model by its family's own class; from local files, weights alone.

    Args:
        model: from `open_foreign`.
        device: torch's name.
        dtype: by default the one that its settings name.

    Raises:
        UsageError: the class wants other tensors than the files hold.
    """
    settings = model.settings
    module, report = settings.family.model_class(transformers()).from_pretrained(
        model.path,
        config=settings.config,
        dtype=dtype or "auto",
        experts_implementation="eager",  # the grouped product wants widths of its own
        local_files_only=True,
        trust_remote_code=False,
        weights_only=True,
        ignore_mismatched_sizes=True,  # they are refused below, in one line
        output_loading_info=True,
    )
    # What is missing would be drawn at random, with no more than a warning.
    for fault in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if report[fault]:
            names = ", ".join(sorted(map(str, report[fault]))[:5])
            found = f"{fault.replace('_', ' ')}: {names}"
            raise Corrupt(str(model.path), found, f"all tensors of a {settings.family.label}")
    return ForeignRunner(model, module.to(device).eval().requires_grad_(False))
