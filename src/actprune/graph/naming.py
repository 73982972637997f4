"""What the running modules call their numbers: integers, shapes and settings that may have to follow a cut."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn

from actprune.core import settings
from actprune.core.stack import Frame, held_by


@dataclass(kw_only=True)
class Naming:
    """The modules of a model, those that are running, and the plain attributes of these."""

    modules: dict[str, nn.Module]
    frames: list[Frame] = field(default_factory=lambda: [Frame("")])
    """The running calls, outermost first."""
    _settings: dict[str, list[tuple[str, int]]] = field(default_factory=dict)

    @property
    def stack(self) -> list[str]:
        """Paths of the running modules, outermost first."""
        return [frame.path for frame in self.frames]

    def attributes(self) -> Iterator[tuple[str, str, object]]:
        """Yield (module path, attribute name, value) of the plain attributes of every running module, innermost first."""
        for path in reversed(self.stack):
            yield from self._plain(path)

    @property
    def unseen(self) -> list[str]:
        """Paths of what the running calls run past ``__call__``: ``sublayer(x, lambda x: self.attention.forward(x))``."""
        stack = self.stack
        around = [
            holder
            for frame, inner in zip(self.frames, stack[1:], strict=False)
            for holder in frame.unseen
            if inner.startswith(f"{holder}.")  # else it ran before
        ]
        return [path for path in (*self.frames[-1].unseen, *around) if path not in stack]

    def called(self) -> Iterator[tuple[str, str, object]]:
        """The same, those of what the innermost module holds, whose methods it may call, and of what runs past its call."""
        yield from self.attributes()
        for path in self.beside():
            yield from self._plain(path)

    def beside(self) -> Iterable[str]:
        """Paths of modules that do not run, whose code may: what the innermost one holds, then what runs past its call."""
        return dict.fromkeys((*held_by(self.modules, self.stack[-1]), *self.unseen))

    def children(self) -> list[str]:
        """Paths of what the innermost module holds itself."""
        path = self.stack[-1]
        own = (f"{path}.{name}" if path else name for name in self.modules[path]._modules)
        return [child for child in own if child in self.modules]

    def _plain(self, path: str) -> Iterator[tuple[str, str, object]]:
        for name, value in vars(self.modules[path]).items():
            private = name.startswith("_") and (type(value) is not int or self.of_torch(path))
            if not private and name != "training":
                yield path, name, value

    def integers(self, path: str) -> Iterator[tuple[str, int]]:
        """Yield (name, value) of a module's own integer attributes."""
        for name, value in vars(self.modules[path]).items():
            if type(value) is int and not (name.startswith("_") and self.of_torch(path)):
                yield name, value

    def settings(self, path: str) -> list[tuple[str, int]]:
        """(``config.name``, value) of the integers that a module keeps in an object."""
        if path not in self._settings:
            self._settings[path] = settings.numbers(self.modules[path])
        return self._settings[path]

    def shapes(self, path: str, tensor: Tensor) -> Iterator[tuple[str, int]]:
        """Yield (name, how many dimensions) of a module's own tuples and lists that are the last extents of a tensor."""
        for _, name, value in self._plain(path):
            if not isinstance(value, (tuple, list)) or not value or any(type(n) is not int for n in value):
                continue
            if list(tensor.shape[-len(value) :]) == list(value):
                yield name, len(value)

    def of_torch(self, path: str) -> bool:
        """Whether PyTorch wrote a module's code."""
        return type(self.modules[path]).__module__.startswith("torch.nn")
