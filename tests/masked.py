"""The reference of every cut: the full-size model with the removed units' slices zeroed.

Nothing here looks at the channel graph; only the plan's positions are used. Norms that mix channels are replaced by the
norm over the channels that stay, everything else is the user's own forward on tensors of the original size. Where a graph is
given, means and extremes over channels are taken over those that stay too (``reductions.py``).
"""

import copy
import functools
from collections.abc import Mapping
from contextlib import nullcontext

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from actprune.core.calling import call
from actprune.pruning.apart import keep_apart
from actprune.pruning.plans import draft
from actprune.pruning.verify import rehearse
from actprune.surgery import cut
from reductions import over_kept

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


class KeptNorm(nn.Module):
    """A norm over the channels that stay; the others come out as zero."""

    def __init__(self, norm, gone):
        super().__init__()
        self.norm, self.gone = norm, gone
        self.weight, self.bias, self.eps = norm.weight, getattr(norm, "bias", None), norm.eps

    def forward(self, x):
        norm = self.norm
        first = 1 if isinstance(norm, nn.GroupNorm) else x.dim() - len(norm.normalized_shape)
        dims = [first] if isinstance(norm, nn.GroupNorm) else list(range(first, x.dim()))
        keeps = []
        for i, dim in enumerate(dims):
            gone = self.gone.get(i)
            if gone is None:  # no weights: what is zero in every sample has left
                others = tuple(d for d in range(x.dim()) if d != dim)
                keep = (x != 0).any(dim=others)
            else:
                keep = torch.ones(x.shape[dim], dtype=torch.bool)
                keep[gone] = False
            keeps.append(keep.nonzero().squeeze(1))
        index = [torch.arange(n) for n in x.shape]
        for dim, keep in zip(dims, keeps, strict=True):
            index[dim] = keep
        grid = torch.meshgrid(*index, indexing="ij")
        kept = x[grid]

        def own(p):
            for i, keep in enumerate(keeps):
                p = None if p is None else p.index_select(i, keep)
            return p

        if isinstance(norm, nn.GroupNorm):
            alive = torch.zeros(x.shape[1], dtype=torch.bool).index_fill(0, keeps[0], True).view(norm.num_groups, -1)
            whole = (alive == alive[:, :1]).all()  # groups that are units leave whole
            groups = int(alive[:, 0].sum()) if whole else norm.num_groups
            y = F.group_norm(kept, groups, own(norm.weight), own(norm.bias), norm.eps)
        elif isinstance(norm, nn.LayerNorm):
            y = F.layer_norm(kept, kept.shape[first:], own(norm.weight), own(norm.bias), norm.eps)
        else:
            y = F.rms_norm(kept, kept.shape[first:], own(norm.weight), norm.eps)
        return torch.zeros_like(x).index_put(grid, y)


class KeptOther(nn.Module):
    """A norm that somebody else wrote, run on the channels that stay; the others come out as zero."""

    def __init__(self, norm, gone):
        super().__init__()
        size = len(next(norm.parameters(recurse=False)))
        self.keep = _stays(size, gone)
        self.norm = copy.deepcopy(norm)
        for name, value in norm.named_parameters(recurse=False):
            setattr(self.norm, name, nn.Parameter(value.index_select(0, self.keep)))
        if hasattr(norm, "normalized_shape"):
            self.norm.normalized_shape = (len(self.keep),)
        for name, value in vars(norm).items():  # what it checks of its input
            if type(value) is int and value == size:
                setattr(self.norm, name, len(self.keep))
        self.weight = self.norm.weight
        first = isinstance(norm, nn.GroupNorm) or "2d" in type(norm).__name__ or _channels_first(norm)
        self.dim = getattr(norm, "channel_dim", 1 if first else -1)

    def forward(self, x, *others):
        gates = (z if z is None else z.index_select(self.dim, self.keep) for z in others)
        said = self.norm(x.index_select(self.dim, self.keep), *gates)
        y, *rest = said if isinstance(said, tuple) else (said,)
        shape = list(y.shape)
        shape[self.dim] = x.shape[self.dim]
        whole = y.new_zeros(shape).index_copy(self.dim, self.keep, y)
        return (whole, *rest) if isinstance(said, tuple) else whole


class KeptConv(nn.Module):
    """A convolution that computes its weight from its parameters, run on the channels that stay; the others are zero."""

    def __init__(self, conv, removed):
        super().__init__()
        self.conv = copy.deepcopy(conv)
        for name, by_dim in removed.items():
            owner, _, leaf = name.rpartition(".")
            tensor = self.conv.get_parameter(name)
            for dim, gone in by_dim.items():
                tensor = tensor.index_select(dim, _stays(tensor.shape[dim], gone))
            setattr(self.conv.get_submodule(owner), leaf, nn.Parameter(tensor))
        source = next(
            name
            for name in ("parametrizations.weight.original1", "parametrizations.weight.original", "weight")
            if name in removed
        )
        by_dim = removed[source]
        self.outer = _stays(conv.out_channels, by_dim.get(0, []))
        self.width = conv.out_channels
        if conv.groups > 1:  # whole groups leave
            self.conv.groups = conv.groups * len(self.outer) // conv.out_channels
            each_out, each_in = conv.out_channels // conv.groups, conv.in_channels // conv.groups
            groups = self.outer[::each_out] // each_out
            self.inner = (groups[:, None] * each_in + torch.arange(each_in)).flatten()
        else:
            self.inner = _stays(conv.in_channels, by_dim.get(1, []))
        self.conv.in_channels, self.conv.out_channels = len(self.inner), len(self.outer)

    def forward(self, x):
        y = self.conv(x.index_select(1, self.inner))
        return y.new_zeros(y.shape[0], self.width, *y.shape[2:]).index_copy(1, self.outer, y)


def _stays(size, gone):
    return torch.tensor(sorted(set(range(size)) - set(gone)))


def _computes_its_weight(module):
    """A convolution with a parametrized or standardised weight."""
    return isinstance(module, CONVS) and type(module) not in CONVS and not hasattr(module, "weight_g")


def _channels_first(norm):
    return getattr(norm, "data_format", "") == "channels_first"


def _written_elsewhere(module):
    """A norm over channels that is no module of PyTorch's own."""
    own = list(module.parameters(recurse=False))
    named = "norm" in type(module).__name__.lower() and not type(module).__module__.startswith("torch.nn")
    named = named and getattr(module, "weight", None) is not None and not isinstance(module, nn.modules.batchnorm._NormBase)
    return named and bool(own) and all(p.dim() == 1 for p in own)


def masked(model, plan, graph=None, *, consumers_only=False):
    """A deep copy of the model with the plan's slices at zero; ``consumers_only`` leaves what produces the units alone.

    ``graph``: says where channels stand in activations, for means and extremes over them.
    """
    original, twin = model, copy.deepcopy(model)
    tensors = dict(twin.named_parameters()) | dict(twin.named_buffers())
    for name in plan.removed.keys() - tensors.keys():  # a plain attribute
        path, _, leaf = name.rpartition(".")
        tensors[name] = getattr(twin.get_submodule(path), leaf)
    with torch.no_grad():
        for name, dims in plan.removed.items():
            for dim, positions in dims.items():
                held = list(_holders(twin, tensors[name]))
                if any(_zeroed(*holder, dim, consumers_only) for holder in held) or not (held or consumers_only):
                    tensors[name].index_fill_(dim, torch.tensor(positions), 0)
    for path, module in list(twin.named_modules()):
        parent, _, leaf = path.rpartition(".")
        if hasattr(module, "keep_only"):  # norms written by hand in the zoo
            module.keep_only(plan.removed.get(module.follows or f"{path}.weight", {}).get(0, []))
        elif _computes_its_weight(module):
            own = {n: plan.removed[f"{path}.{n}"] for n, _ in module.named_parameters() if f"{path}.{n}" in plan.removed}
            if any("weight" in name for name in own):
                setattr(twin.get_submodule(parent), leaf, KeptConv(original.get_submodule(path), own))
        elif _written_elsewhere(module):
            gone = plan.removed.get(f"{path}.weight", {}).get(0, [])
            setattr(twin.get_submodule(parent), leaf, KeptOther(module, gone))
        elif isinstance(module, NORMS):
            by_dim = plan.removed.get(f"{path}.weight", {})
            gone = {i: by_dim.get(i, []) for i in range(8)} if module.weight is not None else {}
            setattr(twin.get_submodule(parent), leaf, KeptNorm(module, gone))
    if graph is not None:
        own = (KeptNorm, KeptOther, KeptConv)
        replaced = [path for path, module in twin.named_modules() if isinstance(module, own)]
        twin.over_kept = functools.partial(over_kept, twin, graph, plan, replaced)
    return twin


def _holders(model, tensor):
    for module in model.modules():
        for leaf, value in [*module._parameters.items(), *module._buffers.items()]:
            if value is tensor:
                yield module, leaf


def _zeroed(owner, leaf, dim, consumers_only):
    if leaf in ("original1", "weight_v"):
        return dim == 1  # weight norm: a zero row of v would be 0 / 0
    if not consumers_only:
        return True
    if isinstance(owner, TRANSPOSED):
        return leaf == "weight" and dim == 0
    if isinstance(owner, (*CONVS, nn.Linear)):
        return leaf == "weight" and dim == 1
    if isinstance(owner, nn.RNNBase):
        return leaf.startswith("weight") and dim == 1
    return not isinstance(owner, (nn.modules.batchnorm._NormBase, *NORMS, nn.Embedding, nn.EmbeddingBag, nn.PReLU))


def outputs(model, example):
    """Every tensor of the output, in evaluation mode, without gradients; beside logits, not the states inside."""
    modes = {m: m.training for m in model.modules()}
    model.eval()
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it would read the weights of a norm past its forward
    try:
        with torch.no_grad(), getattr(model, "over_kept", nullcontext)():
            output = call(model, example)
            if isinstance(output, Mapping) and any("logits" in key for key in output):
                output = [value for key, value in output.items() if key == "loss" or "logits" in key or "boxes" in key]
            return [x for x in tree_leaves(output) if isinstance(x, torch.Tensor)]
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for module, mode in modes.items():
            module.training = mode


def difference(ours, reference):
    """Largest difference relative to the largest value, over all outputs."""
    assert len(ours) == len(reference) > 0
    worst = 0.0
    for a, b in zip(ours, reference, strict=True):
        assert a.shape == b.shape
        assert torch.isfinite(a).all()  # else no difference is larger than none
        assert torch.isfinite(b).all()
        worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp(min=1e-3)))
    return worst


def _grouped_flops(rows, matrices, *_args, **_kwargs):
    """Every row times its expert's matrix, (N, in) and (E, in, out): PyTorch's counter does not know the operator."""
    assert len(rows) == 2
    assert len(matrices) == 3
    return 2 * rows[0] * rows[1] * matrices[2]


def _sparse_flops(_added, one, other, *_args, **_kwargs):
    """Counted as the product of full matrices, as PyTorch counts ``mm`` of a sparse one."""
    return 2 * one[0] * one[1] * other[1]


_UNCOUNTED = {torch.ops.aten._sparse_addmm: _sparse_flops}
if hasattr(torch.ops.aten, "_grouped_mm"):
    _UNCOUNTED[torch.ops.aten._grouped_mm] = _grouped_flops


def counted(model, example):
    """(parameters, multiply-adds) counted by PyTorch, not by us."""
    learning = [p for p in model.parameters() if p.requires_grad]
    for parameter in learning:  # the counter's module tracker fails on a view of one that is an argument
        parameter.requires_grad_(False)
    fused = torch._C._get_mkldnn_enabled()
    if any(isinstance(module, nn.RNNBase) for module in model.modules()):  # the counter does not know the fused kernel
        torch._C._set_mkldnn_enabled(False)
    with FlopCounterMode(display=False, custom_mapping=_UNCOUNTED) as counter, sdpa_kernel(SDPBackend.MATH):
        outputs(model, example)
    torch._C._set_mkldnn_enabled(fused)
    for parameter in learning:
        parameter.requires_grad_(True)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


def random_units(graph, seed, most=None):
    """Units of every unlocked group, drawn: none, a few, or all but one; fewer where widths have to differ."""
    generator = torch.Generator().manual_seed(seed)
    units = {}
    for group in graph.unlocked:
        limit = group.size - 1 if most is None else min(group.size - 1, most)
        n = int(torch.randint(0, limit + 1, (), generator=generator))
        units[group.name] = torch.randperm(group.size, generator=generator)[:n].tolist()
    leaving = keep_apart(graph, units, {name: len(drawn) for name, drawn in units.items()})
    return {name: sorted(units[name][:n]) for name, n in leaving.items()}


def check_built(build, x, sizes):
    """A network has groups of these sizes once it was rehearsed, and its cuts are exact; returns its graph."""
    torch.manual_seed(0)
    graph, _ = rehearse(build().double(), x)
    assert sorted(group.size for group in graph.unlocked) == sizes, str(graph)
    check_cuts(build, graph, x)
    return graph


def check_cuts(build, graph, x, seeds=3, counts=True):
    """Random cuts of a network in float64 equal the masked network, and leave as much as planned, where PyTorch counts it."""
    for seed in range(seeds):
        torch.manual_seed(seed)
        twin = build().double()
        plan = draft(twin, graph, random_units(graph, seed))
        reference = outputs(masked(twin, plan, graph), x)
        cut(twin, plan, x)
        assert difference(outputs(twin, x), reference) < 1e-11
        if counts:
            assert counted(twin, x) == (plan.params_after, plan.macs_after)


def exact(build, x, seeds=3):
    """The graph of a network, of which several random cuts equal the masked network."""
    torch.manual_seed(0)
    graph, _ = rehearse(build().double().eval(), x)
    check_cuts(lambda: build().eval(), graph, x, seeds)
    return graph
