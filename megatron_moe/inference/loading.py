"""A checkpoint, native or in the Hugging Face layout, as a model that is ready to be used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args, get_type_hints

import torch

from megatron_moe.config import DataConfig, RunConfig
from megatron_moe.convert import formats
from megatron_moe.convert.model import Model
from megatron_moe.errors import UsageError
from megatron_moe.inference.text import Text
from megatron_moe.model.reference.model import ReferenceOpenMoE
from megatron_moe.tokenizer.base import Tokenizer
from megatron_moe.tokenizer.build import build_tokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Values of --dtype."""
FORMATS = ("auto", "native", "hf")
"""Values of --format."""
Capacity = Literal["dropless", "eval"]
CAPACITIES: Sequence[str] = get_args(Capacity)
"""Values of --moe-capacity."""
_TOKENIZERS = {
    "tokenizer.model": "SentencePieceTokenizer",
    "spiece.model": "SentencePieceTokenizer",
    "tokenizer.json": "HuggingFaceTokenizer",
}
"""Files that lie beside Hugging Face weights, the first that is there."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What to load, and how."""

    path: Path
    """`--load`."""
    format: str = "auto"
    step: int | None = None
    """Of a native checkpoint, by default the tracker's."""
    tokenizer_type: str | None = None
    """By default the checkpoint's."""
    tokenizer_model: str | None = None
    capacity: Capacity = "dropless"
    """`dropless`, or the evaluation capacity that the checkpoint's configuration states."""
    device: str = "cpu"
    dtype: str = "fp32"


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model in evaluation mode and what belongs to it."""

    model: ReferenceOpenMoE
    config: RunConfig
    """The checkpoint's, with the tokenizer and the capacity that were asked for."""
    text: Text
    source: str
    step: int

    @property
    def longest(self) -> int:
        """Tokens of a row at most."""
        return self.config.model.max_position_embeddings

    @property
    def drops(self) -> bool:
        """Whether there is a capacity."""
        return self.model.moe.moe_eval_capacity_factor is not None


def load(wanted: Wanted) -> Loaded:
    """Read a checkpoint and its tokenizer.

    Raises:
        UsageError: either is missing, damaged or another one's, or the device is not there.
    """
    check_device(wanted.device)
    found = formats.read(format_of(wanted), wanted.path, wanted.step)
    config = replace(found.config, data=_tokenizer_data(wanted, found))
    if wanted.capacity == "dropless":
        config = replace(config, moe=replace(config.moe, moe_eval_capacity_factor=None))
    tokenizer = _tokenizer(found, config.data)
    return Loaded(
        model=_filled(found, config, wanted),
        config=config,
        text=Text(tokenizer, config.data),
        source=found.source,
        step=found.step,
    )


def format_of(wanted: Wanted) -> str:
    """`native` or `hf`; a folder with a `config.json` beside its weights is the latter."""
    if wanted.format != "auto":
        return wanted.format
    return "hf" if (wanted.path / "config.json").is_file() else "native"


def check_device(device: str) -> None:
    """Refuse a device that is not there.

    Raises:
        UsageError: PyTorch does not know it, or this machine has none.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError("--device", device, "a device of this machine", reason) from None


def _tokenizer_data(wanted: Wanted, found: Model) -> DataConfig:
    """The checkpoint's own, unless it has none or another is asked for."""
    data, kind, file = found.config.data, wanted.tokenizer_type, wanted.tokenizer_model
    if format_of(wanted) == "hf" and kind is None:
        names = {path.name: path for path in found.tokenizer_files}
        if file is not None:
            kind = _TOKENIZERS["tokenizer.json" if _is_json(file) else "tokenizer.model"]
        else:
            name = next((name for name in _TOKENIZERS if name in names), None)
            if name is None:
                expected = "given, as no tokenizer lies beside the weights"
                raise UsageError("--tokenizer-model", None, expected)
            kind, file = _TOKENIZERS[name], str(names[name])
    if kind is not None:
        kinds = get_args(get_type_hints(DataConfig)["tokenizer_type"])
        if kind not in kinds:
            raise UsageError("--tokenizer-type", kind, f"one of {', '.join(kinds)}")
        size = found.vocab_size if kind == "NullTokenizer" else None
        data = DataConfig(tokenizer_type=kind, vocab_size=size)  # type: ignore[arg-type]
    return data if file is None else replace(data, tokenizer_model=file)


def _is_json(file: str) -> bool:
    return Path(file).is_dir() or file.endswith(".json")


def _tokenizer(found: Model, data: DataConfig) -> Tokenizer:
    tokenizer = build_tokenizer(data)
    trained = found.tokenizer_hash
    if trained and trained != tokenizer.identity:
        expected = f"the tokenizer of the checkpoint ({trained[:12]}...)"
        raise UsageError("--tokenizer-model", data.tokenizer_model, expected)
    size = tokenizer.vocab_size + data.vocab_extra_ids
    if size > found.vocab_size:
        expected = f"a tokenizer of at most {found.vocab_size} ids, those of {found.source}"
        raise UsageError("--tokenizer-model", data.tokenizer_model, expected, f"it has {size}")
    return tokenizer


@torch.no_grad()
def _filled(found: Model, config: RunConfig, wanted: Wanted) -> ReferenceOpenMoE:
    """The weights, copied a part at a time, so that they are in memory once."""
    model = ReferenceOpenMoE(
        config.model,
        config.moe,
        found.vocab_size,
        seed=None,
        device=wanted.device,
        dtype=DTYPES[wanted.dtype],
    )
    # Logits are fp32 in any case: casting the matrix once spares a cast of it for every token.
    if model.output is not None:
        model.output.float()
    for name, parameter in model.named_parameters():
        start = 0
        for part in found.tensors[name].parts():
            parameter[start : start + len(part)].copy_(part)
            start += len(part)
    return model.eval()
