"""Group influence: every number against a brute-force computation that knows nothing of graphs."""

import itertools
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from actprune import analyze, criteria, trace
from actprune.compensation import Mean
from actprune.core.errors import ConfigError, ObservationError
from actprune.pruning import RANDOM, Removals
from actprune.pruning import influence as module
from actprune.pruning.removals import drawn_order, removal_rows

SIZES = {"0": 9, "3": 6}
REMOVALS = Removals(shares=(0.25, 0.5), n_units=4, draws=2, seed=5)
CRITERIA = {"rms": criteria.RMS(), "magnitude": criteria.Magnitude(), "taylor": criteria.Taylor()}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 6), nn.Tanh(), nn.Linear(6, 3))


def batches(seed, n=4):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(7, 5, generator=generator), torch.randint(0, 3, (7,), generator=generator)) for _ in range(n)]


DATA, VALIDATION = batches(1), batches(2)


@pytest.fixture(scope="module")
def found():
    return analyze(network(), DATA[0][0][:1], DATA, VALIDATION, criteria=CRITERIA, removals=REMOVALS)


def brute_force(gone, part=slice(None)):
    """Loss and accuracy on validation samples at once, with the units at their means over the observed samples."""
    model = network().eval()
    x, y = (torch.cat(parts)[part] for parts in zip(*VALIDATION, strict=True))
    seen = torch.cat([inputs for inputs, _ in DATA])
    with torch.no_grad():
        for last, name in ((3, "0"), (5, "3")):
            x, seen = (model[last - 3 if last == 3 else 3 : last](v) for v in (x, seen))
            for unit in gone.get(name, ()):
                x[:, unit] = seen[:, unit].double().mean().float()
        logits = model[5](x)
        return F.cross_entropy(logits.double(), y).item(), (logits.argmax(1) == y).double().mean().item()


def test_the_whole_network_and_the_groups(found):
    assert (found.loss, found.accuracy) == pytest.approx(brute_force({}), rel=1e-5)
    assert (found.n_observed, found.n_measured) == (28, 28)
    assert {group.name: group.size for group in found.groups} == SIZES
    assert list(found.criteria) == [*CRITERIA, RANDOM]
    first, second = found.groups
    assert first.params == 9 * 5 + 9 + 2 * 9 + 6 * 9  # filters, biases, norm, columns of the reader
    assert first.macs == 9 * 5 + 6 * 9
    assert second.params == 6 * 9 + 6 + 3 * 6
    assert found.macs == 9 * 5 + 6 * 9 + 3 * 6


def test_single_units(found):
    whole = brute_force({})
    for group in found.groups:
        assert len(group.units) == len(set(group.units)) == 4
        for unit, loss, accuracy in zip(group.units, group.unit_loss, group.unit_accuracy, strict=True):
            expected = brute_force({group.name: [unit]})
            assert loss == pytest.approx(expected[0] - whole[0], abs=1e-6)
            assert accuracy == pytest.approx(expected[1] - whole[1], abs=1e-9)


def test_halves_are_every_other_sample(found):
    """Batches of seven: which samples are in a half does not begin anew with each of them."""
    for group in found.groups:
        assert group.n_alone == 28
        for half, start in zip(group.unit_loss_halves, (0, 1), strict=True):
            part = slice(start, None, 2)
            whole = brute_force({}, part)[0]
            expected = [brute_force({group.name: [unit]}, part)[0] - whole for unit in group.units]
            assert half == pytest.approx(expected, abs=1e-6)


def test_shares_on_fewer_samples_than_units_alone(found):
    """Ten samples are asked for: two whole batches of seven."""
    removals = Removals(REMOVALS.shares, n_units=4, draws=2, seed=5, samples=10)
    ours = analyze(network(), DATA[0][0][:1], DATA, VALIDATION, criteria=CRITERIA, removals=removals)
    assert (ours.n_measured, [group.n_alone for group in ours.groups]) == (14, [28, 28])
    assert (ours.loss, ours.accuracy) == pytest.approx(brute_force({}, slice(14)), rel=1e-5)
    few = analyze(network(), DATA[0][0][:1], DATA, VALIDATION[:2], criteria=CRITERIA, removals=REMOVALS)
    assert ours.whole == few.whole
    for group, alone, shares in zip(ours.groups, found.groups, few.groups, strict=True):
        assert (group.unit_loss, group.unit_loss_halves) == (alone.unit_loss, alone.unit_loss_halves)
        assert group.removals == shares.removals


def test_shares_of_one_group_and_of_all(found):
    scores = {group.name: group.scores for group in found.groups}

    def taken(group, name, end, share):
        order = sorted(range(SIZES[group]), key=lambda unit: scores[group][name][unit])
        count = max(1, round(share * SIZES[group]))
        return order[:count] if end == "lowest" else order[-count:]

    sites = [([group.name], group.removals) for group in found.groups] + [(list(SIZES), found.whole)]
    for names, removals in sites:
        wanted = {(name, end, share) for name in CRITERIA for end in ("lowest", "highest") for share in (0.25, 0.5)}
        wanted |= {(RANDOM, "random", share) for share in (0.25, 0.5)}
        assert {(r.criterion, r.end, r.share) for r in removals} == wanted
        for r in removals:
            if r.criterion == RANDOM:
                continue
            gone = {group: taken(group, r.criterion, r.end, r.share) for group in names}
            assert r.units == sum(map(len, gone.values()))
            assert (r.loss, r.accuracy) == pytest.approx(brute_force(gone), abs=1e-6)


def test_a_random_share_is_the_mean_over_draws(found):
    """Of nine choose two sets, two: the mean of some two of them."""
    removal = next(r for r in found.groups[0].removals if r.criterion == RANDOM and r.share == 0.25)
    losses = [brute_force({"0": gone})[0] for gone in itertools.combinations(range(9), 2)]
    assert any(
        removal.loss == pytest.approx((a + b) / 2, abs=1e-6) for a, b in itertools.combinations_with_replacement(losses, 2)
    )


def test_draws_of_neighbouring_seeds_have_nothing_in_common():
    """Nor have units alone with any of the draws."""
    (group,) = trace(nn.Sequential(nn.Linear(5, 40), nn.ReLU(), nn.Linear(40, 3)), torch.randn(1, 5)).unlocked
    orders = [drawn_order([0] * 40, seed, stream, group) for seed in range(4) for stream in range(5)]
    assert all(sorted(order) == list(range(40)) for order in orders)
    alike = torch.tensor(orders)[:, None] == torch.tensor(orders)
    assert alike.sum(-1).fill_diagonal_(0).max() < 10  # of 40 places; 1 on average
    assert alike.double().mean() == pytest.approx(1 / len(orders) + 1 / 40, abs=0.01)
    drawn = next(r for r in removal_rows({"0": {RANDOM: [0.0] * 40}}, [group], Removals(draws=2, seed=5)) if r[0][2] == 0.25)
    wanted = [frozenset(drawn_order([0] * 40, 5, 1 + draw, group)[:10]) for draw in range(2)]
    assert [choice[group.name] for choice in drawn[1]] == wanted


def test_units_of_equal_score_are_not_taken_in_their_order():
    class Same(criteria.Magnitude):
        def score(self, view):
            return torch.ones(view.size, dtype=torch.float64)

    ours = analyze(network(), DATA[0][0], DATA, VALIDATION, criteria={"same": Same()}, removals=REMOVALS)
    removal = next(r for r in ours.groups[0].removals if r.end == "lowest" and r.share == 0.25)
    assert removal.loss != pytest.approx(brute_force({"0": [0, 1]})[0], abs=1e-6)


def test_criteria_see_all_of_large_maps_unless_told_otherwise():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    data = [(torch.randn(4, 3, 20, 20), torch.randint(0, 3, (4,))) for _ in range(2)]

    def scores(**options):
        found = analyze(model, data[0][0][:1], data, data, criteria={"rms": criteria.RMS()}, removals=REMOVALS, **options)
        return found.groups[0].scores["rms"]

    with torch.no_grad():
        seen = torch.cat([model[:2](x) for x, _ in data]).double()
    assert scores() == pytest.approx(seen.square().mean((0, 2, 3)).sqrt().tolist(), rel=1e-6)
    assert scores(positions=2) != pytest.approx(scores(), rel=1e-3)
    with pytest.raises(ConfigError, match="positions=0 must be"):
        scores(positions=0)


def test_criteria_without_scores_are_told_of(caplog):
    model = nn.Sequential(nn.Linear(5, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 6), nn.Tanh(), nn.Linear(6, 3))
    chosen = {"scale": criteria.BatchNormScale(), "rms": criteria.RMS()}
    analyze(model, DATA[0][0], DATA, VALIDATION, criteria=chosen, removals=REMOVALS)
    (said,) = caplog.messages
    assert said.startswith("scale scores 1 of 2 groups: ")
    assert said.endswith("(not: 3)")
    caplog.clear()
    analyze(model[2:], torch.randn(1, 9), [torch.randn(7, 9)], [(torch.randn(7, 9), VALIDATION[0][1])], criteria=chosen)
    assert [message.partition(":")[0] for message in caplog.messages] == ["scale scores none of 1 groups"]


def test_without_compensation_nobody_observes_second_moments(caplog):
    chosen = {"reconstruction": criteria.Reconstruction(), "magnitude": criteria.Magnitude()}
    settings = {"criteria": chosen, "removals": REMOVALS}
    by_default = analyze(network(), DATA[0][0], DATA, VALIDATION, **settings)
    assert all(set(group.scores) == {*chosen, RANDOM} for group in by_default.groups)
    without = analyze(network(), DATA[0][0], DATA, VALIDATION, **settings, compensation=None)
    assert all(set(group.scores) == {"magnitude", RANDOM} for group in without.groups)
    assert caplog.messages[-1].startswith("reconstruction scores none of 2 groups: compensation observed no second moments")


def test_the_name_of_the_baseline_is_taken():
    with pytest.raises(ConfigError, match=r"criteria\['random'\] is RMS: that name is of the baseline"):
        analyze(network(), DATA[0][0], DATA, VALIDATION, criteria={RANDOM: criteria.RMS()})


def test_the_model_stays_as_it_was():
    model = network().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    analyze(model, DATA[0][0][:1], DATA, VALIDATION, criteria=CRITERIA, removals=REMOVALS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert all(module.training for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_it_goes_on_where_it_was_broken_off(found, tmp_path, monkeypatch):
    def run(progress=None, **changed):
        settings = {"criteria": CRITERIA, "removals": REMOVALS, **changed}
        return analyze(network(), DATA[0][0][:1], DATA, VALIDATION, folder=tmp_path, progress=progress, **settings)

    def killed(done, total, name):
        if name == "3":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(killed)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["group000.json", "made_from.json", "scores.json"]
    measured = []
    measure = module._group
    monkeypatch.setattr(module, "_group", lambda group, *rest: measured.append(group.name) or measure(group, *rest))
    monkeypatch.setattr(module, "_scores", killed)
    assert run() == found
    assert measured == ["3"]
    assert run() == found
    assert measured == ["3"]


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"criteria": {"rms": criteria.RMS()}}, "criteria"),
        ({"removals": Removals(shares=(0.25, 0.5), n_units=4, draws=2, seed=6)}, "settings"),
        ({"positions": 1}, "positions"),
    ],
)
def test_pieces_of_another_analysis_are_refused(tmp_path, changed, what):
    settings = {"criteria": CRITERIA, "removals": REMOVALS, "folder": tmp_path}
    analyze(network(), DATA[0][0][:1], DATA, VALIDATION, **settings)
    with pytest.raises(ConfigError, match=rf"holds an analysis that was made from other {what}; choose another folder"):
        analyze(network(), DATA[0][0][:1], DATA, VALIDATION, **{**settings, **changed})
    model = network()
    with torch.no_grad():
        model[5].bias += 1
    with pytest.raises(ConfigError, match="made from other weights"):
        analyze(model, DATA[0][0][:1], DATA, VALIDATION, **settings)
    with pytest.raises(ConfigError, match="made from other data"):
        analyze(network(), DATA[0][0][:1], DATA, batches(3), **settings)
    with pytest.raises(ConfigError, match="made from other judge"):
        analyze(network(), DATA[0][0][:1], DATA, VALIDATION, **settings, judge=lambda o, t: torch.zeros(len(t), 2))
    other = network()
    other[2] = nn.GELU()
    with pytest.raises(ConfigError, match="made from other modules"):
        analyze(other, DATA[0][0][:1], DATA, VALIDATION, **settings)
    with pytest.raises(ConfigError, match="made from other compensation"):
        analyze(network(), DATA[0][0][:1], DATA, VALIDATION, **settings, compensation=Mean())


def test_progress_counts_to_the_end():
    told = []
    analyze(network(), DATA[0][0], DATA, VALIDATION, criteria={}, removals=REMOVALS, progress=lambda *a: told.append(a))
    assert told == [(0, 4, "observing"), (1, 4, "0"), (2, 4, "3"), (3, 4, "whole network"), (4, 4, "done")]


def test_another_judge():
    def judge(outputs, targets):
        error = (outputs[:, 0] - targets).square()
        return torch.stack([error, (error < 1).float()], dim=1).double()

    pairs = [(x, y.float()) for x, y in VALIDATION]
    ours = analyze(network(), DATA[0][0], pairs, pairs, criteria=CRITERIA, removals=REMOVALS, judge=judge)
    model = network().eval()
    x, y = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    assert ours.loss == pytest.approx((model(x)[:, 0] - y).square().mean().item(), rel=1e-5)


class Named(nn.Module):
    """A network that returns a mapping, nearly all of whose parameters may not leave."""

    def __init__(self):
        super().__init__()
        self.net, self.table = network(), nn.Parameter(torch.zeros(200_000))

    def forward(self, x):
        return {"n": torch.arange(len(x)), "logits": self.net(x) + self.table[0]}


def test_outputs_in_a_mapping_and_a_network_that_is_mostly_locked(found):
    ours = analyze(Named(), DATA[0][0][:1], DATA, VALIDATION, criteria=CRITERIA, removals=REMOVALS)
    assert ours.loss == found.loss
    assert [g.unit_loss for g in ours.groups] == [g.unit_loss for g in found.groups]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda y: y.float(), r"got targets \(7,\) of torch.float32; pass judge=f"),
        (lambda y: y[:, None].expand(-1, 2), r"got targets \(7, 2\) of torch.int64; pass judge=f"),
        (lambda y: y + 1, "targets go from 1 to 3, outputs are of classes 0 to 2"),
        (lambda y: y * 0 - 100, "targets go from -100 to -100"),
    ],
)
def test_what_a_classifier_is_not_judged_by(change, message):
    pairs = [(x, change(y)) for x, y in VALIDATION]
    with pytest.raises(ObservationError, match=message):
        analyze(network(), DATA[0][0], DATA, pairs, criteria={}, removals=REMOVALS)


def test_a_judge_of_another_shape_raises():
    with pytest.raises(ObservationError, match=r"judge returned \(7,\) of torch.float32; it must return \(N, 2\)"):
        analyze(network(), DATA[0][0], DATA, VALIDATION, criteria={}, judge=lambda outputs, targets: outputs[:, 0])


@pytest.mark.parametrize("validation", [[], [torch.randn(3, 5)]])
def test_validation_without_targets_raises(validation):
    with pytest.raises(ObservationError, match="validation must yield 1 or more batches, each a pair of inputs and targets"):
        analyze(network(), DATA[0][0], DATA, validation, criteria=CRITERIA)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shares": ()}, r"shares=\[\] must be 1 or more numbers"),
        ({"shares": (0.5, 1.5)}, r"shares=\[0.5, 1.5\] must be"),
        ({"n_units": 0}, "n_units=0 must be a whole number of at least 1"),
        ({"n_units": 2.5}, "n_units=2.5 must be a whole number"),
        ({"draws": 0}, "draws=0 must be a whole number of at least 1"),
        ({"draws": None}, "draws=None must be a whole number"),
        ({"samples": 0}, "samples=0 must be a whole number of at least 1"),
    ],
)
def test_nonsense_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Removals(**options)


def test_pieces_are_plain_json(tmp_path):
    analyze(network(), DATA[0][0], DATA, VALIDATION, criteria=CRITERIA, removals=REMOVALS, folder=tmp_path)
    for path in tmp_path.iterdir():
        json.loads(path.read_text())


def test_what_is_kept_nowhere_needs_no_fingerprint(monkeypatch):
    monkeypatch.setattr(module, "fingerprint", None)
    analyze(network(), DATA[0][0], DATA, VALIDATION, criteria={"rms": criteria.RMS()}, removals=REMOVALS)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.out = nn.Linear(5, 4), nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x, y):
        return self.out((self.left(x) + self.right(y)).relu())


def test_a_network_of_several_inputs_takes_what_a_loader_makes_of_them():
    """Tuples become lists."""
    torch.manual_seed(0)
    model, pairs = Two(), [((x, -x), y) for x, y in DATA]
    loader = DataLoader([((x, -x), y) for xs, ys in DATA for x, y in zip(xs, ys, strict=True)], batch_size=7)
    inputs, _ = next(iter(loader))
    assert isinstance(inputs, list)
    found = [
        analyze(model, pairs[0][0], data, data, criteria={"rms": criteria.RMS()}, removals=REMOVALS) for data in (pairs, loader)
    ]
    assert found[0] == found[1]
