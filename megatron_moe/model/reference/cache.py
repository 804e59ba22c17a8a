"""Keys and values of the tokens that the reference model has read, so that none is read twice.

A token's slot is its position. Rows are filled from the left, each up to its own length, so rows of
different lengths share a batch without padding between their tokens: what a shorter row is padded
with lies behind its tokens, where causal attention does not look, and is not stored.

All memory is taken at the start and nothing moves afterwards. A cache serves a model that drops
nothing: under a capacity a later token may take the slot of an earlier one's second choice, which
changes what the earlier token was, and with it every key after it.

Shapes: L layers, B rows, N heads, P slots, D head width, S new tokens of a row, A new tokens of all
rows, U slots in use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_moe.config.model import ModelConfig
from megatron_moe.errors import UsageError


@dataclass(frozen=True)
class Step:
    """Where the new tokens of one forward pass belong; the same for every layer."""

    counts: tuple[int, ...]
    """New tokens of each row; what a row has beyond them is padding."""
    positions_BS: Tensor
    """Of the new tokens, and on through the padding."""
    real_BS: Tensor | None
    """False for padding; `None` if there is none."""
    rows_A: Tensor
    """Row of each new token."""
    columns_A: Tensor
    """Its place among the new tokens of its row."""
    slots_A: Tensor
    """Its slot."""
    seen_B1SU: Tensor | None
    """Slots that each new token attends to; `None` if all rows begin here, which is plain causal
    attention among the new tokens."""


@dataclass(frozen=True)
class LayerMemory:
    """One layer of a cache, during one forward pass."""

    keys_BNPD: Tensor
    values_BNPD: Tensor
    step: Step

    def extend(self, key_BNSD: Tensor, value_BNSD: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Store what is new.

        Returns:
            Keys and values to attend to, [B, N, U, D], and `Step.seen_B1SU`.
        """
        step = self.step
        for stored, new in ((self.keys_BNPD, key_BNSD), (self.values_BNPD, value_BNSD)):
            stored[step.rows_A, :, step.slots_A] = new[step.rows_A, :, step.columns_A]
        if step.seen_B1SU is None:
            return key_BNSD, value_BNSD, None
        used = step.seen_B1SU.shape[-1]
        return self.keys_BNPD[:, :, :used], self.values_BNPD[:, :, :used], step.seen_B1SU


class Cache:
    """Keys and values of all layers.

    Args:
        model: the dense part of the configuration.
        rows: B.
        slots: P, the longest row that can be held.
        device: of the model.
        dtype: of the model's activations.

    Raises:
        UsageError: more slots than positions that the model is declared for.
    """

    def __init__(
        self,
        model: ModelConfig,
        rows: int,
        slots: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        longest = model.max_position_embeddings
        if not 1 <= slots <= longest:
            expected = f"1 to --max-position-embeddings ({longest})"
            raise UsageError("slots of the cache", slots, expected)
        shape = (rows, model.num_attention_heads, slots, model.kv_channels)
        layers = range(model.num_layers)
        self.slots = slots
        self.lengths = [0] * rows
        """Tokens of each row so far."""
        # Zeros: slots that are not in use yet are masked, but not if they hold NaNs.
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]

    def begin(self, rows: int, length: int, counts: Sequence[int] | None) -> Step:
        """Lay out new tokens [B, S]; nothing is stored yet.

        Args:
            rows: B.
            length: S.
            counts: how many are real, by row; `None` means all.

        Raises:
            UsageError: other rows than those of the cache, or a row becomes too long.
        """
        counts = tuple([length] * rows if counts is None else counts)
        if (
            len(counts) != rows
            or rows != len(self.lengths)
            or not all(0 <= count <= length for count in counts)
        ):
            expected = f"0 to {length} for each of the {len(self.lengths)} rows of the cache"
            raise UsageError("new tokens", list(counts), expected)
        longest = max(old + new for old, new in zip(self.lengths, counts, strict=True))
        if longest > self.slots:
            raise UsageError("tokens of a row", longest, f"at most the cache's {self.slots}")
        device = self.keys[0].device
        starts_B = torch.tensor(self.lengths, device=device)
        positions_BS = starts_B[:, None] + torch.arange(length, device=device)
        pairs = [(row, column) for row, count in enumerate(counts) for column in range(count)]
        rows_A, columns_A = (
            torch.tensor(pairs, dtype=torch.long, device=device).view(-1, 2).unbind(dim=1)
        )
        seen = None
        if any(self.lengths):
            seen = torch.arange(longest, device=device) <= positions_BS[:, None, :, None]
        real = torch.arange(length, device=device) < torch.tensor(counts, device=device)[:, None]
        return Step(
            counts=counts,
            positions_BS=positions_BS,
            real_BS=None if min(counts) == length else real,
            rows_A=rows_A,
            columns_A=columns_A,
            slots_A=positions_BS[rows_A, columns_A],
            seen_B1SU=seen,
        )

    def layer(self, layer: int, step: Step) -> LayerMemory:
        """What the attention of a layer needs."""
        return LayerMemory(self.keys[layer], self.values[layer], step)

    def finish(self, step: Step) -> None:
        """All layers have stored their part: the rows are longer now."""
        self.lengths = [old + new for old, new in zip(self.lengths, step.counts, strict=True)]

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone, in this order."""
        chosen = torch.tensor(rows, dtype=torch.long, device=self.keys[0].device)
        for tensors in (self.keys, self.values):
            for layer, tensor in enumerate(tensors):
                tensors[layer] = tensor.index_select(0, chosen)
        self.lengths = [self.lengths[row] for row in rows]
