"""What lies inside lists, dicts, sets, arrays and plain objects: found, and put back as it was."""

from __future__ import annotations

import copy
import functools
import sys
import sysconfig
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator
from operator import is_
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from torch import Tensor, nn

_CONTAINERS = (list, dict, set, deque, OrderedDict, defaultdict, Counter)
_HOLDING = (list, dict, set, tuple, deque, np.ndarray, type)  # classes of one's own that are such, too, are left alone
_ATOMS = frozenset({type(None), bool, int, float, complex, str, bytes})
_FEW = 1024
"""Of containers that hold more, a data set for one, only what they hold is remembered, not what is inside of that."""
_MOST = 10_000
"""How many values are looked at, those that lie less deep first."""
_SMALL = 1 << 24
"""Bytes of all arrays whose values are remembered."""


def inside(values: Iterable[Any]) -> Iterator[Any]:
    """Tensors, modules, containers, arrays and objects of the user's own classes among values and inside of them, each once."""
    seen: set[int] = set()
    waiting, looked, room = deque([list(values)]), 0, _SMALL
    while waiting and looked < _MOST:
        now = waiting.popleft()
        looked += len(now)
        for value in now:
            kind = type(value)
            if kind in _ATOMS or id(value) in seen:
                continue
            seen.add(id(value))
            if isinstance(value, (Tensor, nn.Module)):
                yield value
            elif kind in _CONTAINERS:
                yield value
                if len(value) <= _FEW:
                    waiting.append(list(value.values()) if isinstance(value, dict) else list(value))
            elif kind is tuple and len(value) <= _FEW:
                waiting.append(list(value))
            elif kind is np.ndarray:
                if value.nbytes <= room and not value.dtype.hasobject:
                    room -= value.nbytes
                    yield value
            elif not isinstance(value, _HOLDING) and is_own(kind):  # type: ignore[arg-type]
                yield value
                waiting.append(list(vars(value).values()))


@functools.cache
def is_own(kind: type[Any]) -> bool:
    """Whether a class is the user's, with attributes: what libraries keep to themselves is theirs."""
    if kind is SimpleNamespace:
        return True
    if not kind.__dictoffset__:
        return False
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    if file is None:
        return kind.__module__ == "__main__"
    above = Path(file).resolve().parents
    if not {"site-packages", "dist-packages"}.isdisjoint(path.name for path in above):
        return False
    return Path(sysconfig.get_paths()["stdlib"]).resolve() not in above and Path(__file__).resolve().parents[1] not in above


class Contents:
    """Contents of containers, arrays and objects as they are now; tensors and modules among them are left alone."""

    def __init__(self, found: Iterable[Any]) -> None:
        self._kept = [(value, _content(value)) for value in found if not isinstance(value, (Tensor, nn.Module))]

    def put_back(self) -> None:
        """In place, for others hold the same objects; lists, sets and dicts that did not change are not touched."""
        for value, content in self._kept:
            _refill(value, content)


def _content(value: Any) -> Any:
    return dict(vars(value)) if type(value) not in (*_CONTAINERS, np.ndarray) else copy.copy(value)


def _refill(value: Any, content: Any) -> None:
    if isinstance(value, np.ndarray):
        if value.shape != content.shape:
            value.resize(content.shape, refcheck=False)
        if value.flags.writeable:
            np.copyto(value, content)
    elif isinstance(value, (list, deque)):
        if len(value) != len(content) or not all(map(is_, value, content)):
            value.clear()
            value.extend(content)
    elif isinstance(value, set):
        if value != content:
            value.clear()
            value.update(content)
    else:
        restore(value if isinstance(value, dict) else vars(value), content)


def restore(now: dict[Any, Any], before: dict[Any, Any]) -> None:
    """Make ``now`` hold the very objects of ``before``."""
    if len(now) != len(before) or any(key not in now or now[key] is not value for key, value in before.items()):
        now.clear()
        now.update(before)
