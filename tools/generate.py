r"""Generate text from a checkpoint, native or Hugging Face, on one CPU or GPU.

The checkpoint names its tokenizer; `--tokenizer-model` says where that file is now. By default
nothing is dropped, as capacity would let the text's length decide which tokens are computed.

    python tools/generate.py --load checkpoints --prompt "def read(self, size):" \
        --max-new-tokens 64 --temperature 0.8 --top-p 0.9
    python tools/generate.py --load openmoe-8b --prompts-file prompts.txt --batch-size 8 --json
    python tools/generate.py --load checkpoints --prompt "import os" --show-routing
    python tools/generate.py --load checkpoints --interactive
    python tools/generate.py --load tuned --chat --interactive
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_moe.errors import UsageError, exit_on_usage_error
from megatron_moe.inference.command import model_parser, wanted
from megatron_moe.parallel.launch import ended_reader_is_fine

if TYPE_CHECKING:
    from megatron_moe.inference.generation import Rules
    from megatron_moe.inference.loading import Loaded


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    moe = "eval: that of the run's evaluations, needs --no-kv-cache (dropless)"
    parser = model_parser("generate.py", __doc__, moe)
    add = parser.add_argument
    add("--no-kv-cache", action="store_true", help="read the whole text again for every token")
    add = parser.add_argument_group("what to continue").add_argument
    add("--prompt", action="append", metavar="TEXT", help="may be repeated (none: a new document)")
    add("--prompts-file", metavar="FILE", help="a prompt a line, or .jsonl; - is standard input")
    add("--interactive", action="store_true", help="ask for prompts, one after the other")
    add("--append-eod", action="store_true", help="end of document after a prompt, as UL2 has it")
    add("--chat", action="store_true", help="prompts are questions to a model tuned with sft")
    add("--system", default="", metavar="TEXT", help="with --chat: stands before the first one")
    add = parser.add_argument_group("how").add_argument
    add("--max-new-tokens", type=int, default=64, help="at most this many (64)")
    add("--temperature", type=float, default=1.0, help="0 takes the most probable token (1)")
    add("--top-k", type=int, default=0, help="draw from the k most probable; 0 for all (0)")
    add("--top-p", type=float, default=1.0, help="draw from the most probable up to p (1)")
    add(
        "--seed", type=int, default=1234, help="of the first prompt; the next takes the next (1234)"
    )
    add("--batch-size", type=int, default=8, help="prompts at a time (8)")
    add = parser.add_argument_group("output").add_argument
    add("--json", action="store_true", help="an object a line and prompt, with token ids")
    add("--show-routing", action="store_true", help="which experts each token took, by layer")
    add("--no-stream", action="store_true", help="print a text when it is whole")
    return parser.parse_args(argv)


def check(options: argparse.Namespace) -> None:
    """Refuse flags that cannot work, before anything is loaded.

    Raises:
        UsageError: the first such flag.
    """
    for flag, value in {
        "--max-new-tokens": options.max_new_tokens,
        "--batch-size": options.batch_size,
    }.items():
        if value < 1:
            raise UsageError(flag, value, "at least 1")
    if not 0 <= options.seed < 2**63:
        raise UsageError("--seed", options.seed, "from 0 to 2^63 - 1")
    if options.prompt and options.prompts_file:
        raise UsageError("--prompts-file", options.prompts_file, "absent beside --prompt")
    if options.system and not options.chat:
        raise UsageError("--system", options.system, "absent without --chat")
    if options.append_eod and options.chat:
        raise UsageError(
            "--append-eod", True, "absent beside --chat, whose template has no such end"
        )
    if options.moe_capacity == "eval" and not options.no_kv_cache:
        raise UsageError(
            "--moe-capacity",
            "eval",
            "--no-kv-cache with it",
            "under a capacity a later token may displace an earlier one, which a cache cannot undo",
        )
    if options.interactive:
        for flag in ("prompt", "prompts_file", "json"):
            if getattr(options, flag):
                name = f"--{flag.replace('_', '-')}"
                raise UsageError(name, getattr(options, flag), "absent beside --interactive")


def run(options: argparse.Namespace) -> None:
    """Load, generate, print.

    Raises:
        UsageError: a flag, the checkpoint, the tokenizer or a prompt is wrong.
    """
    # Imported late, so that --help and a wrong flag are answered at once.
    from megatron_moe.inference.generation import Rules
    from megatron_moe.inference.loading import load
    from megatron_moe.inference.prompts import read_prompts
    from megatron_moe.inference.sampling import Sampling

    check(options)
    sampling = Sampling(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p)
    sampling.check()
    prompts = read_prompts(options.prompts_file) if options.prompts_file else options.prompt
    loaded = load(wanted(options))
    rules = Rules(
        tokens=options.max_new_tokens,
        vocab_size=loaded.text.size,
        eod=loaded.text.eod,
        sampling=sampling,
        cached=not options.no_kv_cache,
    )
    if options.interactive:
        ask(options, loaded, rules)
    else:
        prompts = prompts or [""]
        answer(options, loaded, rules, prompts, encoded(options, loaded, prompts))


def encoded(options: argparse.Namespace, loaded: Loaded, prompts: Sequence[str]) -> list[list[int]]:
    """The ids of prompts; with `--chat` each is the question of a conversation of its own.

    Raises:
        UsageError: a prompt has ids that the model has not.
    """
    from megatron_moe.inference.chat import Conversation
    from megatron_moe.inference.prompts import encode_prompts

    if options.chat:
        return [Conversation(loaded.text, options.system).ask(prompt) for prompt in prompts]
    return encode_prompts(prompts, loaded.text, append_eod=options.append_eod)


def answer(
    options: argparse.Namespace,
    loaded: Loaded,
    rules: Rules,
    prompts: Sequence[str],
    ids: Sequence[list[int]],
    start: int = 0,
) -> list[list[int]]:
    """Continue prompts, batch by batch.

    Args:
        options: the command line.
        loaded: the model.
        rules: how to go on.
        prompts: texts.
        ids: what the model reads of each.
        start: prompts before these, which have taken seeds.

    Returns:
        The new ids of each.

    Raises:
        UsageError: a prompt is too long; nothing is printed.
    """
    from megatron_moe.inference.generation import check_lengths, generate
    from megatron_moe.inference.output import Output, Style
    from megatron_moe.inference.routing_log import RoutingLog

    check_lengths(loaded.model, ids, rules.tokens)
    style = Style(
        as_json=options.json,
        echo=not options.chat,
        numbered=len(prompts) > 1,
        stream=not options.no_stream,
    )
    found: list[list[int]] = []
    for first in range(0, len(ids), options.batch_size):
        batch = slice(first, first + options.batch_size)
        log = RoutingLog(len(ids[batch])) if options.show_routing else None
        seeds = [options.seed + start + first + row for row in range(len(ids[batch]))]
        drawn = generate(loaded.model, ids[batch], rules, seeds, log)
        output = Output(prompts[batch], ids[batch], loaded.text, style, first, log)
        output.print(drawn)
        found += [each.ids for each in output.answers]
    return found


def ask(options: argparse.Namespace, loaded: Loaded, rules: Rules) -> None:
    """Continue prompts as they are typed, until the end of input. A mistake costs a line.

    With `--chat` they are the questions of one conversation.
    """
    from megatron_moe.inference.chat import RESET, Conversation

    hint = f"{RESET} forgets what was said" if options.chat else "An empty line starts a document"
    print(f"{loaded.source}. {hint}; Ctrl-D ends.", file=sys.stderr)
    talk = Conversation(loaded.text, options.system)
    for number in range(sys.maxsize):
        try:
            prompt = input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            return
        try:
            if options.chat and prompt.strip() == RESET:
                talk = Conversation(loaded.text, options.system)
                continue
            ids = talk.ask(prompt) if options.chat else encoded(options, loaded, [prompt])[0]
            (new,) = answer(options, loaded, rules, [prompt], [ids], number)
            talk.remember(ids, new)
        except UsageError as error:
            print(f"generate.py: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print("", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    options = parse(argv)
    with ended_reader_is_fine(), exit_on_usage_error("generate.py"):
        run(options)


if __name__ == "__main__":
    main()
