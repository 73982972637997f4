"""The proximal half of an optimizer: after torch's step, every unit is shrunk by its penalty.

    p <- argmin_z 1/2 sum_i d_i (z_i - p_i)^2 + a r(z)

d is the metric and a the rate of the step that torch just made; ``optim.py`` says what they are for which optimizer.
A unit whose parameters moved at different rates a_i is shrunk under the metric d_i a / a_i, which is the same
problem.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from actprune.core.errors import ConfigError
from actprune.sparsity.blocks import Arenas, Blocks, check
from actprune.sparsity.groups import RowGroup, input_groups
from actprune.sparsity.penalty import Penalty, make_penalty

Closure = Callable[[], Any]
Options = dict[str, Any]
_PENALTY_KEYS = ("penalty", "lam", "gamma")


class Proximal(torch.optim.Optimizer):
    """Stands before a torch optimizer in the bases of a class and applies the penalty after its step.

    Every param group holds ``penalty`` (a name or None), ``lam`` and ``gamma`` as plain values, so that a state dict
    loads with ``weights_only=True`` and a schedule may change ``lam`` as it does ``lr``.
    """

    def _prepare(self, penalty: Penalty | str | None, lam: float | None, gamma: float | None, **more: Any) -> None:
        """Set what ``add_param_group`` needs, before torch's constructor calls it."""
        self._extra: Options = {**_plain(penalty, lam, gamma), **more}
        self._groups: tuple[RowGroup, ...] | None = None
        self._built: tuple[tuple[Any, ...], list[tuple[list[int], Blocks]]] | None = None

    def add_param_group(self, param_group: Options) -> None:
        """Add parameters with their own options; ``penalty`` may be an object, a name or None.

        Raises:
            ConfigError: the penalty is unknown or incomplete.
        """
        self.defaults.update(self._extra)
        given = param_group
        if isinstance(param_group.get("penalty"), Penalty):
            given = {**param_group, **_plain(param_group["penalty"], None, None)}
        elif any(key in param_group for key in _PENALTY_KEYS):
            given = {**param_group, **_plain(**{key: param_group.get(key, self._extra[key]) for key in _PENALTY_KEYS})}
        super().add_param_group(given)

    @property
    def groups(self) -> tuple[RowGroup, ...] | None:
        """The units that were chosen; None = the paper's."""
        return self._groups

    def held(self, group: RowGroup) -> RowGroup | None:
        """The part of some units that lies in parameters of this optimizer; None where there is none."""
        mine = {id(p) for options in self.param_groups for p in options["params"]}
        pieces = tuple(piece for piece in group.pieces if id(piece.param) in mine)
        return RowGroup(group.name, pieces) if pieces else None

    def regroup(self, groups: Sequence[RowGroup] | None) -> None:
        """Choose the units that shrink together, e.g. ``unit_groups(model, graph)``; call again after surgery.

        Args:
            groups: units over parameters of this optimizer; None = the paper's input channels, found anew when
                parameters change.

        Raises:
            ConfigError: this optimizer does not hold one of the parameters.
        """
        self._groups = None if groups is None else tuple(groups)
        self._built = None
        if groups is not None:
            self._build(self._owners(only_live=False))

    def step(self, closure: Closure | None = None) -> Any:
        """Step as torch does, then shrink every unit of every parameter that has a gradient.

        Returns:
            What ``closure`` returned, or None.

        Raises:
            ConfigError: the group MCP is not exact for a unit, or the groups are stale after surgery.
        """
        loss = self._torch_step(closure)
        with torch.no_grad():
            owners = self._owners(only_live=True)
            key = tuple((id(p), number, p.shape, p.device, p.dtype) for p, number in owners)
            if self._built is None or self._built[0] != key:
                self._built = (key, self._build(owners))
            for numbers, units in self._built[1]:
                self._shrink([self.param_groups[number] for number in numbers], units)
        return loss

    @torch.no_grad()
    def penalty_value(self) -> float:
        """Sum of the penalties at the current parameters: what belongs to the loss that is really minimised."""
        total = 0.0
        for numbers, units in self._build(self._owners(only_live=False)):
            penalty = _penalty([self.param_groups[number] for number in numbers])
            squares = [x.square() for x in units.read(units.params)]
            total += float(penalty.value(units.reduce(squares, "sum").sqrt(), units.weights).sum(dtype=torch.float64))
        return total

    def __getstate__(self) -> Options:
        """Torch's state and the units, for copies and pickles."""
        return {**super().__getstate__(), "_groups": self._groups, "_extra": self._extra}

    def __setstate__(self, state: Options) -> None:
        """Take a state; one of the torch optimizer of the same kind keeps the penalty given here."""
        super().__setstate__(state)
        self._built = None
        for group in self.param_groups:
            for key, value in self._extra.items():
                group.setdefault(key, value)

    def _torch_step(self, closure: Closure | None) -> Any:
        """Torch's own step without its wrapper: the one around our ``step`` runs the step hooks already."""
        step = super().step.__func__  # type: ignore[attr-defined]
        return (step.__wrapped__ if getattr(step, "hooked", False) else step)(self, closure)

    def _metric(self, params: Sequence[Tensor], options: Sequence[Options]) -> tuple[list[Tensor] | None, list[float]]:
        """Metric of every parameter (None = ones) and the rate at which it moved under that metric."""
        raise NotImplementedError

    def _shrink(self, options: list[Options], units: Blocks) -> None:
        metrics, rates = self._metric(units.params, options)
        rate = max(rates)
        if rate == 0:
            return
        if min(rates) == 0:
            raise ConfigError(
                f"some parameters of a unit step at the rate 0 and others at {rate:g}; what does not move cannot "
                "shrink: give that param group penalty=None, or give both one lr schedule"
            )
        if min(rates) != rate:
            metrics = [torch.ones_like(p) for p in units.params] if metrics is None else metrics
            torch._foreach_mul_(metrics, [rate / own for own in rates])
        penalty = _penalty(options)
        units.reset()
        x = units.read(units.params)
        units.write_(penalty.prox(x, rate, units.weights, None if metrics is None else units.read(metrics), units))

    def _owners(self, only_live: bool) -> list[tuple[Tensor, int]]:
        """Parameters under a penalty with the number of their param group."""
        return [
            (p, number)
            for number, group in enumerate(self.param_groups)
            if acts(group)
            for p in group["params"]
            if p.grad is not None or not only_live
        ]

    def _build(self, owners: list[tuple[Tensor, int]]) -> list[tuple[list[int], Blocks]]:
        """The units of these parameters: per set of param groups and device, with the param group of each parameter."""
        number_of = {id(p): number for p, number in owners}
        groups = input_groups(p for p, _ in owners) if self._groups is None else self._groups
        check(groups)
        held = {id(p) for group in self.param_groups for p in group["params"]}
        alike: dict[tuple[Any, ...], list[RowGroup]] = {}
        for group in groups:
            missing = [tuple(piece.param.shape) for piece in group.pieces if id(piece.param) not in held]
            if missing:
                raise ConfigError(
                    f"group {group.name} has {len(missing)} parameters that this optimizer does not hold, the first of "
                    f"shape {missing[0]}; after surgery call "
                    "optimizer.regroup(unit_groups(model, graph)) with the new graph"
                )
            pieces = tuple(piece for piece in group.pieces if id(piece.param) in number_of)
            if pieces:
                numbers = frozenset(number_of[id(piece.param)] for piece in pieces)
                alike.setdefault((numbers, pieces[0].param.device), []).append(RowGroup(group.name, pieces))
        arenas: Arenas = {}
        built = [Blocks(chosen, arenas) for chosen in alike.values()]
        return [([number_of[id(p)] for p in units.params], units) for units in built]


def acts(group: Options) -> bool:
    """Whether a param group is under a penalty."""
    return group["penalty"] is not None and group["lam"] != 0


def _plain(penalty: Penalty | str | None, lam: float | None, gamma: float | None) -> Options:
    """A penalty as the plain values that a param group holds."""
    if isinstance(penalty, Penalty):
        if lam is not None or gamma is not None:
            raise ConfigError(
                f"lam={lam} and gamma={gamma} are given beside {penalty}; "
                "give numbers inside the object or beside a name, not both"
            )
        return {"penalty": penalty.name, "lam": penalty.lam, "gamma": getattr(penalty, "gamma", None)}
    if penalty is not None:
        make_penalty(penalty, lam, gamma)
    return {"penalty": penalty, "lam": lam, "gamma": gamma}


def _penalty(options: Sequence[Options]) -> Penalty:
    """The one penalty of a set of param groups."""
    first, *others = {make_penalty(*(option[key] for key in _PENALTY_KEYS)) for option in options}
    if others:
        raise ConfigError(
            f"one unit has parameters under {1 + len(others)} penalties: {', '.join(sorted(map(repr, [first, *others])))}; "
            "give the param groups that share units the same penalty, lam and gamma, or None"
        )
    return first
