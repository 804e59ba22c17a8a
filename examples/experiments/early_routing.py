"""Early routing learning: the experts of an id are settled early in training.

What is measured, and against which null: `phenomena.py`.

    python -m examples.experiments.early_routing --out experiments
"""

from __future__ import annotations

from collections.abc import Sequence

from examples.experiments import phenomena

VARIANTS = ("openmoe",)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    phenomena.main("early_routing", phenomena.early_routing, VARIANTS, argv)


if __name__ == "__main__":
    main()
