"""Every parser of files and words that others can write."""

from __future__ import annotations

from tests.fuzz import data_targets, model_targets

TARGETS = {target.name: target for target in (*data_targets.TARGETS, *model_targets.TARGETS)}
