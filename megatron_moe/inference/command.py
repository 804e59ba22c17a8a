"""The parser, with the flags that say which model to use, of every command that uses one."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_moe.errors import UsageError

if TYPE_CHECKING:
    from megatron_moe.inference.loading import Capacity, Wanted


def require_harness() -> None:
    """Refuse tasks where lm-eval is not installed.

    Raises:
        UsageError: it is not.
    """
    if importlib.util.find_spec("lm_eval") is None:
        fix = "pip install 'megatron-moe[eval]', or pip install lm-eval"
        raise UsageError("--tasks", "without lm-eval", "lm-eval installed", fix)


def model_parser(prog: str, description: str | None, capacity: str) -> argparse.ArgumentParser:
    """A parser that has them; the command adds its own.

    Args:
        prog: name of the command.
        description: its module's docstring.
        capacity: what `--moe-capacity` means here.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument_group("the model").add_argument
    add("--load", required=True, type=Path, metavar="DIR", help="checkpoints of a run, or weights")
    add("--format", choices=("auto", "native", "hf"), default="auto", help="of --load (auto)")
    add("--ckpt-step", type=int, help="native: step to load (the newest)")
    add("--tokenizer-type", help="instead of the checkpoint's, e.g. SentencePieceTokenizer")
    add("--tokenizer-model", metavar="FILE", help="where the tokenizer is now")
    add("--device", default="cpu", help="device of PyTorch, e.g. cuda (cpu)")
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help="to compute in (fp32)")
    add("--moe-capacity", choices=("dropless", "eval"), help=capacity)
    return parser


def wanted(options: argparse.Namespace, capacity: Capacity = "dropless") -> Wanted:
    """What the flags ask for.

    Args:
        options: the command line.
        capacity: without `--moe-capacity`.
    """
    from megatron_moe.inference.loading import Wanted

    return Wanted(
        path=options.load,
        format=options.format,
        step=options.ckpt_step,
        tokenizer_type=options.tokenizer_type,
        tokenizer_model=options.tokenizer_model,
        capacity=options.moe_capacity or capacity,
        device=options.device,
        dtype=options.dtype,
    )
