"""Write a network, pruned or not, for use elsewhere: ONNX, a ``torch.export`` program, or weights with the surgery record.

    onnx            network.onnx   any ONNX runtime; opset 18
    torch_export    network.pt2    torch alone, without the code of the model
    state_dict      network.pt     torch and actprune, with the code of the model: ``load_pruned``

The first dimension of every input tensor is the batch and stays free; all other sizes are those of the example. What was
written is run once on the example and compared with the network itself, as far as the packages are there, so a file that
computes something else is an error and not a surprise.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from actprune.core.calling import evaluating
from actprune.core.errors import ConfigError, ExportError
from actprune.core.files import atomic_path
from actprune.surgery import save_pruned

_EXTRA = "pip install 'actprune[export]'"


def export(
    network: nn.Module,
    example_inputs: Tensor | tuple[Tensor, ...],
    folder: str | os.PathLike[str],
    formats: Sequence[str] = ("torch_export", "state_dict"),
) -> dict[str, Path]:
    """Write a network in one or several formats; files are whole or absent.

    Args:
        network: the network, in whatever mode; it is exported in evaluation mode and left as it was.
        example_inputs: what it takes, at least one sample: a tensor, or a tuple of tensors.
        folder: where the files go.
        formats: of ``onnx``, ``torch_export`` and ``state_dict``.

    Returns:
        Format -> file.

    Raises:
        ConfigError: a format is unknown, or the packages that it needs are not installed.
        ExportError: the network cannot be exported, or the exported one computes something else.
    """
    check_formats(formats)
    example = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    example = tuple(x.detach() for x in example)
    batch = tuple(torch.cat([x, x]) if len(x) == 1 else x for x in example)  # a batch of one would be taken for a constant
    with evaluating(network), torch.no_grad():
        expected = [x for x in tree_leaves(network(*batch)) if isinstance(x, Tensor)]
        return {name: _FORMATS[name](network, batch, Path(folder), expected) for name in formats}


def load_exported(path: str | os.PathLike[str]) -> nn.Module:
    """A network that ``export`` wrote as ``torch_export``: a module that takes batches of any size, without the model's code.

    Raises:
        ConfigError: the file is not one of these.
    """
    if Path(path).suffix != ".pt2":
        raise ConfigError(f"{path} is no torch_export file (.pt2); .pt files take load_pruned, .onnx files an ONNX runtime")
    return torch.export.load(str(path)).module()


def check_formats(formats: Sequence[str]) -> None:
    """Refuse unknown formats, and those whose packages are not installed or too old.

    Raises:
        ConfigError: says which.
    """
    if isinstance(formats, str):
        raise ConfigError(f"export={formats!r} must be a list of formats, e.g. [{formats}]")
    for name in formats:
        if name not in _FORMATS:
            raise ConfigError(f"export: {name!r} is not known; choose from {', '.join(_FORMATS)}")
    if "onnx" in formats and torch.__version__ < (2, 7):  # type: ignore[operator]  # fails at batch norm there
        raise ConfigError(f"export to onnx needs PyTorch 2.7 or newer, this is {torch.__version__}; choose another format")
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if "onnx" in formats and missing:
        raise ConfigError(f"export to onnx needs {' and '.join(missing)}; {_EXTRA}")


def _onnx(network: nn.Module, example: tuple[Tensor, ...], folder: Path, expected: list[Tensor]) -> Path:
    path = folder / "network.onnx"
    with atomic_path(path) as temporary, _quiet("onnx", network):
        shapes = tuple({0: torch.export.Dim.DYNAMIC} for _ in example)
        torch.onnx.export(
            network, example, str(temporary), dynamo=True, dynamic_shapes=shapes, external_data=False, verbose=False
        )
        if importlib.util.find_spec("onnxruntime") is not None:
            _compare(path, expected, _run_onnx(temporary, example))
    return path


def _run_onnx(path: Path, example: tuple[Tensor, ...]) -> list[Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    inputs = {put.name: x.cpu().numpy() for put, x in zip(session.get_inputs(), example, strict=True)}
    return [torch.from_numpy(y) for y in session.run(None, inputs)]


def _torch_export(network: nn.Module, example: tuple[Tensor, ...], folder: Path, expected: list[Tensor]) -> Path:
    path = folder / "network.pt2"
    with atomic_path(path) as temporary, _quiet("torch_export", network):
        program = torch.export.export(network, example, dynamic_shapes=_dynamic(network, example))
        torch.export.save(program, temporary)
        found = load_exported(temporary)(*example)
        _compare(path, expected, [x for x in tree_leaves(found) if isinstance(x, Tensor)])
    return path


def _dynamic(network: nn.Module, example: tuple[Tensor, ...]) -> Any:
    import inspect

    parameters = list(inspect.signature(network.forward).parameters.values())
    shapes = [{0: torch.export.Dim.DYNAMIC} for _ in example]
    return (tuple(shapes),) if parameters and parameters[0].kind is parameters[0].VAR_POSITIONAL else tuple(shapes)


def _state_dict(network: nn.Module, example: tuple[Tensor, ...], folder: Path, expected: list[Tensor]) -> Path:
    return save_pruned(network, folder / "network.pt")


_FORMATS: dict[str, Callable[[nn.Module, tuple[Tensor, ...], Path, list[Tensor]], Path]] = {
    "onnx": _onnx,
    "torch_export": _torch_export,
    "state_dict": _state_dict,
}


def _compare(path: Path, expected: list[Tensor], found: list[Tensor]) -> None:
    scale = max((float(x.abs().max()) for x in expected if x.numel()), default=1.0)
    if [x.shape for x in expected] != [x.shape for x in found]:
        worst = float("inf")
    else:
        pairs = zip(expected, found, strict=True)
        worst = max(float((a.cpu().double() - b.cpu().double()).abs().max()) for a, b in pairs) / max(scale, 1e-6)
    if not worst <= 1e-3:
        raise ExportError(
            f"{path.name} computes something else than the network: it differs by {worst:.2g} of the largest output, and "
            "1e-3 is allowed; export another format"
        )


@contextlib.contextmanager
def _quiet(name: str, network: nn.Module) -> Iterator[None]:
    loggers = [logging.getLogger(each) for each in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (ExportError, OSError):
        raise
    except Exception as error:
        first = str(error).strip().splitlines()
        raise ExportError(
            f"{type(network).__name__} cannot be exported as {name} ({type(error).__name__}: {first[0] if first else ''}); "
            "export another format: state_dict always works"
        ) from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
