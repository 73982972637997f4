"""Graph networks: who is whose neighbour stands in a sparse matrix, by pairs or in compressed rows."""

import pytest
import torch
from torch import nn

import actprune
from actprune.pruning.verify import rehearse
from masked import check_cuts

EDGES = torch.tensor([[0, 1, 2, 3, 4, 5, 0], [1, 2, 3, 4, 5, 0, 3]])
PAIRS = torch.sparse_coo_tensor(EDGES, torch.arange(1.0, 8.0, dtype=torch.float64), (6, 6), check_invariants=True)
NODES = torch.randn(6, 10, dtype=torch.float64)

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled"),
]


def laid_out(layout):
    return PAIRS.to_sparse_csr() if layout == "rows" else PAIRS


class Convolutions(nn.Module):
    """Features of neighbours are summed, by what is given."""

    def __init__(self, gather):
        super().__init__()
        self.first, self.second, self.head, self.gather = nn.Linear(10, 16), nn.Linear(16, 8), nn.Linear(8, 4), gather

    def forward(self, x, edges):
        x = self.gather(edges, self.first(x)).relu()
        return self.head(self.gather(edges, self.second(x)).relu())


def added(edges, x):
    return torch.sparse.addmm(x, edges, x, beta=0.5)


def set_aside(edges, x):
    return torch.sparse.addmm(x.exp(), edges, x, beta=0)


@pytest.mark.parametrize("layout", ["pairs", "rows"])
@pytest.mark.parametrize("gather", [torch.matmul, torch.spmm, torch.sparse.mm, added, set_aside])
def test_the_matrix_is_an_input(gather, layout):
    example = (NODES, laid_out(layout))
    graph, _ = rehearse(Convolutions(gather).double(), example)
    assert sorted(group.size for group in graph.unlocked) == [8, 16], str(graph)
    assert not graph.unknown
    check_cuts(lambda: Convolutions(gather), graph, example)


def test_the_matrix_is_made_inside():
    class Made(Convolutions):
        def forward(self, x):
            return super().forward(x, laid_out("pairs"))

    graph, _ = rehearse(Made(torch.sparse.mm).double(), NODES)
    assert sorted(group.size for group in graph.unlocked) == [8, 16], str(graph)
    check_cuts(lambda: Made(torch.sparse.mm), graph, NODES)


class Own(nn.Module):
    """Products that the module runs itself, one of them of a matrix that may be sparse."""

    def __init__(self, edges):
        super().__init__()
        self.register_buffer("edges", edges)
        self.inner, self.outer = nn.Parameter(torch.randn(10, 8)), nn.Parameter(torch.randn(8, 4))

    def forward(self, x):
        gather = torch.sparse.mm if self.edges.is_sparse else torch.mm
        return gather(self.edges, x @ self.inner).relu() @ self.outer


@pytest.mark.parametrize("criterion", [actprune.criteria.Variance(), actprune.criteria.Taylor()])
def test_what_a_product_reads_is_found_behind_a_sparse_one(criterion):
    left = []
    for edges in (PAIRS, PAIRS.to_dense()):
        torch.manual_seed(0)
        model = Own(edges).double()
        data = [(NODES, torch.arange(6) % 4)]
        actprune.prune(model, NODES, data=data, criterion=criterion, budget=actprune.Budget(params=0.6), compensation=None)
        left.append(model.inner)
    assert left[0].shape == left[1].shape != (10, 8)
    assert torch.equal(*left)


@pytest.mark.parametrize("criterion", [actprune.criteria.Variance(), actprune.criteria.Taylor()])
@pytest.mark.parametrize("layout", ["pairs", "rows"])
def test_pruned_by_what_it_computes(layout, criterion):
    torch.manual_seed(0)
    model, example = Convolutions(torch.matmul), {"x": NODES.float(), "edges": laid_out(layout).float()}
    actprune.prune(
        model, example, data=[(example, torch.arange(6) % 4)], criterion=criterion, budget=actprune.Budget(params=0.6)
    )
    assert model.first.out_features + model.second.out_features < 24
    assert model(**example).shape == (6, 4)


def of_pairs(n, x):
    return torch.sparse_coo_tensor(EDGES, torch.ones(7, dtype=x.dtype), (n, n))


MADE = {
    "pairs": lambda x: torch.sparse.mm(of_pairs(len(x), x), x),
    "rows": lambda x: torch.eye(len(x), dtype=x.dtype).to_sparse_csr() @ x,
    "identity": lambda x: torch.sparse.mm(torch.eye(len(x), dtype=x.dtype).to_sparse(), x),
    "dense again": lambda x: of_pairs(len(x), x).coalesce().to_dense() @ x,
}


@pytest.mark.parametrize("case", MADE)
def test_the_matrix_is_made_of_sizes_in_the_forward(case):
    def gather(edges, x):
        return MADE[case](x)

    example = (NODES, NODES)
    graph, _ = rehearse(Convolutions(gather).double(), example)
    assert sorted(group.size for group in graph.unlocked) == [8, 16], str(graph)
    check_cuts(lambda: Convolutions(gather), graph, example)
