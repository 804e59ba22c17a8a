"""Tokenizers in Hugging Face's `tokenizer.json`, through the `tokenizers` library.

The special tokens are named in `tokenizer_config.json` or `special_tokens_map.json` in the same
folder. Without these files, the names that the known model families use are looked up.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_moe.errors import UsageError
from megatron_moe.files import describe_start, read_small
from megatron_moe.text import json_value, without_bom
from megatron_moe.tokenizer.base import NO_ID, SPECIAL_IN_TEXT, Tokenizer, count_sentinels
from megatron_moe.tokenizer.files import COMPANIONS, files_of, read_model

USUAL_NAMES = {
    "eos_token": ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "[SEP]"),
    "pad_token": ("<pad>", "[PAD]"),
    "unk_token": ("<unk>", "[UNK]"),
    "bos_token": (),
}
"""Names to look for, by role; the first one in the vocabulary is used."""


_SENTENCEPIECE = b"\n"
"""The first byte of a SentencePiece model: its field 1, of bytes."""
_SHOWN = 8
"""Special tokens that an error names."""


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`, or the folder that holds it. No special tokens are added to texts.

    Args:
        path: of the file or folder.
        special_in_text: whether a text that spells a special token, `<|endoftext|>`, gets its id;
            otherwise it is text like any other.

    Raises:
        UsageError: `tokenizers` is not installed, the file cannot be read, or there is no
            end-of-document token.
    """

    def __init__(self, path: str, special_in_text: bool = False) -> None:
        try:
            import tokenizers
        except ImportError:
            fix = "pip install 'megatron-moe[data]', or pip install tokenizers"
            expected, found = "used with tokenizers installed", "HuggingFaceTokenizer"
            raise UsageError("--tokenizer-type", found, expected, fix) from None
        file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        content = without_bom(read_model(path, file, "a tokenizer.json"))
        try:
            self._model = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises nothing narrower
            reason = _reason(content, error)
            raise UsageError("--tokenizer-model", path, "a tokenizer.json", reason) from None
        self._model.encode_special_tokens = not special_in_text
        # A file can ask for both. They would cut documents, or fill them up.
        self._model.no_truncation()
        self._model.no_padding()
        self._vocabulary: dict[str, int] = self._model.get_vocab(with_added_tokens=True)
        if not self._vocabulary:
            raise UsageError(
                "--tokenizer-model", path, "a tokenizer with a vocabulary", "it is empty"
            )
        self.vocab_size = max(self._vocabulary.values()) + 1
        self.extra_ids = count_sentinels(self._model.id_to_token, self.vocab_size)
        names = _configured_names(file)
        roles = (self._special(role, names) for role in USUAL_NAMES)
        self.eod, self.pad, self.unk, self.bos = roles
        if self.eod == NO_ID:
            raise self._without_end(path, file, names.get("eos_token"))
        self.identity = hashlib.sha256(content + b"%d" % self.eod).hexdigest()
        self.identity += SPECIAL_IN_TEXT if special_in_text else ""
        self.files = {"tokenizer.json": content, **_companions(file)}

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of ``text``, without `eod`."""
        try:
            ids: list[int] = self._model.encode(text, add_special_tokens=False).ids
        except Exception as error:  # a file whose parts do not fit; nothing narrower is raised
            expected = "a tokenizer of any text"
            raise UsageError("--tokenizer-model", text, expected, str(error)) from None
        return ids

    def detokenize(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids``."""
        known = [i if i < self.vocab_size else max(self.unk, 0) for i in ids]
        text: str = self._model.decode(known, skip_special_tokens=True)
        return text

    def _without_end(self, path: str, file: Path, named: str | None) -> UsageError:
        """The error for a tokenizer without an end-of-document token."""
        if named is None:
            usual = ", ".join(USUAL_NAMES["eos_token"])
            expected = f"a tokenizer with an end-of-document token, such as {usual}"
            fix = "set eos_token in a tokenizer_config.json in the same folder"
            return UsageError("--tokenizer-model", path, expected, fix)
        special = [t.content for t in self._model.get_added_tokens_decoder().values() if t.special]
        known = f"; its special tokens are {', '.join(special[:_SHOWN])}" if special else ""
        what = f"eos_token beside {file}"
        fix = f"correct tokenizer_config.json or special_tokens_map.json{known}"
        return UsageError(what, named, "a token of the vocabulary", fix)

    def _special(self, role: str, names: dict[str, str]) -> int:
        if role in names:
            return self._vocabulary.get(names[role], NO_ID)
        found = (self._vocabulary[name] for name in USUAL_NAMES[role] if name in self._vocabulary)
        return next(found, NO_ID)


def _reason(content: bytes, error: Exception) -> str:
    """Why a file is no `tokenizer.json`."""
    if content.lstrip()[:1] in (b"{", b"["):
        return " ".join(str(error).split())
    found = describe_start(content)
    if content.startswith(_SENTENCEPIECE):
        found = "it may be a SentencePiece model, for --tokenizer-type SentencePieceTokenizer"
    return f"{found} ({' '.join(str(error).split())})"


def _companions(file: Path) -> dict[str, bytes]:
    """Contents of the files beside a `tokenizer.json` that belong to it."""
    beside = (path for path in files_of(file) if path.name in COMPANIONS)
    return {path.name: read_small(path) for path in beside}


def _configured_names(file: Path) -> dict[str, str]:
    """Return token names by role, from the files that Hugging Face writes next to it."""
    names: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = file.with_name(name)
        if not path.exists():
            continue
        try:
            values: Any = json_value(read_small(path))
            for role in USUAL_NAMES:
                value = values.get(role)
                token = value.get("content") if isinstance(value, dict) else value
                if isinstance(token, str):
                    names[role] = token
        except (OSError, ValueError, AttributeError) as error:
            raise UsageError("--tokenizer-model", str(path), "a JSON object", str(error)) from None
    return names
