"""A callback that keeps layers within a capacity given beforehand: Graf et al. 2022, arXiv:2202.08070.

Every convolution and linear layer stays within a Lipschitz constant s and a (2, 1) distance b of its initialisation, by
projection after every few optimizer steps, and before every validation, so that what is validated and saved keeps both. A first
weight over s is scaled to it, and is the initialisation from then on, as in the paper. Batch norms are left alone: the limits
are those of the kernels, not of a kernel with the scale behind it.

When units are pruned meanwhile, the initialisation is cut like the network, as its surgery record says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from actprune.capacity import constrain, linear_map, scaled
from actprune.capacity.maps import CONVOLUTIONS
from actprune.core.errors import ConfigError
from actprune.core.hooks import Live
from actprune.core.record import record_of, since
from actprune.surgery.tensors import keep_indices, sliced
from actprune.training.finding import names

_TOLERANCE = 1e-3


class CapacityConstraint(Callback):
    """Keep Lipschitz constants and distances to initialisation of layers under limits while training.

    Args:
        lipschitz: largest Lipschitz constant of a layer, at least 0; None: free.
        distance: largest (2, 1) distance of a layer's weight to its initialisation, at least 0; None: free.
        every: optimizer steps from one projection to the next, at least 1 (15 in the official code).
        modules: dotted names of submodules whose layers are constrained; None: all layers.

    Raises:
        ConfigError: a limit is negative, ``every`` is below 1, or nothing is limited.
    """

    def __init__(
        self,
        lipschitz: float | None = None,
        distance: float | None = None,
        every: int = 15,
        modules: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("lipschitz", lipschitz), ("distance", distance)):
            if value is not None and not value >= 0:
                raise ConfigError(f"{name}={value} must be at least 0, or null for no limit")
        if lipschitz is None and distance is None:
            raise ConfigError("lipschitz=null and distance=null limit nothing; set one, or leave the callback out")
        if every < 1:
            raise ConfigError(f"every={every} must be at least 1 optimizer step")
        self.lipschitz, self.distance, self.every = lipschitz, distance, every
        self.modules = names(modules)
        self._initial: dict[str, Tensor] = {}
        self._removed: dict[str, dict[int, list[int]]] = {}
        """Path of a layer -> dimension -> positions of the original that were gone when its initialisation was taken."""
        self._sizes: dict[str, tuple[int, ...]] = {}
        """Path of a layer -> positions that it reads, (*size) of a convolution's map."""
        self._scaled = False
        self._hooks: list[RemovableHandle] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier run."""
        if stage == "fit" and trainer.current_epoch == 0:
            self._initial, self._removed, self._sizes, self._scaled = {}, {}, {}, False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the initialisation, and watch what layers read.

        Raises:
            ConfigError: a named module is missing, no layer can be constrained, or the strategy holds parameters in pieces.
        """
        if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise ConfigError(
                f"CapacityConstraint needs whole weights, which {type(trainer.strategy).__name__} does not hold; "
                'train on one device or with strategy="ddp"'
            )
        layers = dict(self._layers(pl_module))
        if not layers:
            raise ConfigError("no convolution or linear layer with a plain weight was found; name other modules")
        if not self._initial:
            self._begin_at(pl_module, layers)
        for path, layer in layers.items():
            if isinstance(layer, CONVOLUTIONS):
                self._hooks.append(layer.register_forward_pre_hook(Live(self._watch(path)), with_kwargs=True))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Scale the initialisation to the limit once sizes are known: right before the first step."""
        if self._scaled or self.lipschitz is None:
            return
        layers = dict(self._known(pl_module))
        for path, layer in layers.items():
            placed = linear_map(layer, self._shape(path, layer))
            layer.weight.data.copy_(scaled(placed, self.lipschitz, tolerance=_TOLERANCE))
        self._begin_at(pl_module, layers)
        self._scaled = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Project when a projection is due."""
        if trainer.global_step % self.every == 0:
            self.project(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Project, so that what is validated keeps the limits."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.project(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Project what the last steps moved."""
        self.project(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop watching."""
        while self._hooks:
            self._hooks.pop().remove()

    @torch.no_grad()
    def project(self, pl_module: LightningModule) -> None:
        """Put every layer that has run within its limits, in place.

        Raises:
            ConfigError: a layer has another shape than its initialisation, cut as the surgery records say.
        """
        removed = _removed(pl_module)
        for path, layer in self._known(pl_module):
            initial = self._initial[path].to(layer.weight)  # type: ignore[arg-type]
            before = self._removed.get(path, {})
            gone = {dim: since(places, before.get(dim, [])) for dim, places in removed.get(path, {}).items()}
            initial = sliced(initial, {dim: keep_indices(initial.shape[dim], places) for dim, places in gone.items()})
            if initial.shape != layer.weight.shape:
                raise ConfigError(
                    f"{path}.weight has shape {tuple(layer.weight.shape)}, its initialisation {tuple(initial.shape)}, and no "
                    "surgery record tells why; constrain modules that only PruningCallback changes"
                )
            placed = linear_map(layer, self._shape(path, layer))
            weight = constrain(placed, initial, lipschitz=self.lipschitz, distance=self.distance, tolerance=_TOLERANCE)
            layer.weight.copy_(weight)  # type: ignore[operator]

    def state_dict(self) -> dict[str, Any]:
        """The initialisation and the sizes that layers read."""
        return {"initial": self._initial, "removed": self._removed, "sizes": self._sizes, "scaled": self._scaled}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on against the initialisation of the checkpoint."""
        self._initial, self._scaled = dict(state_dict["initial"]), state_dict["scaled"]
        self._removed = dict(state_dict.get("removed", {}))
        self._sizes = {path: tuple(size) for path, size in state_dict["sizes"].items()}

    def _begin_at(self, pl_module: LightningModule, layers: Mapping[str, Any]) -> None:
        """Take these weights as the initialisation; a network may have been cut before."""
        removed = _removed(pl_module)
        self._initial |= {path: layer.weight.detach().clone() for path, layer in layers.items()}
        self._removed |= {path: removed[path] for path in layers if path in removed}

    def _layers(self, pl_module: LightningModule) -> Iterator[tuple[str, nn.Module]]:
        for name in self.modules:
            try:
                pl_module.get_submodule(name)
            except AttributeError as error:
                raise ConfigError(
                    f"modules={list(self.modules)}: there is no {name!r} in {type(pl_module).__name__}"
                ) from error
        for path, module in pl_module.named_modules():
            wanted = not self.modules or any(path == name or path.startswith(f"{name}.") for name in self.modules)
            if wanted and isinstance(module, (*CONVOLUTIONS, nn.Linear)) and module._parameters.get("weight") is not None:
                yield path, module

    def _known(self, pl_module: LightningModule) -> Iterator[tuple[str, Any]]:
        for path in self._initial:
            layer = pl_module.get_submodule(path)
            if isinstance(layer, nn.Linear) or path in self._sizes:
                yield path, layer

    def _shape(self, path: str, layer: Any) -> tuple[int, ...]:
        return (layer.in_features,) if isinstance(layer, nn.Linear) else (layer.in_channels, *self._sizes[path])

    def _watch(self, path: str) -> Any:
        def watch(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            read = next(iter((*args, *kwargs.values())))
            self._sizes[path] = tuple(read.shape[2 - module.weight.dim() :])

        return watch


def _removed(pl_module: LightningModule) -> dict[str, dict[int, list[int]]]:
    """Path of every layer whose weight was cut -> dimension -> positions of the original that are gone."""
    return {
        f"{path}.{name}".lstrip(".").removesuffix(".weight"): {dim: list(places) for dim, places in dims.items()}
        for path, module in pl_module.named_modules()
        for name, dims in record_of(module).removed.items()
        if name.rpartition(".")[2] == "weight"
    }


def initial_weights(checkpoint: Any) -> dict[str, Tensor]:
    """Path of every layer that was constrained -> the weight that its distance was kept to; empty without the callback."""
    held = checkpoint.get("callbacks", {}) if isinstance(checkpoint, Mapping) else {}
    return dict(held.get(CapacityConstraint.__qualname__, {}).get("initial", {}))
