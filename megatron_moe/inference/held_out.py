"""Loss on a run's own held-out samples: which phase's, and as training measures it.

Phases (`--phases`) that have started are read from the checkpoint, which records their settings, so
later edits of the phases file do not matter; phases to come are read from the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from megatron_moe.checkpoint.directory import ANOTHER_STEP, step_directory
from megatron_moe.checkpoint.metadata import open_checkpoint
from megatron_moe.config import RunConfig
from megatron_moe.config.phases import PhaseSpec, place_of, read_phases
from megatron_moe.data.batch import Batch
from megatron_moe.errors import UsageError, with_fixes
from megatron_moe.inference.loading import LoadedModel
from megatron_moe.inference.perplexity import Perplexity, evaluate_batches
from megatron_moe.training.consumed import KEY, recorded

_FILES = ("tokenizer_model", "vocab_file", "merge_file")
_TOKENIZER = ("tokenizer_type", *_FILES, "vocab_size", "vocab_extra_ids")


@dataclass(frozen=True, kw_only=True)
class SelectedPhase:
    """The phase of a run whose held-out data is evaluated."""

    name: str
    number: int
    """Counted from 1."""
    config: RunConfig
    """Configuration of a run of this phase alone."""
    reason: str
    """Why this phase is selected."""

    @property
    def line(self) -> str:
        """The line printed above the results."""
        return f"held-out data of phase {self.number}, {self.name!r}: {self.reason}"

    def with_tokenizer_of(self, config: RunConfig) -> RunConfig:
        """The phase's configuration with the tokenizer of ``config``, whose file may have moved."""
        tokenizer = {name: getattr(config.data, name) for name in _TOKENIZER}
        return replace(self.config, data=replace(self.config.data, **tokenizer))


def select_phase(directory: Path, step: int | None, phase: str | None) -> SelectedPhase | None:
    """The phase to evaluate: by default the one that took the checkpoint's last step.

    That is the phase whose held-out data the run itself evaluates after this step, including the
    step with which the phase ends.

    Args:
        directory: checkpoint directory of the run.
        step: step of the checkpoint, by default the tracker's.
        phase: name, or number from 1.

    Returns:
        `None` for a run without phases.

    Raises:
        UsageError: there is no such checkpoint or phase, the phases file is needed but not
            readable, or the checkpoint does not record which phase took its last step.
    """
    with with_fixes(ANOTHER_STEP):
        opened = open_checkpoint(step_directory(directory, step)[1])
    config, train = opened.config, opened.train
    if config.train.stages is None:
        if phase is not None:
            raise UsageError("--phase", phase, "absent for a run without --phases")
        return None
    started = recorded(train, opened) if KEY in train.extra else ()
    names = [record.name for record in started]
    later: Sequence[PhaseSpec] = ()
    selected, reason = phase, "selected by --phase"
    if phase is None and started:
        selected, reason = names[-1], f"it took step {train.iteration}"
    # The file is read only if needed: it may no longer exist, and started phases do not need it.
    if selected not in (*names, *map(str, range(1, len(names) + 1))):
        later = read_phases(config.train.stages)[len(started) :]
        names += [spec.name for spec in later]
    if selected is None:
        fix = "the checkpoint does not record which phase took its last step"
        raise UsageError("--phase", None, f"one of {', '.join(names)}", fix)
    place = place_of(selected, names)
    if place < len(started):
        source = f"phase {names[place]!r} of {opened.path}"
        own = RunConfig.from_dict(started[place].config, source)
    else:
        own = later[place - len(started)].applied(config)
        own = replace(own, train=replace(own.train, stages=None))
    return SelectedPhase(name=names[place], number=place + 1, config=own, reason=reason)


def evaluate_held_out(loaded: LoadedModel, config: RunConfig, split: str) -> list[Perplexity]:
    """Loss on a run's held-out samples, as training measures it: of all, then by domain.

    Args:
        loaded: the model.
        config: configuration of the run with its data, or of one of its phases alone.
        split: `valid` or `test`.

    Raises:
        UsageError: the run's data is missing or damaged, or the split has no data.
    """
    from megatron_moe.data.pipeline import build_data  # imports Megatron-Core, which takes seconds

    train = config.train
    assert train.stages is None, "a single phase, as each phase has its own data"
    size = train.global_batch_size
    if size is None:
        fix = "the run derived it from its layout; pass the run's number of sequences per step"
        raise UsageError("--global-batch-size", None, "given", fix)
    per_step, rest = divmod(size, train.micro_batch_size)
    if rest:
        expected = f"a multiple of the run's --micro-batch-size ({train.micro_batch_size})"
        raise UsageError("--global-batch-size", size, expected)
    # Held-out samples do not depend on the length of the run.
    config = replace(config, train=replace(train, train_iters=1, train_samples=None))
    data = build_data(
        config,
        dp_rank=0,
        dp_size=1,
        num_microbatches=per_step,
        consumed_train_samples=0,
        reads_data=True,
    )
    batches = data.valid() if split == "valid" else data.test()
    if batches is None:
        raise UsageError("--held-out", split, "a split that has data in the run")
    found = [_evaluate_samples("all", loaded, batches, train.eval_iters * per_step)]
    for name, iterations in data.domains[split].items():
        own = data.domain(split, name)
        assert own is not None
        found.append(_evaluate_samples(name, loaded, own, iterations * per_step))
    return found


def _evaluate_samples(
    name: str, loaded: LoadedModel, batches: Iterable[Batch], micro_batches: int
) -> Perplexity:
    total, count = evaluate_batches(loaded, islice(batches, micro_batches))
    return Perplexity(
        name=name,
        prefix=None,
        weight=None,
        loss=total / max(count, 1),
        tokens=count,
        bits_per_byte=None,
    )
