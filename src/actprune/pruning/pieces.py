"""Pieces of a long job that survive its end: one file each, whole or absent, tied to what they were made from."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from actprune.core.errors import ConfigError
from actprune.core.files import atomic_path

_SETTINGS = "made_from.json"


class Pieces:
    """Results by name, kept in a folder.

    Args:
        folder: where; None keeps nothing.
        made_from: what the results are a function of, plain numbers and strings, see ``fingerprint``.

    Raises:
        ConfigError: the folder holds pieces that were made from something else.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, made_from: Mapping[str, Any]) -> None:
        self._folder = None if folder is None else Path(folder)
        self.seconds_before = 0.0
        """Wall time that earlier runs took for the pieces that were taken from the folder."""
        if self._folder is None:
            return
        file, wanted = self._folder / _SETTINGS, json.loads(json.dumps(made_from))
        if file.is_file():
            before = json.loads(file.read_text(encoding="utf-8"))
            differing = [key for key in {**before, **wanted} if before.get(key) != wanted.get(key)]
            if differing:
                raise ConfigError(
                    f"{self._folder} holds an analysis that was made from other {', '.join(differing)}; "
                    "choose another folder, or delete this one"
                )
        _write(file, wanted)

    def get(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The piece of this name: as it was kept, else made now and kept."""
        if self._folder is None:
            return make()
        file = self._folder / f"{name}.json"
        if file.is_file():
            kept = json.loads(file.read_text(encoding="utf-8"))
            self.seconds_before += kept["seconds"]
            return kept["result"]
        began = time.monotonic()
        _write(file, {"result": make(), "seconds": time.monotonic() - began})
        return json.loads(file.read_text(encoding="utf-8"))["result"]


def _write(file: Path, content: Any) -> None:
    with atomic_path(file) as temporary:
        temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
