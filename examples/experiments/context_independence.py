"""Context-independent specialization: routing follows the id of the token.

What is measured, and against which null: `phenomena.py`.

    python -m examples.experiments.context_independence --out experiments
"""

from __future__ import annotations

from collections.abc import Sequence

from examples.experiments import phenomena

VARIANTS = ("openmoe", "token-hash")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    phenomena.main("context_independence", phenomena.context_independence, VARIANTS, argv)


if __name__ == "__main__":
    main()
