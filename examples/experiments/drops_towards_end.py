"""Drop towards the end: late tokens lose their experts.

What is measured, and against which null: `phenomena.py`.

    python -m examples.experiments.drops_towards_end --out experiments
"""

from __future__ import annotations

from collections.abc import Sequence

from examples.experiments import phenomena

VARIANTS = ("openmoe", "random")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    phenomena.main("drops_towards_end", phenomena.drops_towards_end, VARIANTS, argv)


if __name__ == "__main__":
    main()
