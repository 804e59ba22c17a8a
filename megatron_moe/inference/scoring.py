"""How probable given tokens are, without ever holding the logits of a whole batch.

B rows, S tokens of a row, H hidden, V vocabulary, N predictions that are wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_moe.inference.loading import Loaded

LOGITS = 1 << 26
"""Elements of logits at a time: 256 MiB in fp32. A row of 2048 tokens of the released vocabulary
would have 2 GiB."""


@torch.no_grad()
def predictions(
    loaded: Loaded,
    tokens_BS: Tensor,
    labels_BS: Tensor,
    wanted_BS: Tensor,
    *,
    positions_BS: Tensor | None = None,
    documents_BS: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Log probabilities of labels, and whether greedy decoding would draw each; both [N].

    Probabilities are over the padded vocabulary, as in training; padding is never drawn.

    Args:
        loaded: the model.
        tokens_BS: int64 ids.
        labels_BS: int64 ids.
        wanted_BS: which labels, row by row.
        positions_BS: see `ReferenceOpenMoE.forward`.
        documents_BS: likewise.
    """
    model = loaded.model
    device = model.embedding.weight.device
    planes = {"positions_BS": positions_BS, "documents_BS": documents_BS}
    x_BSH, _ = model.hidden_states(
        tokens_BS.to(device),
        training_capacity=False,
        **{name: None if plane is None else plane.to(device) for name, plane in planes.items()},
    )
    wanted = wanted_BS.to(device)
    x_NH, labels_N = x_BSH[wanted], labels_BS.to(device)[wanted]
    step = max(1, LOGITS // model.vocab_size)
    found, greedy = [], []
    for x, labels in zip(x_NH.split(step), labels_N.split(step), strict=True):
        logits = model.logits(x)
        target = logits.gather(-1, labels[:, None])[:, 0]
        found.append(target - logits.logsumexp(dim=-1))
        greedy.append(logits[:, : loaded.text.size].argmax(dim=-1) == labels)
    return torch.cat(found).cpu(), torch.cat(greedy).cpu()


@dataclass(frozen=True)
class Row:
    """Tokens, of which the last ones are to be predicted from all before them."""

    ids: Sequence[int]
    predicted: int
    """How many; fewer than there are ids."""


def score(loaded: Loaded, rows: Sequence[Row], batch_size: int) -> list[tuple[Tensor, Tensor]]:
    """By row, in order: log probabilities of the predicted ids, and whether each is the likeliest.

    Rows of similar lengths are read together, padded at their end, where causal attention does not
    look. Under a capacity each is read by itself, since padding would take slots.

    Args:
        loaded: the model.
        rows: each with at most one id more than the model's longest row.
        batch_size: how many rows at a time.
    """
    order = sorted(range(len(rows)), key=lambda number: -len(rows[number].ids))
    size = 1 if loaded.drops else batch_size
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for first in range(0, len(order), size):
        numbers = order[first : first + size]
        batch = [rows[number] for number in numbers]
        length = len(batch[0].ids) - 1
        tokens_BS = torch.zeros(len(batch), length, dtype=torch.long)
        labels_BS, wanted_BS = tokens_BS.clone(), tokens_BS.bool()
        for place, row in enumerate(batch):
            ids, last = torch.tensor(row.ids), len(row.ids) - 1
            tokens_BS[place, :last], labels_BS[place, :last] = ids[:-1], ids[1:]
            wanted_BS[place, last - row.predicted : last] = True
        counts = [row.predicted for row in batch]
        both = predictions(loaded, tokens_BS, labels_BS, wanted_BS)
        parts = zip(both[0].split(counts), both[1].split(counts), strict=True)
        found.update(zip(numbers, parts, strict=True))
    return [found[number] for number in range(len(rows))]
