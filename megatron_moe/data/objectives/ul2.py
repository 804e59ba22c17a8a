"""UL2: each sample is a text, a part of which is hidden by one of several denoisers.

Source: Tay et al., "UL2" (arXiv 2205.05131) in OpenMoE's form (arXiv 2402.01739): a row holds the
inputs, their end, the targets, their end, and pads. The model sees it causally; the loss counts
where the targets and their end are predicted.

S tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_moe.config import RunConfig
from megatron_moe.data.causal import CausalDataset, Sample
from megatron_moe.data.indexed.cache import Array
from megatron_moe.data.objectives.mixture import Denoiser, read_mixture
from megatron_moe.data.objectives.noise import Noise, noise_of
from megatron_moe.data.objectives.spans import Ids, corrupt, random_spans, span_counts
from megatron_moe.data.objectives.windows import Windows, cut_windows
from megatron_moe.errors import UsageError
from megatron_moe.tokenizer.build import Tokenizer, sentinel_ids

HIDE = 3
"""Lane of the noise; the first ones are of `windows`."""


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A denoiser in a row of S tokens."""

    denoiser: Denoiser
    prefix_ids: tuple[int, ...]
    """Its prefix text."""
    text: int
    """Tokens of text that it takes for a row."""

    def spans(self) -> int:
        """Sentinels that it needs."""
        if self.denoiser.kind == "prefix-lm":
            return 0
        return span_counts(self.text, self.denoiser.rate, self.denoiser.mean_span)[1]

    def hide(self, noise: Noise, index: int, text: Ids, sentinels: Sequence[int]) -> list[Ids]:
        """Inputs with their prefix, and targets, both without their ends."""
        words = noise.words(HIDE, index, self.text)
        if self.denoiser.kind == "span":
            kept, hidden = random_spans(
                words, self.text, self.denoiser.rate, self.denoiser.mean_span
            )
            inputs, targets = corrupt(text, kept, hidden, sentinels)
        else:
            split = random_split(int(words[0]), self.text)
            inputs, targets = text[:split], text[split:]
        return [np.concatenate([np.asarray(self.prefix_ids, dtype=np.int64), inputs]), targets]


@dataclass(frozen=True, kw_only=True)
class Ul2Plan:
    """The mixture of a run."""

    denoisers: tuple[Fitted, ...]
    sentinels: range
    row: int
    """S."""

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the samples, besides seed, data and tokenizer."""
        return {
            "denoisers": [asdict(fitted) for fitted in self.denoisers],
            "first_sentinel": self.sentinels[0],
        }


def random_split(word: int, length: int) -> int:
    """A split uniform in 1 .. ``length`` - 1, from 64 random bits."""
    return 1 + (word * (length - 1) >> 64)


def plan_ul2(config: RunConfig, tokenizer: Tokenizer) -> Ul2Plan:
    """Read the mixture and fit it to the rows.

    Raises:
        UsageError: a bad mixture, no or too few sentinels, or rows too short for a denoiser.
    """
    row, inputs = config.data.seq_length, config.objective.ul2_inputs_length
    part = None if config.objective.ul2_fill_rows else inputs or row // 2
    sentinels = sentinel_ids(config.data, tokenizer)
    fitted = []
    for denoiser in read_mixture(config.objective.ul2_mixture):
        ids = tuple(tokenizer.tokenize(denoiser.prefix))
        text = denoiser.fit(len(ids), row, part)
        if text == 0:
            expected = f"rows that hold {denoiser.prefix!r} ({len(ids)} tokens) and two of text"
            raise UsageError("--seq-length", row, expected)
        fitted.append(Fitted(denoiser=denoiser, prefix_ids=ids, text=text))
    most = max(denoiser.spans() for denoiser in fitted)
    if most > len(sentinels):
        expected = f"at least {most}, one per hidden span of a row"
        raise UsageError("--vocab-extra-ids", len(sentinels), expected)
    return Ul2Plan(denoisers=tuple(fitted), sentinels=sentinels, row=row)


class Ul2Dataset(CausalDataset):
    """Denoising samples of one source and one split."""

    plan: Ul2Plan
    noise: Noise
    windows: Windows

    def _description(self) -> dict[str, Any]:
        self.plan = self.config.plan
        common = super()._description()
        # Not the run's length or the files' places: the same data, the same noise.
        part = (common["content"], *common["documents"])
        self.noise = noise_of(self.config.random_seed, "ul2", *part)
        return common | {"class": "Ul2Dataset", **self.plan.identity}

    def _build_document_sample_shuffle_indices(self) -> Sequence[Array]:
        arrays = super()._build_document_sample_shuffle_indices()
        self.windows = Windows(*arrays)
        return self.windows.documents, self.windows.starts, self.windows.order

    def _build_indices(self) -> Sequence[Array]:
        return cut_windows(
            self.noise,
            self.indices,
            self.dataset.sequence_lengths[self.indices],
            [fitted.text for fitted in self.plan.denoisers],
            [fitted.denoiser.weight for fitted in self.plan.denoisers],
            self.num_samples,
        )

    def __len__(self) -> int:
        return len(self.windows.order)

    def __getitem__(self, idx: int) -> Sample:
        """Sample ``idx``: tokens [S] and labels [S], int64, and loss_mask [S], bool."""
        window = int(self.windows.order[idx])
        fitted = self.plan.denoisers[int(self.windows.kinds[window])]
        text, documents = self._read(window, fitted.text)
        self._check_ids(text, documents)
        inputs, targets = fitted.hide(self.noise, window, text, self.plan.sentinels)
        tokenizer = self.config.tokenizer
        return pack_row(inputs, targets, self.plan.row, tokenizer.eod, max(tokenizer.pad, 0))

    def _read(self, window: int, count: int) -> tuple[Ids, npt.NDArray[np.int64]]:
        """The text of a window, and the documents that it touches."""
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


def pack_row(inputs: Ids, targets: Ids, row: int, end: int, pad: int) -> Sample:
    """A row of S tokens: inputs, end, targets, end, pads.

    Position t predicts the token at t + 1, so the loss counts from the end of the inputs, where the
    first target is predicted, to the last target, where the targets' end is.
    """
    tokens = np.full(row + 1, pad, dtype=np.int64)
    first = len(inputs) + 1
    last = first + len(targets)
    tokens[: first - 1], tokens[first - 1] = inputs, end
    tokens[first:last], tokens[last] = targets, end
    counts = np.zeros(row, dtype=bool)
    counts[first - 1 : last] = True
    return {"tokens": tokens[:-1], "labels": tokens[1:], "loss_mask": counts}
