#!/usr/bin/env bash
# Guess:    torch_geometric's to_undirected of a weighted graph adds the missing directions, with the weight of the other one,
#           and leaves a graph that is undirected already as it is, as it does where there are no weights.
# Happens:  every edge is mirrored and the weights of an edge and its mirror are added up: an undirected graph comes back with
#           all its weights doubled, four times as large after two calls, and every loop is doubled in any graph. Edges that had
#           one direction keep their weight, so that in a graph of both kinds weights that were equal are not any more. The
#           transform ToUndirected does the same. Without weights the graph does not change. reduce="mean" leaves the weights
#           alone. Nothing is said.
# Seen with torch_geometric 2.8.1, torch 2.15.0 and numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet 'torch==2.15.0' 'torch_geometric==2.8.1' 'numpy==2.4.6'
"$folder/venv/bin/python" - <<'PY'
import warnings

import torch
import torch_geometric
from torch_geometric.data import Data
from torch_geometric.transforms import ToUndirected
from torch_geometric.utils import is_undirected, to_undirected

warnings.simplefilter("error")  # a warning would end the script
print("torch_geometric", torch_geometric.__version__, "torch", torch.__version__)
edges = torch.tensor([[0, 1, 1, 2, 3, 3], [1, 0, 2, 1, 3, 0]])  # 0-1 and 1-2 both ways, a loop at 3, and 3 to 0
weights = torch.ones(6)


def table(edges, weights):
    pairs = sorted(zip(edges.T.tolist(), weights.tolist(), strict=True))
    return {f"{source}-{target}": weight for (source, target), weight in pairs}


once = to_undirected(edges, weights)
twice = to_undirected(*once)
seen = {
    "before": table(edges, weights),
    "once": table(*once),
    "twice": table(*twice),
    "mean": table(*to_undirected(edges, weights, reduce="mean")),
}
for name, weight in seen.items():
    print(f"{name}: {weight}")
both_ways = {"0-1", "1-0", "1-2", "2-1", "3-3"}
assert all(seen["once"][edge] == 2 for edge in both_ways), "this has changed"
assert seen["once"]["3-0"] == seen["once"]["0-3"] == 1, "this has changed"
assert {edge: 2 * weight for edge, weight in seen["once"].items()} == seen["twice"], "this has changed"
assert set(seen["mean"].values()) == {1.0}, "this has changed"
assert is_undirected(*once), "this has changed"
symmetric = edges[:, :5], weights[:5]
assert is_undirected(*symmetric)
doubled = to_undirected(*symmetric)[1].tolist()
unweighted = to_undirected(symmetric[0])
print("undirected graph with weights of 1:", doubled, "; without weights its edges:", unweighted.shape[1], "of", 5)
assert doubled == [2] * 5 and unweighted.shape[1] == 5, "this has changed"
data = ToUndirected()(Data(edge_index=symmetric[0], edge_attr=symmetric[1], num_nodes=4))
print("ToUndirected:", data.edge_attr.tolist())
assert data.edge_attr.tolist() == [2] * 5, "this has changed"
print("as described")
PY
