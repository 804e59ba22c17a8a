r"""Generate text from a checkpoint, native or Hugging Face, on one CPU or GPU.

The checkpoint names its tokenizer; --tokenizer-model is for a file that has moved. By default no
token is dropped: under a capacity, drops depend on the length of the text.

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

from megatron_moe.config.fields import flag_named
from megatron_moe.errors import UsageError, exit_on_usage_error
from megatron_moe.inference.command import load_options, model_parser
from megatron_moe.parallel.launch import ended_reader_is_fine
from megatron_moe.text import accept_undecodable_input, argument_text

if TYPE_CHECKING:
    from megatron_moe.inference.generation import GenerationConfig
    from megatron_moe.inference.loading import LoadedModel


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    moe = "eval: capacity of the run's evaluations; needs --no-kv-cache (dropless)"
    parser = model_parser("generate.py", __doc__, moe)
    add = parser.add_argument
    add("--no-kv-cache", action="store_true", help="process the whole text for every token")
    add = parser.add_argument_group("prompts").add_argument
    add("--prompt", action="append", metavar="TEXT", help="can be repeated (none: a new document)")
    add("--prompts-file", metavar="FILE", help="a prompt per line, or .jsonl; - is standard input")
    add("--interactive", action="store_true", help="read prompts from the terminal")
    add(
        "--append-eod", action="store_true", help="append an end of document to prompts, as for UL2"
    )
    add("--chat", action="store_true", help="prompts are questions to a model tuned with sft")
    add("--system", default="", metavar="TEXT", help="with --chat: system prompt")
    add = parser.add_argument_group("sampling").add_argument
    add("--max-new-tokens", type=int, default=64, help="maximal number of new tokens (64)")
    add("--temperature", type=float, default=1.0, help="0 takes the most probable token (1)")
    add("--top-k", type=int, default=0, help="sample from the k most probable; 0 for all (0)")
    add("--top-p", type=float, default=1.0, help="sample from the most probable that sum to p (1)")
    add("--seed", type=int, default=1234, help="of the first prompt; +1 for each next one (1234)")
    add("--batch-size", type=int, default=8, help="prompts per batch (8)")
    add = parser.add_argument_group("output").add_argument
    add("--json", action="store_true", help="a JSON object per prompt, with token ids")
    add("--show-routing", action="store_true", help="experts of each token, by layer")
    add("--no-stream", action="store_true", help="print each text when it is finished")
    return parser.parse_args(argv)


def check(options: argparse.Namespace) -> None:
    """Check the flags before anything is loaded.

    Raises:
        UsageError: the first invalid flag.
    """
    for flag, value in {
        "--max-new-tokens": options.max_new_tokens,
        "--batch-size": options.batch_size,
    }.items():
        if value < 1:
            raise UsageError(flag, value, ">= 1")
    if not 0 <= options.seed < 2**63:
        raise UsageError("--seed", options.seed, "from 0 to 2^63 - 1")
    if options.prompt and options.prompts_file:
        raise UsageError("--prompts-file", options.prompts_file, "absent with --prompt")
    if options.system and not options.chat:
        raise UsageError("--system", options.system, "absent without --chat")
    if options.append_eod and options.chat:
        reason = "the chat template has no end of document after a question"
        raise UsageError("--append-eod", True, "absent with --chat", reason)
    if options.moe_capacity == "eval" and not options.no_kv_cache:
        reason = "under a capacity a later token may displace an earlier one, already cached"
        expected = "dropless without --no-kv-cache"
        raise UsageError("--moe-capacity", "eval", expected, reason)
    if options.interactive:
        for flag in ("prompt", "prompts_file", "json"):
            if getattr(options, flag):
                raise UsageError(
                    flag_named(flag), getattr(options, flag), "absent with --interactive"
                )


def run(options: argparse.Namespace) -> None:
    """Load, generate, print.

    Raises:
        UsageError: a flag, the checkpoint, the tokenizer or a prompt is invalid.
    """
    # Imported late, so that --help and usage errors are immediate.
    from megatron_moe.inference.generation import GenerationConfig, SamplingParams
    from megatron_moe.inference.loading import load
    from megatron_moe.inference.prompts import read_prompts

    check(options)
    sampling = SamplingParams(
        temperature=options.temperature, top_k=options.top_k, top_p=options.top_p
    )
    sampling.check()
    options.system = argument_text("--system", options.system)
    given = [argument_text("--prompt", prompt) for prompt in options.prompt or ()]
    prompts = read_prompts(options.prompts_file) if options.prompts_file else given
    loaded = load(load_options(options))
    config = GenerationConfig(
        max_new_tokens=options.max_new_tokens,
        vocab_size=loaded.tokenizer.size,
        eod=loaded.tokenizer.eod,
        sampling=sampling,
        use_cache=not options.no_kv_cache,
    )
    if options.interactive:
        run_interactive(options, loaded, config)
    else:
        prompts = prompts or [""]
        continue_prompts(options, loaded, config, prompts, encode(options, loaded, prompts))


def encode(
    options: argparse.Namespace, loaded: LoadedModel, prompts: Sequence[str]
) -> list[list[int]]:
    """Ids of prompts; with `--chat` each is the question of a conversation of its own.

    Raises:
        UsageError: a prompt has ids beyond the vocabulary.
    """
    from megatron_moe.inference.prompts import Conversation, encode_prompts

    if options.chat:
        return [Conversation(loaded.tokenizer, options.system).ask(prompt) for prompt in prompts]
    return encode_prompts(prompts, loaded.tokenizer, append_eod=options.append_eod)


def continue_prompts(
    options: argparse.Namespace,
    loaded: LoadedModel,
    config: GenerationConfig,
    prompts: Sequence[str],
    ids: Sequence[list[int]],
    start: int = 0,
) -> list[list[int]]:
    """Continue prompts, batch by batch.

    Args:
        options: the command line.
        loaded: the model.
        config: shared settings of the continuations.
        prompts: texts of the prompts.
        ids: token ids of the prompts.
        start: number of earlier prompts, whose seeds are used.

    Returns:
        The new ids of each prompt.

    Raises:
        UsageError: a prompt is too long; nothing is printed.
    """
    from megatron_moe.inference.generation import check_lengths, generate
    from megatron_moe.inference.output import ContinuationPrinter, OutputStyle
    from megatron_moe.inference.routing_log import RoutingLog

    check_lengths(loaded.model, ids, config.max_new_tokens)
    style = OutputStyle(
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
        tokens = generate(loaded.model, ids[batch], config, seeds, log)
        printer = ContinuationPrinter(
            prompts[batch], ids[batch], loaded.tokenizer, style, first, log
        )
        printer.print(tokens)
        found += [each.ids for each in printer.continuations]
    return found


def run_interactive(
    options: argparse.Namespace, loaded: LoadedModel, config: GenerationConfig
) -> None:
    """Continue prompts as they are typed, until the end of input; errors are printed as a line.

    With `--chat` they are the questions of one conversation.
    """
    from megatron_moe.inference.prompts import RESET, Conversation

    chat_hint, text_hint = f"{RESET} starts a new conversation", "An empty line starts a document"
    hint = chat_hint if options.chat else text_hint
    print(f"{loaded.source}. {hint}; Ctrl-D ends.", file=sys.stderr)
    accept_undecodable_input()
    conversation = Conversation(loaded.tokenizer, options.system)
    for number in range(sys.maxsize):
        try:
            typed = input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            return
        try:
            prompt = argument_text("prompt", typed)
            if options.chat and prompt.strip() == RESET:
                conversation = Conversation(loaded.tokenizer, options.system)
                continue
            ids = conversation.ask(prompt) if options.chat else encode(options, loaded, [prompt])[0]
            (new,) = continue_prompts(options, loaded, config, [prompt], [ids], number)
            conversation.add_answer(ids, new)
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
