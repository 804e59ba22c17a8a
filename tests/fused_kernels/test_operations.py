"""Every implementation has the functions of its operation's protocol, with the same arguments."""

from __future__ import annotations

import importlib
import inspect
from typing import Any, get_type_hints

import pytest

from fused_kernels import registry
from fused_kernels.operations import Kernels


def functions(thing: Any) -> dict[str, list[str]]:
    """Public functions and the names of their arguments."""
    found = inspect.getmembers(thing, inspect.isfunction)
    module = getattr(thing, "__module__", thing.__name__)
    return {
        name: [argument for argument in inspect.signature(f).parameters if argument != "self"]
        for name, f in found
        if not name.startswith("_") and f.__module__ == module
    }


@pytest.mark.parametrize("implementation", registry.IMPLEMENTATIONS)
@pytest.mark.parametrize("operation", registry.OPERATIONS)
def test_functions_and_arguments_are_those_of_the_protocol(
    operation: str, implementation: str
) -> None:
    protocol = get_type_hints(Kernels)[operation]
    if (implementation, operation) in registry.LEFT_TO_REFERENCE:
        implementation = "reference"
    module = importlib.import_module(f"fused_kernels.{implementation}.{operation}")
    found = functions(module)
    expected = functions(protocol)
    assert expected
    assert {name: found.get(name) for name in expected} == expected


def test_an_attribute_per_operation() -> None:
    assert set(registry.OPERATIONS) == get_type_hints(Kernels).keys() - {"selected"}
