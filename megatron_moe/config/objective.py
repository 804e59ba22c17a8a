"""What a sample asks the model to predict.

The flags are explained with examples in `docs/objectives.md`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Objective = Literal["causal", "prefix-lm", "ul2", "sft"]


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """How tokens become inputs, targets and a loss mask."""

    objective: Objective = "causal"
    """`causal`: the next token, everywhere. `prefix-lm`: the same after a random split. `ul2`: a
    mixture of denoisers. `sft`: the assistant's turns of conversations (JSON Lines)."""
    ul2_mixture: str | None = None
    """TOML file of the denoisers; `None` takes the six of OpenMoE."""
    ul2_inputs_length: int | None = None
    """Most tokens of a row for the inputs of a denoiser, the rest being for its targets; `None`
    means half of `--seq-length`, as in the paper."""
    ul2_fill_rows: bool = False
    """Take as much text as fits into the whole row, instead of fixed parts for inputs and targets
    (which leave up to half of a row empty)."""
    eod_mask_loss: bool = False
    """Do not count what is predicted right after an end of document (causal and prefix LM)."""
    reset_position_ids: bool = False
    """Count rotary positions from the start of each document (of each conversation, with `sft`)."""
    reset_attention_mask: bool = False
    """Let no position see another document (another conversation, with `sft`)."""
    sft_key: str = "messages"
    """Where a line of a conversation file is an object: its key that holds the list of turns."""
    sft_pack: bool = True
    """Put several conversations into a row where they fit; otherwise one a row."""
