"""The contract of every statistic in the package; a new one without a case here fails."""

import importlib
import inspect
import math
import pkgutil
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple, get_origin

import numpy as np
import pytest
import torch

import actprune.statistics
from actprune.core.errors import ConfigError, ObservationError
from actprune.core.views import Statistic
from actprune.statistics import (
    Activity,
    ClassHistogram,
    GateTaylor,
    Gram,
    Histogram,
    LinearRademacher,
    MapRank,
    Moments,
    Sensitivity,
    merge_shards,
)
from actprune.statistics.reduce import pack, pack_scales

torch.set_num_threads(1)
N, U, SIDE = 23, 5, 4
IDS = torch.arange(N) * 7 + 3


def feed(statistic, x, ids, how="update"):
    """The class of a sample is its id modulo 3; of what takes maps, positions are one map of two dimensions."""
    if statistic.takes_maps and x.ndim == 3:
        side = math.isqrt(x.shape[2])
        x = x.unflatten(2, (1, side, side))
    return getattr(statistic, how)(x, ids, *[ids % 3] * statistic.needs_labels)


# --- independent references: numpy in float64, loops, Python integers of any size ---


def histogram_reference(x, bins=64, range="layer", pool="positions", zero_bin=True, classes=0):
    """The definition in the docstring, with exact fractions and the range known beforehand."""
    labels = (IDS[: len(x)] % 3).numpy() if classes else np.zeros(len(x), dtype=int)
    if pool == "gap":
        x = torch.as_tensor(x, dtype=torch.float32).mean(2, keepdim=True).double().numpy()  # one rounding, not two
    rows = []
    for unit in np.moveaxis(x, 1, 0):
        domain = x if range == "layer" else unit
        low, high = Fraction(float(domain.min())), Fraction(float(domain.max()))
        magnitude = max(abs(low), abs(high))
        exponent = -120
        while 2 ** (exponent + 16) <= magnitude and magnitude > 0:
            exponent += 1

        def fine(value, exponent):
            return math.floor(value / Fraction(2) ** exponent)

        while fine(high, exponent) - fine(low, exponent) >= 16 * bins:
            exponent += 1
        width = Fraction(2) ** exponent
        row = np.zeros((max(1, classes), bins + 1))
        for label, values in zip(labels, unit, strict=True):
            for value in values:
                if zero_bin and value == 0:
                    row[label, 0] += 1
                else:
                    middle = (fine(Fraction(float(value)), exponent) + Fraction(1, 2)) * width
                    place = (middle - low) * bins // (high - low) if high - low > width else 0
                    row[label, 1 + min(max(place, 0), bins - 1)] += 1
        row = row if zero_bin else row[:, 1:]
        rows.append(row if classes else row[0])
    return np.stack(rows)


def splitmix(x):
    mask = (1 << 64) - 1
    z = (x + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def sign(sample_id, position, replicate, seed):
    key = splitmix(splitmix(splitmix(0) ^ sample_id) ^ position)
    word = splitmix(splitmix(splitmix(seed) ^ key) ^ (replicate // 64))
    return 2 * ((word >> (replicate % 64)) & 1) - 1


def rademacher_reference(x, replicates=64, pool="gap", seed=0):
    terms = x.mean(2, keepdims=True) if pool == "gap" else x
    sums = np.zeros((replicates, x.shape[1]))
    for i in range(terms.shape[0]):
        for p in range(terms.shape[2]):
            sigma = np.array([sign(int(IDS[i]), p, m, seed) for m in range(replicates)])
            sums += sigma[:, None] * terms[i, :, p]
    return np.abs(sums).mean(0) / (terms.shape[0] * terms.shape[2])


def moments_reference(x):
    return np.stack([x.mean((0, 2)), x.var((0, 2))], axis=1)


def gram_reference(x):
    rows = np.moveaxis(x, 1, 2).reshape(-1, x.shape[1])
    return np.column_stack([rows.mean(0), np.cov(rows.T, bias=True).reshape(x.shape[1], -1)])


def activity_reference(x):
    return np.stack([(x == 0).mean((0, 2)), (x > 0).mean((0, 2))], axis=1)


def taylor_reference(x):
    return (x.sum(2) ** 2).mean(0)


def sensitivity_reference(x, mode="full"):
    return np.abs(x).mean((0, 2))


def rank_reference(x, threshold=1.0):
    """Ranks of square float32 maps, from singular values in float64; ``threshold``: in units of the one that is defined."""
    side = math.isqrt(x.shape[2])
    values = np.linalg.svd(x.astype(np.float32).astype(np.float64).reshape(*x.shape[:2], side, side), compute_uv=False)
    least = threshold * side * np.finfo(np.float32).eps * values.max(2, keepdims=True)
    return (values > least).sum(2).mean(0)


class Case(NamedTuple):
    cls: type[Statistic]
    options: dict
    reference: Callable
    exact: bool

    def build(self, n_units=U):
        return self.cls(n_units, **self.options)


CASES = [
    *(
        Case(Histogram, {"bins": bins, "range": scope, "pool": pool, "zero_bin": zero_bin}, histogram_reference, True)
        for bins, scope, pool, zero_bin in [
            (64, "layer", "positions", True),
            (64, "unit", "positions", True),
            (8, "layer", "gap", False),
            (7, "unit", "positions", False),
            (100, "unit", "gap", True),
        ]
    ),
    *(
        Case(
            ClassHistogram,
            {"bins": bins, "range": scope, "pool": pool, "zero_bin": zero_bin, "classes": classes},
            histogram_reference,
            True,
        )
        for bins, scope, pool, zero_bin, classes in [
            (16, "unit", "gap", True, 3),
            (8, "layer", "positions", True, 4),
            (5, "unit", "positions", False, 3),
        ]
    ),
    Case(LinearRademacher, {}, rademacher_reference, False),
    Case(LinearRademacher, {"pool": "positions", "replicates": 70, "seed": 9}, rademacher_reference, False),
    Case(Moments, {}, moments_reference, False),
    Case(Gram, {}, gram_reference, False),
    Case(Activity, {}, activity_reference, True),
    Case(GateTaylor, {}, taylor_reference, False),
    Case(Sensitivity, {}, sensitivity_reference, False),
    Case(Sensitivity, {"mode": "lower_bound"}, sensitivity_reference, False),
    Case(MapRank, {}, rank_reference, True),
]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.cls.__name__}{list(c.options.values())}")


def activations(kind):
    x = torch.randn(N, U, SIDE * SIDE, generator=torch.Generator().manual_seed(5))
    x = x * torch.tensor([1.0, 0.1, 3.0, 1e-4, 1.0])[:, None]
    if kind == "relu":
        x = x.relu()
        x[:, 4] = 0  # a dead unit
    elif kind == "offset":
        x = x + 1e4
    elif kind == "constant":
        x[:, 1], x[:, 2] = -2.5, 0.0
    elif kind == "growing":
        x = x * 2.0 ** torch.arange(-20, -20 + 2 * N, 2)[:, None, None]
    return x


each_kind = pytest.mark.parametrize("kind", ["signed", "relu", "offset", "constant", "growing"])


def run(case, x, sizes=None, order=None, ids=IDS):
    """Feed the samples in batches of the given sizes and order of batches."""
    statistic = case.build(x.shape[1])
    sizes = sizes or [len(x)]
    batches = list(zip(x.split(sizes), ids[: len(x)].split(sizes), strict=True))
    for number in order or range(len(batches)):
        feed(statistic, *batches[number])
    return statistic


def assert_same(actual, expected, exact, rtol=1e-9):
    """Floats of one computation in another order: float64 rounding only, relative to the largest value."""
    expected = torch.as_tensor(expected)
    assert actual.dtype == torch.float64
    if exact:
        assert torch.equal(actual, expected)
    else:
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


# --- the contract ---


def test_every_statistic_has_a_case():
    found = set()
    for module in pkgutil.iter_modules(actprune.statistics.__path__):
        members = vars(importlib.import_module(f"actprune.statistics.{module.name}")).values()
        for cls in filter(inspect.isclass, members):
            # Python 3.10 takes `tuple[int]` for a class
            if get_origin(cls) is None and issubclass(cls, Statistic) and not inspect.isabstract(cls):
                found.add(cls)
    assert found == {case.cls for case in CASES}


@each_case
@each_kind
def test_streaming_is_the_reference_on_all_data(case, kind):
    x = activations(kind)
    statistic = run(case, x, [9, 1, 8, 5])
    if case.cls is MapRank:  # in float32 a singular value may be off by the threshold's order, on either side by processor
        high, low = (torch.from_numpy(case.reference(x.double().numpy(), **case.options, threshold=t)) for t in (0.5, 2))
        assert (low <= statistic.compute()).all()
        assert (statistic.compute() <= high).all()
        assert kind == "offset" or torch.equal(low, high)
        return
    expected = case.reference(x.double().numpy(), **case.options)
    assert_same(statistic.compute(), expected, case.exact, rtol=2e-6)


@each_kind
def test_moments_are_right_for_small_and_for_offset_units(kind):
    """The contract's tolerance is relative to the largest unit; variance has to hold for each by itself."""
    x = activations(kind)
    expected = torch.as_tensor(moments_reference(x.double().numpy()))
    actual = run(CASES[[c.cls for c in CASES].index(Moments)], x, [9, 1, 8, 5]).compute()
    torch.testing.assert_close(actual[:, 1], expected[:, 1], rtol=2e-6, atol=0)


@each_case
@each_kind
def test_batch_size_and_order_do_not_matter(case, kind):
    x = activations(kind)
    whole = run(case, x).compute()
    for sizes, order in (
        ([1] * N, None),
        ([1, N - 1], None),
        ([9, 1, 8, 5], [3, 1, 0, 2]),
        ([1] * N, list(range(N))[::-1]),
    ):
        assert_same(run(case, x, sizes, order).compute(), whole, case.exact)


@each_case
@each_kind
def test_shards_merge_to_the_whole(case, kind):
    x = activations(kind)
    whole = run(case, x)
    parts = [slice(0, 2), slice(2, 15), slice(15, N)]
    shards = [[run(case, x[part], ids=IDS[part])] for part in parts]
    shards.insert(1, [case.build()])  # a rank without data
    for ordered in (shards, shards[::-1]):
        ordered = [[copy_of(case, statistic) for statistic in shard] for shard in ordered]
        merged = merge_shards(ordered)[0]
        assert_same(merged.compute(), whole.compute(), case.exact)
        assert merged.n_samples == N


def copy_of(case, statistic):
    copy = case.build()
    for name in statistic.metric_state:
        getattr(copy, name).copy_(getattr(statistic, name))
    return copy


@each_case
@each_kind
def test_a_merged_statistic_can_go_on(case, kind):
    x = activations(kind)
    merged = merge_shards([[run(case, x[:10])], [run(case, x[10:20], ids=IDS[10:20])]])[0]
    feed(merged, x[20:], IDS[20:])
    assert_same(merged.compute(), run(case, x).compute(), case.exact)


@each_case
def test_torchmetrics_forward_counts_as_well_and_its_merge_of_states_is_refused(case):
    """States of different ranges do not add up as they are."""
    x, statistic = activations("growing"), case.build()
    for part, ids in zip(x.split([9, 14]), IDS.split([9, 14]), strict=True):
        of_batch = feed(statistic, part, ids, "forward")
        assert_same(of_batch, run(case, part, ids=ids).compute(), exact=True)
    assert_same(statistic.compute(), run(case, x, [9, 14]).compute(), exact=True)
    with pytest.raises(RuntimeError, match="merge_state"):
        statistic.merge_state(run(case, x))


@each_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_are_read_as_float32(case, dtype):
    x = activations("relu").to(dtype)
    assert_same(run(case, x).compute(), run(case, x.float()).compute(), exact=True)


@each_case
def test_layout_does_not_matter(case):
    """A channels-last map, seen as (N, U, P); multiples of 2^-8, whose sums no order of addition rounds."""
    x = (activations("relu") * 256).round() / 256
    x = x.unflatten(2, (SIDE, SIDE)).contiguous(memory_format=torch.channels_last).flatten(2)
    assert not x.is_contiguous()
    assert_same(run(case, x).compute(), run(case, x.contiguous()).compute(), case.exact, rtol=1e-6)


@each_case
def test_reset_forgets(case):
    x = activations("signed")
    statistic = run(case, 50 * x)
    statistic.reset()
    with pytest.raises(ObservationError, match="saw 0 samples"):
        statistic.compute()
    feed(statistic, x, IDS)
    assert_same(statistic.compute(), run(case, x).compute(), exact=True)


@each_case
def test_nothing_seen_raises(case):
    statistic = case.build()
    feed(statistic, torch.zeros(0, U, 16), IDS[:0])
    with pytest.raises(ObservationError, match=r"saw 0 samples, needs at least 1; observe validation batches"):
        statistic.compute()


@each_case
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_are_counted_and_raise(case, value):
    x = activations("relu")
    statistic = run(case, x, [9, 1, 8, 5])
    assert not statistic.nonfinite.any()
    broken = x.clone()
    broken[2, 1, 3], broken[4, 1, 0], broken[7, 3, 5] = value, -value, value
    for batch in (x, broken, x, broken):
        feed(statistic, batch, IDS)
    assert statistic.nonfinite.tolist() == [0, 2, 0, 2, 0]
    with pytest.raises(ObservationError, match=r"2 of 5 units had NaN or Inf activations, .* first in batch 5;"):
        statistic.compute()
    merged = merge_shards([[run(case, x)], [statistic]])[0]
    with pytest.raises(ObservationError, match=r"2 of 5 units .* first in another rank"):
        merged.compute()


@each_case
def test_wrong_shapes_raise(case):
    statistic = case.build()
    for x, ids in (
        (torch.zeros(2, U + 1, 16), IDS[:2]),
        (torch.zeros(2, U), IDS[:2]),
        (torch.zeros(2, U, 16), IDS[:3]),
    ):
        with pytest.raises(ObservationError, match=rf"takes activations \(N, {U}, (P|M, \*extents)\) and N sample ids, got"):
            feed(statistic, x, ids)


@each_case
def test_activations_are_not_changed(case):
    x = activations("signed")
    before = x.clone()
    run(case, x)
    assert torch.equal(x, before)


@each_case
def test_modes_of_the_caller_do_not_matter(case):
    """Built, updated and reset inside a validation loop's inference mode and autocast, merged outside of them."""
    x = activations("signed")
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        statistic = case.build()
        feed(statistic, x[:9] * 1, IDS[:9] * 1)
        statistic.reset()
        feed(statistic, x[:9] * 1, IDS[:9] * 1)
    feed(statistic, x[9:].requires_grad_(), IDS[9:])
    assert not any(state.requires_grad for state in statistic.metric_state.values())
    merged = merge_shards([[statistic], [case.build()]])[0]
    assert_same(merged.compute(), run(case, activations("signed")).compute(), case.exact)


@each_case
def test_one_unit_and_one_position(case):
    x = activations("signed")[:, :1, :1]
    values = run(case, x).compute()
    assert values.shape[0] == 1
    assert values.ndim >= 1
    assert_same(values, case.reference(x.double().numpy(), **case.options), case.exact, rtol=2e-6)


@each_case
def test_update_reads_nothing_back_from_the_device(case):
    """Meta tensors have no data: whatever asks for a number raises."""
    statistic = case.build().to("meta")
    feed(statistic, torch.zeros(3, U, SIDE * SIDE, device="meta"), torch.zeros(3, dtype=torch.int64, device="meta"))
    statistic.scale()
    assert pack([statistic]).is_meta


@each_case
def test_memory_does_not_grow_with_the_data(case):
    small, large = run(case, activations("signed")[:1]), run(case, activations("growing"), [1] * N)
    assert [s.shape for s in small.metric_state.values()] == [s.shape for s in large.metric_state.values()]
    assert pack([small]).shape == pack([large]).shape
    assert pack_scales([small]).shape == pack_scales([large]).shape


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@each_case
def test_a_gpu_counts_the_same(case):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for kind in ("relu", "growing"):
        x = activations(kind)
        statistic = case.build().to("cuda")
        batches = list(zip(x.cuda().split(9), IDS.cuda().split(9), strict=True))
        # singular values are computed on the host
        torch.cuda.set_sync_debug_mode("default" if isinstance(statistic, MapRank) else "error")
        try:
            for batch, ids in batches:
                feed(statistic, batch, ids)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert_same(statistic.compute().cpu(), run(case, x, [9, 9, 5]).compute(), case.exact, rtol=1e-6)


@each_case
def test_no_units_raise(case):
    with pytest.raises(ConfigError, match="n_units >= 1, got 0"):
        case.build(0)


def test_labels_are_asked_for():
    statistic = ClassHistogram(U, classes=3)
    for labels, given in ((None, "none"), (torch.zeros(N, 1), r"\(23, 1\)")):
        with pytest.raises(ObservationError, match=rf"takes the class of each of 23 samples, got {given}; give labels"):
            statistic.update(activations("relu"), IDS, labels)


@pytest.mark.parametrize("wrong", [3, -1, 2**40])
def test_labels_outside_the_classes_raise_once_it_counts(wrong):
    statistic = ClassHistogram(U, classes=3)
    labels = IDS % 3
    labels[[4, 7]] = wrong
    statistic.update(activations("relu"), IDS, labels)
    with pytest.raises(ObservationError, match=r"2 of 23 samples have a label outside \[0, 3\): set classes="):
        statistic.compute()


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (ClassHistogram, {"classes": 0}, "classes=0 must be an integer of at least 1; use the number of classes"),
        (ClassHistogram, {"bins": 1, "classes": 2}, r"bins=1 must be an integer in \[2, 65536\]"),
        (ClassHistogram, {"range": "all"}, "range='all' is not known; choose one of layer, unit"),
        (ClassHistogram, {"pool": "max"}, "pool='max' is not known"),
        (Sensitivity, {"mode": "half"}, "mode='half' is not known; choose one of full, lower_bound"),
    ],
)
def test_nonsense_is_refused(cls, options, message):
    with pytest.raises(ConfigError, match=message):
        cls(U, **options)
