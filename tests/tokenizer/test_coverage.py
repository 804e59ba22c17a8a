"""Scripts of characters, and the numbers of a table by hand."""

from __future__ import annotations

import pytest

from megatron_moe.tokenizer.coverage import (
    ScriptCoverage,
    coverage_table,
    coverage_warnings,
    script_of,
)


@pytest.mark.parametrize(
    ("characters", "script"),
    [
        ("aZéÅﬁ\uff21", "Latin"),
        ("我日㐀", "Han"),
        ("ひ", "Hiragana"),
        ("カｶ", "Katakana"),
        ("한", "Hangul"),
        ("กำ", "Thai"),
        ("हिी", "Devanagari"),
        ("жЁ", "Cyrillic"),
        ("ع", "Arabic"),
        ("Ω", "Greek"),
        ("0٣ .,\n😀\u0301\U0001d431\ue000", "Common"),
    ],
)
def test_scripts(characters: str, script: str) -> None:
    assert [script_of(character) for character in characters] == [script] * len(characters)


def test_rare_scripts_have_no_line_and_no_warning() -> None:
    values = {"tokens": 3.0, "byte_tokens": 3.0, "without_piece": 0.995}
    found = [
        ScriptCoverage(script="Han", share=0.25, **values),
        ScriptCoverage(script="Runic", share=0.0001, **values),
    ]
    title, line = coverage_table(found).splitlines()
    assert line.split() == ["Han", "25.00%", "99.50%", "3.000", "3.000"]
    assert len(title) == len(line)
    (warning,) = coverage_warnings(found)
    assert warning.startswith("99.5% of the Han characters have no piece")
