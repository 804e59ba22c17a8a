r"""Print the held-out loss of a unigram model of a run's training tokens.

Takes the flags of pretrain_openmoe.py, of which those of data and batch sizes matter, and of a run
in stages --stage NAME, or its number; the last one, if none is chosen.

Examples:
    # with the flags of the run
    python tools/unigram_loss.py --preset openmoe-tiny --data-path data/text_document \
        --tokenizer-type SentencePieceTokenizer --tokenizer-model t.model --train-iters 100

    # of a saved run
    python tools/unigram_loss.py --config run/config.json

    # of a stage of it
    python tools/unigram_loss.py --config run/config.json --stage ul2
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megatron_moe.config.cli import parse_or_exit
from megatron_moe.config.validate import validate
from megatron_moe.errors import USAGE_EXIT_CODE, UsageError


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    own = argparse.ArgumentParser(prog="unigram_loss.py", add_help=False, allow_abbrev=False)
    own.add_argument("--stage")
    chosen, others = own.parse_known_args(argv)
    command = parse_or_exit(others, prog="unigram_loss.py", examples=__doc__ or "")
    # Megatron-Core, whose data sets are used, warns that Apex is missing; counting needs none.
    from megatron_moe.platform.patches.megatron_core import KnownWarnings

    KnownWarnings().apply()
    from megatron_moe.training.unigram import unigram_loss

    try:
        validate(command.config)
        found = unigram_loss(command.config, chosen.stage)
    except UsageError as error:
        print(f"unigram_loss.py: error: {error}", file=sys.stderr)
        return USAGE_EXIT_CODE
    of_stage = f" of stage {found.stage}" if found.stage else ""
    print(
        f"unigram held-out loss {found.loss:.6f} nats per token{of_stage} "
        f"({found.targets} targets, {found.training_tokens} training tokens)"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
