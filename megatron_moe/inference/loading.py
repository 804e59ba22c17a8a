"""Load a checkpoint, native or in the Hugging Face layout, with its tokenizer, for inference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args, get_type_hints

import torch

from megatron_moe.checkpoint.foreign import weights_in
from megatron_moe.config import DataConfig, RunConfig
from megatron_moe.convert import formats
from megatron_moe.convert.model import LogicalModel
from megatron_moe.convert.tokenizers import with_tokenizer
from megatron_moe.errors import UsageError
from megatron_moe.inference.text import TextTokenizer
from megatron_moe.model.reference import ReferenceOpenMoE
from megatron_moe.tokenizer.base import Tokenizer, vocabulary_of
from megatron_moe.tokenizer.build import build_tokenizer
from megatron_moe.tokenizer.files import MERGES, PAIR_TYPE, VOCAB, files_of, settings_for, type_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Values of --dtype."""
FORMATS = ("auto", "native", "hf")
"""Values of --format."""
Capacity = Literal["dropless", "eval"]
CAPACITIES: Sequence[str] = get_args(Capacity)
"""Values of --moe-capacity."""


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
    allow_special_tokens: bool = False
    """Read special tokens in text, also if the checkpoint's run did not."""
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
    data = _tokenizer_data(options, found)
    if options.allow_special_tokens:
        data = replace(data, allow_special_tokens=True)
    config = replace(found.config, data=data)
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

    In a native checkpoint directory that file is in the directory of each step; one given in
    its place is read as native, for an error that says what to give.
    """
    if options.format != "auto":
        return options.format
    if not (options.path / "config.json").is_file():
        return "native"
    found = weights_in(options.path)
    return "native" if found is not None and found.format == "native step" else "hf"


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
    """Tokenizer settings: those of the flags, else of the files in or beside the checkpoint."""
    data, kind, file = found.config.data, options.tokenizer_type, options.tokenizer_model
    if kind is None and file is None:
        return settings_for(data, found.tokenizer_files) or _beside(found)
    known = found.tokenizer_hash or data.tokenizer_model
    if kind is None and file is not None and not known:
        kind = type_of(Path(file))
    if kind is not None:
        kinds = get_args(get_type_hints(DataConfig)["tokenizer_type"])
        if kind not in kinds:
            raise UsageError("--tokenizer-type", kind, f"one of {', '.join(kinds)}")
        size = found.vocab_size if kind == "NullTokenizer" else None
        data = DataConfig(tokenizer_type=kind, vocab_size=size)  # type: ignore[arg-type]
    if file is None:
        return data
    if data.tokenizer_type != PAIR_TYPE:
        return replace(data, tokenizer_model=file)
    pair = settings_for(data, files_of(Path(file)))
    if pair is None:
        raise UsageError("--tokenizer-model", file, f"a folder with {VOCAB} and {MERGES}")
    return pair


def _beside(found: LogicalModel) -> DataConfig:
    """Settings of a checkpoint that does not record which of its files is the tokenizer.

    Raises:
        UsageError: none of them can be used, or there is none.
    """
    data = found.config.data
    if found.tokenizer_hash or data.tokenizer_type != DataConfig().tokenizer_type:
        return data  # a tokenizer without a file, or a file that has gone
    model, lines = with_tokenizer(found, None)
    if not model.tokenizer_hash:
        *reasons, _ = lines
        reason = reasons[0] if reasons else "there is no tokenizer file beside the weights"
        raise UsageError("--tokenizer-model", None, "given", reason)
    return model.config.data


def _tokenizer(found: LogicalModel, data: DataConfig) -> Tokenizer:
    tokenizer = build_tokenizer(data)
    trained = found.tokenizer_hash
    if trained and trained != vocabulary_of(tokenizer.identity):
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
