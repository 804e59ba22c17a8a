"""FP8 where no device can multiply in it, and not emulated: one line before anything is built."""

from __future__ import annotations

import pytest

from megatron_moe.config import PrecisionConfig
from megatron_moe.errors import UsageError
from megatron_moe.platform.precision import check_precision
from tests.support.pool import Pool
from tests.training.tiny import MODEL, pretrain_rank


def test_fp8_is_an_error_where_nothing_multiplies_in_it() -> None:
    check_precision(PrecisionConfig(), "cpu")
    for device in ("cpu", "cuda"):
        check_precision(PrecisionConfig(fp8_format="hybrid", fp8_emulate=True), device)
        with pytest.raises(UsageError, match="--fp8-format must be used with --fp8-emulate"):
            check_precision(PrecisionConfig(fp8_format="hybrid"), device)


def test_a_run_on_a_cpu_ends_on_every_rank(pool: Pool) -> None:
    argv = [*MODEL, "--mock-data", "--fp8-format", "e4m3", "--train-iters", "9"]
    for code, out, error in pool.run(pretrain_rank, 2, argv=argv):
        assert (code, out) == (2, "")
        assert "\n" not in error.strip()
        assert "--fp8-format must be used with --fp8-emulate (got 'e4m3'); no CPU mul" in error
