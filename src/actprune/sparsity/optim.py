"""Proximal SGD, Adam and AdamW: torch's optimizers with an exact group penalty.

    step     torch's step                            (AdamW: without its decay)
    decay    p <- p - lr wd p                        (AdamW)
    prox     metric 1 (SGD) or sqrt(v) + eps (Adam, AdamW), threshold rate * lam * sqrt(n)

Source: Deleu & Bengio 2021, arXiv:2102.03869: this order, the metric (v not bias-corrected), rate = lr and eps = 1e-6
are theirs.

Adam really moves at the rate lr / (1 - b1^t) under the metric sqrt(v / (1 - b2^t)) + eps. Its exact proximal step has
that rate and metric, which is, eps apart, the rate lr sqrt(1 - b2^t) / (1 - b1^t) under sqrt(v):
``exact_threshold=True``. The two agree as t grows; the paper's threshold is 3 times the exact one at t = 1 and 7
times around t = 12.

SGD with momentum moves by up to lr (1 - dampening) / (1 - momentum) per unit of gradient, and that is its rate: with
lr alone it would settle where the penalty is 1 - momentum as strong as ``lam`` says. So ``lam`` means the same for
all three: they minimise loss + penalty.

Deviations: where no penalty acts (``penalty=None`` or ``lam=0``) the update is torch's, bit for bit, AdamW's decay
first. Parameters without gradient are neither moved nor shrunk. ``fused``, ``capturable`` and ``differentiable`` are
not offered: the prox is none of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from actprune.sparsity.groups import RowGroup
from actprune.sparsity.penalty import Penalty
from actprune.sparsity.proximal import Closure, Options, Proximal, acts


class ProxSGD(Proximal, torch.optim.SGD):
    """torch's SGD followed by the proximal operator of a group penalty.

    Args:
        params: as for every torch optimizer; param groups may set ``penalty``, ``lam`` and ``gamma``.
        lr: learning rate.
        momentum: momentum factor.
        dampening: dampening of the momentum.
        weight_decay: L2 penalty in the gradient.
        nesterov: Nesterov momentum.
        penalty: ``GroupLasso(...)``, ``GroupMCP(...)``, their names with ``lam`` (and ``gamma``), or None.
        lam: strength per unit before the factor sqrt(n), with a name.
        gamma: where the group MCP becomes flat, in units of its strength, with a name; must exceed lr / (1 - momentum).
        groups: the units, e.g. ``unit_groups(model, graph)``; None = the paper's input channels and columns.
        maximize: maximise instead.
        foreach: as in torch.

    Raises:
        ConfigError: the penalty is unknown or incomplete, or ``groups`` holds other parameters than ``params``.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        penalty: Penalty | str | None = None,
        lam: float | None = None,
        gamma: float | None = None,
        groups: Sequence[RowGroup] | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        self._prepare(penalty, lam, gamma)
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize, foreach=foreach)
        self.regroup(groups)

    def _metric(self, params: Sequence[Tensor], options: Sequence[Options]) -> tuple[list[Tensor] | None, list[float]]:
        return None, [float(option["lr"]) * _reach(option) for option in options]


def _reach(option: Options) -> float:
    """Sum of the weights with which SGD's momentum comes to use one gradient."""
    return (1 - option["dampening"]) / (1 - option["momentum"]) if option["momentum"] else 1.0


class _AdamMetric(Proximal):
    """The metric that Adam and AdamW move under."""

    def _metric(self, params: Sequence[Tensor], options: Sequence[Options]) -> tuple[list[Tensor] | None, list[float]]:
        states = [self.state[p] for p in params]
        moments = [s["max_exp_avg_sq" if o["amsgrad"] else "exp_avg_sq"] for s, o in zip(states, options, strict=True)]
        metrics = list(torch._foreach_sqrt(moments))
        rates = [float(option["lr"]) for option in options]
        if any(option["exact_threshold"] for option in options):
            corrections = [_corrections(state, option) for state, option in zip(states, options, strict=True)]
            rates = [rate / first for rate, (first, _) in zip(rates, corrections, strict=True)]
            torch._foreach_div_(metrics, [second**0.5 for _, second in corrections])
        torch._foreach_add_(metrics, [float(option["eps"]) for option in options])
        return metrics, rates


def _corrections(state: Options, option: Options) -> tuple[float, float]:
    """Bias corrections 1 - b^t of the two moments where they are asked for, else ones."""
    if not option["exact_threshold"]:
        return 1.0, 1.0
    first, second = (1 - beta ** float(state["step"]) for beta in option["betas"])
    return first, second


class ProxAdam(_AdamMetric, torch.optim.Adam):
    """torch's Adam followed by the weighted proximal operator of a group penalty.

    Args:
        params: as for every torch optimizer; param groups may set ``penalty``, ``lam``, ``gamma`` and
            ``exact_threshold``.
        lr: learning rate.
        betas: decay of the two moments.
        eps: floor of the metric; 1e-6 as in the paper, where torch has 1e-8.
        weight_decay: L2 penalty in the gradient.
        amsgrad: use the maximum of the second moments, also as metric.
        penalty: ``GroupLasso(...)``, ``GroupMCP(...)``, their names with ``lam`` (and ``gamma``), or None.
        lam: strength per unit before the factor sqrt(n), with a name.
        gamma: where the group MCP becomes flat, in units of its strength, with a name; ``gamma > lr / eps`` is always
            exact.
        exact_threshold: the bias-corrected rate and metric that Adam really moves with, instead of the paper's.
        groups: the units, e.g. ``unit_groups(model, graph)``; None = the paper's input channels and columns.
        maximize: maximise instead.
        foreach: as in torch.

    Raises:
        ConfigError: the penalty is unknown or incomplete, or ``groups`` holds other parameters than ``params``.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        penalty: Penalty | str | None = None,
        lam: float | None = None,
        gamma: float | None = None,
        exact_threshold: bool = False,
        groups: Sequence[RowGroup] | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        self._prepare(penalty, lam, gamma, exact_threshold=exact_threshold)
        super().__init__(params, lr, (betas[0], betas[1]), eps, weight_decay, amsgrad, maximize=maximize, foreach=foreach)
        self.regroup(groups)


class ProxAdamW(_AdamMetric, torch.optim.AdamW):
    """torch's AdamW with the paper's order: step, decay, prox. Arguments as ``ProxAdam``; the decay is decoupled.

    Raises:
        ConfigError: the penalty is unknown or incomplete, or ``groups`` holds other parameters than ``params``.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        penalty: Penalty | str | None = None,
        lam: float | None = None,
        gamma: float | None = None,
        exact_threshold: bool = False,
        groups: Sequence[RowGroup] | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        self._prepare(penalty, lam, gamma, exact_threshold=exact_threshold)
        super().__init__(params, lr, (betas[0], betas[1]), eps, weight_decay, amsgrad, maximize=maximize, foreach=foreach)
        self.regroup(groups)

    def _torch_step(self, closure: Closure | None) -> Any:
        late = [(group, group["weight_decay"]) for group in self.param_groups if acts(group)]
        for group, _ in late:
            group["weight_decay"] = 0.0
        try:
            loss = super()._torch_step(closure)
        finally:
            for group, decay in late:
                group["weight_decay"] = decay
        with torch.no_grad():
            for group, decay in late:
                live = [p for p in group["params"] if p.grad is not None]
                if decay and live:
                    torch._foreach_mul_(live, 1 - float(group["lr"]) * decay)
        return loss
