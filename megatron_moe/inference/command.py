"""Command-line flags of the model to load, shared by the commands that use one.

Imports neither torch nor the loader, so `--help` and usage errors are immediate.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_moe.command_line import Parser
from megatron_moe.errors import UsageError

if TYPE_CHECKING:
    from megatron_moe.inference.loading import Capacity, LoadOptions


def require_harness() -> None:
    """Check that lm-eval is installed, for `--tasks`.

    Raises:
        UsageError: it is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        fix = "pip install 'megatron-moe[eval]', or pip install lm-eval"
        raise UsageError("package lm-eval", "missing", "installed for --tasks", fix)


def model_parser(prog: str, description: str | None, capacity: str) -> Parser:
    """A parser with the flags of the model; the command adds its own.

    Args:
        prog: name of the command.
        description: docstring of the command's module.
        capacity: help of `--moe-capacity`.
    """
    parser = Parser(prog, description)
    add = parser.add_argument_group("the model").add_argument
    add(
        "--load",
        required=True,
        type=Path,
        metavar="DIR",
        help="checkpoints of a run, or HF weights",
    )
    add("--format", choices=("auto", "native", "hf"), default="auto", help="of --load (auto)")
    add("--ckpt-step", type=int, help="native: step to load (the latest)")
    add("--tokenizer-type", help="replaces the checkpoint's, e.g. SentencePieceTokenizer")
    add("--tokenizer-model", metavar="FILE", help="path of the tokenizer, if it has moved")
    more = "a prompt that spells a special token gets its id, not those of its characters"
    add("--allow-special-tokens", action="store_true", help=more)
    add("--device", default="cpu", help="PyTorch device, e.g. cuda (cpu)")
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help="dtype of the computation (fp32)")
    add("--moe-capacity", choices=("dropless", "eval"), help=capacity)
    return parser


def load_options(options: argparse.Namespace, capacity: Capacity = "dropless") -> LoadOptions:
    """The options of the loader from the command line.

    Args:
        options: the parsed command line.
        capacity: default of `--moe-capacity`.
    """
    from megatron_moe.inference.loading import LoadOptions

    return LoadOptions(
        path=options.load,
        format=options.format,
        step=options.ckpt_step,
        tokenizer_type=options.tokenizer_type,
        tokenizer_model=options.tokenizer_model,
        allow_special_tokens=options.allow_special_tokens,
        capacity=options.moe_capacity or capacity,
        device=options.device,
        dtype=options.dtype,
    )
