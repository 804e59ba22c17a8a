"""The page on migrating from Megatron-LM: its table is what the command line does."""

from __future__ import annotations

from tests.config.migration import PAGE, page, rows


def test_the_page_has_the_table_as_it_is_now() -> None:
    says = "the table changed: run `python -m tests.config.migration`"
    assert page() == PAGE.read_text(encoding="utf-8"), says


def test_so_many_pairs_are_accepted_and_the_others_explained() -> None:
    table = rows()
    pairs = sum(row.listed.scripts for row in table)
    accepted = sum(row.accepted for row in table)
    assert pairs == 5417
    assert accepted >= 0.88 * pairs
    assert all(row.says and all(row.says) for row in table)


def test_flags_are_counted_by_value() -> None:
    """Counted by hand in the list."""
    accepted = {row.listed.flag: row.accepted for row in rows()}
    assert accepted["--normalization"] == 52
    assert accepted["--moe-router-enable-expert-bias"] == 18
    assert accepted["--rotary-percent"] == 10
    assert accepted["--context-parallel-size"] == 41
    assert accepted["--multi-latent-attention"] == 0
    assert accepted["--use-mcore-models"] == 51
    assert accepted["--hidden-size"] == 62
