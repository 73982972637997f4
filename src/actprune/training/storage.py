"""Checkpoints that are whole or absent, and the newest of them in a folder.

Lightning writes to the system's folder for temporary files and moves the result; between two file systems that is a copy,
which a kill leaves half done. Here the file is written beside its place, flushed to disk and renamed. A full disk or a folder
that cannot be written ends in one message; what was there before is intact.
"""

from __future__ import annotations

import pickle
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any, TypeVar

import torch
from lightning import LightningModule
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from actprune.core.errors import StorageError
from actprune.core.files import atomic_path
from actprune.training.resume import CheckpointHooks

Task = TypeVar("Task", bound=LightningModule)

_BROKEN = (RuntimeError, EOFError, OSError, KeyError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile)
_ONE_BY_ONE = threading.RLock()
_RESHAPED: set[type] = set()


class AtomicCheckpoints(TorchCheckpointIO):
    """Lightning's checkpoint files, written atomically: ``Trainer(plugins=[AtomicCheckpoints()])``."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint; a remote path is left to Lightning.

        Raises:
            StorageError: the disk is full, or the folder cannot be written; an older file of this name is intact.
        """
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        try:
            with atomic_path(path) as temporary, temporary.open("wb") as file:  # no path: PyTorch takes none without a suffix
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:  # torch tells of a full disk by a RuntimeError
            raise StorageError(
                f"the checkpoint {path} could not be written ({error}); checkpoints written before are intact: free some "
                "space or make the folder writable, and go on from the last one"
            ) from error


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest file in a folder, or below it, that loads as a checkpoint to go on from; None if there is none.

    Below: the ``/`` of ``{prune/step:.0f}`` in a file name makes folders.

    One that is whole but holds classes of yours, in its hyperparameters for one, counts: ``fit`` loads it with
    ``weights_only=False``.
    """
    files = [path for path in folder.rglob("*.ckpt") if path.is_file() and not path.name.startswith(".")]  # those are half done
    newest_first = sorted(files, key=lambda path: path.stat().st_mtime_ns, reverse=True)
    return next((path for path in newest_first if goes_on(path)), None)


def goes_on(path: Path) -> bool:
    """Whether a file loads as a checkpoint to go on from."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except _BROKEN as error:
        return "Unsupported global" in str(error) and zipfile.is_zipfile(path)
    return isinstance(content, dict) and "optimizer_states" in content  # others hold weights only


def load_task(kind: type[Task], path: Any, **options: Any) -> Task:
    """``kind.load_from_checkpoint(path, **options)`` for checkpoints of pruned LightningModules.

    Args:
        kind: the LightningModule's class, which need not know of pruning.
        path: a checkpoint, with or without pruning steps in it.
        options: as ``load_from_checkpoint`` takes them: arguments of the class, ``map_location``, ``strict``.

    Returns:
        The module in the shape of the checkpoint; it carries its surgery records, and may be trained on with the callback.
    """
    with _reshaping(kind):
        return kind.load_from_checkpoint(path, **{"weights_only": True, **options})


@contextmanager
def _reshaping(kind: type[LightningModule]) -> Iterator[None]:
    """Modules of a class that load a checkpoint inside the block take its shapes first, one block at a time.

    The class itself has the hook, no subclass: LightningCLI's checkpoints say which class they are of.
    """
    with _ONE_BY_ONE:
        if kind in _RESHAPED:  # a teacher of the same class, loaded while the module is made
            yield
            return
        own, original = vars(kind).get("on_load_checkpoint"), kind.on_load_checkpoint

        def load(self: LightningModule, checkpoint: dict[str, Any]) -> None:
            object.__setattr__(self, "on_load_checkpoint", MethodType(original, self))  # what runs after the reshaping
            CheckpointHooks.attach(self).load(checkpoint)

        kind.on_load_checkpoint = load  # type: ignore[method-assign, assignment]
        _RESHAPED.add(kind)
        try:
            yield
        finally:
            _RESHAPED.remove(kind)
            if own is None:
                del kind.on_load_checkpoint
            else:
                kind.on_load_checkpoint = own  # type: ignore[method-assign]
