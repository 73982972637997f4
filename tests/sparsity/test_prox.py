import math

import numpy as np
import pytest
import scipy.optimize
import torch

from actprune.core.errors import ConfigError
from actprune.sparsity.penalty import GroupLasso, GroupMCP, make_penalty
from actprune.sparsity.prox import prox_group_lasso, prox_group_mcp

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


def lasso(x, t, d=None):
    return prox_group_lasso([x], t, None if d is None else [d])[0]


def mcp(x, a, lam, gamma, d=None):
    return prox_group_mcp([x], a, lam, gamma, None if d is None else [d])[0]


def row(*values, dtype=torch.float64):
    return torch.tensor([values], dtype=dtype)


def draw(n, dtype, seed, decades=7, units=600):
    """Units over many scales, metrics over ``decades``, thresholds from far below to just below ||d x||."""
    g = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return torch.rand(*shape, generator=g, dtype=torch.float64)

    d = 10 ** (uniform(units, n) * decades - 6)
    x = torch.randn(units, n, generator=g, dtype=torch.float64) * 10 ** (uniform(units, 1) * 6 - 4)
    share = torch.where(uniform(units) < 0.2, 1 - 10 ** (-5 * uniform(units)), 10 ** (-6 * uniform(units)))
    t = (d * x).norm(dim=1) * share
    return x.to(dtype), d.to(dtype), t.to(dtype)


def residual(z, x, d, pull):
    """Largest gradient of 1/2 sum d (z - x)^2 + a r(||z||), each component relative to its terms; in float64.

    ``pull`` is a r'(||z||). Relative, because rounding z to its dtype alone moves component i by d_i |z_i| eps.
    """
    norm = z.norm(dim=1, keepdim=True)
    gradient = d * (z - x) + pull(norm) * z / norm
    return (gradient.abs() / (d * x.abs() + pull(norm) * z.abs() / norm)).max().item()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("n", [1, 2, 7, 144, 1152])
def test_lasso_is_stationary(n, dtype):
    x, d, t = draw(n, dtype, seed=n)
    z = lasso(x, t, d)
    assert z.dtype == dtype
    z, x, d, t = (v.double() for v in (z, x, d, t))
    survived = (d * x).norm(dim=1) > t * (1 + 1e-6)
    assert survived.sum() > 300
    assert z[survived].ne(0).any(1).all()
    assert residual(z[survived], x[survived], d[survived], lambda s: t[survived, None]) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("n", [1, 2, 7, 144, 1152])
def test_mcp_is_stationary(n, dtype):
    x, d, t = draw(n, dtype, seed=100 + n)
    a = 1e-3
    gamma = 1.5 * a / d.min().item()
    lam = t / a
    # half of the units inside the curved part, half beyond it
    lam[::2] = x[::2].norm(dim=1) / gamma * 2
    z = mcp(x, a, lam, gamma, d)
    z, x, d, lam = (v.double() for v in (z, x, d, lam))
    alive = z.ne(0).any(1)
    assert alive.sum() > 50
    pull = lambda s: a * (lam[alive, None] - s / gamma).clamp(min=0)  # noqa: E731
    assert residual(z[alive], x[alive], d[alive], pull) < TOLERANCE[dtype]
    flat = x.norm(dim=1) > gamma * lam * (1 + 1e-6)
    assert torch.equal(z[flat], x[flat])
    small = ((d * x).norm(dim=1) < a * lam * (1 - 1e-6)) & ~flat
    assert (z[small] == 0).all()


def test_lasso_vector():
    z = lasso(row(3, 4, -1), 1.0, row(1, 2, 0.5))
    assert z.norm().item() == pytest.approx(4.398591840162983, rel=1e-14)
    torch.testing.assert_close(z, row(2.44429953, 3.5917194, -0.68743123), rtol=0, atol=1e-8)


def test_mcp_vector():
    z = mcp(row(1.5, 2, -0.5), 1.0, 1.0, 5.0, row(1, 2, 0.5))
    assert z.norm().item() == pytest.approx(2.152687149092351, rel=1e-14)
    torch.testing.assert_close(z, row(1.18620614, 1.76636651, -0.32699585), rtol=0, atol=1e-8)
    assert (mcp(row(0.3, 0.2, -0.5), 1.0, 1.0, 5.0, row(1, 2, 0.5)) == 0).all()


@pytest.mark.parametrize("metric", [None, row(1, 1)])
def test_unit_metric_vector(metric):
    torch.testing.assert_close(lasso(row(3, 4), 1.0, metric), row(2.4, 3.2), rtol=1e-15, atol=0)
    # gamma / (gamma - a) (1 - t / ||x||) = 2 / 1.5 * 0.8 > 1 keeps; 5 / 4.5 * 0.8 shrinks
    assert torch.equal(mcp(row(3, 4), 0.5, 2.0, 2.0, metric), row(3, 4))
    torch.testing.assert_close(mcp(row(3, 4), 0.5, 2.0, 5.0, metric), row(3, 4) * (0.8 * 5 / 4.5), rtol=1e-14, atol=0)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", ["lasso", "mcp"])
def test_agrees_with_a_general_minimiser(kind, seed):
    rng = np.random.default_rng(seed)
    n, a, lam = 4, 0.3, 0.8
    x, d = rng.normal(size=n) * rng.uniform(0.2, 2), 10 ** rng.uniform(-1, 1, n)
    gamma = 1.2 * a / d.min()

    def penalty(s):
        if kind == "lasso":
            return lam * s
        return lam * s - s**2 / (2 * gamma) if s <= gamma * lam else gamma * lam**2 / 2

    def objective(z):
        return 0.5 * np.sum(d * (z - x) ** 2) + a * penalty(np.linalg.norm(z))

    z = (lasso(row(*x), a * lam, row(*d)) if kind == "lasso" else mcp(row(*x), a, lam, gamma, row(*d))).numpy()[0]
    starts = [x, 0.1 * x, 1e-3 * rng.normal(size=n)]
    options = {"xatol": 1e-10, "fatol": 1e-14, "maxiter": 20000, "maxfev": 20000}
    found = [scipy.optimize.minimize(objective, s, method="Nelder-Mead", options=options) for s in starts]
    best = min([*(f.fun for f in found), objective(np.zeros(n))])
    assert objective(z) <= best + 1e-12
    assert objective(z) == pytest.approx(best, abs=1e-8)


def test_threshold_decides_zero():
    x, d = row(0.3, -0.2), row(2.0, 5.0)
    edge = (d * x).norm().item()
    assert (lasso(x, edge * (1 + 1e-12), d) == 0).all()
    assert lasso(x, edge * (1 - 1e-12), d).ne(0).all()


def test_units_do_not_touch_each_other():
    x, d, t = draw(9, torch.float64, seed=1, units=50)
    together = lasso(x, t, d)
    for u in (0, 17, 49):
        torch.testing.assert_close(together[u : u + 1], lasso(x[u : u + 1], t[u : u + 1], d[u : u + 1]), rtol=1e-12, atol=0)


@pytest.mark.parametrize("metric", [None, torch.ones(3, 2)])
def test_zero_and_nan_units(metric):
    x = torch.tensor([[0.0, 0.0], [math.nan, 1.0], [3.0, 4.0]])
    for z in (lasso(x, 1.0, metric), mcp(x, 1.0, 1.0, 5.0, metric)):
        assert (z[0] == 0).all()
        assert z[1].isnan().all()
        assert z[2].isfinite().all()


def test_mcp_refuses_several_minima():
    x, d = row(1.0, 1.0), row(1.0, 0.01)
    with pytest.raises(ConfigError, match=r"gamma=5 .* 1 / 0.01 = 100 \(1 units"):
        mcp(x, 1.0, 1.0, 5.0, d)
    with pytest.raises(ConfigError, match=r"gamma=0.5 is exact only for gamma > step"):
        mcp(x, 1.0, 1.0, 0.5)


@pytest.mark.parametrize("seed", range(4))
def test_mcp_bounds_beyond_the_guard_hold(seed):
    """Units accepted although gamma min(d) < a: zero, or x itself, must be the global minimum (grid over the plane)."""
    rng = np.random.default_rng(seed)
    a, lam, gamma = 1.0, 1.0, 2.0
    accepted = set()
    grid = np.linspace(-1.5, 1.5, 241)
    for _ in range(60):
        d = np.array([10 ** rng.uniform(-2, -0.4), 10 ** rng.uniform(-1, 1)])
        x = rng.normal(size=2) * 10 ** rng.uniform(-2, 1.2)
        try:
            z = mcp(row(*x), a, lam, gamma, row(*d)).numpy()[0]
        except ConfigError:
            continue
        accepted.add(bool(np.any(z)))
        reach = max(np.abs(x).max(), 0.1)
        p = np.stack(np.meshgrid(grid * reach, grid * reach), -1).reshape(-1, 2)
        s = np.linalg.norm(p, axis=1)
        r = np.where(s <= gamma * lam, lam * s - s**2 / (2 * gamma), gamma * lam**2 / 2)
        s_z = np.linalg.norm(z)
        r_z = lam * s_z - s_z**2 / (2 * gamma) if s_z <= gamma * lam else gamma * lam**2 / 2
        assert 0.5 * np.sum(d * (z - x) ** 2) + a * r_z <= (0.5 * ((p - x) ** 2 * d).sum(1) + a * r).min() + 1e-9
    assert accepted == {True, False}


def test_penalty_values():
    norms, weights = torch.tensor([0.5, 10.0]), torch.tensor([1.0, 2.0])
    torch.testing.assert_close(GroupLasso(0.1).value(norms, weights), torch.tensor([0.05, 2.0]))
    # 0.1 * 0.5 - 0.125 / 40 = 0.046875 with gamma = 20; beyond gamma lam sqrt(n) = 4: 20 * 0.2^2 / 2
    torch.testing.assert_close(GroupMCP(0.1, 20.0).value(norms, weights), torch.tensor([0.05 - 0.25 / 40, 0.4]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GroupLasso(-1.0), "lam=-1.0 must be finite and at least 0"),
        (lambda: GroupLasso(math.nan), "lam=nan must be finite"),
        (lambda: GroupMCP(1.0, 0.0), "gamma=0.0 must be positive"),
        (lambda: make_penalty("lasso", 1.0, None), "penalty='lasso' must be one of group_lasso, group_mcp"),
        (lambda: make_penalty("group_lasso", None, None), "needs lam"),
        (lambda: make_penalty("group_mcp", 1.0, None), "needs gamma"),
    ],
)
def test_bad_penalties(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
