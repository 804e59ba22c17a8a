r"""Print the held-out loss of a unigram model of a run's training tokens.

Takes the flags of pretrain_openmoe.py, of which those of data and batch sizes matter. For a run in
phases, --phase NAME or its number selects one; the default is the last. (--stage is an alias.)

Examples:
    # with the flags of the run
    python tools/unigram_loss.py --preset openmoe-tiny --data-path data/text_document \
        --tokenizer-type SentencePieceTokenizer --tokenizer-model t.model --train-iters 100

    # for a saved run
    python tools/unigram_loss.py --config run/config.json

    # for one of its phases
    python tools/unigram_loss.py --config run/config.json --phase ul2
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from megatron_moe.command_line import Parser
from megatron_moe.config.cli import parse_or_exit
from megatron_moe.config.validate import validate
from megatron_moe.errors import USAGE_EXIT_CODE, UsageError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    own = Parser("unigram_loss.py", add_help=False)
    own.add_argument("--phase", "--stage")
    chosen, others = own.parse_known_args(argv)
    command = parse_or_exit(others, prog="unigram_loss.py", examples=__doc__ or "")
    # Importing Megatron-Core warns that Apex is missing, which does not matter for counting.
    from megatron_moe.platform.patches.megatron_core import KnownWarnings

    KnownWarnings().apply()
    from megatron_moe.training.unigram import unigram_loss

    try:
        validate(command.config)
        found = unigram_loss(command.config, chosen.phase)
    except UsageError as error:
        print(f"unigram_loss.py: error: {error}", file=sys.stderr)
        return USAGE_EXIT_CODE
    of_phase = f" of phase {found.phase}" if found.phase else ""
    print(
        f"unigram held-out loss {found.loss:.6f} nats per token{of_phase} "
        f"({found.targets} targets, {found.training_tokens} training tokens)"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
