"""Key-value cache of the reference model: each token is processed once during generation.

The slot of a token is its position. Rows are filled from the left, each to its own length, so rows
of different lengths share a batch without padding between their tokens. Padding of a shorter row
lies behind its tokens, where causal attention does not look, and is not stored.

    row 0   a b c d         lengths [4, 2]: the next token of row 0 goes to slot 4,
    row 1   x y . .         that of row 1 to slot 2

Memory is allocated once and stored keys never move. A cache requires a dropless model: under a
capacity a later token may take the slot of an earlier token's second choice (`routing.py`), which
changes the earlier token's state and every key computed from it.

Shapes: L layers, B rows, N heads of keys and values, P slots, D head width, S new tokens of a row,
A new tokens of all rows, U slots in use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_moe.config.model import ModelConfig
from megatron_moe.errors import UsageError


@dataclass(frozen=True)
class CacheStep:
    """Placement of the new tokens of one forward pass; the same for every layer."""

    counts: tuple[int, ...]
    """New tokens of each row; the rest of a row is padding."""
    positions_BS: Tensor
    """Positions of the new tokens, continued through the padding."""
    valid_BS: Tensor | None
    """False for padding; `None` if there is none."""
    rows_A: Tensor
    """Row of each new token."""
    columns_A: Tensor
    """Its index among the new tokens of its row."""
    slots_A: Tensor
    """Its slot."""
    mask_B1SU: Tensor | None
    """Slots that each new token attends to; `None` if all rows are empty so far, which is plain
    causal attention among the new tokens."""


@dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer during one forward pass."""

    keys_BNPD: Tensor
    values_BNPD: Tensor
    step: CacheStep
    context_BE: Tensor | None = None
    """State of a contextual router; see `MoE.logits`."""

    def extend(self, key_BNSD: Tensor, value_BNSD: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Store the keys and values of the new tokens.

        Returns:
            Keys and values to attend to, [B, N, U, D], and `CacheStep.mask_B1SU`.
        """
        step = self.step
        # Indexing by (row, slot) pairs skips padding, so a shorter row's slots stay free.
        for stored, new in ((self.keys_BNPD, key_BNSD), (self.values_BNPD, value_BNSD)):
            stored[step.rows_A, :, step.slots_A] = new[step.rows_A, :, step.columns_A]
        if step.mask_B1SU is None:
            # Nothing was cached before: the new keys are all keys, and causal attention without a
            # mask takes the fast path of the attention kernel.
            return key_BNSD, value_BNSD, None
        used = step.mask_B1SU.shape[-1]
        return self.keys_BNPD[:, :, :used], self.values_BNPD[:, :, :used], step.mask_B1SU


class KVCache:
    """Keys and values of all layers.

    Args:
        model: the dense part of the configuration.
        rows: B.
        slots: P, the longest row that can be held.
        device: of the model.
        dtype: of the model's activations.
        experts: E of each layer, for models whose routers have a state; `None` for others. Any
            number for a layer without experts.

    Raises:
        UsageError: more slots than `--max-position-embeddings`.
    """

    def __init__(
        self,
        model: ModelConfig,
        rows: int,
        slots: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        experts: Sequence[int] | None = None,
    ) -> None:
        longest = model.max_position_embeddings
        if not 1 <= slots <= longest:
            expected = f"from 1 to --max-position-embeddings ({longest})"
            raise UsageError("slots of the KV cache", slots, expected)
        shape = (rows, model.key_value_heads, slots, model.kv_channels)
        layers = range(model.num_layers)
        self.slots = slots
        self.lengths = [0] * rows
        """Cached tokens of each row."""
        # Zeros, not `empty`: unused slots are masked, but a masked NaN still gives 0 * NaN = NaN.
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.contexts: list[Tensor] = []
        """By layer, [B, E]; empty for models whose routers have no state."""
        if experts is not None:
            at_least = torch.promote_types(dtype, torch.float32)
            self.contexts = [
                torch.zeros(rows, count, device=device, dtype=at_least) for count in experts
            ]

    def begin(self, rows: int, length: int, counts: Sequence[int] | None) -> CacheStep:
        """Place new tokens [B, S]; nothing is stored yet.

        Args:
            rows: B.
            length: S.
            counts: tokens of each row that are not padding; `None` means S.

        Raises:
            UsageError: the rows are not those of the cache, or a row exceeds its slots.
        """
        counts = tuple([length] * rows if counts is None else counts)
        if (
            len(counts) != rows
            or rows != len(self.lengths)
            or not all(0 <= count <= length for count in counts)
        ):
            expected = f"0 to {length} for each of the {len(self.lengths)} rows of the KV cache"
            raise UsageError("new tokens", list(counts), expected)
        longest = max(old + new for old, new in zip(self.lengths, counts, strict=True))
        if longest > self.slots:
            expected = f"<= the slots of the KV cache ({self.slots})"
            raise UsageError("tokens of a row", longest, expected)
        device = self.keys[0].device
        starts_B = torch.tensor(self.lengths, device=device)
        positions_BS = starts_B[:, None] + torch.arange(length, device=device)
        pairs = [(row, column) for row, count in enumerate(counts) for column in range(count)]
        rows_A, columns_A = (
            torch.tensor(pairs, dtype=torch.long, device=device).view(-1, 2).unbind(dim=1)
        )
        mask = None
        if any(self.lengths):
            # Slot u is visible to the token at position p if u <= p: everything cached before it
            # and the new tokens up to itself. Slots behind a shorter row fail the test.
            mask = torch.arange(longest, device=device) <= positions_BS[:, None, :, None]
        valid = torch.arange(length, device=device) < torch.tensor(counts, device=device)[:, None]
        return CacheStep(
            counts=counts,
            positions_BS=positions_BS,
            valid_BS=None if min(counts) == length else valid,
            rows_A=rows_A,
            columns_A=columns_A,
            slots_A=positions_BS[rows_A, columns_A],
            mask_B1SU=mask,
        )

    def layer(self, layer: int, step: CacheStep) -> LayerCache:
        """The cache of one layer for this step."""
        context_BE = self.contexts[layer] if self.contexts else None
        return LayerCache(self.keys[layer], self.values[layer], step, context_BE)

    def finish(self, step: CacheStep) -> None:
        """Count the new tokens as cached, after every layer has stored what it keeps of them."""
        self.lengths = [old + new for old, new in zip(self.lengths, step.counts, strict=True)]

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order."""
        chosen = torch.tensor(rows, dtype=torch.long, device=self.keys[0].device)
        for tensors in (self.keys, self.values, self.contexts):
            for layer, tensor in enumerate(tensors):
                tensors[layer] = tensor.index_select(0, chosen)
        self.lengths = [self.lengths[row] for row in rows]
