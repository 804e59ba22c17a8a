"""Load a checkpoint, native or in the Hugging Face layout, with its tokenizer, for inference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args, get_type_hints

import torch

from megatron_moe.config import DataConfig, RunConfig
from megatron_moe.convert import formats
from megatron_moe.convert.model import LogicalModel
from megatron_moe.errors import UsageError
from megatron_moe.inference.text import TextTokenizer
from megatron_moe.model.reference import ReferenceOpenMoE
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
"""Tokenizer type by file name, for Hugging Face weights; the first file present is used."""


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """What to load, and how; by the flags of the commands."""

    path: Path
    """`--load`."""
    format: str = "auto"
    step: int | None = None
    """Step of a native checkpoint; `None` means the tracker's."""
    tokenizer_type: str | None = None
    """`None` means the checkpoint's."""
    tokenizer_model: str | None = None
    capacity: Capacity = "dropless"
    """`dropless`, or `eval`: the evaluation capacity of the checkpoint's configuration."""
    device: str = "cpu"
    dtype: str = "fp32"


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model in evaluation mode, with its configuration and tokenizer."""

    model: ReferenceOpenMoE
    config: RunConfig
    """The checkpoint's, with the tokenizer and the capacity of the options."""
    tokenizer: TextTokenizer
    source: str
    step: int

    @property
    def max_length(self) -> int:
        """Maximal number of tokens of a row."""
        return self.config.model.max_position_embeddings

    @property
    def drops_tokens(self) -> bool:
        """Whether the experts have a capacity."""
        return self.model.moe.moe_eval_capacity_factor is not None


def load(options: LoadOptions) -> LoadedModel:
    """Load a checkpoint and its tokenizer.

    Raises:
        UsageError: either is missing or damaged, they do not match, or the device does not exist.
    """
    check_device(options.device)
    found = formats.read(format_of(options), options.path, options.step)
    config = replace(found.config, data=_tokenizer_data(options, found))
    if options.capacity == "dropless":
        config = replace(config, moe=replace(config.moe, moe_eval_capacity_factor=None))
    tokenizer = _tokenizer(found, config.data)
    return LoadedModel(
        model=_build_model(found, config, options),
        config=config,
        tokenizer=TextTokenizer(
            tokenizer, config.data, start=config.objective.decoder_start_token_id
        ),
        source=found.source,
        step=found.step,
    )


def format_of(options: LoadOptions) -> str:
    """`native` or `hf`: a directory with a `config.json` is in the Hugging Face layout.

    In a native checkpoint directory that file is in the directory of each step.
    """
    if options.format != "auto":
        return options.format
    return "hf" if (options.path / "config.json").is_file() else "native"


def check_device(device: str) -> None:
    """Check that a device exists.

    Raises:
        UsageError: PyTorch does not know it, or this machine does not have it.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError("--device", device, "a device of this machine", reason) from None


def _tokenizer_data(options: LoadOptions, found: LogicalModel) -> DataConfig:
    """Tokenizer settings: those of the flags, else the checkpoint's, else of a file beside it."""
    data, kind, file = found.config.data, options.tokenizer_type, options.tokenizer_model
    if format_of(options) == "hf" and kind is None:
        names = {path.name: path for path in found.tokenizer_files}
        if file is not None:
            kind = _TOKENIZERS["tokenizer.json" if _is_json(file) else "tokenizer.model"]
        else:
            name = next((name for name in _TOKENIZERS if name in names), None)
            if name is None:
                reason = "there is no tokenizer file beside the weights"
                raise UsageError("--tokenizer-model", None, "given", reason)
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


def _tokenizer(found: LogicalModel, data: DataConfig) -> Tokenizer:
    tokenizer = build_tokenizer(data)
    trained = found.tokenizer_hash
    if trained and trained != tokenizer.identity:
        expected = f"the tokenizer of the checkpoint ({trained[:12]}...)"
        raise UsageError("--tokenizer-model", data.tokenizer_model, expected)
    size = tokenizer.vocab_size + data.vocab_extra_ids
    if size > found.vocab_size:
        expected = f"a tokenizer of <= {found.vocab_size} ids, the vocabulary of {found.source}"
        raise UsageError("--tokenizer-model", data.tokenizer_model, expected, f"it has {size}")
    return tokenizer


@torch.no_grad()
def _build_model(found: LogicalModel, config: RunConfig, options: LoadOptions) -> ReferenceOpenMoE:
    """The model with its weights, which are copied in parts so that memory holds them once."""
    model = ReferenceOpenMoE(
        config.model,
        config.moe,
        found.vocab_size,
        seed=None,
        device=options.device,
        dtype=DTYPES[options.dtype],
    )
    # Logits are computed in fp32: casting the matrix here avoids casting it for every token.
    if model.output is not None:
        model.output.float()
    for name, parameter in model.named_parameters():
        start = 0
        for part in found.tensors[name].parts():
            parameter[start : start + len(part)].copy_(part)
            start += len(part)
    return model.eval()
