#!/usr/bin/env bash
# Guess:    networkx.from_scipy_sparse_array and igraph's Weighted_Adjacency make the graph of a weight's edges: the same one from a
#           scipy matrix as from the array that it stands for.
# Happens:  a stored zero is an edge. A CSR weight whose smallest values were set to zero, or that was multiplied by a mask of its own
#           values, gives the graph from before the pruning, with edges of weight 0; from the dense array these edges are absent.
#           Whether an output can still be reached, the number of paths, dead units and shortest paths are those of the unpruned
#           network; a shortest path by weight prefers what was removed. eliminate_zeros() before mends it.
# Seen with networkx 3.6.1, igraph 1.0.0, scipy 1.17.1 and numpy 2.4.6, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet networkx==3.6.1 igraph==1.0.0 scipy==1.17.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import warnings

import igraph
import networkx
import numpy as np
from scipy import sparse

warnings.simplefilter("error")  # a warning would end the script
generator = np.random.default_rng(0)
layers, width = 4, 12


def of_networkx(matrix):
    make = networkx.from_scipy_sparse_array if sparse.issparse(matrix) else networkx.from_numpy_array
    graph = make(matrix, create_using=networkx.DiGraph)
    outputs = range(layers * width, (layers + 1) * width)
    reached = networkx.descendants(graph, 0).intersection(outputs)
    return graph.number_of_edges(), len(reached)


def of_igraph(matrix):
    graph = igraph.Graph.Weighted_Adjacency(matrix, mode="directed")
    distances = graph.distances(0, range(layers * width, (layers + 1) * width))[0]
    return graph.ecount(), int(np.isfinite(distances).sum())


# A network of five columns of units as one matrix, from which all but a twelfth of the values are then set to zero.
weight = np.zeros(((layers + 1) * width,) * 2)
for layer in range(layers):
    rows, columns = (slice(place * width, (place + 1) * width) for place in (layer, layer + 1))
    weight[rows, columns] = np.abs(generator.standard_normal((width, width)))
network = sparse.csr_matrix(weight)
network.data[network.data < np.quantile(network.data, 11 / 12)] = 0
without = network.copy()
without.eliminate_zeros()

seen = {}
for library, facts in (("networkx", of_networkx), ("igraph", of_igraph)):
    for name, matrix in (("stored zeros", network), ("eliminate_zeros()", without), ("array", network.toarray())):
        seen[library, name] = facts(matrix)
        print(f"{library}, {name}: {seen[library, name][0]} edges, unit 0 reaches {seen[library, name][1]} of {width} outputs")
for library in ("networkx", "igraph"):
    assert seen[library, "stored zeros"] == (layers * width**2, width), "this has changed"
    assert seen[library, "array"] == seen[library, "eliminate_zeros()"] == (np.count_nonzero(weight) // 12, 0), "this has changed"
print("as described")
PY
