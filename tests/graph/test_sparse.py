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

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")


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


@pytest.mark.parametrize("layout", ["pairs", "rows"])
def test_the_matrix_is_an_input(layout):
    example = (NODES, laid_out(layout))
    graph, _ = rehearse(Convolutions(torch.matmul).double(), example)
    assert sorted(group.size for group in graph.unlocked) == [8, 16], str(graph)
    check_cuts(lambda: Convolutions(torch.matmul), graph, example)


@pytest.mark.parametrize("criterion", [actprune.criteria.Variance(), actprune.criteria.Taylor()])
@pytest.mark.parametrize("layout", ["pairs", "rows"])
def test_pruned_by_what_it_computes(layout, criterion):
    torch.manual_seed(0)
    model, example = Convolutions(torch.matmul), {"x": NODES.float(), "edges": laid_out(layout).float()}
    actprune.prune(model, example, data=[(example, torch.arange(6) % 4)], criterion=criterion, budget=actprune.Budget(params=0.6))
    assert model.first.out_features + model.second.out_features < 24
    assert model(**example).shape == (6, 4)
