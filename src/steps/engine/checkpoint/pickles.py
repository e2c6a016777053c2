"""Pickles that name classes and functions which are not imported here, written and read.

torch's files are pickles of its own classes, and importing torch.distributed.checkpoint to have these takes a second.
Written here, such a class is a Name; read here, it is a stand-in that keeps what it was made of, whatever the pickle
says: reading runs no code of the file's choice.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Name:
    """A class, a function or a constant, by where it is found."""

    module: str
    name: str

    def __call__(self, *arguments: Any) -> Object:
        """What it returns for these arguments, once the pickle is read."""
        return Object(self, arguments)


@dataclass(frozen=True, eq=False)
class Object:
    """An object that reading the pickle makes: `maker(*arguments)`, then `state` is given to it.

    new: maker is a class, and `__new__` is called alone.
    """

    maker: Name
    arguments: tuple[Any, ...] = ()
    state: Any = None
    new: bool = False


def dumps(obj: Any, persistent: Callable[[Any], Any] = lambda obj: None) -> bytes:
    """The pickle (protocol 2) of None, booleans, numbers, text, tuples, lists, dicts, Names and Objects.

    persistent: what names an object that is kept elsewhere (its persistent id); None for all others.
    """
    writer = _Writer(persistent)
    writer.save(obj)
    return pickle.PROTO + b"\2" + b"".join(writer.written) + pickle.STOP


class _Writer:
    # pickle.Pickler resolves every name by importing it, and cannot be told not to.
    def __init__(self, persistent: Callable[[Any], Any]) -> None:
        self.written: list[bytes] = []
        self._persistent = persistent
        self._seen: dict[int, int] = {}

    def save(self, obj: Any) -> None:
        write = self.written.append
        if (persistent := self._persistent(obj)) is not None:
            self.save(persistent)
            write(pickle.BINPERSID)
        elif isinstance(obj, Name | Object):
            self._save_once(obj)
        elif isinstance(obj, dict):
            self._save_all(pickle.EMPTY_DICT + pickle.MARK, (part for item in obj.items() for part in item))
            write(pickle.SETITEMS)
        elif isinstance(obj, list):
            self._save_all(pickle.EMPTY_LIST + pickle.MARK, obj)
            write(pickle.APPENDS)
        elif isinstance(obj, tuple):
            self._save_all(pickle.MARK, obj)
            write(pickle.TUPLE)
        elif isinstance(obj, str):
            text = obj.encode("utf-8", "surrogatepass")
            write(pickle.BINUNICODE + struct.pack("<I", len(text)) + text)
        else:
            assert obj is None or isinstance(obj, bool | int | float), type(obj)
            write(pickle.dumps(obj, protocol=2)[2:-1])  # without its PROTO and STOP

    def _save_all(self, opening: bytes, items: Iterable[Any]) -> None:
        self.written.append(opening)
        for item in items:
            self.save(item)

    def _save_once(self, obj: Name | Object) -> None:
        write = self.written.append
        if (seen := self._seen.get(id(obj))) is not None:
            write(pickle.LONG_BINGET + struct.pack("<I", seen))
            return
        if isinstance(obj, Name):
            write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
        else:
            self.save(obj.maker)
            self.save(obj.arguments)
            write(pickle.NEWOBJ if obj.new else pickle.REDUCE)
        self._seen[id(obj)] = len(self._seen)
        write(pickle.LONG_BINPUT + struct.pack("<I", self._seen[id(obj)]))
        if isinstance(obj, Object) and obj.state is not None:
            self.save(obj.state)
            write(pickle.BUILD)


class StandIn:
    """An object of a class that is not imported. `arguments` and `state` are what the pickle makes it of."""

    arguments: tuple[Any, ...]
    state: Any = None

    def __new__(cls, *arguments: Any, **_: Any) -> StandIn:
        self = super().__new__(cls)
        self.arguments = arguments
        return self

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    # A list or dict of a class of its own is filled in these ways.
    def append(self, _: Any) -> None:
        pass

    def extend(self, _: Any) -> None:
        pass

    def __setitem__(self, _: Any, __: Any) -> None:
        pass


_PLAIN = {"OrderedDict": OrderedDict, "defaultdict": defaultdict}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, known: Mapping[tuple[str, str], Any], persistent: Callable[[Any], Any]):
        super().__init__(file)
        self._known, self._persistent = known, persistent

    def find_class(self, module: str, name: str) -> Any:
        if module == "collections" and name in _PLAIN:
            return _PLAIN[name]
        if (module, name) in self._known:
            return self._known[module, name]
        return type(name, (StandIn,), {"__module__": module})

    def persistent_load(self, pid: Any) -> Any:
        return self._persistent(pid)


def loads(data: bytes, known: Mapping[tuple[str, str], Any], persistent: Callable[[Any], Any] = lambda pid: pid) -> Any:
    """Read a pickle. known: what stands for a name (module, name); everything else becomes a StandIn.

    Raises what the pickle module raises for damaged data.
    """
    return _Unpickler(io.BytesIO(data), known, persistent).load()
