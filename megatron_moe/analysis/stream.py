"""The pass over the tokens: every batch once through the model, every collector on each batch.

Its state is written from time to time, so that a pass that was interrupted goes on where it was.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from megatron_moe.analysis.collector import Collector
from megatron_moe.analysis.model import MoERunner
from megatron_moe.analysis.result import replace_file
from megatron_moe.analysis.sample import Sample

SAVE_SECONDS = 60.0
"""Between two saves of the state."""
_DONE, _FINGERPRINT = "batches done", "fingerprint"


def stream(
    runner: MoERunner,
    sample: Sample,
    collectors: Mapping[str, Collector],
    *,
    state: Path,
    fingerprint: str,
    advance: Callable[[int], object],
    save_seconds: float = SAVE_SECONDS,
) -> None:
    """Run the pass, from where the state of an earlier one ends.

    Args:
        runner: the model.
        sample: the tokens.
        collectors: by name.
        state: file of the state; it is left complete, so that a repeated pass reads nothing.
        fingerprint: of model, sample and collectors; a state with another one is ignored.
        advance: called with the number of batches done, those of an earlier pass included.
        save_seconds: seconds between two saves.
    """
    done = _restore(state, fingerprint, collectors)
    advance(done)
    predictions = any(each.needs_predictions for each in collectors.values())
    saved = time.monotonic()
    for batch in sample.batches(done):
        inputs = {layer for each in collectors.values() for layer in each.inputs_for(batch)}
        seen = runner.run(batch, inputs=sorted(inputs), predictions=predictions)
        for each in collectors.values():
            each.add(seen, runner)
        advance(1)
        if time.monotonic() - saved > save_seconds:
            _save(state, fingerprint, collectors, batch.number + 1)
            saved = time.monotonic()
    if done < sample.num_batches:
        _save(state, fingerprint, collectors, sample.num_batches)


def _save(state: Path, fingerprint: str, collectors: Mapping[str, Collector], done: int) -> None:
    arrays = {_DONE: np.array(done), _FINGERPRINT: np.array(fingerprint)}
    for name, each in collectors.items():
        arrays |= {f"{name}/{key}": value for key, value in each.state().items()}
    content = io.BytesIO()
    np.savez(content, **arrays)  # type: ignore[arg-type]
    state.parent.mkdir(parents=True, exist_ok=True)
    replace_file(state, content.getvalue())


def _restore(state: Path, fingerprint: str, collectors: Mapping[str, Collector]) -> int:
    """Batches that the state contains, after restoring the collectors; 0 if there is none."""
    if not state.is_file():
        return 0
    with np.load(state, allow_pickle=False) as found:
        if str(found[_FINGERPRINT]) != fingerprint:
            return 0
        for name, each in collectors.items():
            prefix = f"{name}/"
            keys = [key for key in found.files if key.startswith(prefix)]
            each.restore({key.removeprefix(prefix): found[key] for key in keys})
        return int(found[_DONE])
