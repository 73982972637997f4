"""What a unit tells of the class where it tells nothing, and where there is nothing to tell."""

import pytest
import torch
from sklearn.metrics import mutual_info_score

from actprune import Budget, Pruner
from actprune.core.errors import ObservationError
from actprune.core.views import GroupView
from actprune.criteria import LabelInformation
from actprune.criteria.label_information import mutual_information

N, CLASSES = 60, 3
LABELS = torch.arange(N) % CLASSES
VARIANTS = [
    LabelInformation(CLASSES, bins=1024),
    LabelInformation(CLASSES, bins=1024, range="layer"),
    LabelInformation(CLASSES, bins=1024, pool="positions", zero_bin=False),
    LabelInformation(CLASSES, bins=1024, bias_correction="miller_madow"),
]
each_variant = pytest.mark.parametrize("criterion", VARIANTS, ids=lambda c: f"{c.range},{c.pool},{c.bias_correction}")


def score(criterion, x, labels, n_sites=1):
    (key, build), *_ = criterion.statistics().items()
    sites = [build(x.shape[1]) for _ in range(n_sites)]
    for site in sites:
        site.update(x, torch.arange(len(x)), labels)
    return criterion.score(GroupView("g", x.shape[1], {key: sites}))


@each_variant
def test_units_that_tell_nothing_score_exactly_zero(criterion):
    """Always 0, always the same, and as often of each level in every class."""
    levels = torch.stack([torch.zeros(N), torch.full((N,), 0.3), (torch.arange(N) // CLASSES) % 4, LABELS], dim=1)
    found = score(criterion, levels.float().unsqueeze(2), LABELS)
    assert found[:3].tolist() == [0, 0, 0]
    assert found[3] > 0.9


@pytest.mark.parametrize("n_sites", [1, 2])
@each_variant
def test_a_group_that_tells_nothing_of_several_classes_scores_zero(criterion, n_sites):
    assert score(criterion, torch.full((N, 4, 2), 0.7), LABELS, n_sites).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("n_sites", [1, 2])
@each_variant
def test_samples_of_one_class_give_no_score(criterion, n_sites):
    assert score(criterion, torch.randn(N, 4, 2), torch.full((N,), 2), n_sites) is None


def test_pruning_by_samples_of_one_class_is_an_error_that_says_so():
    model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)).eval()
    x = torch.randn(N, 5)
    pruner = Pruner(model, x[:2], LabelInformation(CLASSES), Budget(units=0.5), compensation=None)
    with pruner.observe() as observation, torch.no_grad():
        observation.begin_batch(torch.arange(N), torch.zeros(N, dtype=torch.int64))
        model(x)
    with pytest.raises(ObservationError, match=r"scores none of 1 groups: all observed samples are of one class; observe"):
        pruner.plan(observation)


@pytest.mark.parametrize("scale", [1, 10**7])
def test_mutual_information_is_that_of_scikit_learn(scale):
    counts = torch.randint(0, 9, (20, 4, 6), generator=torch.Generator().manual_seed(0))
    counts[:, :, 2], counts[:, 1] = 0, 0
    found = mutual_information(scale * counts.double())
    expected = [mutual_info_score(None, None, contingency=table.numpy()) for table in counts]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-12)
