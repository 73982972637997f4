"""How much a trained network could have fitted: Lipschitz constants, distances to initialisation, bounds, projections."""

from actprune.capacity.bounds import Sample, layer_capacities, margin, norms_bound, params_bound, psi, sample_of
from actprune.capacity.distance import distance, group_norm
from actprune.capacity.flow import Flow, Use, follow
from actprune.capacity.lipschitz import lipschitz_constant
from actprune.capacity.maps import LinearMap, batch_norm_scale, linear_map
from actprune.capacity.measure import LayerCapacity, NetworkCapacity, effective, measure
from actprune.capacity.projections import clip, constrain, dykstra, onto_group_ball, scaled

__all__ = [
    "Flow",
    "LayerCapacity",
    "LinearMap",
    "NetworkCapacity",
    "Sample",
    "Use",
    "batch_norm_scale",
    "clip",
    "constrain",
    "distance",
    "dykstra",
    "effective",
    "follow",
    "group_norm",
    "layer_capacities",
    "linear_map",
    "lipschitz_constant",
    "margin",
    "measure",
    "norms_bound",
    "onto_group_ball",
    "params_bound",
    "psi",
    "sample_of",
    "scaled",
]
