"""Read the activations of many places of a network with one kernel: on a GPU a launch costs more than what it reads.

``read`` takes what ``at_positions`` does, at the positions that ``sample_positions`` draws, or the mean of each map; positions
are drawn on the device, of the ids, bit for bit the same (see ``counter``). It widens to float32. ``differ`` compares tensors
in pairs.

To be imported where it is used: needs Triton, which PyTorch brings along for GPUs on Linux, and what Triton needs to compile.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from actprune.core.tensors import sent

TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float64: tl.float64}
"""What is read."""

_COMPILED: dict[object, Any] = {}
_BLOCK, _WORDS = 1024, 8192
_LINES, _WIDTH = 32, 64
_HALF = 31
"""Bits of an id that a kernel is told at once: what fits in 32 bits is of one type whatever it is, so it is compiled once."""
_GAMMA = tl.constexpr(0x9E3779B97F4A7C15)
_FIRST = tl.constexpr(0xBF58476D1CE4E5B9)
_SECOND = tl.constexpr(0x94D049BB133111EB)
_SEED = tl.constexpr(0xE220A8397B1DCDAF)  # splitmix64(0)
_ROTATION, _SAMPLE = tl.constexpr((1 << 64) - 1), tl.constexpr((1 << 64) - 2)  # -1 and -2


class Source(NamedTuple):
    """What is read at one place, and where it is written: columns of (rows, units, k), of which one row is a sample."""

    place: int
    """Which of the places that a kernel is told of."""
    channels: int
    space: int
    """Positions of a map."""
    k: int
    """Of these, how many are read; 1 for means."""
    how: int
    """``DRAWN``: the k are drawn; ``ALL``: they are all there are; ``MEAN``."""
    column: int
    units: int
    base: int
    """Where (rows, units, k) begins, in elements."""


ALL, DRAWN, MEAN = 0, 1, 2
_FIELDS = tl.constexpr(8)
_IS_DRAWN, _IS_MEAN, _BITS = tl.constexpr(DRAWN), tl.constexpr(MEAN), tl.constexpr(_HALF)


class Launch(NamedTuple):
    """What one kernel reads."""

    sources: Tensor
    """(S, 8) int32, fields of ``Source``."""
    widest: int
    """The greatest channels times k of what is not a mean."""
    widest_mean: int
    """The greatest channels of means."""
    dtype: torch.dtype
    """Of what is read, one of ``TYPES``."""


def try_out(device: torch.device) -> None:
    """Compile and run all kernels once; raises where that does not work."""
    x, out = torch.zeros(1, 1, 1, device=device), torch.ones(2, device=device)
    heads = torch.tensor([x.data_ptr(), 0], device=device)
    launch = launched([Source(0, 1, 1, 1, how, 0, 1, base) for base, how in enumerate((ALL, MEAN))], x.dtype, device)
    for ids in (range(1), range(1), None, None):  # the second time as compiled
        out.fill_(1)
        read(launch, heads, out, 0, 1, ids, False)
        if out.any() or differ([(x, x.clone()), (x, x + 1)], device).tolist() != [0, 1]:
            raise RuntimeError("kernels of Triton run, and compute something else")


def launched(sources: list[Source], dtype: torch.dtype, device: torch.device) -> Launch:
    """Sources of one type as a kernel takes them."""
    widest, widest_mean = (
        max((source.channels * source.k for source in sources if (source.how == MEAN) == is_mean), default=0)
        for is_mean in (False, True)
    )
    with torch.inference_mode(False):
        return Launch(torch.tensor(sources, dtype=torch.int32, device=device), widest, widest_mean, dtype)


def takes(ids: range) -> bool:
    """Whether ``read`` can be told these."""
    return 0 <= ids.start < 1 << 2 * _HALF and 0 < ids.step < 1 << _HALF


def read(
    launch: Launch,
    heads: Tensor,  # (L,) or (L + N,) int64
    out: Tensor,  # float32, flat
    row: int,
    n_samples: int,
    ids: range | None,
    halved: bool,
) -> None:
    """Read every place; rows of ``out`` from ``row`` on.

    Args:
        launch: what is read.
        heads: addresses of contiguous (N, channels, space), one per place, on the device; then the samples' ids, if these are
            not given as a range.
        out: where it is written.
        row: of ``out``, that of the first sample.
        n_samples: N.
        ids: of the samples, such that ``takes``.
        halved: where positions are drawn, only the samples of ``every_second`` are read, and other rows are not written.
    """
    programs = max(triton.cdiv(n_samples * launch.widest, _BLOCK), triton.cdiv(n_samples * launch.widest_mean, _LINES))
    first, step = (ids.start, ids.step) if ids is not None else (0, 0)
    high, low = divmod(first, 1 << _HALF)
    arguments = (heads, launch.sources, out, row, n_samples, len(heads) - n_samples, high, low, step)
    constants = (ids is not None, halved, TYPES[launch.dtype], _BLOCK, _LINES, _WIDTH)
    _launch(_read, (programs, len(launch.sources), 1), arguments, constants)


def differ(
    pairs: list[tuple[Tensor, Tensor]],  # contiguous, on the device, of one shape and type
    device: torch.device,
) -> Tensor:
    """Where bits of the first are not those of the second, not 0: int32 (len(pairs),)."""
    words = [x.numel() * x.element_size() // 2 for x, _ in pairs]
    numbers = [x.data_ptr() for x, _ in pairs] + [y.data_ptr() for _, y in pairs] + words
    told = sent(torch.tensor(numbers, dtype=torch.int64, device="cpu"), device)
    found = torch.zeros(len(pairs), dtype=torch.int32, device=device)
    if max(words):
        _launch(_differ, (triton.cdiv(max(words), _WORDS), len(pairs), 1), (told, found, len(pairs)), (_WORDS,))
    return found


def _launch(kernel: Any, grid: tuple[int, int, int], arguments: tuple[Any, ...], constants: tuple[Any, ...]) -> None:
    """Launch a kernel; from the second time on as it was compiled, which spares Triton looking what it is given.

    All numbers are of the same kind every time, and all tensors begin where PyTorch's allocator puts them.
    """
    key = (kernel.fn, constants, arguments[0].device)
    with torch.cuda.device_of(arguments[0]):  # Triton launches on the current device, whichever has the tensors
        if key not in _COMPILED:
            # no floats are multiplied and added here; Triton 3.9 warns where this is left to it
            compiled = kernel[grid](*arguments, *constants, enable_fp_fusion=False)
            if compiled is not None:  # as it is where kernels are interpreted
                _COMPILED[key] = compiled
            return
        try:
            _COMPILED[key][grid](*arguments, *constants)
        except TypeError:  # of older Triton, what is compiled does not take its constants
            _COMPILED[key][grid](*arguments)


@triton.jit
def _mix(x):
    z = x + _GAMMA
    z = (z ^ (z >> 30)) * _FIRST
    z = (z ^ (z >> 27)) * _SECOND
    return z ^ (z >> 31)


@triton.jit(do_not_specialize=["row", "n_samples", "n_addresses", "high", "low", "step"])
def _read(
    heads, sources, out, row, n_samples, n_addresses, high, low, step,
    RANGE: tl.constexpr, HALVED: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr, LINES: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    source = sources + tl.program_id(1) * _FIELDS
    place, channels, space, k = tl.load(source), tl.load(source + 1), tl.load(source + 2), tl.load(source + 3)
    how, column, units, base = tl.load(source + 4), tl.load(source + 5), tl.load(source + 6), tl.load(source + 7)
    x = tl.load(heads + place).to(tl.pointer_type(DTYPE))
    # other places, or the other kind, may need more programs than this one
    if how == _IS_MEAN:
        if tl.program_id(0) < tl.cdiv(n_samples * channels, LINES):
            _means(x, out + base, row, n_samples, channels, space, column, units, LINES, WIDTH)
    elif tl.program_id(0) < tl.cdiv(n_samples * channels * k, BLOCK):
        element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = element < n_samples * channels * k
        sample, channel, stratum = element // (channels * k), (element // k) % channels, element % k
        if RANGE:
            ids = (high.to(tl.int64) << _BITS) + low + sample.to(tl.int64) * step
        else:
            ids = tl.load(heads + n_addresses + sample, mask=inside, other=0)
        key = _mix(ids.to(tl.uint64, bitcast=True) ^ _SEED)
        if HALVED:
            inside = tl.where(how == _IS_DRAWN, inside & ((_mix(key ^ _SAMPLE) >> 63) == 0), inside)
        lower, upper = stratum * space // k, (stratum + 1) * space // k
        drawn = lower + ((_mix(key ^ stratum.to(tl.uint64)) >> 1) % (upper - lower).to(tl.uint64)).to(tl.int32)
        rotation = ((_mix(key ^ _ROTATION) >> 1) % space.to(tl.uint64)).to(tl.int32)
        at = tl.where(how == _IS_DRAWN, (drawn + rotation) % space, stratum)
        value = tl.load(x + (sample.to(tl.int64) * channels + channel) * space + at, mask=inside, other=0).to(tl.float32)
        tl.store(out + base + ((row + sample) * units + column + channel) * k + stratum, value, mask=inside)


@triton.jit
def _means(x, out, row, n_samples, channels, space, column, units, LINES: tl.constexpr, WIDTH: tl.constexpr):
    line = tl.program_id(0) * LINES + tl.arange(0, LINES)
    inside = line < n_samples * channels
    total = tl.zeros((LINES, WIDTH), dtype=tl.float32)
    for start in range(0, space, WIDTH):
        at = start + tl.arange(0, WIDTH)
        read = inside[:, None] & (at < space)[None, :]
        total += tl.load(x + line.to(tl.int64)[:, None] * space + at[None, :], mask=read, other=0).to(tl.float32)
    value = tl.sum(total, 1) / space
    tl.store(out + (row + line // channels) * units + column + line % channels, value, mask=inside)


@triton.jit(do_not_specialize=["n_pairs"])
def _differ(told, found, n_pairs, WORDS: tl.constexpr):
    pair = told + tl.program_id(1)
    x, y = tl.load(pair).to(tl.pointer_type(tl.int16)), tl.load(pair + n_pairs).to(tl.pointer_type(tl.int16))
    word = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    inside = word < tl.load(pair + 2 * n_pairs)
    other = (tl.load(x + word, mask=inside, other=0) != tl.load(y + word, mask=inside, other=0)).to(tl.int32)
    if tl.max(other, 0) > 0:
        tl.store(found + tl.program_id(1), 1)
