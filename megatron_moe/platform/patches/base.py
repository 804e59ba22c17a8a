"""What a patch is: a named, reversible change of code that is not ours, with its reason."""

from __future__ import annotations

import importlib
import inspect
from abc import ABC, abstractmethod
from types import CodeType, FunctionType
from typing import Any, ClassVar

from megatron_moe.platform.release import RELEASES, installed_release


class PatchMismatchError(RuntimeError):
    """A patch does not fit the installed Megatron-Core or torch."""


class Patch(ABC):
    """One reversible change. `apply` and `undo` are called in pairs, `apply` at most once."""

    name: str
    """Short name, as in `Platform.patches`."""
    releases: ClassVar[tuple[str, ...]] = RELEASES
    """Releases of Megatron-Core that it fits, and that need it."""

    @abstractmethod
    def apply(self) -> None:
        """Make the change.

        Raises:
            PatchMismatchError: the code to change is not there.
        """

    @abstractmethod
    def undo(self) -> None:
        """Restore exactly what `apply` replaced."""


class AttributePatch(Patch):
    """Replaces attributes of modules or classes."""

    def __init__(self) -> None:
        self._saved: list[tuple[Any, str, Any, bool]] = []

    @abstractmethod
    def replacements(self) -> list[tuple[Any, str, Any]]:
        """(owner, attribute, new value) of each change; imports what it needs."""

    def apply(self) -> None:
        for owner, attribute, value in self.replacements():
            own = attribute in vars(owner)
            original = vars(owner)[attribute] if own else None
            self._saved.append((owner, attribute, original, own))
            setattr(owner, attribute, value)

    def undo(self) -> None:
        while self._saved:
            owner, attribute, original, own = self._saved.pop()
            if own:
                setattr(owner, attribute, original)
            else:
                delattr(owner, attribute)


class ConstantPatch(Patch):
    """Replaces constants in the compiled code of named functions.

    This changes a literal `device="cuda"` inside a function at no cost when the function runs, and
    for every module that has imported it: the function object stays the same. The literal is an
    entry of `function.__code__.co_consts`; the code object is replaced by a copy in which that
    entry is "cpu".
    """

    constants: ClassVar[dict[str, str]]
    """Old value -> new value. Only whole constants are replaced, not parts of strings."""
    functions: ClassVar[tuple[str, ...]]
    """`module:qualified.name` of each function or method."""
    functions_of: ClassVar[dict[str, tuple[str, ...]]] = {}
    """Further functions of one release of Megatron-Core alone."""

    def __init__(self) -> None:
        self._saved: list[tuple[FunctionType, CodeType]] = []

    @classmethod
    def literals(cls) -> tuple[str, ...]:
        """The functions of the installed release."""
        return (*cls.functions, *cls.functions_of.get(installed_release(), ()))

    def apply(self) -> None:
        for name in self.literals():
            function = find_function(name)
            original = function.__code__
            code = _replace_constants(original, self.constants)
            if code is original:
                # Some of the constants are in assertions, which `python -O` leaves out. Whether a
                # patch fits this Megatron-Core is known without it: the tests run that way.
                if not __debug__:
                    continue
                raise PatchMismatchError(
                    f"patch {self.name}: {name} has none of {sorted(map(repr, self.constants))}"
                )
            self._saved.append((function, original))
            function.__code__ = code

    def undo(self) -> None:
        while self._saved:
            function, code = self._saved.pop()
            function.__code__ = code


def find_function(name: str) -> FunctionType:
    """The plain function called `module:qualified.name`, without its decorators.

    Raises:
        PatchMismatchError: there is no such function.
    """
    module_name, _, path = name.partition(":")
    found: Any = importlib.import_module(module_name)
    for part in path.split("."):
        found = inspect.getattr_static(found, part, None)
    if isinstance(found, classmethod | staticmethod):
        found = found.__func__
    found = inspect.unwrap(found) if callable(found) else found
    if not isinstance(found, FunctionType):
        raise PatchMismatchError(f"there is no function {name} in this Megatron-Core")
    return found


def _replace_constants(code: CodeType, constants: dict[str, str]) -> CodeType:
    """The code with other constants; the same object if it has none of them."""
    replaced = tuple(_replace(value, constants) for value in code.co_consts)
    if all(new is old for new, old in zip(replaced, code.co_consts, strict=True)):
        return code
    return code.replace(co_consts=replaced)


def _replace(value: Any, constants: dict[str, str]) -> Any:
    if isinstance(value, CodeType):  # a function defined inside this one
        return _replace_constants(value, constants)
    if isinstance(value, tuple):
        items = tuple(_replace(item, constants) for item in value)
        return value if all(a is b for a, b in zip(items, value, strict=True)) else items
    if isinstance(value, str):
        return constants.get(value, value)
    return value
