"""The sources of training, validation and test, and their proportions.

`--data-path`, the same words in the file of `--data-args-path`, or `--mixture` are divided among
all three by `--split` (shares of documents, in file order); `--train-data-path`,
`--valid-data-path` and `--test-data-path` each feed one. Each is a list of prefixes, or of weight
and prefix pairs. A source of weight 0 is left out and not read. Every source belongs to a domain,
whose held-out loss is measured separately.

Example: `--data-path 3 web 1 code --split 8,2,0` with 100 documents of web and 10 of code. Training
has documents 0-79 of web and 0-7 of code, validation documents 80-99 and 8-9, test none. Of 400
training samples 300 are from web and 100 from code, spread evenly: web, code, web, web, web, ... If
code has only 40 samples, it goes through 2.5 epochs.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_moe.config import DataConfig
from megatron_moe.data.indexed.check import Source
from megatron_moe.data.indexed.manifest import read_manifest
from megatron_moe.data.named_mixture import read_named_mixture
from megatron_moe.errors import UsageError
from megatron_moe.text import read_text

SPLITS = ("train", "valid", "test")
_ALL = (0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Blend:
    """The sources of one split."""

    flag: str
    """The flag that names them."""
    prefixes: tuple[str, ...]
    weights: tuple[float, ...] | None
    """Proportions of samples; `None`: in proportion to the sizes of the sources."""
    bounds: tuple[float, float]
    """Start and end of the split in every source, as shares of its documents."""
    domains: tuple[str, ...] = ()
    """Domain of each prefix; empty: all are one domain."""

    def by_domain(self) -> dict[str, Blend]:
        """Return the blend of each domain, in the order of the prefixes; empty for one domain."""
        names = list(dict.fromkeys(self.domains))
        return {name: self._only(name) for name in names} if len(names) > 1 else {}

    def _only(self, name: str) -> Blend:
        own = [i for i, domain in enumerate(self.domains) if domain == name]
        weights = None if self.weights is None else tuple(self.weights[i] for i in own)
        return replace(
            self,
            prefixes=tuple(self.prefixes[i] for i in own),
            weights=weights,
            domains=(name,) * len(own),
        )


def domains_of_samples(blend: Blend, dataset: Any, samples: Sequence[int]) -> list[str]:
    """Return the domain of each sample of the data set of a blend, by number.

    Args:
        blend: its sources.
        dataset: of Megatron-Core: one source, or a blend with the number of each sample's source.
        samples: numbers.
    """
    names = blend.domains or ("",) * len(blend.prefixes)
    sources = getattr(dataset, "dataset_index", None)
    return [names[0 if sources is None else int(sources[sample])] for sample in samples]


def blends_of(data: DataConfig) -> dict[str, Blend | None]:
    """Return the blend of each split, `None` for a split without data.

    Raises:
        UsageError: no training data, a bad weight or split, or a file of words or a mixture that
            cannot be read.
    """
    own = {
        "train": data.train_data_path,
        "valid": data.valid_data_path,
        "test": data.test_data_path,
    }
    shared = _shared_blend(data)
    if shared is not None:
        return {
            name: bounds and replace(shared, bounds=bounds)
            for name, bounds in zip(SPLITS, parse_split(data.split), strict=True)
        }
    if not data.train_data_path:
        expected = "one or more prefixes of indexed data (tools/preprocess_data.py)"
        raise UsageError("--data-path", "", expected)
    return {
        name: _of_words(f"--{name}-data-path", values) if values else None
        for name, values in own.items()
    }


def _shared_blend(data: DataConfig) -> Blend | None:
    """Return the blend that all splits share, if there is one."""
    if data.mixture:
        named = read_named_mixture(data.mixture, data.data_root)
        return Blend(
            flag="--mixture",
            prefixes=named.prefixes,
            weights=named.weights,
            bounds=_ALL,
            domains=named.domains,
        )
    if data.data_args_path:
        return _of_words("--data-args-path", _words_of(data.data_args_path))
    return _of_words("--data-path", data.data_path) if data.data_path else None


def _words_of(path: str) -> list[str]:
    """Return the words of a file, as Megatron-LM reads it."""
    expected = "a readable file with the words of --data-path"
    words = read_text(path, "--data-args-path", expected).split()
    if not words:
        raise UsageError("--data-args-path", path, "a file with words", "the file is empty")
    return words


def _of_words(flag: str, words: Sequence[str]) -> Blend:
    prefixes, weights = parse_blend(flag, words)
    return Blend(
        flag=flag,
        prefixes=prefixes,
        weights=weights,
        bounds=_ALL,
        domains=domains_of(prefixes),
    )


def domains_of(prefixes: Sequence[str]) -> tuple[str, ...]:
    """Return the domain of each prefix.

    This is the domain in its manifest (`--domain` of preprocessing), else its file name without the
    suffix that preprocessing adds, or the complete prefix where two file names are equal.

    Raises:
        UsageError: a manifest cannot be read.
    """
    names = [os.path.basename(prefix).removesuffix("_text_document") for prefix in prefixes]
    count = Counter(names)
    found = []
    for name, prefix in zip(names, prefixes, strict=True):
        manifest = read_manifest(prefix)
        named = None if manifest is None else manifest.domain
        found.append(named or (name if name and count[name] == 1 else prefix))
    return tuple(found)


def parse_blend(
    flag: str, values: Sequence[str]
) -> tuple[tuple[str, ...], tuple[float, ...] | None]:
    """Return the prefixes and weights of a list from the command line.

    Raises:
        UsageError: only some prefixes have weights, a weight is negative, infinite or not a
            number, or all are 0; a word is a file of a pair, or a whole list in quotes.
    """
    words = [value.strip() for value in values]
    for word in words:
        _check_word(flag, word)
    numbers = [_number(word) for word in words]
    if all(number is None for number in numbers):
        return tuple(words), None
    paired = [number is not None for number in numbers] == [i % 2 == 0 for i in range(len(words))]
    if not paired or len(words) % 2:
        raise UsageError(
            flag, " ".join(words), "a list of prefixes, or WEIGHT PREFIX WEIGHT PREFIX ..."
        )
    weights = [number for number in numbers[::2] if number is not None]
    if any(not math.isfinite(weight) or weight < 0 for weight in weights) or not any(weights):
        raise UsageError(flag, " ".join(words), "a list of weights >= 0, with one > 0")
    # Weight 0 is dropped here, so that such a source need not exist.
    kept = [(p, w) for p, w in zip(words[1::2], weights, strict=True) if w > 0]
    return tuple(prefix for prefix, _ in kept), tuple(weight for _, weight in kept)


def _check_word(flag: str, word: str) -> None:
    """Find what is no prefix: `a.bin` in place of `a`, and `"0.3 a 0.7 b"` as one word."""
    if os.path.exists(word) or os.path.exists(f"{word}.idx"):
        base, suffix = os.path.splitext(word)
        if suffix in (".bin", ".idx") and not os.path.exists(f"{word}.idx"):
            raise UsageError(flag, word, f"a prefix, without {suffix}", f"use {base}")
        return
    parts = word.split()
    if len(parts) > 1 and _number(parts[0]) is not None:
        fix = f"take the quotes off: {flag} {word}"
        raise UsageError(flag, word, "a list of words, WEIGHT PREFIX WEIGHT PREFIX ...", fix)


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def parse_split(split: str) -> list[tuple[float, float] | None]:
    """Return the bounds of training, validation and test, `None` for a share of 0.

    Example: `8,1,1` is (0, 0.8), (0.8, 0.9) and (0.9, 1) of the documents.

    Raises:
        UsageError: not one to three numbers >= 0, or no training share.
    """
    shares = [_number(word) for word in split.split(",")]
    values = [share for share in shares if share is not None and 0 <= share < math.inf]
    if len(values) != len(shares) or not 1 <= len(values) <= 3 or values[0] <= 0:
        expected = "one to three shares of documents such as 969,30,1, the first > 0"
        raise UsageError("--split", split, expected)
    values += [0.0] * (3 - len(values))
    total, bounds, start = sum(values), list[tuple[float, float] | None](), 0.0
    for value in (share / total for share in values):
        bounds.append((start, start + value) if value > 0 else None)
        start += value
    return bounds


def tokens_in(source: Source, bounds: tuple[float, float]) -> int:
    """Return the tokens of a source in a split. Rounding is that of Megatron-Core."""
    first, last = (round(bound * float(source.sequences)) for bound in bounds)
    return int(source.lengths()[first:last].sum(dtype="int64"))


def usable(
    name: str, blend: Blend | None, split: str, sources: Mapping[str, Source]
) -> Blend | None:
    """Return the blend if every source has tokens for it; a test split may be empty, then `None`.

    Raises:
        UsageError: a source has no tokens for training or validation.
    """
    if blend is None:
        return None
    for prefix in blend.prefixes:
        if tokens_in(sources[prefix], blend.bounds) > 0:
            continue
        if name == "test":
            return None
        documents, cut = sources[prefix].documents, blend.flag != f"--{name}-data-path"
        found = f"{split} of {documents} documents" if cut else prefix
        expected = f"a share for {name} that contains tokens of {prefix}"
        raise UsageError(
            "--split" if cut else blend.flag,
            found,
            expected,
            "raise the share, or set it to 0 for no validation" if name == "valid" else "",
        )
    return blend


def weights_of(
    blend: Blend, sources: Mapping[str, Source], seq_length: int
) -> tuple[float, ...] | None:
    """Return the proportions of the blend: as given, or the samples in one epoch of each source.

    Without weights, Megatron-LM provides one epoch and then runs out of data in the middle of
    training. With the same proportions as weights, sources repeat instead; the order of the first
    epoch is the same.
    """
    if len(blend.prefixes) == 1:
        return None
    if blend.weights is not None:
        return blend.weights
    epochs = [(tokens_in(sources[p], blend.bounds) - 1) // seq_length for p in blend.prefixes]
    return tuple(float(max(samples, 1)) for samples in epochs)
