"""Weights & Biases (`--wandb-project`). Without network or account: `WANDB_MODE=offline`."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from megatron_moe.config import RunConfig
from megatron_moe.errors import UsageError
from megatron_moe.training.sinks import BoardSink

_AXIS = "iteration"
"""Name of the metric that is the x-axis of the others."""


def check_wandb() -> None:
    """Check that the package is installed, without importing it.

    Raises:
        UsageError: it is not.
    """
    if not _installed():
        fix = "pip install 'megatron-moe[wandb]'"
        raise UsageError("--wandb-project", "no package wandb", "used with wandb installed", fix)


def _installed() -> bool:
    try:
        return importlib.util.find_spec("wandb") is not None
    except ValueError:  # the import system has it as missing
        return False


def wandb_directory(config: RunConfig) -> str:
    """Where the files of the run go: `--wandb-save-dir`, else `wandb` in `--save`, as in
    Megatron-LM; without `--save`, the working directory.
    """
    if config.logging.wandb_save_dir is not None:
        return config.logging.wandb_save_dir
    save = config.checkpoint.save
    return os.getcwd() if save is None else os.path.join(save, "wandb")


class WandbSink(BoardSink):
    """Logs to one run of a project; its configuration is that of `config.json`.

    The axis is a metric of its own, `iteration`: W&B drops a value whose `step` is below that of
    one before it, and the values of steps come after those of an evaluation between them.

    Args:
        config: of the run.

    Raises:
        UsageError: W&B cannot start the run, e.g. without an account or network.
    """

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config.logging)
        self._wandb: Any = importlib.import_module("wandb")
        directory = wandb_directory(config)
        os.makedirs(directory, exist_ok=True)
        try:
            self._run: Any = self._wandb.init(
                project=config.logging.wandb_project,
                name=config.logging.wandb_exp_name,
                entity=config.logging.wandb_entity,
                dir=directory,
                config=config.to_dict(),
            )
        except self._wandb.Error as error:
            reason = " ".join(str(error).split())
            fix = "WANDB_MODE=offline needs neither account nor network"
            found = f"{config.logging.wandb_project}: {reason}"
            raise UsageError("--wandb-project", found, "a project that can be used", fix) from None
        self._run.define_metric(_AXIS)
        self._run.define_metric("*", step_metric=_AXIS)

    def add(self, values: Mapping[str, float], iteration: int) -> None:
        """See `BoardSink.add`."""
        with self._errors():
            self._run.log({**values, _AXIS: iteration})

    def add_bars(self, tag: str, values: Sequence[float], iteration: int) -> None:
        """Add a histogram whose bar e is the value of expert e."""
        edges = [e - 0.5 for e in range(len(values) + 1)]
        histogram = self._wandb.Histogram(np_histogram=(list(values), edges))
        with self._errors():
            self._run.log({tag: histogram, _AXIS: iteration})

    def add_text(self, tag: str, text: str, iteration: int) -> None:
        """See `BoardSink.add_text`."""
        with self._errors():
            self._run.log({tag: text, _AXIS: iteration})

    def close(self) -> None:
        """Write the run's file and, online, wait until everything is uploaded."""
        with self._errors():
            self._run.finish()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """What W&B raises for itself is an `OSError` for the reporter."""
        try:
            yield
        except self._wandb.Error as error:
            raise OSError(" ".join(str(error).split())) from error
