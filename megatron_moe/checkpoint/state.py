"""What a checkpoint holds beside tensors: progress, and what identifies model and data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from megatron_moe.errors import Corrupt


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """How far a run has come."""

    iteration: int = 0
    """Optimizer steps done."""
    consumed_train_samples: int = 0
    """Sequences that training has taken: the sampler's position."""
    consumed_valid_samples: int = 0
    """Sequences that evaluation has taken."""
    scheduler: dict[str, Any] = field(default_factory=dict)
    """State of the learning-rate schedule, as JSON values."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Anything else that must survive, as JSON values."""


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """What a run must share with the checkpoint that it loads."""

    padded_vocab_size: int
    """Vocabulary V after padding: rows of the embedding."""
    tokenizer_hash: str = ""
    """Identifies the tokenizer."""
    data_fingerprint: str = ""
    """Identifies the training data."""


def train_state_from(values: Any, source: str) -> TrainState:
    """Read a state back from ``source``.

    Raises:
        Corrupt: it is something else.
    """
    return TrainState(**_typed(TrainState(), values, source))


def metadata_from(values: Any, source: str) -> RunIdentity:
    """Read metadata back from ``source``.

    Raises:
        Corrupt: it is something else.
    """
    return RunIdentity(**_typed(RunIdentity(padded_vocab_size=0), values, source))


def _typed(example: Any, values: Any, source: str) -> dict[str, Any]:
    kinds = {f.name: type(getattr(example, f.name)) for f in fields(example)}
    if not isinstance(values, dict) or values.keys() != kinds.keys():
        raise Corrupt(source, values, f"an object with {', '.join(kinds)}")
    for name, kind in kinds.items():
        if type(values[name]) is not kind:
            raise Corrupt(f"{name} in {source}", values[name], kind.__name__)
    return values


def as_json(value: TrainState | RunIdentity) -> dict[str, Any]:
    """Plain values; the inverse of `train_state_from` and `metadata_from`."""
    return asdict(value)
