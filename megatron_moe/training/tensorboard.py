"""TensorBoard (`--tensorboard-dir`)."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Mapping, Sequence

from torch.utils.tensorboard import SummaryWriter

from megatron_moe.config import LoggingConfig
from megatron_moe.text import printable
from megatron_moe.training.sinks import BoardSink


class TensorBoardSink(BoardSink):
    """Writes event files.

    Args:
        directory: of the event files.
        first_iteration: TensorBoard hides the points of later steps in older event files.
        logging: what to write, and how many events to hold back.
    """

    def __init__(
        self, directory: str, first_iteration: int, logging: LoggingConfig | None = None
    ) -> None:
        super().__init__(logging or LoggingConfig())
        self._hook = threading.excepthook
        threading.excepthook = _without_writers(self._hook)
        try:
            self._board = SummaryWriter(
                directory,
                purge_step=first_iteration + 1,
                max_queue=self._logging.tensorboard_queue_size,
            )
        except OSError:
            threading.excepthook = self._hook
            raise

    def add(self, values: Mapping[str, float], iteration: int) -> None:
        """See `BoardSink.add`."""
        for tag, value in values.items():
            self._board.add_scalar(printable(tag), value, iteration)

    def add_bars(self, tag: str, values: Sequence[float], iteration: int) -> None:
        """Add a histogram whose bar at position e is the value of expert e.

        `add_histogram` would bin the loads and lose which expert has which. With raw buckets, loads
        [3, 1] become 3 observations in the bucket that ends at 0.5 and 1 in the one that ends at
        1.5.
        """
        positions = range(len(values))
        self._board.add_histogram_raw(
            printable(tag),
            min=-0.5,
            max=len(values) - 0.5,
            num=int(sum(values)),
            sum=sum(e * value for e, value in zip(positions, values, strict=True)),
            sum_squares=sum(e * e * value for e, value in zip(positions, values, strict=True)),
            bucket_limits=[e + 0.5 for e in positions],
            bucket_counts=list(values),
            global_step=iteration,
        )

    def add_text(self, tag: str, text: str, iteration: int) -> None:
        """See `BoardSink.add_text`."""
        self._board.add_text(tag, printable(text), iteration)

    def close(self) -> None:
        """Flush and close the event file."""
        try:
            self._board.close()
        finally:
            threading.excepthook = self._hook


def _without_writers(
    before: Callable[[threading.ExceptHookArgs], object],
) -> Callable[[threading.ExceptHookArgs], object]:
    """A hook for exceptions of threads that prints none of the writer's: its next call raises it.

    It must not refer to the sink: the writer keeps its error, and with it the frames of the run.
    """

    def note(arguments: threading.ExceptHookArgs) -> None:
        trace = traceback.extract_tb(arguments.exc_traceback)
        of_writer = any(frame.filename.endswith("event_file_writer.py") for frame in trace)
        if not (of_writer and isinstance(arguments.exc_value, OSError)):
            before(arguments)

    return note
