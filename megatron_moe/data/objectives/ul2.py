"""UL2: each sample is a window of text, a part of which is hidden by one of several denoisers.

Source: Tay et al., "UL2" (arXiv 2205.05131) in OpenMoE's form (arXiv 2402.01739): a row contains
the inputs, their end, the targets, their end, and pads. Attention is causal; the loss counts where
the targets and their end are predicted.

A sample is made in three steps: `windows` decides which text and which denoiser, the denoiser hides
a part of it (`spans`), and `pack_row` lays out the row.

S tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_moe.config import RunConfig
from megatron_moe.data.batch import inputs_of
from megatron_moe.data.causal import CausalDataset, Sample
from megatron_moe.data.indexed.cache import Array
from megatron_moe.data.objectives.denoiser import Denoiser, not_implemented, read_denoisers
from megatron_moe.data.objectives.rng import SampleRng, sample_rng
from megatron_moe.data.objectives.spans import Ids, corrupt, random_spans, random_split
from megatron_moe.data.objectives.windows import Windows, cut_windows
from megatron_moe.errors import UsageError
from megatron_moe.tokenizer.base import Tokenizer
from megatron_moe.tokenizer.build import sentinel_ids

ROW = ("tokens", "labels", "loss_mask")
HIDE = 3
"""Stream of the generator; the lower ones belong to `windows`."""


@dataclass(frozen=True, kw_only=True)
class FittedDenoiser:
    """A denoiser, fitted to rows of S tokens."""

    denoiser: Denoiser
    prefix_ids: tuple[int, ...]
    """Ids of its prefix text."""
    text: int
    """L, tokens of text that it takes for a row."""

    def spans(self) -> int:
        """Return the number of sentinels in a row."""
        return self.denoiser.spans(self.text)

    def hide(self, rng: SampleRng, index: int, text: Ids, sentinels: Sequence[int]) -> list[Ids]:
        """Return inputs with their prefix, and targets, both without their ends."""
        words = rng.words(HIDE, index, self.text)
        if self.denoiser.kind == "span":
            kept, hidden = random_spans(
                words, self.text, self.denoiser.rate, self.denoiser.mean_span
            )
            inputs, targets = corrupt(text, kept, hidden, sentinels)
        elif self.denoiser.kind == "prefix-lm":
            split = random_split(int(words[0]), self.text)
            inputs, targets = text[:split], text[split:]
        else:
            raise not_implemented(self.denoiser.kind)
        return [np.concatenate([np.asarray(self.prefix_ids, dtype=np.int64), inputs]), targets]


@dataclass(frozen=True, kw_only=True)
class Ul2Plan:
    """The denoisers of a run."""

    denoisers: tuple[FittedDenoiser, ...]
    sentinels: range
    row: int
    """S."""

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that decides the samples, besides seed, data and tokenizer."""
        return {
            "denoisers": [asdict(fitted) for fitted in self.denoisers],
            "first_sentinel": self.sentinels[0],
        }


def plan_ul2(config: RunConfig, tokenizer: Tokenizer) -> Ul2Plan:
    """Read the denoisers and fit them to the rows.

    Raises:
        UsageError: a bad mixture, no or too few sentinels, or rows too short for a denoiser.
    """
    row, inputs = config.data.seq_length, config.objective.ul2_inputs_length
    part = None if config.objective.ul2_fill_rows else inputs or row // 2
    sentinels = sentinel_ids(config.data, tokenizer)
    fitted = []
    for denoiser in read_denoisers(config.objective.ul2_mixture):
        ids = tuple(tokenizer.tokenize(denoiser.prefix))
        text = denoiser.fit(len(ids), row, part)
        if text == 0:
            expected = f"large enough for {denoiser.prefix!r} ({len(ids)} tokens) and two of text"
            raise UsageError("--seq-length", row, expected)
        fitted.append(FittedDenoiser(denoiser=denoiser, prefix_ids=ids, text=text))
    most = max(denoiser.spans() for denoiser in fitted)
    if most > len(sentinels):
        expected = f">= {most}, one per hidden span of a row"
        raise UsageError("--vocab-extra-ids", len(sentinels), expected)
    return Ul2Plan(denoisers=tuple(fitted), sentinels=sentinels, row=row)


class Ul2Dataset(CausalDataset):
    """Denoising samples of one source and one split."""

    plan: Ul2Plan
    rng: SampleRng
    windows: Windows

    def _description(self) -> dict[str, Any]:
        self.plan = self.config.plan
        common = super()._description()
        # Neither the length of the run nor the paths: the same data has the same random numbers.
        part = (common["content"], *common["documents"])
        self.rng = sample_rng(self.config.random_seed, "ul2", *part)
        return common | {"class": "Ul2Dataset", **self.plan.identity}

    def _build_document_sample_shuffle_indices(self) -> Sequence[Array]:
        arrays = super()._build_document_sample_shuffle_indices()
        self.windows = Windows(*arrays)
        return self.windows.documents, self.windows.starts, self.windows.order

    def _build_indices(self) -> Sequence[Array]:
        return cut_windows(
            self.rng,
            self.indices,
            self.dataset.sequence_lengths[self.indices],
            [fitted.text for fitted in self.plan.denoisers],
            [fitted.denoiser.weight for fitted in self.plan.denoisers],
            self.num_samples,
        )

    def __len__(self) -> int:
        return len(self.windows.order)

    def __getitem__(self, idx: int) -> Sample:
        """Return sample ``idx``: tokens [S] and labels [S], int64, and loss_mask [S], bool."""
        window = int(self.windows.order[idx])
        fitted = self.plan.denoisers[int(self.windows.kinds[window])]
        text, documents = self._read(window, fitted.text)
        self._check_ids(text, documents)
        inputs, targets = fitted.hide(self.rng, window, text, self.plan.sentinels)
        tokenizer = self.config.tokenizer
        pad = max(tokenizer.pad, 0)
        sample = pack_row(
            inputs, targets, self.plan.row, tokenizer.eod, pad, start=self.config.start
        )
        return {name: sample[name] for name in (*ROW, *self.config.planes)}

    def _read(self, window: int, count: int) -> tuple[Ids, npt.NDArray[np.int64]]:
        """Return the text of a window, and the documents that it is from."""
        place, offset = map(int, self.windows.starts[window])
        parts, documents = [], []
        while count:
            document = int(self.windows.documents[place])
            take = min(int(self.dataset.sequence_lengths[document]) - offset, count)
            if take:
                parts.append(self.dataset.get(document, offset=offset, length=take))
                documents.append(document)
            place, offset, count = place + 1, 0, count - take
        return np.concatenate(parts, dtype=np.int64), np.array(documents, dtype=np.int64)


def pack_row(
    inputs: Ids, targets: Ids, row: int, end: int, pad: int, start: int | None = None
) -> Sample:
    """Lay out a row of S tokens: inputs, end, targets, end, pads.

    Position t predicts the token at t + 1, so the loss counts from the end of the inputs, where the
    first target is predicted, to the last target, where the end is predicted. Example, S = 8:

        inputs a b <0>, targets <0> c
        ids        a b <0> </s> <0> c </s> pad pad     S + 1 of them
        loss_mask  0 0 0   1    1   1 0    0           of positions 0 .. S - 1
        padding    0 0 0   0    0   0 1    1           positions without a target

    With a start token the row has S ids, which are all targets:

        tokens     0 a b <0> </s> <0> c    </s>
        labels     a b <0> </s> <0> c </s> pad
        loss_mask  0 0 0   0    1   1 1    0
        padding    0 0 0   0    0   0 0    1
    """
    tokens = np.full(row + 1, pad, dtype=np.int64)
    first = len(inputs) + 1
    last = first + len(targets)
    tokens[: first - 1], tokens[first - 1] = inputs, end
    tokens[first:last], tokens[last] = targets, end
    # Place of each label among the ids.
    place = np.arange(row) + (start is None)
    shift = {"loss_mask": (place >= first) & (place <= last), "padding": place > last}
    if start is None:
        return {"tokens": tokens[:-1], "labels": tokens[1:], **shift}
    labels, nowhere = tokens[:-1], np.zeros(row, dtype=bool)
    return {"tokens": inputs_of(labels, start, nowhere), "labels": labels, **shift}
