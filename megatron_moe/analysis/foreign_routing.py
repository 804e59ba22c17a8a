"""Routing decisions of other programs' MoE models for given tokens, from their own routers.

The family's class in `transformers` computes, and forward hooks on its routers record. Field names
are those of `megatron_moe.model.reference.Routing`, so an analysis can use either.

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
from megatron_moe.analysis.observation import LayerRouting
from megatron_moe.errors import Corrupt, UsageError


@dataclass(frozen=True, kw_only=True)
class ForeignOutput:
    """Result of a forward pass: one record per MoE layer, and logits [B, S, V] if requested."""

    routing: list[LayerRouting]
    logits_BSV: Tensor | None


class ForeignRunner:
    """A model loaded for inference."""

    def __init__(self, model: ForeignModel, module: Any) -> None:
        self.model = model
        self.module = module

    @torch.no_grad()
    def run(
        self, tokens_BS: Tensor, *, inputs: bool = False, logits: bool = False
    ) -> ForeignOutput:
        """One causal forward pass over full rows.

        Args:
            tokens_BS: ids, without padding.
            inputs: record the inputs of the routers.
            logits: compute the logits.

        Raises:
            UsageError: an id is not in the vocabulary.
        """
        size = self.model.settings.config.vocab_size
        outside = tokens_BS[(tokens_BS < 0) | (tokens_BS >= size)]
        if len(outside):
            raise UsageError("token id", int(outside[0]), f"from 0 to {size - 1}")
        recorded: list[tuple[Tensor, tuple[Tensor, Tensor, Tensor]]] = []
        with ExitStack() as hooks:
            for weights in self.model.layers:
                router = self.module.model.layers[weights.layer].mlp.gate
                handle = router.register_forward_hook(
                    lambda _, inputs_, outputs: recorded.append((inputs_[0], outputs))
                )
                hooks.callback(handle.remove)
            body = self.module if logits else self.module.model
            found = body(tokens_BS.to(self.module.device), use_cache=False)
        records = [
            self._record(weights.layer, given, result, inputs)
            for weights, (given, result) in zip(self.model.layers, recorded, strict=True)
        ]
        return ForeignOutput(routing=records, logits_BSV=found.logits if logits else None)

    def _record(
        self,
        layer: int,
        given: Tensor,
        result: tuple[Tensor, Tensor, Tensor],
        inputs: bool,
    ) -> LayerRouting:
        """From the input of a router and its result: logits [T, E], weights and ids [T, K]."""
        logits_TE, weights_TK, ids_TK = result
        # Not every router sorts its choices. After sorting by expert, the stable sort by weight
        # breaks ties in the order of the experts.
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
    """Load a model into its family's class, from local files and with weights only.

    Args:
        model: from `open_foreign`.
        device: PyTorch device.
        dtype: dtype of the weights; `None` means that of its settings.

    Raises:
        UsageError: the tensors of the files are not those of the class.
    """
    settings = model.settings
    module, report = settings.family.model_class(transformers()).from_pretrained(
        model.path,
        config=settings.config,
        dtype=dtype or "auto",
        experts_implementation="eager",  # the grouped GEMM supports only some widths
        local_files_only=True,
        trust_remote_code=False,
        weights_only=True,
        ignore_mismatched_sizes=True,  # reported below, in one line
        output_loading_info=True,
    )
    # `from_pretrained` initialises missing tensors at random and only warns.
    for fault in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        inside = [str(name) for name in report[fault] if not model.is_outside(str(name))]
        if inside:
            names = ", ".join(sorted(inside)[:5])
            found = f"{fault.replace('_', ' ')}: {names}"
            expected = f"a checkpoint with the tensors of {settings.family.label}"
            raise Corrupt(str(model.path), found, expected)
    return ForeignRunner(model, module.to(device).eval().requires_grad_(False))
