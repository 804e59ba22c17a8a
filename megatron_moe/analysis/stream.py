"""The pass over the tokens: every batch once through the model, every collector on each batch.

The state of each collector is written from time to time, so that a pass that was interrupted goes
on where it was, and one with further collectors counts for these alone.
"""

from __future__ import annotations

import functools
import io
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from megatron_moe.analysis.collector import Collector, Inputs
from megatron_moe.analysis.model import MoERunner
from megatron_moe.analysis.observation import Observation
from megatron_moe.analysis.sample import Sample
from megatron_moe.checkpoint.disk import replace_bytes

SAVE_SECONDS = 60.0
"""Between two saves of the state."""
_DONE, _FINGERPRINT = "batches done", "fingerprint"
_NO_PLACES = np.zeros(0, np.int64)


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
    """Run the pass, from where the states of an earlier one end.

    Args:
        runner: the model.
        sample: the tokens.
        collectors: by name; without any, or if all are complete, no batch is read.
        state: folder of the states; they are left complete, so that a repeated pass reads nothing.
        fingerprint: of model, sample and code; a state with another one is ignored.
        advance: called with the number of batches done, those of an earlier pass included.
        save_seconds: seconds between two saves.
    """
    done = {n: _restore(state / f"{n}.npz", fingerprint, c) for n, c in collectors.items()}
    first = min(done.values(), default=sample.num_batches)
    advance(first)
    saved = time.monotonic()
    for batch in sample.batches(first):
        waiting = [each for name, each in collectors.items() if done[name] <= batch.number]
        wanted = {id(each): each.inputs_for(batch) for each in waiting}
        read = [each for each in wanted.values() if each is not None]
        places_N = functools.reduce(np.union1d, (each.places_N for each in read), _NO_PLACES)
        seen = runner.run(
            batch,
            inputs=sorted({layer for each in read for layer in each.layers}),
            places=torch.from_numpy(places_N),
            predictions=any(each.needs_predictions for each in waiting),
        )
        for each in waiting:
            each.add(_with_inputs(seen, wanted[id(each)], places_N), runner)
        advance(1)
        complete = batch.number + 1
        if time.monotonic() - saved > save_seconds or complete == sample.num_batches:
            for name, each in collectors.items():
                if done[name] < complete:
                    _save(state / f"{name}.npz", fingerprint, each, complete)
            saved = time.monotonic()


def _with_inputs(
    seen: Observation, wanted: Inputs | None, places_N: npt.NDArray[np.int64]
) -> Observation:
    """The observation with the inputs of one collector, of those recorded for all."""
    if wanted is None or np.array_equal(wanted.places_N, places_N):
        return seen
    at_N = torch.from_numpy(np.searchsorted(places_N, wanted.places_N))
    layers = (
        layer
        if layer.inputs_NH is None
        else replace(layer, inputs_NH=layer.inputs_NH[at_N.to(layer.inputs_NH.device)])
        for layer in seen.layers
    )
    return replace(seen, layers=tuple(layers))


def _save(state: Path, fingerprint: str, collector: Collector, done: int) -> None:
    arrays = {_DONE: np.array(done), _FINGERPRINT: np.array(fingerprint)}
    content = io.BytesIO()
    np.savez(content, **arrays, **collector.state())  # type: ignore[arg-type]
    state.parent.mkdir(parents=True, exist_ok=True)
    replace_bytes(state, content.getvalue())


def _restore(state: Path, fingerprint: str, collector: Collector) -> int:
    """Batches that the state contains, after restoring the collector; 0 if there is none."""
    if not state.is_file():
        return 0
    with np.load(state, allow_pickle=False) as found:
        if str(found[_FINGERPRINT]) != fingerprint:
            return 0
        own = set(found.files) - {_DONE, _FINGERPRINT}
        collector.restore({key: found[key] for key in own})
        return int(found[_DONE])
