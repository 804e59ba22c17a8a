r"""Look into a checkpoint. Exit code 0: fine; 1: damaged or different; 2: a wrong flag.

# step, sizes, files; --json for programs
python tools/inspect_checkpoint.py checkpoints
# every tensor, or those that match: shape, type, mean, standard deviation, largest value
python tools/inspect_checkpoint.py checkpoints --tensors '*.router.weight'
# every checksum, and every block where the index says it is
python tools/inspect_checkpoint.py checkpoints --ckpt-step 2000 --verify
# settings and tensors in which two differ
python tools/inspect_checkpoint.py checkpoints --compare other --compare-step 1000
# a Mixtral, DeepSeekMoE, OLMoE or Qwen-MoE directory: family, experts, routing rule, sizes;
# --tensors and --compare take such directories too
python tools/inspect_checkpoint.py mixtral-8x7b
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_moe.analysis.foreign import open_foreign
from megatron_moe.analysis.foreign_config import is_foreign
from megatron_moe.analysis.foreign_overview import foreign_differences, foreign_overview
from megatron_moe.checkpoint.reading import verify
from megatron_moe.convert.inspection import (
    TensorFacts,
    differences,
    facts_of,
    overview,
    tensor_facts,
)
from megatron_moe.errors import USAGE_EXIT_CODE, Corrupt, UsageError

FAULT_EXIT_CODE = 1


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="inspect_checkpoint.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("load", type=Path, help="directory of a run's checkpoints, or of another program's model")
    add("--ckpt-step", type=int, help="by default the one that the tracker names")
    add("--tensors", nargs="?", const="*", metavar="PATTERN", help="facts of matching tensors")
    add("--verify", action="store_true", help="read all of it and compare every checksum")
    add("--compare", type=Path, metavar="DIR", help="another run's checkpoints")
    add("--compare-step", type=int, help="the step of --compare")
    add("--json", action="store_true", help="one JSON object a line in place of text")
    return made.parse_args(argv)


def run(options: argparse.Namespace) -> int:
    """Do what the command line asks for; returns the exit code.

    Raises:
        UsageError: there is no such checkpoint.
    """
    if options.compare_step is not None and options.compare is None:
        raise UsageError("--compare-step", options.compare_step, "--compare beside it")
    if is_foreign(options.load):
        return run_foreign(options)
    if options.verify:
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
    """The same for another program's model, which has no steps and no checksums.

    Raises:
        UsageError: the family is unknown, the files are damaged, or a flag means nothing here.
    """
    flags = {"--ckpt-step": options.ckpt_step, "--compare-step": options.compare_step}
    for flag, value in {**flags, "--verify": options.verify or None}.items():
        if value is not None:
            raise UsageError(flag, value, f"absent: {options.load} has neither steps nor checksums")
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
    """Family, rule, sizes, and a line per layer with experts."""
    if as_json:
        print(json.dumps(found))
        return
    layers = found.pop("moe_layers")
    for key, value in found.items():
        print(f"{key:<18} {value}")
    for layer in layers:
        router = "x".join(map(str, layer["router"]))
        sizes = f"{layer['expert_elements']} elements an expert, {layer['shared_elements']} shared"
        print(f"layer {layer['layer']:<12} router {router} {layer['dtype']}  {sizes}")


def report(differences: Iterable[str], as_json: bool) -> int:
    """Print the differences, each a name and what differs; returns the exit code."""
    lines = list(differences)
    if as_json:
        pairs = (line.split(": ", 1) for line in lines)
        print(json.dumps({"differences": [{"name": name, "is": text} for name, text in pairs]}))
    else:
        print("\n".join(lines) if lines else "no difference")
    return FAULT_EXIT_CODE if lines else 0


def print_tensors(options: argparse.Namespace, facts: Iterable[TensorFacts]) -> None:
    """A line per tensor.

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
            print(f"{fact.name:<40} {shape:>20} {fact.dtype:>8}  {numbers}{odd}")
    if not found:
        raise UsageError("--tensors", options.tensors, "a pattern that matches a tensor's name")


def print_overview(options: argparse.Namespace) -> None:
    """Step, sizes and files."""
    found = overview(options.load, options.ckpt_step)
    if options.json:
        print(json.dumps(found))
        return
    kinds, files = found.pop("kinds"), found.pop("files")
    for key, value in found.items():
        print(f"{key:<18} {value}")
    for kind, sizes in kinds.items():
        numbers = f"{sizes['tensors']} tensors  {sizes['elements']} elements"
        print(f"{kind:<18} {numbers}  {sizes['bytes']} bytes")
    for file, size in files.items():
        print(f"{file:<28} {size} bytes")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
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
