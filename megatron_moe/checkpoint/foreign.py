"""What weights lie in a directory that is not the checkpoint directory of a run.

Recognized by names, and the first bytes of `.bin` files: nothing is opened that could run code or
take long. It serves two purposes: an error that says what was found and what to give instead, and a
run with `--allow-missing-load`, which must not start from random weights beside weights.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_moe.errors import CheckpointError
from megatron_moe.files import first_bytes, is_lfs_pointer, read_small
from megatron_moe.text import json_value

Format = Literal[
    "native", "native step", "megatron", "torch_dist", "deepspeed", "adapter", "hf", "t5x", "other"
]
"""`native` and `native step` are this project's, a run and one step of it; `megatron` holds pickles
by rank, `torch_dist` is PyTorch's distributed format, which Megatron-LM writes as well."""

_STEP = re.compile(r"iter_(\d{7,12})(?:-\d{1,6})?")
_NATIVE_FILES = {"manifest.json", "index.json", "state.json", "rank-00000.safetensors"}
_NATIVE_AT_LEAST = 2
"""Files of a step that are enough to recognise it: a damaged one is still one of ours."""
_MEGATRON_RANK = re.compile(r"mp_rank_\d\d(_\d\d\d)*")
_MEGATRON_STEP = re.compile(r"iter_\d{7}|release")
_DEEPSPEED = re.compile(r"global_step\d+|mp_rank_\d\d_model_states\.pt|zero_pp_rank_.*\.pt")
_T5X = re.compile(r"(target|state)\..+")
_HF_WEIGHTS = re.compile(
    r"(pytorch_model|model|consolidated)[\w.-]*\.(bin|safetensors|index\.json)|"
    r"tf_model\.h5|flax_model\.msgpack"
)
_OTHER = {".safetensors", ".pt", ".pth", ".ckpt", ".gguf", ".distcp", ".nemo"}
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04")
"""How PyTorch's `.bin` files begin; those of indexed data begin with token ids."""


@dataclass(frozen=True)
class FoundWeights:
    """Weights, and the directory in which they lie."""

    format: Format
    path: Path

    @property
    def described(self) -> str:
        """What they are, for messages: `a Hugging Face model`."""
        return _DESCRIPTIONS[self.format]

    @property
    def fix(self) -> str:
        """What to give instead of the directory, to a command that reads checkpoints of runs."""
        if self.format == "native":
            return f"give {self.path}"
        if self.format == "native step":
            match = _STEP.fullmatch(self.path.name)
            step = int(match[1]) if match else "STEP"
            return f"give {self.path.parent} with --ckpt-step {step}"
        return _FIXES[self.format].format(path=self.path)


_DESCRIPTIONS: dict[Format, str] = {
    "native": "the checkpoints of a run",
    "native step": "one step of a run's checkpoints",
    "megatron": "a checkpoint of Megatron-LM (format torch)",
    "torch_dist": "a distributed checkpoint of PyTorch or Megatron-LM (format torch_dist)",
    "deepspeed": "a checkpoint of DeepSpeed",
    "adapter": "an adapter (LoRA) without its base model",
    "hf": "a Hugging Face model",
    "t5x": "a checkpoint of t5x",
    "other": "weights of another program",
}
_CONVERT = "convert it with tools/convert_checkpoint.py --to native --save NEW --load {path}"
_VIA_HF = (
    "export it to the Hugging Face format with the program that wrote it, and convert that with "
    "tools/convert_checkpoint.py --from hf"
)
_FIXES: dict[Format, str] = {
    "megatron": "load it in Megatron-LM with the flags of its run and --ckpt-convert-format "
    "torch_dist --ckpt-convert-save DIR, and convert DIR with tools/convert_checkpoint.py --from "
    "megatron",
    "torch_dist": f"{_CONVERT} --from megatron, if Megatron-LM wrote it",
    "deepspeed": _VIA_HF,
    "adapter": "merge it into its base model, and convert that with tools/convert_checkpoint.py "
    "--from hf",
    "hf": f"{_CONVERT} --from hf",
    "t5x": f"{_CONVERT} --from t5x --preset NAME",
    "other": "give the directory of a run's checkpoints",
}


def weights_in(directory: Path) -> FoundWeights | None:
    """The weights that lie in a directory itself, in whichever format; None if there are none."""
    names = _names(directory)
    found = _structured(directory, names)
    if found is None and any(_is_weights(directory, name, names) for name in names):
        return FoundWeights("other", directory)
    return found


def find_weights(directory: Path) -> FoundWeights | None:
    """The weights in a directory, else in a folder in it, else in its parent; None without any.

    Of the parent only known formats count, so that a run may start in a folder beside some file of
    weights. Names that begin with a dot are ignored: an interrupted save leaves such folders.
    """
    found = weights_in(directory)
    if found is not None:
        return found
    folders = (directory / name for name in sorted(_names(directory)))
    below = (weights_in(folder) for folder in folders if folder.is_dir())
    found = next((each for each in below if each is not None), None)
    parent = directory.absolute().parent
    return found or _structured(parent, _names(parent))


def describe_contents(directory: Path) -> str:
    """What is in a directory, for messages: `missing`, `an empty directory`, or its first names."""
    if not directory.exists():
        return "missing"
    if not directory.is_dir():
        return "a file"
    names = sorted(path.name for path in directory.iterdir())
    if not names:
        return "an empty directory"
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"a directory with {', '.join(names[:3])}{more}"


def reject_foreign(directory: Path) -> None:
    """Reject a directory without checkpoints of a run in, below or above which there are weights.

    Raises:
        CheckpointError: it says what they are and what to give instead.
    """
    found = find_weights(directory)
    if found is not None and (found.format, found.path) != ("native", directory):
        raise not_native(directory, found)


def not_native(directory: Path, found: FoundWeights) -> CheckpointError:
    """The error for a directory in, below or above which there are other weights."""
    where = "" if found.path == directory else f" in {found.path}"
    what = f"checkpoint directory {directory}"
    expected = "the directory of a run's checkpoints"
    above = found.path == directory.absolute().parent
    fix = f"{found.fix}; for a run that starts anew, give a directory elsewhere" if above else ""
    return CheckpointError(what, f"{found.described}{where}", expected, fix or found.fix)


def _names(directory: Path) -> set[str]:
    """The visible names in a directory; none if it is none or cannot be read."""
    try:
        return {path.name for path in directory.iterdir() if not path.name.startswith(".")}
    except OSError:
        return set()


def _structured(directory: Path, names: set[str]) -> FoundWeights | None:
    """The known format that a directory with these names has."""
    for name in sorted(filter(_is_step, names), reverse=True):
        inside = _names(directory / name)
        if _is_native(inside):
            return FoundWeights("native", directory)
        by_rank = _one_step(directory / name, inside)
        if by_rank is not None:
            return FoundWeights(by_rank, directory)
    kind = "native step" if _is_native(names) else _one_step(directory, names)
    return None if kind is None else FoundWeights(kind, directory)


def _is_step(name: str) -> bool:
    return bool(_STEP.fullmatch(name) or _MEGATRON_STEP.fullmatch(name))


def _is_native(names: set[str]) -> bool:
    return len(names & _NATIVE_FILES) >= _NATIVE_AT_LEAST


def _one_step(directory: Path, names: set[str]) -> Format | None:
    """The format of another program's single checkpoint."""
    if any(map(_MEGATRON_RANK.fullmatch, names)):
        return "megatron"
    if (directory / ".metadata").is_file() or _is_distributed(names):
        return "torch_dist"
    if any(map(_DEEPSPEED.fullmatch, names)):
        return "deepspeed"
    if "adapter_config.json" in names or any(n.startswith("adapter_model.") for n in names):
        return "adapter"
    if any(map(_HF_WEIGHTS.fullmatch, names)) or _is_hf_config(directory / "config.json", names):
        return "hf"
    if "checkpoint" in names and any(map(_T5X.fullmatch, names)):
        return "t5x"
    return None


def _is_distributed(names: set[str]) -> bool:
    return any(n.endswith(".distcp") for n in names) or names >= {"common.pt", "metadata.json"}


def _is_hf_config(path: Path, names: set[str]) -> bool:
    if path.name not in names:
        return False
    try:
        content = json_value(read_small(path))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and bool({"model_type", "architectures"} & content.keys())


def _is_weights(directory: Path, name: str, names: set[str]) -> bool:
    """Whether a file holds weights, by its name and, of a `.bin`, its first bytes."""
    path = directory / name
    if path.suffix in _OTHER:
        return path.is_file()
    if path.suffix != ".bin" or f"{path.stem}.idx" in names:
        return False
    try:
        start = first_bytes(path)
    except OSError:
        return False
    return start.startswith(_PICKLES) or is_lfs_pointer(start)
