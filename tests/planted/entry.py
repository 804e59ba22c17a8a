"""A fault to plant: one place of the source, what somebody might write there, and who notices."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


class StaleError(Exception):
    """The source has changed, so that a fault cannot be planted as it is written down."""


@dataclass(frozen=True, kw_only=True)
class Planted:
    """A fault, and the test that must fail with it."""

    row: str
    """Of `docs/reliability.md`: `case 14`, `feature 6`."""
    fault: str
    """What is wrong, as the page says it."""
    file: str
    """From the repository's root."""
    old: str
    """Source text that occurs exactly once in the file."""
    new: str
    """What stands there with the fault."""
    test: str
    """Node id of pytest, possibly of one parameter; one of the tests that the row names."""
    hangs: bool = False
    """Whether the fault can make the test wait for ever: then a timeout counts as a failure."""

    @property
    def function(self) -> str:
        """The node id without parameters."""
        return self.test.partition("[")[0]

    def planted_in(self, text: str) -> str:
        """Return the file's text with the fault.

        Raises:
            StaleError: the source text does not occur exactly once, or is replaced by itself.
        """
        count = text.count(self.old)
        if count != 1:
            raise StaleError(
                f"{self.row} ({self.fault}): the text to replace must occur once in {self.file}"
                f" (got {count} times); write it as the source has it now: {self.old!r}"
            )
        if self.old == self.new:
            raise StaleError(f"{self.row} ({self.fault}): the text is replaced by itself")
        return text.replace(self.old, self.new)

    def source(self, root: Path) -> Path:
        """The file below a root."""
        return root / self.file
