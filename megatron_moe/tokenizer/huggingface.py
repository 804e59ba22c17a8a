"""Tokenizers in Hugging Face's `tokenizer.json`, through the `tokenizers` library.

The special tokens are named in `tokenizer_config.json` or `special_tokens_map.json` in the same
folder. Without these files, the names that the known model families use are looked up.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_moe.errors import UsageError
from megatron_moe.tokenizer.base import NO_ID, Tokenizer, count_sentinels

USUAL_NAMES = {
    "eos_token": ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "[SEP]"),
    "pad_token": ("<pad>", "[PAD]"),
    "unk_token": ("<unk>", "[UNK]"),
}
"""Names to look for, by role; the first one in the vocabulary is used."""


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`, or the folder that holds it. Texts are encoded without special tokens.

    Raises:
        UsageError: `tokenizers` is not installed, the file cannot be read, or there is no
            end-of-document token.
    """

    def __init__(self, path: str) -> None:
        try:
            import tokenizers
        except ImportError:
            fix = "pip install 'megatron-moe[data]', or pip install tokenizers"
            expected, found = "used with tokenizers installed", "HuggingFaceTokenizer"
            raise UsageError("--tokenizer-type", found, expected, fix) from None
        file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        try:
            content = file.read_bytes()
        except OSError as error:
            raise UsageError("--tokenizer-model", path, "a readable file", str(error)) from None
        try:
            self._model = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises nothing narrower
            reason = " ".join(str(error).split())
            raise UsageError("--tokenizer-model", path, "a tokenizer.json", reason) from None
        # A file can ask for both. They would cut documents, or fill them up.
        self._model.no_truncation()
        self._model.no_padding()
        self._vocabulary: dict[str, int] = self._model.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._vocabulary.values()) + 1
        self.extra_ids = count_sentinels(self._model.id_to_token, self.vocab_size)
        names = _configured_names(file)
        self.eod, self.pad, self.unk = (self._special(role, names) for role in USUAL_NAMES)
        if self.eod == NO_ID:
            raise UsageError(
                "--tokenizer-model",
                path,
                "a tokenizer with an end-of-document token, such as "
                + ", ".join(USUAL_NAMES["eos_token"]),
                "set eos_token in a tokenizer_config.json in the same folder",
            )
        self.identity = hashlib.sha256(content + b"%d" % self.eod).hexdigest()

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of ``text``, without `eod`."""
        ids: list[int] = self._model.encode(text, add_special_tokens=False).ids
        return ids

    def detokenize(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids``."""
        known = [i if i < self.vocab_size else max(self.unk, 0) for i in ids]
        text: str = self._model.decode(known, skip_special_tokens=True)
        return text

    def _special(self, role: str, names: dict[str, str]) -> int:
        if role in names:
            return self._vocabulary.get(names[role], NO_ID)
        found = (self._vocabulary[name] for name in USUAL_NAMES[role] if name in self._vocabulary)
        return next(found, NO_ID)


def _configured_names(file: Path) -> dict[str, str]:
    """Return token names by role, from the files that Hugging Face writes next to it."""
    names: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = file.with_name(name)
        if not path.exists():
            continue
        try:
            values: Any = json.loads(path.read_bytes())
            for role in USUAL_NAMES:
                value = values.get(role)
                token = value.get("content") if isinstance(value, dict) else value
                if isinstance(token, str):
                    names[role] = token
        except (OSError, ValueError, AttributeError) as error:
            raise UsageError("--tokenizer-model", str(path), "a JSON object", str(error)) from None
    return names
