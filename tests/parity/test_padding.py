"""Rows with padding set to zero: every layout equals the reference, and that the definition.

The definition is written here once more, from the released code (flaxformer `DecoderLayer` and
`SparseDecoderLayer`: `logit_mask` times the norm's output), on plain tensors.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_moe.model.reference import ReferenceOpenMoE
from tests.parity.cases import LAYOUTS, PLANES, VOCAB, Layout, global_batch, run_config
from tests.parity.compare import relative_error
from tests.parity.expected import expected, reference_model
from tests.parity.harness import one_step
from tests.parity.test_layouts import RECOMPUTE, check
from tests.support.pool import Pool

# Of two pipeline stages each has an embedding or a loss; of four, two have neither.
LAYOUT = {layout.name: layout for layout in LAYOUTS} | {
    "PP4": Layout("PP4", 4, {"pipeline_model_parallel_size": 4})
}
PADDING = ("padding",)


def run(pool: Pool, name: str, variant: str = "released", **flags: Any) -> list[Any]:
    layout = LAYOUT[name]
    flags = {**layout.flags, **flags}
    return pool.run(one_step, layout.world_size, variant=variant, flags=flags, extra=PADDING)


@pytest.mark.parametrize(
    "name", ["1", "TP2", "PP2-interleaved", "EP2", "TP2xEP2", "PP2xEP2", "EP2xETP2", "PP4"]
)
def test_every_layout_equals_the_reference(pool: Pool, name: str) -> None:
    check(run(pool, name), "released", PADDING)


@pytest.mark.parametrize("variant", ["paper-port", "two-row-groups", "batched"])
def test_other_rules_equal_the_reference(pool: Pool, variant: str) -> None:
    check(run(pool, "TP2xEP2", variant), variant, PADDING)


@pytest.mark.parametrize("kind", RECOMPUTE)
@pytest.mark.parametrize("name", ["TP2xEP2", "PP2"])
def test_recomputation_takes_the_same_padding(pool: Pool, name: str, kind: str) -> None:
    check(run(pool, name, **RECOMPUTE[kind]), "released", PADDING)


def test_with_documents(pool: Pool) -> None:
    extra = (*PLANES, *PADDING)
    layout = LAYOUT["TP2"]
    outcomes = pool.run(one_step, 2, variant="released", flags=layout.flags, extra=extra)
    check(outcomes, "released", extra)


def test_padding_changes_the_loss() -> None:
    """The tests above would say little otherwise."""
    with_padding, without = (expected("released", extra) for extra in (PADDING, ()))
    assert relative_error(with_padding.sums[0], without.sums[0]) > 1e-3
    assert with_padding.kept != without.kept


class Released:
    """The released stack on the reference's weights, with nothing of its code."""

    def __init__(self, model: ReferenceOpenMoE) -> None:
        self.weights = dict(model.named_parameters())
        self.config = run_config("released", {})
        self.probs: list[Tensor] = []
        """Of each MoE layer's tokens, [B, S, E]."""

    def norm(self, x: Tensor, name: str, real_BS1: Tensor) -> Tensor:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.config.model.norm_epsilon)
        return real_BS1 * (x * scale * self.weights[f"{name}.weight"])

    def attention(self, x: Tensor, name: str) -> Tensor:
        model = self.config.model
        shape = (*x.shape[:2], model.num_attention_heads, model.kv_channels)
        q, k, v = (
            (x @ self.weights[f"{name}.{part}.weight"].t()).view(shape).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        half = model.kv_channels // 2
        frequency = model.rotary_base ** (-torch.arange(half, dtype=x.dtype) / half)
        turn = torch.polar(
            torch.ones(x.shape[1], half, dtype=x.dtype),
            torch.outer(torch.arange(x.shape[1], dtype=x.dtype), frequency),
        )
        q, k = (torch.complex(t[..., :half], t[..., half:]) * turn for t in (q, k))
        scores = (q @ k.conj().transpose(-1, -2)).real
        scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -torch.inf)
        y = scores.softmax(-1) @ v
        return y.transpose(1, 2).flatten(2) @ self.weights[f"{name}.output.weight"].t()

    def feed_forward(self, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        linear, gated = (x @ gate).chunk(2, -1)
        return (linear * F.silu(gated) * (x @ up)) @ down

    def dense(self, x: Tensor, name: str) -> Tensor:
        parts = (self.weights[f"{name}.{part}.weight"].t() for part in ("gate", "up", "down"))
        return self.feed_forward(x, *parts)

    def experts(self, x_BSH: Tensor, name: str, slots: int) -> Tensor:
        """Groups of one row, choice by choice."""
        probs_BSE = (x_BSH @ self.weights[f"{name}.router.weight"].t()).softmax(-1)
        self.probs.append(probs_BSE)
        gate, up, down = (self.weights[f"{name}.experts.{part}"] for part in ("gate", "up", "down"))
        y = torch.zeros_like(x_BSH)
        for row, probs_SE in enumerate(probs_BSE):
            taken = [0] * probs_SE.shape[1]
            for choice in range(2):
                for place, probs_E in enumerate(probs_SE):
                    # Sorted by probability and then by expert: ties go to the lower one.
                    order = sorted(range(len(probs_E)), key=lambda e: (-probs_E[e].item(), e))
                    expert = order[choice]
                    taken[expert] += 1
                    if taken[expert] <= slots:
                        out = self.feed_forward(
                            x_BSH[row, place], gate[expert], up[expert], down[expert]
                        )
                        y[row, place] += probs_E[expert] * out
        return y

    def logits(self, tokens: Tensor, padding: Tensor, slots: int) -> Tensor:
        real = (padding == 0).unsqueeze(-1)
        x = self.weights["embedding.weight"][tokens]
        for layer in range(self.config.model.num_layers):
            name = f"layers.{layer}"
            x = x + self.attention(
                self.norm(x, f"{name}.attention_norm", real), f"{name}.attention"
            )
            normed = self.norm(x, f"{name}.ffn_norm", real)
            if layer % 2 == 0:
                x = x + self.dense(normed, f"{name}.ffn")
                continue
            x = x + self.experts(normed, f"{name}.moe", slots)
            x = x + self.dense(self.norm(x, f"{name}.shared_norm", real), f"{name}.shared")
        return self.norm(x, "final_norm", real) @ self.weights["output.weight"].t()


def test_padding_has_uniform_scores_and_chooses_the_first_experts() -> None:
    """Logits, choices and balance loss of the reference against the stack written above."""
    model = reference_model("released")
    tokens = global_batch()[0][:2]
    padding = torch.zeros_like(tokens)
    padding[0, 9:] = padding[1, 13:] = 1
    released = Released(model)
    slots = 4  # max(round(1.0 * 16 / 4), 4)
    with torch.no_grad():
        expect = released.logits(tokens, padding, slots)
        found = model(tokens, training_capacity=True, padding_BS=padding)
        as_tokens = model(tokens, training_capacity=True)
    torch.testing.assert_close(found.logits, expect, rtol=1e-9, atol=1e-9)
    assert (found.logits[padding == 1] == 0).all()
    real = padding == 0
    differ = (found.logits - as_tokens.logits).abs().amax(-1)[real]
    assert (differ > 1e-3).sum() > 5, "pads take slots of experts 0 and 1, not of any"
    for routing, probs_BSE in zip(found.routing, released.probs, strict=True):
        pads = padding.flatten() == 1
        assert (routing.router_probs_TE[pads] == 0.25).all()
        assert (routing.ids_TK[pads] == torch.tensor([0, 1])).all()
        chosen = probs_BSE.sort(dim=-1, descending=True, stable=True).indices[..., :2]
        share_BE = F.one_hot(chosen, 4).sum(2).double().mean(1)
        balance = 4 * (share_BE * probs_BSE.mean(1)).sum(-1).mean()
        torch.testing.assert_close(routing.balance_loss, balance)
    found_loss, without = (float(out.aux_loss) for out in (found, as_tokens))
    assert abs(found_loss - without) > 1e-2


def test_an_id_of_zero_is_no_padding_by_itself() -> None:
    """Only the plane says what padding is: BOS and pad are both 0."""
    model = reference_model("released")
    tokens = torch.zeros(1, 16, dtype=torch.int64)
    with torch.no_grad():
        plain = model(tokens, training_capacity=True)
        none = model(tokens, training_capacity=True, padding_BS=torch.zeros_like(tokens))
    assert torch.equal(plain.logits, none.logits)
    assert plain.logits.shape[-1] == VOCAB
