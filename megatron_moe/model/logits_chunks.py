"""How many tokens have logits at once: for the loss (`loss.py`), the log and the planner.

Numbers alone, no torch.
"""

from __future__ import annotations

CHUNK_LOGITS = 1 << 27
"""Logits of a chunk, 512 MiB in fp32: fewer tokens than this would hold are one chunk, and nothing
is computed twice."""
LEAST_CHUNK_TOKENS = 1024
"""Every chunk reads W and adds to its gradient, about 10 bytes an element for 6 FLOPs a token: from
about a thousand tokens on a GPU's tensor cores take longer than its memory (H100: 989 TFLOP/s over
3.35 TB/s is 295 FLOPs a byte)."""


def chunk_tokens(columns: int) -> int:
    """Tokens whose logits exist at once, without `--logits-chunk-tokens`.

    Args:
        columns: of the vocabulary on this rank: V of the whole model over TP.
    """
    return max(LEAST_CHUNK_TOKENS, CHUNK_LOGITS // columns)
