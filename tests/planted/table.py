"""All faults, in the order of the rows of `docs/reliability.md`."""

from __future__ import annotations

from tests.planted.cases_of_data import CASES_OF_DATA
from tests.planted.cases_of_runs import CASES_OF_RUNS
from tests.planted.entry import Planted
from tests.planted.features_of_runs import FEATURES_OF_RUNS
from tests.planted.features_of_values import FEATURES_OF_VALUES

PLANTED: tuple[Planted, ...] = (
    *CASES_OF_RUNS,
    *CASES_OF_DATA,
    *FEATURES_OF_RUNS,
    *FEATURES_OF_VALUES,
)

NONE: dict[str, str] = {
    "feature 14": "none: takes an hour",
}
"""Rows without a fault, with what the page says instead."""
