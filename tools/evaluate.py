r"""Evaluate a checkpoint, native or Hugging Face: perplexity on indexed data, tasks of lm-eval.

--data-path measures perplexity on every token of the data once. --held-out measures it on the
samples that the run's own evaluations use, of the checkpoint's phase if the run has phases. --tasks
needs the extra [eval].

    python tools/evaluate.py --load checkpoints --data-path data/wiki data/code
    python tools/evaluate.py --load openmoe-8b --data-path 0.3 data/wiki 0.7 data/code --json
    python tools/evaluate.py --load checkpoints --held-out valid
    python tools/evaluate.py --load checkpoints --held-out valid --ckpt-step 390000 --phase causal
    python tools/evaluate.py --load checkpoints --tasks arc_easy,hellaswag --num-fewshot 5
    python tools/evaluate.py --load tuned --tasks gsm8k --num-fewshot 5 --apply-chat-template
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_moe.config.fields import flag_named
from megatron_moe.errors import UsageError, exit_on_usage_error
from megatron_moe.inference.command import load_options, model_parser, require_harness
from megatron_moe.text import argument_text

if TYPE_CHECKING:
    from megatron_moe.config import RunConfig
    from megatron_moe.inference.held_out import SelectedPhase
    from megatron_moe.inference.loading import LoadedModel
    from megatron_moe.inference.perplexity import Perplexity

OWNERS = {
    "seq_length": "data_path",
    "max_tokens": "data_path",
    "phase": "held_out",
    "eval_iters": "held_out",
    "global_batch_size": "held_out",
    "include_path": "tasks",
    "num_fewshot": "tasks",
    "limit": "tasks",
    "system_instruction": "tasks",
    "apply_chat_template": "tasks",
    "fewshot_as_multiturn": "tasks",
}
"""The flag that each of these flags requires."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    moe = "eval: capacity of the run's evaluations (dropless; with --held-out eval)"
    parser = model_parser("evaluate.py", __doc__, moe)
    parser.add_argument("--batch-size", type=int, help="rows per batch (8)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    add = parser.add_argument_group("perplexity of data").add_argument
    add("--data-path", nargs="+", metavar="WORD", help="prefixes, or weight and prefix pairs")
    add("--seq-length", type=int, help="tokens of a row (the run's; HF weights: the maximum)")
    add("--max-tokens", type=int, help="tokens of each prefix, from its start (all)")
    add = parser.add_argument_group("perplexity of a run's held-out samples").add_argument
    add("--held-out", choices=("valid", "test"), help="the split")
    help_phase = "phase of the run, by name or number (that of the checkpoint's last step)"
    add("--phase", "--stage", dest="phase", help=help_phase)
    add("--eval-iters", type=int, help="global batches (the run's)")
    add("--global-batch-size", type=int, help="sequences of a global batch (the run's)")
    add = parser.add_argument_group("tasks").add_argument
    add("--tasks", type=lambda words: words.split(","), help="tasks of lm-eval, comma-separated")
    add("--include-path", type=Path, help="directory of task definitions; only these are used")
    add("--num-fewshot", type=int, help="examples in a context (the task's)")
    add("--limit", type=int, help="documents of each task (all)")
    add("--system-instruction", metavar="TEXT", help="system prompt")
    more = "use the chat template of models tuned with --objective sft"
    add("--apply-chat-template", action="store_const", const=True, help=more)
    more = "few-shot examples are turns (true) or part of the question"
    add("--fewshot-as-multiturn", nargs="?", const="true", choices=("true", "false"), help=more)
    return parser.parse_args(argv)


def check(options: argparse.Namespace) -> None:
    """Check the flags before anything is loaded.

    Raises:
        UsageError: the first invalid flag.
    """
    ways = {"data_path": "--data-path", "held_out": "--held-out", "tasks": "--tasks"}
    given = [name for name in ways if getattr(options, name)]
    if len(given) != 1:
        found = " ".join(ways[name] for name in given) or None
        raise UsageError("what to evaluate", found, f"exactly one of {', '.join(ways.values())}")
    for name, owner in OWNERS.items():
        flag = flag_named(name)
        if getattr(options, name) is not None and owner != given[0]:
            raise UsageError(flag, getattr(options, name), f"absent without {ways[owner]}")
    if options.held_out and options.batch_size is not None:
        reason = "the run's --micro-batch-size applies"
        raise UsageError("--batch-size", options.batch_size, "absent with --held-out", reason)
    for name in ("batch_size", "seq_length", "max_tokens", "eval_iters", "limit"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(flag_named(name), value, ">= 1")
    if options.num_fewshot is not None and options.num_fewshot < 0:
        raise UsageError("--num-fewshot", options.num_fewshot, ">= 0")
    if options.fewshot_as_multiturn and not options.apply_chat_template:
        expected = "absent without --apply-chat-template"
        raise UsageError("--fewshot-as-multiturn", options.fewshot_as_multiturn, expected)


def run(options: argparse.Namespace) -> None:
    """Load, evaluate, print.

    Raises:
        UsageError: a flag, the checkpoint, the tokenizer or the data is invalid.
    """
    check(options)
    if options.system_instruction:
        flag = "--system-instruction"
        options.system_instruction = argument_text(flag, options.system_instruction)
    if options.tasks:
        require_harness()  # before loading, which takes seconds to minutes
    phase = phase_of_run(options) if options.held_out else None  # before loading, too
    from megatron_moe.inference.loading import load

    loaded = load(load_options(options, "eval" if options.held_out else "dropless"))
    if options.tasks:
        run_tasks(options, loaded)
        return
    found = held_out(options, loaded, phase) if options.held_out else data(options, loaded)
    if options.json:
        about = {
            "checkpoint": loaded.source,
            "step": loaded.step,
            "dropless": not loaded.drops_tokens,
        }
        about |= {} if phase is None else {"stage": phase.name}
        print(json.dumps(about | {"results": [each.to_json() for each in found]}))
    else:
        print(*([] if phase is None else [phase.line]), table(found), sep="\n")


def data(options: argparse.Namespace, loaded: LoadedModel) -> list[Perplexity]:
    """Perplexity of indexed data.

    Raises:
        UsageError: rows exceed the model's maximal length, or the data is invalid.
    """
    from megatron_moe.inference.loading import format_of
    from megatron_moe.inference.perplexity import evaluate_data

    trained = loaded.config.data.seq_length
    default = loaded.max_length if format_of(load_options(options)) == "hf" else trained
    length = options.seq_length or min(default, loaded.max_length)
    if length > loaded.max_length:
        expected = f"<= --max-position-embeddings ({loaded.max_length})"
        raise UsageError("--seq-length", length, expected)
    return evaluate_data(
        loaded,
        options.data_path,
        seq_length=length,
        batch_size=options.batch_size or 8,
        max_tokens=options.max_tokens,
    )


def phase_of_run(options: argparse.Namespace) -> SelectedPhase | None:
    """The phase whose held-out samples are used; `None` for a run without phases.

    Raises:
        UsageError: Hugging Face weights, or the checkpoint or phase does not exist.
    """
    from megatron_moe.inference.held_out import select_phase
    from megatron_moe.inference.loading import format_of

    if format_of(load_options(options)) == "hf":
        reason = "they do not record the run's data"
        raise UsageError("--held-out", options.held_out, "absent for Hugging Face weights", reason)
    return select_phase(options.load, options.ckpt_step, options.phase)


def held_out(
    options: argparse.Namespace, loaded: LoadedModel, phase: SelectedPhase | None
) -> list[Perplexity]:
    """Perplexity of the held-out samples of the run, or of a phase.

    Raises:
        UsageError: the data is invalid.
    """
    from megatron_moe.inference.held_out import evaluate_held_out

    config = loaded.config if phase is None else phase.with_tokenizer_of(loaded.config)
    return evaluate_held_out(loaded, with_flags(config, options), options.held_out)


def with_flags(config: RunConfig, options: argparse.Namespace) -> RunConfig:
    """The configuration of the run with the values of the command line."""
    names = ("eval_iters", "global_batch_size")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return replace(config, train=replace(config.train, **given))


def run_tasks(options: argparse.Namespace, loaded: LoadedModel) -> None:
    """Run tasks of lm-eval and print their results."""
    from megatron_moe.inference.harness import evaluate_tasks, results_table

    results: dict[str, Any] = evaluate_tasks(
        loaded,
        options.tasks,
        batch_size=options.batch_size or 8,
        include_path=options.include_path,
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        system_instruction=options.system_instruction,
        apply_chat_template=bool(options.apply_chat_template),
        fewshot_as_multiturn=options.fewshot_as_multiturn != "false",
    )
    print(json.dumps(results, default=str) if options.json else results_table(results))


def table(found: Sequence[Perplexity]) -> str:
    """A table with a line per domain."""
    rows = [("domain", "tokens", "loss", "perplexity", "bits/byte", "weight")]
    for each in found:
        optional = [
            "-" if value is None else f"{value:.4f}" for value in (each.bits_per_byte, each.weight)
        ]
        loss, perplexity = f"{each.loss:.4f}", f"{each.perplexity:.4g}"
        rows.append((each.name, f"{each.tokens:,}", loss, perplexity, optional[0], optional[1]))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    options = parse(argv)
    with exit_on_usage_error("evaluate.py"):
        run(options)


if __name__ == "__main__":
    main()
