"""Print the held-out loss of a unigram model of a run's training tokens.

    python tools/unigram_loss.py --config RUN/config.json
    python tools/unigram_loss.py --preset openmoe-tiny --data-path ... --eval-iters 10

Takes the flags of pretrain_openmoe.py; only those of data and batch sizes matter.
"""

from __future__ import annotations

import sys

from megatron_moe.config.cli import parse_or_exit
from megatron_moe.errors import USAGE_EXIT_CODE, UsageError


def main() -> int:
    """Entry point; returns the exit code."""
    command = parse_or_exit(prog="unigram_loss.py")
    # The engine, whose data sets are used, says that Apex is missing: no matter for counting.
    from megatron_moe.platform.patches.noise import KnownWarnings

    KnownWarnings().apply()
    from megatron_moe.training.unigram import unigram_loss

    try:
        found = unigram_loss(command.config)
    except UsageError as error:
        print(f"unigram_loss.py: error: {error}", file=sys.stderr)
        return USAGE_EXIT_CODE
    print(
        f"unigram held-out loss {found.loss:.6f} nats per token "
        f"({found.targets} targets, {found.training_tokens} training tokens)"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
