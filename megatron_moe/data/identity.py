"""What decides the samples of a run, and in which parts two runs differ.

A fingerprint, the hash of all of it, tells that data differs. A checkpoint records the parts as
well, so that an error names the source, the seed or the flag that is another one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_LABELS = {
    "seed": "--seed",
    "seq_length": "--seq-length",
    "tokenizer": "tokenizer of the training data",
    "documents": "part of each source's documents for training (--split)",
    "weights": "weights of the sources",
    "objective": "--objective",
    "pack": "--sft-pack",
    "conversations": "conversations among the rows (--sft-data-path, --sft-share, --sft-pack)",
    "eod_mask_loss": "--eod-mask-loss",
    "reset": "resets at ends of documents",
    "decoder_start_token_id": "--decoder-start-token-id",
    "denoisers": "denoisers of UL2",
    "first_sentinel": "first sentinel of UL2",
}
"""Parts of the identity but the sources, in the words of an error."""
_SOURCES, _PREFIXES, _FINGERPRINT = "sources", "prefixes", "fingerprint"


def described(
    identity: Mapping[str, Any], prefixes: Sequence[str], fingerprint: str
) -> dict[str, Any]:
    """What a checkpoint records of the training data, as JSON values.

    Args:
        identity: see `Data.identity`; its ``sources`` are the fingerprints of the sources' content.
        prefixes: of the sources, in the same order.
        fingerprint: of the identity.
    """
    values = {**identity, _PREFIXES: list(prefixes), _FINGERPRINT: fingerprint}
    described: dict[str, Any] = json.loads(json.dumps(values))
    return described


def data_differences(
    saved: Any, ours: Mapping[str, Any], fingerprint: str, where: str = "in the checkpoint"
) -> list[str]:
    """In what the data of a run differs from what it was, one line each.

    Args:
        saved: what the checkpoint recorded, see `described`; anything else, as in checkpoints of
            earlier versions or of other data than ``fingerprint``, gives one line with both hashes.
        ours: the same of this run.
        fingerprint: of the checkpoint's data.
        where: where or when it was so.
    """
    lines: list[str] = []
    if isinstance(saved, dict) and saved.get(_FINGERPRINT) == fingerprint:
        lines += _source_lines(_sources(saved), _sources(ours), where)
        for key in sorted((saved.keys() | ours.keys()) - {_SOURCES, _PREFIXES, _FINGERPRINT}):
            before, now = saved.get(key), ours.get(key)
            if before != now:
                values = f"{_words(before)} {where}, {_words(now)} in this run"
                lines.append(f"{_LABELS.get(key, key)}: {values}")
    if not lines:
        now = ours[_FINGERPRINT]
        lines.append(f"training data: {fingerprint} {where}, {now} in this run")
    return lines


def _words(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(part, int | float | str) for part in value):
        return " ".join(map(str, value))
    return str(value)


def _sources(described: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Prefix and fingerprint of each source."""
    prefixes, contents = described.get(_PREFIXES), described.get(_SOURCES)
    if not isinstance(prefixes, list) or not isinstance(contents, list):
        return []
    return [(str(one), str(other)) for one, other in zip(prefixes, contents, strict=False)]


def _source_lines(
    saved: list[tuple[str, str]], ours: list[tuple[str, str]], where: str
) -> Iterator[str]:
    """Sources that changed, came, went or moved to another place in the order.

    A source is known by its content: its files may lie elsewhere now.
    """
    before, now = ([content for _, content in sources] for sources in (saved, ours))
    if sorted(before) == sorted(now):
        if before != now:
            orders = (" ".join(prefix for prefix, _ in sources) for sources in (saved, ours))
            yield "order of the sources: {} {where}, {} in this run".format(*orders, where=where)
        return
    paths = {prefix for prefix, _ in saved}
    for prefix, content in ours:
        if content in before:
            continue
        if prefix in paths:
            yield f"{prefix}: it has other content than {where}"
        else:
            yield f"{prefix}: a source in this run, not {where}"
    present = {prefix for prefix, _ in ours}
    for prefix, content in saved:
        if content not in now and prefix not in present:
            yield f"{prefix}: a source {where}, not in this run"
    if sorted(set(before)) == sorted(set(now)):
        yield f"number of sources: {len(before)} {where}, {len(now)} in this run"
