"""How well a trained tokenizer covers the scripts of its training text.

A character without a piece is encoded as its UTF-8 bytes: three tokens for a Chinese character. A
table by script shows where that happens. Totals hide it: a script with 2% of the text can have no
piece at all.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import sentencepiece

COMMON = "Common"
"""Characters that several scripts share: digits, signs, white space (Unicode's name for them)."""
_OTHER_NAMES = {"CJK": "Han"}
_WIDTHS = ("FULLWIDTH", "HALFWIDTH")
_NO_SCRIPT = {"COMBINING", "MODIFIER", "MATHEMATICAL", "VARIATION", "MICRO", "OHM"}
"""First words in the names of letters and marks that belong to no script."""
_SAMPLE = 20_000
"""Characters of a script that are encoded to measure tokens per character."""
_LISTED = 0.0005
"""Share of all characters from which a script has a line of its own."""
_WARN = 0.01
"""Share of a script's characters without a piece from which a warning is due."""


@lru_cache(maxsize=1 << 16)
def script_of(character: str) -> str:
    """Return the script of a letter or mark: `Latin`, `Han`, `Thai`; of all others `COMMON`.

    The script is the first word of the character's name in Unicode, as in THAI CHARACTER KO KAI.
    """
    if unicodedata.category(character)[0] not in "LM":
        return COMMON
    words = unicodedata.name(character, "COMBINING").split()
    first = words[1] if words[0] in _WIDTHS and len(words) > 1 else words[0]
    return COMMON if first in _NO_SCRIPT else _OTHER_NAMES.get(first, first.capitalize())


@dataclass(frozen=True, kw_only=True)
class ScriptCoverage:
    """What a tokenizer makes of the characters of one script."""

    script: str
    share: float
    """Of all characters of the training text."""
    without_piece: float
    """Share of the script's characters that are in no piece, each counted as often as it occurs."""
    tokens: float
    """Tokens per character in a sample."""
    byte_tokens: float
    """Tokens per character that are single bytes."""


class ScriptSample:
    """Counts the characters of a training text, and keeps some text of each script."""

    def __init__(self) -> None:
        self.characters: Counter[str] = Counter()
        self._texts: list[str] = []
        self._kept: Counter[str] = Counter()

    def add(self, text: str) -> None:
        """Count a text, and keep it if there is little of one of its scripts so far."""
        found = Counter(text)
        self.characters.update(found)
        scripts: Counter[str] = Counter()
        for character, count in found.items():
            scripts[script_of(character)] += count
        if any(self._kept[script] < _SAMPLE for script in scripts):
            self._texts.append(text)
            self._kept.update(scripts)

    def coverage(self, model: bytes) -> list[ScriptCoverage]:
        """Return the coverage of each script by a SentencePiece model, the most frequent first."""
        loaded = sentencepiece.SentencePieceProcessor(model_proto=model)
        special = (loaded.is_byte, loaded.is_control, loaded.is_unknown)
        ids = range(loaded.get_piece_size())
        pieces = (loaded.id_to_piece(i) for i in ids if not any(kind(i) for kind in special))
        known = set("".join(pieces)) | {" "}
        total, missing = _by_script(self.characters), Counter[str]()
        for character, count in self.characters.items():
            if character not in known:
                missing[script_of(character)] += count
        tokens, in_bytes = _tokens_by_script(loaded, self._texts)
        size = sum(total.values())
        return [
            ScriptCoverage(
                script=script,
                share=count / size,
                without_piece=missing[script] / count,
                tokens=tokens[script] / self._kept[script],
                byte_tokens=in_bytes[script] / self._kept[script],
            )
            for script, count in total.most_common()
        ]


def _by_script(characters: Counter[str]) -> Counter[str]:
    found: Counter[str] = Counter()
    for character, count in characters.items():
        found[script_of(character)] += count
    return found


def _tokens_by_script(
    model: sentencepiece.SentencePieceProcessor, texts: Iterable[str]
) -> tuple[Counter[str], Counter[str]]:
    """Count all tokens, and single bytes, by the script of the character where they begin.

    Spaces and signs at the start of a piece are skipped: `_the` counts as Latin.
    """
    tokens, in_bytes = Counter[str](), Counter[str]()
    for text in texts:
        found = model.encode(text, out_type="offset_mapping")
        for token, (start, end) in zip(found["ids"], found["offsets"], strict=True):
            # The bytes of a character begin where it begins; only the last one ends after it.
            covered = map(script_of, text[start : max(end, start + 1)])
            script = next((name for name in covered if name != COMMON), COMMON)
            tokens[script] += 1
            in_bytes[script] += model.is_byte(token)
    return tokens, in_bytes


def coverage_table(found: Iterable[ScriptCoverage]) -> str:
    """Format a table with a line for each script that is not rare."""
    lines = [
        f"{'script':<14}{'characters':>12}{'without piece':>15}{'tokens/char':>13}{'bytes':>8}"
    ]
    for each in found:
        if each.share >= _LISTED:
            numbers = f"{each.share:>12.2%}{each.without_piece:>15.2%}"
            lines.append(f"{each.script:<14}{numbers}{each.tokens:>13.3f}{each.byte_tokens:>8.3f}")
    return "\n".join(lines)


def coverage_warnings(found: Iterable[ScriptCoverage]) -> list[str]:
    """Return a line for each script, rare ones left out, of which characters have no piece."""
    return [
        f"{each.without_piece:.1%} of the {each.script} characters have no piece and are encoded "
        f"as bytes ({each.tokens:.2f} tokens per character); raise --vocab-size or "
        "--character-coverage"
        for each in found
        if each.share >= _LISTED and each.without_piece >= _WARN
    ]
