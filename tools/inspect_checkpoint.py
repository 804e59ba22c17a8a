r"""Inspect a checkpoint. Exit code 0: success; 1: damaged or different; 2: usage error.

# step, sizes and files; --json prints JSON
python tools/inspect_checkpoint.py checkpoints
# all tensors, or those that match: shape, dtype, mean, standard deviation, largest value
python tools/inspect_checkpoint.py checkpoints --tensors '*.router.weight'
# verify every checksum and the place of every block
python tools/inspect_checkpoint.py checkpoints --ckpt-step 2000 --verify
# settings and tensors in which two checkpoints differ
python tools/inspect_checkpoint.py checkpoints --compare other --compare-step 1000
# a Mixtral, DeepSeekMoE, OLMoE or Qwen-MoE directory: family, experts, routing rule, sizes;
# also with --tensors and --compare
python tools/inspect_checkpoint.py mixtral-8x7b
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_moe.analysis.foreign import foreign_differences, foreign_overview, open_foreign
from megatron_moe.analysis.foreign_config import is_foreign
from megatron_moe.checkpoint.directory import ANOTHER_STEP
from megatron_moe.checkpoint.reading import verify
from megatron_moe.command_line import Parser
from megatron_moe.console import escape_unprintable, print_safely
from megatron_moe.convert.inspection import (
    TensorFacts,
    differences,
    facts_of,
    overview,
    tensor_facts,
)
from megatron_moe.errors import USAGE_EXIT_CODE, Corrupt, UsageError, with_fixes

FAULT_EXIT_CODE = 1


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser("inspect_checkpoint.py", __doc__)
    add = parser.add_argument
    add("load", type=Path, help="checkpoints of a run, or a Hugging Face MoE model")
    add("--ckpt-step", type=int, help="step to inspect, by default the tracker's")
    add("--tensors", nargs="?", const="*", metavar="PATTERN", help="statistics of matching tensors")
    add("--verify", action="store_true", help="read all files and compare every checksum")
    add("--compare", type=Path, metavar="DIR", help="directory to compare with")
    add("--compare-step", type=int, help="step of --compare")
    add("--json", action="store_true", help="print JSON objects, one per line")
    return parser.parse_args(argv)


def run(options: argparse.Namespace) -> int:
    """Run the inspection; returns the exit code.

    Raises:
        UsageError: the checkpoint does not exist.
    """
    if options.compare_step is not None and options.compare is None:
        raise UsageError("--compare-step", options.compare_step, "absent without --compare")
    if is_foreign(options.load):
        return run_foreign(options)
    if options.verify:
        with with_fixes(ANOTHER_STEP):
            verify(options.load, options.ckpt_step)
        whole = {"path": str(options.load), "whole": True}
        print(json.dumps(whole) if options.json else f"{options.load}: whole")
    elif options.compare is not None:
        steps = options.ckpt_step, options.compare_step
        return report(differences(options.load, options.compare, steps), options.json)
    elif options.tensors is not None:
        facts = tensor_facts(options.load, options.ckpt_step, options.tensors)
        print_tensors(options, facts)
    else:
        print_overview(options)
    return 0


def run_foreign(options: argparse.Namespace) -> int:
    """Inspect another program's model, which has neither steps nor checksums.

    Raises:
        UsageError: the family is unknown, the files are damaged, or a flag does not apply.
    """
    flags = {"--ckpt-step": options.ckpt_step, "--compare-step": options.compare_step}
    for flag, value in {**flags, "--verify": options.verify or None}.items():
        if value is not None:
            reason = "a Hugging Face model has neither steps nor checksums"
            raise UsageError(flag, value, f"absent for {options.load}", reason)
    model = open_foreign(options.load)
    if options.compare is not None:
        found = foreign_differences(model, open_foreign(options.compare))
        return report(found, options.json)
    if options.tensors is not None:
        print_tensors(options, facts_of(model.tensors, options.tensors))
    else:
        print_foreign(foreign_overview(model), options.json)
    return 0


def print_foreign(found: dict[str, Any], as_json: bool) -> None:
    """Print family, routing rule, sizes, and a line per MoE layer."""
    if as_json:
        print(json.dumps(found))
        return
    layers = found.pop("moe_layers")
    for key, value in found.items():
        print_safely(f"{key:<18} {value}")
    for layer in layers:
        router = "x".join(map(str, layer["router"]))
        sizes = f"{layer['expert_elements']} elements an expert, {layer['shared_elements']} shared"
        print(f"layer {layer['layer']:<12} router {router} {layer['dtype']}  {sizes}")


def report(differences: Iterable[str], as_json: bool) -> int:
    """Print the differences, one per line; returns the exit code."""
    lines = list(differences)
    if as_json:
        pairs = (line.split(": ", 1) for line in lines)
        print(json.dumps({"differences": [{"name": name, "is": text} for name, text in pairs]}))
    else:
        print_safely("\n".join(lines) if lines else "no difference")
    return FAULT_EXIT_CODE if lines else 0


def print_tensors(options: argparse.Namespace, facts: Iterable[TensorFacts]) -> None:
    """Print a line per tensor.

    Raises:
        UsageError: no tensor matches.
    """
    found = False
    for fact in facts:
        found = True
        if options.json:
            print(json.dumps(vars(fact)))
        else:
            shape, odd = "x".join(map(str, fact.shape)), "" if fact.finite else "  NOT FINITE"
            numbers = f"mean {fact.mean:+.3e}  std {fact.std:.3e}  max {fact.largest:.3e}"
            print_safely(f"{fact.name:<40} {shape:>20} {fact.dtype:>8}  {numbers}{odd}")
    if not found:
        raise UsageError(
            "--tensors", options.tensors, "a pattern that matches the name of a tensor"
        )


def print_overview(options: argparse.Namespace) -> None:
    """Print step, sizes and files."""
    found = overview(options.load, options.ckpt_step)
    if options.json:
        print(json.dumps(found))
        return
    kinds, files = found.pop("kinds"), found.pop("files")
    for key, value in found.items():
        print_safely(f"{key:<18} {'unknown' if value == '' else value}")
    for kind, sizes in kinds.items():
        numbers = f"{sizes['tensors']} tensors  {sizes['elements']} elements"
        print(f"{kind:<18} {numbers}  {sizes['bytes']} bytes")
    for file, size in files.items():
        print(f"{file:<28} {size} bytes")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    escape_unprintable()
    try:
        return run(parse(argv))
    except Corrupt as error:
        print(f"inspect_checkpoint.py: error: {error}", file=sys.stderr)
        return FAULT_EXIT_CODE
    except UsageError as error:
        print(f"inspect_checkpoint.py: error: {error}", file=sys.stderr)
        return USAGE_EXIT_CODE


if __name__ == "__main__":
    sys.exit(main())
