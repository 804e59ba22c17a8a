"""`CUDA_DEVICE_MAX_CONNECTIONS` where overlap needs it."""

from __future__ import annotations

import pytest

from megatron_moe.errors import UsageError
from megatron_moe.platform.queues import check_queues

ONE = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}


def test_tensor_parallelism_needs_one_queue_up_to_hopper() -> None:
    for environment in ({}, {"CUDA_DEVICE_MAX_CONNECTIONS": "8"}):
        for capability in (8, 9):
            with pytest.raises(UsageError, match=r"CUDA_DEVICE_MAX_CONNECTIONS must be 1 with"):
                check_queues(2, capability, environment)
        check_queues(2, 10, environment)
        check_queues(1, 9, environment)
    check_queues(2, 9, ONE)
