"""MLflow: `--log-boards mlflow=EXPERIMENT`.

Where to is MLflow's own setting: `MLFLOW_TRACKING_URI`, a server, or a folder with
`MLFLOW_ALLOW_FILE_STORE=true`, and its variables for access. Tags are those of TensorBoard, with
`_` for characters that MLflow does not take; bars and texts are artifacts of the run.
"""

from __future__ import annotations

import importlib
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from megatron_moe.config import RunConfig
from megatron_moe.errors import UsageError
from megatron_moe.training.board_registry import BOARDS, FLAG
from megatron_moe.training.sinks import BoardSink

_OTHER = re.compile(r"[^\w\-. /:]")
_BATCH = 500
"""Metrics of one request; the server takes 1000."""


@BOARDS.register("mlflow", package="mlflow", extra="mlflow")
class MlflowSink(BoardSink):
    """Logs to a new run of an experiment, which is created if there is none.

    Args:
        config: of the run.
        experiment: its name.

    Raises:
        UsageError: MLflow cannot start the run, e.g. without a store.
    """

    def __init__(self, config: RunConfig, experiment: str) -> None:
        super().__init__(config.logging)
        self._mlflow: Any = importlib.import_module("mlflow")
        try:
            self._client: Any = self._mlflow.MlflowClient()
            found = self._client.get_experiment_by_name(experiment)
            number = (
                self._client.create_experiment(experiment) if found is None else found.experiment_id
            )
            run = self._client.create_run(number, run_name=config.logging.log_run_name)
            self._id: str = run.info.run_id
            self._client.log_dict(self._id, config.to_dict(), "config.json")
        except self._mlflow.exceptions.MlflowException as error:
            reason = " ".join(str(error).split())[:300]
            fix = "set MLFLOW_TRACKING_URI"
            expected = "an experiment that can be used"
            raise UsageError(FLAG, f"mlflow={experiment}: {reason}", expected, fix) from None

    def add(self, values: Mapping[str, float], iteration: int) -> None:
        """See `BoardSink.add`."""
        now = int(time.time() * 1000)
        metric = self._mlflow.entities.Metric
        metrics = [metric(_key(tag), value, now, iteration) for tag, value in values.items()]
        with self._errors():
            for start in range(0, len(metrics), _BATCH):
                self._client.log_batch(self._id, metrics=metrics[start : start + _BATCH])

    def add_bars(self, tag: str, values: Sequence[float], iteration: int) -> None:
        """A JSON list for each tag and step."""
        with self._errors():
            self._client.log_dict(self._id, list(values), f"{_key(tag)}/{iteration:08d}.json")

    def add_text(self, tag: str, text: str, iteration: int) -> None:
        """A Markdown file for each tag and step."""
        with self._errors():
            self._client.log_text(self._id, text, f"{_key(tag)}/{iteration:08d}.md")

    def close(self) -> None:
        """Mark the run as finished."""
        with self._errors():
            self._client.set_terminated(self._id)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """What MLflow raises for itself is an `OSError` for the reporter."""
        try:
            yield
        except self._mlflow.exceptions.MlflowException as error:
            raise OSError(" ".join(str(error).split())[:300]) from error


def _key(tag: str) -> str:
    """A tag in characters that MLflow takes."""
    return _OTHER.sub("_", tag)
