"""From `--log-boards NAME=PROJECT` to the board that it names.

A file of `training/boards/` is a board: it registers what opens it, and the configuration lists the
folder for the valid names, so that adding a file is all it takes.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

from megatron_moe.config import RunConfig
from megatron_moe.config.boards import boards_of
from megatron_moe.errors import UsageError
from megatron_moe.training.sinks import BoardSink

FLAG = "--log-boards"


@dataclass(frozen=True)
class Board:
    """How to open a board.

    Args:
        package: that it needs, as it is imported.
        extra: of this project that installs it.
        open_sink: of the configuration and the project; a `UsageError` if the settings of the
            library do not allow it, an `OSError` if it cannot be written now.
    """

    package: str
    extra: str
    open_sink: Callable[[RunConfig, str], BoardSink]


class BoardRegistry:
    """Boards by name."""

    def __init__(self) -> None:
        self._boards: dict[str, Board] = {}

    def register(
        self, name: str, *, package: str, extra: str
    ) -> Callable[[Callable[[RunConfig, str], BoardSink]], Callable[[RunConfig, str], BoardSink]]:
        """A decorator that enters what opens a board; a class that takes the same arguments does.

        Args:
            name: of the file.
            package: see `Board`.
            extra: see `Board`.
        """

        def enter(
            open_sink: Callable[[RunConfig, str], BoardSink],
        ) -> Callable[[RunConfig, str], BoardSink]:
            self._boards[name] = Board(package, extra, open_sink)
            return open_sink

        return enter

    def __getitem__(self, name: str) -> Board:
        """The board called ``name``, whose file is imported."""
        if name not in self._boards:
            importlib.import_module(f"{__package__}.boards.{name}")
        return self._boards[name]


BOARDS = BoardRegistry()
"""By the name of the file."""


def check_boards(config: RunConfig) -> None:
    """Check that the packages of the boards are installed, without importing them.

    Raises:
        UsageError: one is not.
    """
    for name in boards_of(config.logging.log_boards):
        board = BOARDS[name]
        try:
            installed = importlib.util.find_spec(board.package) is not None
        except ValueError:  # the import system has it as missing
            installed = False
        if not installed:
            fix = f"pip install 'megatron-moe[{board.extra}]'"
            found = f"{name}, no package {board.package}"
            raise UsageError(FLAG, found, f"used with {board.package} installed", fix)
