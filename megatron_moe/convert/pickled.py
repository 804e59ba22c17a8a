"""Pickles as data: the stream is interpreted, and nothing that it names is imported or called.

Python's own loader runs code that a stream names. Here `GLOBAL` gives a `Name`, and what would be a
call or an object gives a `Built` that records the name and the arguments. Readers then take the few
kinds that they know (`plain`) and reject the others by name. Source of the opcodes: the standard
library's `pickletools`, which disassembles without executing.
"""

from __future__ import annotations

import pickletools
import reprlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megatron_moe.errors import Corrupt


@dataclass(frozen=True)
class Name:
    """Something that a stream refers to by module and name: a class, a function, a constant."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False, repr=False)
class Built:
    """An object that was not built.

    Args:
        of: the class or function that would be called.
        args: its arguments.
        state: what would be passed to `__setstate__`, or become its attributes.
        items: what would be appended to it.
        pairs: what would be set as its items.
    """

    of: Any
    args: Any
    state: Any = None
    items: list[Any] = field(default_factory=list)
    pairs: dict[Any, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        # Without the arguments, which may be nested to any depth.
        return f"an object of {self.of if isinstance(self.of, Name) else type(self.of).__name__}"


@dataclass(frozen=True, eq=False, repr=False)
class Persistent:
    """A persistent id, with which PyTorch refers to the storage of a tensor."""

    id: Any

    def __repr__(self) -> str:
        return "a persistent id"


_MARK = object()
_CONSTANTS = {
    "NONE": None,
    "NEWTRUE": True,
    "NEWFALSE": False,
}
_EMPTY: dict[str, Callable[[], Any]] = {
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
_VALUES = {
    *("BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING"),
    *("SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_ARGUMENTS = 64
"""Most arguments of an object; they are copied, and a stream may use the same ones many times."""
_KEYS = (str, bytes, int, float, type(None), Name, Built, Persistent)
"""Types of keys and of members of sets, alone or in a tuple."""


class _Machine:
    """The stack machine of the format, without its calls."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def above_mark(self) -> list[Any]:
        """Take everything above the last mark, and the mark."""
        for place in range(len(self.stack) - 1, -1, -1):
            if self.stack[place] is _MARK:
                taken = self.stack[place + 1 :]
                del self.stack[place:]
                return taken
        raise ValueError("a stream without a mark")

    def pop(self, count: int) -> list[Any]:
        """Take the uppermost entries."""
        taken = self.stack[max(0, len(self.stack) - count) :]
        if len(taken) < count or any(value is _MARK for value in taken):
            raise ValueError("a stream that takes more than it has")
        del self.stack[len(self.stack) - count :]
        return taken

    def step(self, name: str, argument: Any) -> None:
        """One opcode, of those that the tables of this module do not cover."""
        stack = self.stack
        if name == "MARK":
            stack.append(_MARK)
        elif name in ("POP", "POP_MARK"):
            self.pop(1) if name == "POP" else self.above_mark()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[len(self.memo) if name == "MEMOIZE" else int(argument)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[int(argument)])
        elif name in ("TUPLE", "LIST", "FROZENSET"):
            kind: Any = {"TUPLE": tuple, "LIST": list, "FROZENSET": _members}[name]
            stack.append(kind(self.above_mark()))
        elif name == "DICT":
            stack.append(_pairs(self.above_mark()))
        else:
            self.container(name, argument)

    def container(self, name: str, argument: Any) -> None:
        """Opcodes that fill a container, and those that would build an object."""
        stack = self.stack
        if name in ("APPEND", "APPENDS", "ADDITEMS"):
            values = self.pop(1) if name == "APPEND" else self.above_mark()
            _extend(stack[-1], values)
        elif name in ("SETITEM", "SETITEMS"):
            values = self.pop(2) if name == "SETITEM" else self.above_mark()
            _update(stack[-1], _pairs(values))
        elif name == "GLOBAL":
            module, _, attribute = argument.partition(" ")
            stack.append(Name(module, attribute))
        elif name == "STACK_GLOBAL":
            module, attribute = self.pop(2)
            if not isinstance(module, str) or not isinstance(attribute, str):
                raise ValueError("a stream that refers to something without a name")
            stack.append(Name(module, attribute))
        elif name in ("REDUCE", "NEWOBJ"):
            stack.append(Built(*self.pop(2)))
        elif name == "NEWOBJ_EX":
            of, args, named = self.pop(3)
            if not isinstance(args, tuple) or len(args) > _ARGUMENTS:
                raise ValueError(f"a stream with the arguments {describe(args)}")
            stack.append(Built(of, (*args, named)))
        elif name == "BUILD":
            (state,) = self.pop(1)
            if not isinstance(stack[-1], Built):
                raise ValueError(f"a stream with the state of {type(stack[-1]).__name__}")
            stack[-1].state = state
        elif name in ("BINPERSID", "PERSID"):
            stack.append(Persistent(self.pop(1)[0] if name == "BINPERSID" else argument))
        else:
            raise ValueError(f"a stream with the opcode {name}")


def _hashable(value: Any) -> Any:
    """A key or a member of a set.

    The hash of a tuple follows its nesting, which a stream may make deeper than the interpreter's
    stack, and wider than any time by using the same tuple twice in the next.
    """
    inner = value if isinstance(value, tuple) else (value,)
    if not all(isinstance(part, _KEYS) for part in inner):
        raise ValueError(f"a stream with the key {describe(value)}")
    return value


def _members(values: list[Any]) -> frozenset[Any]:
    return frozenset(map(_hashable, values))


def _pairs(values: list[Any]) -> dict[Any, Any]:
    return dict(zip(map(_hashable, values[::2]), values[1::2], strict=True))


def _extend(target: Any, values: list[Any]) -> None:
    if isinstance(target, list):
        target.extend(values)
    elif isinstance(target, set):
        target.update(_members(values))
    elif isinstance(target, Built):
        target.items.extend(values)
    else:
        raise ValueError(f"a stream that appends to {type(target).__name__}")


def _update(target: Any, pairs: dict[Any, Any]) -> None:
    if isinstance(target, dict):
        target.update(pairs)
    elif isinstance(target, Built):
        target.pairs.update(pairs)
    else:
        raise ValueError(f"a stream that sets items of {type(target).__name__}")


def read_pickle(data: bytes, where: str) -> Any:
    """The value of a pickle: plain values and containers, and `Name`, `Built`, `Persistent`.

    Args:
        data: the stream.
        where: the file, for messages.

    Raises:
        Corrupt: the stream is damaged.
    """
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(data):
            name = opcode.name
            if name in ("PROTO", "FRAME"):
                continue
            if name == "STOP":
                (value,) = machine.pop(1)
                return value
            if name in _VALUES:
                machine.stack.append(argument)
            elif name in _CONSTANTS:
                machine.stack.append(_CONSTANTS[name])
            elif name in _EMPTY:
                machine.stack.append(_EMPTY[name]())
            elif name in _TUPLES:
                machine.stack.append(tuple(machine.pop(_TUPLES[name])))
            else:
                machine.step(name, argument)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, EOFError) as error:
        raise Corrupt(where, str(error) or type(error).__name__, "a whole pickle") from None
    raise Corrupt(where, "without an end", "a whole pickle")


def attributes(value: Any, of: str) -> dict[str, Any]:
    """The attributes of an object of a class, whose module may have moved.

    Args:
        value: what was read.
        of: name of the class without its module, e.g. ``Namespace``.

    Raises:
        ValueError: it is something else; the text says what.
    """
    named = isinstance(value, Built) and isinstance(value.of, Name) and value.of.name == of
    if not named or not isinstance(value.state, dict):
        raise ValueError(f"{describe(value)} in place of {of}")
    return dict(value.state)


def describe(value: Any) -> str:
    """What a value is, in a few words, for messages."""
    if isinstance(value, Built | Name):
        return str(value)
    try:
        text = reprlib.repr(value)  # bounded in depth and length
    except ValueError:  # an integer with more digits than Python prints
        text = f"a value of the type {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."
