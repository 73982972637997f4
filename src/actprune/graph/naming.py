"""What the running modules call their numbers: integers, shapes and settings that may have to follow a cut."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn

from actprune.core import settings
from actprune.core.stack import Frame


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

    def called(self) -> Iterator[tuple[str, str, object]]:
        """The same and those of the innermost module's children, whose methods it may call."""
        yield from self.attributes()
        for child in self.children():
            yield from self._plain(child)

    def children(self) -> list[str]:
        """Paths of what the innermost module holds: code that runs now may be a method of one of them."""
        path = self.stack[-1]
        held = (f"{path}.{name}" if path else name for name in self.modules[path]._modules)
        return [child for child in held if child in self.modules]

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
