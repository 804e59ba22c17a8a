"""trackio: `--log-boards trackio=PROJECT`.

Runs are stored in a local folder (`TRACKIO_DIR`), without network or account; `trackio show` draws
them. Tags are those of TensorBoard.
"""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from megatron_moe.config import RunConfig
from megatron_moe.training.board_registry import BOARDS
from megatron_moe.training.sinks import BoardSink


@BOARDS.register("trackio", package="trackio", extra="trackio")
class TrackioSink(BoardSink):
    """Logs to a new run of a project; its configuration is that of `config.json`.

    Args:
        config: of the run.
        project: its name.
    """

    def __init__(self, config: RunConfig, project: str) -> None:
        super().__init__(config.logging)
        self._trackio: Any = importlib.import_module("trackio")
        with self._quiet():
            self._run: Any = self._trackio.init(
                project=project,
                name=config.logging.log_run_name,
                config=config.to_dict(),
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def add(self, values: Mapping[str, float], iteration: int) -> None:
        """See `BoardSink.add`."""
        with self._quiet():
            self._run.log(dict(values), step=iteration)

    def add_bars(self, tag: str, values: Sequence[float], iteration: int) -> None:
        """Add a histogram whose bar e is the value of expert e."""
        edges = [e - 0.5 for e in range(len(values) + 1)]
        histogram = self._trackio.Histogram(np_histogram=(list(values), edges))
        with self._quiet():
            self._run.log({tag: histogram}, step=iteration)

    def add_text(self, tag: str, text: str, iteration: int) -> None:
        """See `BoardSink.add_text`."""
        with self._quiet():
            self._run.log({tag: self._trackio.Markdown(text)}, step=iteration)

    def close(self) -> None:
        """Write everything."""
        with self._quiet():
            self._run.finish()

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """Without trackio's messages, as the log of the run is read by programs."""
        with contextlib.redirect_stdout(io.StringIO()):
            yield
