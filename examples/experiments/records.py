"""What is kept of a run: a flat record of its loss, routing, arithmetic and time.

A record is read from the files that `pretrain_openmoe.py` writes. All records of a claim are one
JSON file in `examples/experiments/records/`, from which tables and plots are made, so that a table
can be checked without training again.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.experiments.lab import PIECES, ROOT, Lab, Run
from megatron_moe.config.cli import parse_args
from megatron_moe.parallel.layout import resolve_layout
from megatron_moe.planning.muon import muon_shares

FOLDER = ROOT / "examples" / "experiments" / "records"
SETTLED = 0.5
"""The part of the steps, from the end, over which routing is described."""
Record = dict[str, Any]

_LOSS = re.compile(r"^ validation loss: ([\d.]+) over (\d+) targets", re.MULTILINE)
_STEP = re.compile(r"([\d.]+) ms/iter")


def read_record(lab: Lab, run: Run) -> Record:
    """The record of a finished run.

    Args:
        lab: its folder.
        run: which one.

    Returns:
        `loss`: on held-out data, dropless. `tokens`, `done`, `asked`: training tokens, and training
        FLOPs of the model with kept and with all choices. `orthogonal`: FLOPs with which Muon
        orthogonalizes updates, which are in neither. `kept`, `slots`: choices that experts
        computed, and rows of buffers of fixed shape, over all MoE layers and steps. `drop`,
        `drop_first`, `drop_last`: share of choices dropped, in all and in the first and the last
        eighth of rows, `drop_real` of tokens that are not padding; `max_violation`: of the loads of
        an interval; all over the second half of the run. `token_share` and `token_chance`: of the
        routing that the id explains, at the last probe; `settled`: agreement of the choices at a
        quarter of the run with those at its end. `ms_per_step`: the least of the means of the log's
        intervals: what a step takes where the machine does nothing else meanwhile.
    """
    folder = lab.finished(run).parent
    lines = [json.loads(line) for line in (folder / "routing.jsonl").read_text().splitlines()]
    steps = lab.steps_of(run)
    intervals = [line for line in lines if "layers" in line]
    late = [line for line in intervals if line["iteration"] > steps * (1 - SETTLED)] or intervals
    log = (folder / "log").read_text()
    found = _LOSS.search(log)
    assert found is not None
    milliseconds = [float(each) for each in _STEP.findall(log)]
    return {
        "size": run.size,
        "variant": run.variant,
        "seed": run.seed,
        "length": run.length,
        "steps": steps,
        "loss": float(found[1]),
        "tokens": sum(line["arithmetic"]["tokens"] for line in intervals),
        "done": sum(line["arithmetic"]["done"] for line in intervals),
        "asked": sum(line["arithmetic"]["asked"] for line in intervals),
        "orthogonal": steps * orthogonalizing_flops(lab.command(run)),
        "kept": sum(sum(layer["kept"]) for layer in layers_of(intervals)),
        "slots": sum(layer["slots"] for layer in layers_of(intervals)),
        **_drops(late),
        **_probes([line["probe"] for line in lines if "probe" in line]),
        "ms_per_step": min(milliseconds),
    }


def orthogonalizing_flops(command: Sequence[str]) -> float:
    """FLOPs of a step's Newton-Schulz products; 0 without `--optimizer muon`.

    Args:
        command: flags of a run on one process.
    """
    config = parse_args(command).config
    if config.optimizer.optimizer != "muon":
        return 0.0
    shares = muon_shares(config, resolve_layout(config, 1), PIECES)
    return float(sum(2 * m * n * k * count for each in shares for m, n, k, count in each.products))


def layers_of(intervals: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The layers of all intervals of a routing log, one after the other."""
    return [layer for line in intervals for layer in line["layers"].values()]


def _drops(intervals: Sequence[Mapping[str, Any]]) -> Record:
    layers = layers_of(intervals)
    choices = sum(sum(layer["load"]) for layer in layers)
    kept = sum(sum(layer["kept"]) for layer in layers)

    def at(place: int) -> float:
        tokens = sum(layer["tokens_at"][0][place] for layer in layers)
        ranks = len(layers[0]["kept_at"][0][place])
        return 1 - sum(sum(layer["kept_at"][0][place]) for layer in layers) / (tokens * ranks)

    return {
        "drop": 1 - kept / choices,
        "drop_first": at(0),
        "drop_last": at(-1),
        "drop_real": statistics.mean(layer["drop_rate_of_real"] for layer in layers),
        "max_violation": statistics.mean(layer["max_violation"] for layer in layers),
        "entropy": statistics.mean(layer["router_entropy"] for layer in layers),
    }


def _probes(probes: Sequence[Mapping[str, Any]]) -> Record:
    if not probes:
        return {"token_share": None, "token_chance": None, "settled": None}
    layers = list(probes[-1]["layers"].values())

    def mean(values: Iterable[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return statistics.mean(known) if known else None

    same = [layer["first"] and layer["first"]["choices"] for layer in layers]
    return {
        "token_share": mean(layer["token_share"] for layer in layers),
        "token_chance": mean(layer["token_share_chance"] for layer in layers),
        "settled": mean(same),
        "chance": probes[-1]["chance"],
    }


def write_records(name: str, records: Sequence[Record], about: Mapping[str, Any]) -> Path:
    """Write the records of one claim, one a line.

    Args:
        name: of the file, without its suffix.
        records: in the order of the table.
        about: what they were made with: commit, versions, flags of the variants.
    """
    FOLDER.mkdir(exist_ok=True)
    rows = ",\n".join(json.dumps({k: _short(v) for k, v in record.items()}) for record in records)
    path = FOLDER / f"{name}.json"
    path.write_text(f'{{"about": {json.dumps(about, indent=1)},\n"records": [\n{rows}\n]}}\n')
    return path


def _short(value: Any) -> Any:
    """Floats with six digits: the noise of a run is in the third one."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def load_records(name: str) -> tuple[list[Record], dict[str, Any]]:
    """Records and `about` of a claim."""
    content = json.loads((FOLDER / f"{name}.json").read_text())
    return content["records"], content["about"]
