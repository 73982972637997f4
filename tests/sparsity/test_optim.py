import copy
import io
import pickle

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import nn

from actprune.core.errors import ConfigError
from actprune.sparsity import GroupLasso, GroupMCP, Piece, ProxAdam, ProxAdamW, ProxSGD, RowGroup, input_groups

PAIRS = {
    "sgd": (ProxSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "adam": (ProxAdam, torch.optim.Adam, {"lr": 0.01, "eps": 1e-6, "weight_decay": 0.01}),
    "amsgrad": (ProxAdam, torch.optim.Adam, {"lr": 0.01, "eps": 1e-6, "amsgrad": True}),
    "adamw": (ProxAdamW, torch.optim.AdamW, {"lr": 0.01, "eps": 1e-6, "weight_decay": 0.1, "betas": (0.8, 0.99)}),
}


def network(dtype=torch.float32):
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.Flatten(), nn.Linear(64, 3))
    return nn.Sequential(*layers).to(dtype)


def batch(seed, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(6, 3, 8, 8, generator=g).to(dtype), torch.randint(3, (6,), generator=g)


def train(model, optimizer, steps, first=0, scheduler=None):
    dtype = next(model.parameters()).dtype
    for seed in range(first, first + steps):
        x, y = batch(seed, dtype)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return model


def assert_same(one, other):
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("options", [{}, {"penalty": "group_lasso", "lam": 0.0}, {"penalty": GroupMCP(0.0, 1.0)}])
@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("pair", PAIRS)
def test_without_penalty_it_is_torchs_bit_for_bit(pair, foreach, options):
    ours, theirs, settings = PAIRS[pair]
    one, other = network(), network()
    train(one, ours(one.parameters(), foreach=foreach, **settings, **options), 4)
    train(other, theirs(other.parameters(), foreach=foreach, **settings), 4)
    assert_same(one, other)


class Paper:
    """The method written down again in numpy, one column at a time; the prox by bracketing, not by Newton."""

    def __init__(self, w, lr, betas, eps, wd, lam, exact):
        self.w, self.lr, self.betas, self.eps, self.wd, self.lam, self.exact = w, lr, betas, eps, wd, lam, exact
        self.m, self.v, self.t = np.zeros_like(w), np.zeros_like(w), 0

    def step(self, g):
        (b1, b2), self.t = self.betas, self.t + 1
        self.m, self.v = b1 * self.m + (1 - b1) * g, b2 * self.v + (1 - b2) * g**2
        c1, c2 = 1 - b1**self.t, 1 - b2**self.t
        w = self.w - self.lr / c1 * self.m / (np.sqrt(self.v / c2) + self.eps)
        w = w - self.lr * self.wd * w
        rate = self.lr * np.sqrt(c2) / c1 if self.exact else self.lr
        d = np.sqrt(self.v) + self.eps * (np.sqrt(c2) if self.exact else 1)
        t = rate * self.lam * np.sqrt(len(w))
        self.w = np.stack([self.prox(w[:, j], d[:, j], t) for j in range(w.shape[1])], 1)

    @staticmethod
    def prox(x, d, t):
        if np.linalg.norm(d * x) <= t:
            return np.zeros_like(x)
        s = scipy.optimize.brentq(
            lambda s: np.sum((d * x / (s * d + t)) ** 2) - 1, 0, np.linalg.norm(x), xtol=1e-300, rtol=1e-15
        )
        return s * d * x / (s * d + t)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("kind", ["adam", "adamw"])
def test_steps_are_the_papers(kind, exact):
    rng = np.random.default_rng(0)
    start = rng.normal(size=(4, 6)) * 0.1
    wd = 0.3 if kind == "adamw" else 0.0
    settings = {"lr": 0.02, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": wd}
    reference = Paper(start, 0.02, (0.9, 0.99), 1e-6, wd, lam=0.4, exact=exact)
    w = nn.Parameter(torch.tensor(start))
    optimizer = (ProxAdamW if kind == "adamw" else ProxAdam)([w], penalty=GroupLasso(0.4), exact_threshold=exact, **settings)
    seen = set()
    for _ in range(25):
        gradient = rng.normal(size=(4, 6)) * 10 ** rng.uniform(-1, 1, (4, 6))
        w.grad = torch.tensor(gradient)
        optimizer.step()
        reference.step(gradient)
        np.testing.assert_allclose(w.detach().numpy(), reference.w, rtol=1e-11, atol=1e-15)
        seen.add(int((w == 0).all(0).sum()))
    assert len(seen) > 1


@pytest.mark.parametrize("make", [
    lambda p: ProxSGD(p, lr=0.05, penalty=GroupLasso(0.2)),
    lambda p: ProxSGD(p, lr=0.05, momentum=0.9, penalty=GroupLasso(0.2)),
    lambda p: ProxSGD(p, lr=0.01, momentum=0.8, nesterov=True, penalty=GroupLasso(0.2)),
    lambda p: ProxSGD(p, lr=0.05, momentum=0.9, dampening=0.5, penalty=GroupLasso(0.2)),
    lambda p: ProxAdam(p, lr=0.1, betas=(0.9, 0.9), penalty=GroupLasso(0.2), exact_threshold=True),
    lambda p: ProxAdamW(p, lr=0.1, betas=(0.9, 0.9), weight_decay=0.0, penalty=GroupLasso(0.2)),
])  # fmt: skip
def test_it_minimises_the_penalised_loss(make):
    """Optimality of the group lasso in float64: zero columns have a small gradient, the others balance it."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(60, 6, generator=g, dtype=torch.float64)
    truth = torch.randn(3, 6, generator=g, dtype=torch.float64)
    truth[:, [1, 4]] = 0
    y = x @ truth.T + 0.1 * torch.randn(60, 3, generator=g, dtype=torch.float64)
    w = nn.Parameter(torch.randn(3, 6, generator=g, dtype=torch.float64))
    optimizer = make([w])
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.997)
    for _ in range(2500):
        optimizer.zero_grad()
        (0.5 * ((x @ w.T - y) ** 2).sum() / 60).backward()
        optimizer.step()
        scheduler.step()
    zero = (w == 0).all(0)
    assert zero.nonzero().flatten().tolist() == [1, 4]
    strength = 0.2 * 3**0.5
    assert (w.grad[:, zero].norm(dim=0) <= strength).all()
    alive = w.detach()[:, ~zero]
    torch.testing.assert_close(w.grad[:, ~zero], -strength * alive / alive.norm(dim=0), rtol=0, atol=1e-3)


@pytest.mark.parametrize("pair", ["sgd", "adam", "adamw"])
def test_zeros_appear_and_stay(pair):
    ours, _, settings = PAIRS[pair]
    model = network()
    optimizer = ours(model.parameters(), **{**settings, "weight_decay": 0.0}, penalty="group_lasso", lam=0.05)
    train(model, optimizer, 40)
    zero = (model[3].weight == 0).all(3).all(2).all(0)
    assert zero.sum() > 0
    for p in model.parameters():
        p.grad.zero_()
    for _ in range(5):
        optimizer.step()
        assert (model[3].weight[:, zero] == 0).all()
    assert model[1].weight.ne(0).all()  # norms and biases are not under the paper's penalty
    assert model[0].bias.ne(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("penalty", [GroupLasso(0.02), GroupMCP(0.02, 20_000.0)])
@pytest.mark.parametrize("pair", PAIRS)
def test_saved_and_loaded_it_goes_on_exactly(pair, penalty, dtype):
    ours, _, settings = PAIRS[pair]
    whole = network(dtype)
    optimizer = ours(whole.parameters(), penalty=penalty, **settings)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    train(whole, optimizer, 4, scheduler=scheduler)
    file = io.BytesIO()
    torch.save({"model": whole.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    train(whole, optimizer, 4, first=4, scheduler=scheduler)

    resumed = network(dtype)
    resumed.load_state_dict(saved["model"])
    optimizer = ours(resumed.parameters(), **settings)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    optimizer.load_state_dict(saved["optimizer"])
    scheduler.load_state_dict(saved["scheduler"])
    train(resumed, optimizer, 4, first=4, scheduler=scheduler)
    assert_same(whole, resumed)
    assert resumed[0].weight.dtype == dtype


def test_takes_the_state_of_torchs_optimizer():
    model = network()
    plain = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, plain, 2)
    optimizer = ProxAdamW(model.parameters(), lr=0.5, penalty="group_lasso", lam=0.1)
    optimizer.load_state_dict(plain.state_dict())
    group = optimizer.param_groups[0]
    assert (group["lr"], group["penalty"], group["lam"], group["exact_threshold"]) == (0.01, "group_lasso", 0.1, False)
    train(model, optimizer, 30, first=2)
    assert (model[3].weight == 0).all(3).all(2).all(0).any()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_a_copy_goes_on_exactly(duplicate):
    model = network()
    optimizer = ProxAdam(model.parameters(), lr=0.01, groups=input_groups([model[3].weight]), penalty=GroupLasso(0.1))
    train(model, optimizer, 2)
    twin, twins_optimizer = duplicate((model, optimizer))
    train(model, optimizer, 20, first=2)
    train(twin, twins_optimizer, 20, first=2)
    assert_same(model, twin)
    assert (twin[3].weight == 0).all(3).all(2).all(0).any()
    assert not (twin[0].weight == 0).all(3).all(2).all(0).any()


def test_closure_is_called_once_with_gradients():
    model = network()
    optimizer = ProxAdamW(model.parameters(), lr=0.01, weight_decay=0.1, penalty=GroupLasso(0.01))
    x, y = batch(0)
    calls = []

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        calls.append(loss.item())
        return loss

    assert optimizer.step(closure).item() == calls[0]
    assert len(calls) == 1
    other = network()
    train(other, ProxAdamW(other.parameters(), lr=0.01, weight_decay=0.1, penalty=GroupLasso(0.01)), 1)
    assert_same(model, other)


def test_a_failing_closure_leaves_the_decay_as_it_was():
    optimizer = ProxAdamW(network().parameters(), weight_decay=0.1, penalty=GroupLasso(0.01))
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    assert optimizer.param_groups[0]["weight_decay"] == 0.1


def test_step_hooks_run_once():
    torch.optim.AdamW([nn.Parameter(torch.zeros(1))])  # torch wraps the step of a class when it is first built
    model = network()
    optimizer = ProxAdamW(model.parameters(), penalty=GroupLasso(0.01))
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    train(model, optimizer, 1)
    assert calls == ["before", "after"]


def test_scheduler_scales_the_threshold():
    w = nn.Parameter(torch.tensor([[3.0], [4.0]]))
    optimizer = ProxSGD([w], lr=1.0, penalty=GroupLasso(1 / 2**0.5), groups=whole(w))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: [1.0, 0.5, 0.0, 2.0][min(t, 3)])
    norms = []
    for _ in range(4):
        w.grad = torch.zeros_like(w)
        optimizer.step()
        scheduler.step()
        norms.append(w.norm().item())
    assert norms == pytest.approx([4.0, 3.5, 3.5, 1.5], rel=1e-6)


def whole(w):
    return (RowGroup("column", (Piece(w, 1, torch.zeros(1, 1, dtype=torch.int64)),)),)


def test_lam_follows_its_param_group():
    a, b, c = (nn.Parameter(torch.full((1, 2), 10.0)) for _ in range(3))
    groups = [{"params": [a]}, {"params": [b], "lam": 3.0}, {"params": [c], "penalty": None}]
    optimizer = ProxSGD(groups, lr=1.0, penalty="group_lasso", lam=1.0)
    optimizer.add_param_group({"params": [d := nn.Parameter(torch.full((1, 2), 10.0))], "penalty": GroupMCP(1.0, 2.0)})
    for p in (a, b, c, d):
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert [p[0, 0].item() for p in (a, b, c, d)] == [9.0, 7.0, 10.0, 10.0]
    optimizer.param_groups[0]["lam"] = 5.0
    optimizer.step()
    assert a[0, 0].item() == pytest.approx(4.0)


def unit_of(*params):
    return (RowGroup("units", tuple(Piece(p, 0, torch.arange(len(p)).unsqueeze(1)) for p in params)),)


@pytest.mark.parametrize("kind", [ProxSGD, ProxAdam])
def test_a_unit_over_param_groups_with_different_lr(kind):
    """Stationary for the prox of its own step: d_i / lr_i (z_i - x_i) + lam sqrt(n) z_i / ||z|| = 0."""
    torch.manual_seed(0)
    gradients = [torch.randn(3, 4, dtype=torch.float64), torch.randn(3, dtype=torch.float64)]
    stepped = []
    for penalty in (None, GroupLasso(0.3)):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(*shape, dtype=torch.float64)) for shape in ((3, 4), (3,))]
        optimizer = kind(
            [{"params": [params[0]], "lr": 0.1}, {"params": [params[1]], "lr": 0.001}],
            penalty=penalty,
            groups=unit_of(*params),
        )
        for p, g in zip(params, gradients, strict=True):
            p.grad = g.clone()
        optimizer.step()
        stepped.append([p.detach() for p in params])
    if kind is ProxAdam:
        ds = [optimizer.state[p]["exp_avg_sq"].sqrt() + 1e-6 for p in params]
    else:
        ds = [torch.ones_like(p) for p in params]
    d = torch.cat([ds[0] / 0.1, ds[1][:, None] / 0.001], 1)
    x, z = (torch.cat([w, b[:, None]], 1) for w, b in stepped)
    assert not torch.equal(x, z)
    alive = z.ne(0).any(1)
    strength = 0.3 * 5**0.5
    torch.testing.assert_close(
        (d * (z - x))[alive], (-strength * z / z.norm(dim=1, keepdim=True))[alive], rtol=1e-9, atol=1e-12
    )
    assert ((d * x)[~alive].norm(dim=1) <= strength).all()


def test_parameters_without_gradient_are_left_alone():
    model = network()
    model[3].weight.requires_grad_(False)
    before = model[3].weight.clone()
    train(model, ProxAdam(model.parameters(), lr=0.01, penalty=GroupLasso(0.1)), 30)
    assert torch.equal(model[3].weight, before)
    assert (model[0].weight == 0).all(3).all(2).all(0).any()
    ProxAdam(network().parameters(), penalty=GroupLasso(0.1)).step()  # nothing has a gradient


def test_bfloat16_parameters():
    w = nn.Parameter(torch.randn(8, 5).bfloat16())
    optimizer = ProxAdamW([w], lr=0.1, penalty=GroupLasso(0.5))
    for _ in range(20):
        w.grad = 0.01 * w.detach()
        optimizer.step()
    assert w.dtype == torch.bfloat16
    assert (w == 0).all()


@pytest.mark.parametrize("groups", ["paper", "units"])
def test_penalty_value_is_what_the_prox_adds(groups):
    w, b = nn.Parameter(torch.tensor([[3.0, 1.0], [4.0, 0.0]])), nn.Parameter(torch.tensor([0.0, 3.0]))
    optimizer = ProxSGD([w, b], penalty=GroupLasso(0.1), groups=None if groups == "paper" else unit_of(w, b))
    expected = 0.1 * 2**0.5 * (5 + 1) if groups == "paper" else 0.1 * 3**0.5 * (10**0.5 + 5)
    assert optimizer.penalty_value() == pytest.approx(expected, rel=1e-6)


def test_groups_follow_surgery():
    model = network()
    units = input_groups([model[3].weight])
    default = ProxAdam(model.parameters(), lr=0.01, penalty=GroupLasso(0.1))
    chosen = ProxAdam(model.parameters(), lr=0.01, penalty=GroupLasso(0.1), groups=units)
    for optimizer in (default, chosen):
        train(model, optimizer, 1)
    model[3].weight = nn.Parameter(model[3].weight.detach()[:, :3].clone())
    model[0].weight = nn.Parameter(model[0].weight.detach()[:3].clone())
    for optimizer in (default, chosen):
        optimizer.param_groups[0]["params"] = [model[0].weight, model[3].weight]
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.zeros_like(p)
    default.step()
    with pytest.raises(ConfigError, match=r"group 0.dim1 has 1 parameters that .* shape \(4, 5, 3, 3\); after surgery call"):
        chosen.step()
    chosen.regroup(input_groups([model[3].weight]))
    chosen.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"penalty": "group_lasso"}, "penalty='group_lasso' needs lam"),
        ({"penalty": "group_mcp", "lam": 0.1}, "needs gamma"),
        ({"penalty": "l1", "lam": 0.1}, "penalty='l1' must be one of"),
        ({"penalty": GroupLasso(0.1), "lam": 0.2}, "lam=0.2 and gamma=None are given beside GroupLasso"),
        ({"groups": unit_of(torch.zeros(2, 2)), "penalty": GroupLasso(0.1)}, "does not hold, the first of shape"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        ProxAdamW(network().parameters(), **options)


def test_one_unit_needs_one_penalty_and_moving_parameters():
    w, b = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    w.grad, b.grad = torch.ones(2, 2), torch.ones(2)
    split = [{"params": [w]}, {"params": [b], "lam": 0.2}]
    with pytest.raises(ConfigError, match="under 2 penalties"):
        ProxSGD(split, penalty="group_lasso", lam=0.1, groups=unit_of(w, b)).step()
    split = [{"params": [w]}, {"params": [b], "lr": 0.0}]
    with pytest.raises(ConfigError, match="some parameters of a unit step at the rate 0 and others at 0.001"):
        ProxSGD(split, penalty="group_lasso", lam=0.1, groups=unit_of(w, b)).step()


def test_mcp_outside_its_range_is_an_error_with_a_cure():
    w = nn.Parameter(torch.ones(4, 4))
    w.grad = torch.tensor([0.01, 0.01, 0.1, 0.1]).expand(4, 4).T.clone()
    with pytest.raises(ConfigError, match=r"gamma=3 .* \(4 units are below\); raise gamma above lr / eps"):
        ProxAdam([w], lr=0.1, penalty=GroupMCP(0.04, 3.0)).step()
