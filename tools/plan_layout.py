r"""Choose a layout for a cluster: what fits, how fast it is, what it sends; no GPU is needed.

All flags of training are accepted. A degree that they give is kept, all others are searched.

# the fastest layouts of the 34B model on 64 H100s, and the command that starts the first
python tools/plan_layout.py --preset openmoe-34b-32e --bf16 --cluster h100 --gpus 64

# days, GPU-hours and energy for 200 billion tokens; the third layout in full, with every formula
python tools/plan_layout.py --preset openmoe-34b-32e --bf16 --cluster h100 --gpus 256 \
        --tokens 200e9 --choose 3 --explain

# one layout, as JSON
python tools/plan_layout.py --preset openmoe-8b-32e --bf16 --cluster a100-80 --gpus 8 \
        --tensor-model-parallel-size 1 --expert-model-parallel-size 8 --json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_moe.command_line import Parser
from megatron_moe.config import RunConfig
from megatron_moe.config.cli import parse_args
from megatron_moe.errors import UsageError, exit_on_usage_error
from megatron_moe.parallel.launch import ended_reader_is_fine
from megatron_moe.planning.cluster import Cluster, load_cluster, profile_names

FIGURES = {
    "--memory-gb": "memory of a GPU",
    "--reserved-gb": "of that, not for tensors",
    "--intra-bandwidth": "GB/s between GPUs of a node",
    "--intra-microseconds": "latency inside a node",
    "--inter-bandwidth": "GB/s of a GPU to other nodes",
    "--inter-microseconds": "latency between nodes",
}
"""Flags of the cluster's figures."""
SPLITS = {
    "num_layers_per_virtual_pipeline_stage",
    "num_virtual_stages_per_pipeline_rank",
    "pipeline_model_parallel_layout",
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
}
"""Flags that divide layers among stages: with one of them, no division is searched."""


def parser() -> Parser:
    """Return the parser of the planner's own flags."""
    made = Parser("plan_layout.py", __doc__)
    add = made.add_argument
    names = ", ".join(profile_names())
    add("--cluster", default="h100", help=f"{names}, or a .toml file (%(default)s)")
    add("--gpus", type=int, help="all GPUs; or give --nodes")
    add("--nodes", type=int, help="nodes")
    add("--gpus-per-node", type=int, help="GPUs of a node (that of the cluster)")
    for flag, what in FIGURES.items():
        add(flag, type=float, help=f"{what} (that of the cluster)")
    add("--capacity-factors", type=float, nargs="+", default=[], help="capacity factors to try")
    add("--tokens", type=float, help="tokens of the whole training, for days and energy")
    add("--top", type=int, default=10, help="layouts to list (%(default)s)")
    add("--choose", type=int, default=1, help="which of them to describe (%(default)s)")
    add("--placement", action="store_true", help="draw the chosen layout's ranks on the nodes")
    add("--explain", action="store_true", help="print every formula with its numbers")
    add("--json", action="store_true", help="print JSON")
    add("--plot", metavar="FILE", help="draw memory and time of the listed layouts")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    with exit_on_usage_error("plan_layout.py"):
        text = plan(list(sys.argv[1:] if argv is None else argv))
    with ended_reader_is_fine():
        print(text, flush=True)


def plan(words: list[str]) -> str:
    """What the command line asks for, as text.

    Raises:
        UsageError: a flag is wrong, or no layout fits.
    """
    options, of_run = parser().parse_known_args(words)
    config = parse_args(of_run, "plan_layout.py").config
    # Here, not above: they import torch, which `--help` and errors of flags do without.
    from megatron_moe.planning.describe import ASSUMED, known_vocab_size
    from megatron_moe.planning.layout_search import flags_of, launch_command, search
    from megatron_moe.planning.plan_plot import draw
    from megatron_moe.planning.plan_report import (
        detail_lines,
        explain_lines,
        summary_line,
        table_lines,
        to_json,
    )
    from megatron_moe.planning.rank_order import picture

    cluster = load_cluster(options.cluster, _changes(options))
    gpus = _gpus(options, cluster.gpus_per_node)
    fixed = given_fields(of_run)
    _check(options, config, cluster, fixed)
    vocab_size, assumed = known_vocab_size(config)
    result = search(
        config,
        vocab_size,
        cluster,
        gpus,
        fixed=fixed,
        capacity_factors=tuple(options.capacity_factors),
    )
    if not result.plans:
        least = (result.least_bytes or 0) / 1e9
        found = f"{gpus} x {cluster.usable_bytes / 1e9:.1f} GB"
        expected = f"GPUs on which a layout fits (the smallest needs {least:.1f} GB a rank)"
        if result.least_bytes is None:
            expected = "GPUs on which parameters, gradients and optimizer state fit"
        fix = "more GPUs, GPUs with more memory, or fewer flags that fix the layout"
        raise UsageError("--gpus", found, expected, fix)
    shown = result.plans[: max(options.top, options.choose)]
    if not 1 <= options.choose <= len(shown):
        raise UsageError("--choose", options.choose, f">= 1 and <= {len(shown)}")
    if options.plot:
        draw(shown, options.plot)
    if options.json:
        return to_json(result, shown, options.tokens)
    chosen = shown[options.choose - 1]
    lines = [
        f"{gpus} x {cluster.gpu}, {cluster.gpus_per_node} a node;"
        f" vocabulary {vocab_size}{ASSUMED * assumed}",
        summary_line(result),
        "",
        *table_lines(shown),
        "",
        f"Layout {options.choose}",
        *detail_lines(chosen, options.tokens),
        *(["", *picture(chosen.layout, cluster.gpus_per_node)] if options.placement else []),
        *(["", *explain_lines(chosen)] if options.explain else []),
        "",
        launch_command(chosen, of_run, flags_of(chosen, fixed)),
    ]
    return "\n".join(lines)


def given_fields(words: Sequence[str]) -> set[str]:
    """Names of the searched fields that the flags of the run give."""
    from megatron_moe.planning.layout_search import DEGREES

    names = {
        word.partition("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_")
        for word in words
        if word.startswith("--")
    }
    if names & SPLITS:
        names |= {"num_virtual_stages_per_pipeline_rank", "decoder_last_pipeline_num_layers"}
    kept = {"global_batch_size", "sequence_parallel", "overlap_grad_reduce", "overlap_param_gather"}
    return names & (DEGREES | kept)


def _changes(options: argparse.Namespace) -> dict[str, Any]:
    names = [flag[2:].replace("-", "_") for flag in (*FIGURES, "--gpus-per-node")]
    given = {name: getattr(options, name) for name in names}
    return {name: value for name, value in given.items() if value is not None}


def _gpus(options: argparse.Namespace, per_node: int) -> int:
    flag = "--gpus" if options.nodes is None else "--nodes"
    value = options.gpus if options.nodes is None else options.nodes
    if (options.gpus is None) == (options.nodes is None):
        raise UsageError(flag, value, "given, or --nodes instead, and not both")
    if value < 1:
        raise UsageError(flag, value, ">= 1")
    gpus = int(value if options.nodes is None else value * per_node)
    if gpus > per_node and gpus % per_node:
        raise UsageError(flag, gpus, f"a multiple of the GPUs of a node ({per_node}), or fewer")
    return gpus


def _check(
    options: argparse.Namespace, config: RunConfig, cluster: Cluster, fixed: set[str]
) -> None:
    """What is wrong before any layout is looked at."""
    if options.top < 1:
        raise UsageError("--top", options.top, ">= 1")
    if options.tokens is not None and not 0 < options.tokens < float("inf"):
        raise UsageError("--tokens", options.tokens, "> 0")
    if options.capacity_factors and "moe_expert_capacity_factor" in fixed:
        expected = "used without --moe-expert-capacity-factor"
        raise UsageError("--capacity-factors", options.capacity_factors, expected)
    if options.plot and not Path(options.plot).absolute().parent.is_dir():
        raise UsageError("--plot", options.plot, "a file in a directory that exists")
    if config.precision.fp8_format is not None and not cluster.fp8_tflops:
        expected = f"unset, as {cluster.gpu} does not multiply FP8"
        raise UsageError("--fp8-format", config.precision.fp8_format, expected)


if __name__ == "__main__":
    main()
