"""Which stage's held-out data a run evaluates (`--stages`), as its checkpoint says.

Stages that have begun are as the checkpoint records them, whatever has become of the table since;
those still to come are as the table has them now.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_moe.checkpoint.directory import step_directory
from megatron_moe.checkpoint.metadata import open_checkpoint
from megatron_moe.config import RunConfig
from megatron_moe.config.phases import PhaseSpec, place_of, read_phases
from megatron_moe.errors import UsageError
from megatron_moe.training.consumed import KEY, recorded

_TOKENIZER = ("tokenizer_type", "tokenizer_model", "vocab_size", "vocab_extra_ids")


@dataclass(frozen=True, kw_only=True)
class OnePhase:
    """A stage of a run."""

    name: str
    number: int
    """From 1."""
    config: RunConfig
    """Of a run of this stage alone."""
    why: str
    """Why it is this one."""

    @property
    def line(self) -> str:
        """Says which it is."""
        return f"held-out data of stage {self.number}, {self.name!r}: {self.why}"

    def read_by(self, config: RunConfig) -> RunConfig:
        """The stage's configuration with the tokenizer of ``config``, whose file may have moved."""
        tokenizer = {name: getattr(config.data, name) for name in _TOKENIZER}
        return replace(self.config, data=replace(self.config.data, **tokenizer))


def phase_of(directory: Path, step: int | None, stage: str | None) -> OnePhase | None:
    """The stage to evaluate: by default the one that took the checkpoint's last step.

    That is the one which the run itself evaluates after this step, also where it ends with it.

    Args:
        directory: of the run's checkpoints.
        step: by default the one that the tracker names.
        stage: name, or number from 1.

    Returns:
        `None` for a run without stages.

    Raises:
        UsageError: there is no such checkpoint or stage, the table cannot be read where it is
            needed, or the checkpoint does not say what its stages have done.
    """
    opened = open_checkpoint(step_directory(directory, step)[1])
    config, train = opened.config, opened.train
    if config.train.stages is None:
        if stage is not None:
            raise UsageError("--stage", stage, "no value: the run has no --stages")
        return None
    begun = recorded(train, opened) if KEY in train.extra else ()
    names = [record.name for record in begun]
    later: Sequence[PhaseSpec] = ()
    wanted, why = stage, "--stage says so"
    if stage is None and begun:
        wanted, why = names[-1], f"it took step {train.iteration}"
    if wanted not in (*names, *map(str, range(1, len(names) + 1))):
        later = read_phases(config.train.stages)[len(begun) :]
        names += [spec.name for spec in later]
    if wanted is None:
        fix = "the checkpoint does not say which took its last step"
        raise UsageError("--stage", None, f"one of {', '.join(names)}", fix)
    place = place_of(wanted, names)
    if place < len(begun):
        own = RunConfig.from_dict(begun[place].config, f"stage {names[place]!r} of {opened.path}")
    else:
        own = later[place - len(begun)].applied(config)
        own = replace(own, train=replace(own.train, stages=None))
    return OnePhase(name=names[place], number=place + 1, config=own, why=why)
