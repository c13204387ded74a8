#!/usr/bin/env bash
# Guess:    networkx.number_of_walks, which returns Python integers, counts the paths through a layered network exactly, however many
#           there are, or raises where it cannot.
# Happens:  the counts are int64 inside and wrap around without a word. In a network of 64 units a layer of which half of the edges
#           are pruned, the number of paths from input to output is right up to 13 layers of weights; with 14 it is a 20th of the
#           true one, with 16 negative. In the dense network it is 0 from 12 layers on, for every pair of units, as if nothing were
#           connected. The share of its paths that a pattern keeps, the usual reason to count them, can come out as anything.
# Seen with networkx 3.6.1, scipy 1.17.1 and numpy 2.4.6, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet networkx==3.6.1 scipy==1.17.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import networkx
import numpy as np

WIDTH = 64


def counted(masks):
    graph = networkx.DiGraph()
    for depth, mask in enumerate(masks):
        graph.add_edges_from(((depth, int(i)), (depth + 1, int(j))) for i, j in zip(*mask.nonzero()))
    walks = networkx.number_of_walks(graph, len(masks))
    return sum(walks[0, i][len(masks), j] for i in range(WIDTH) for j in range(WIDTH)), walks


def exact(masks):
    paths = np.full(WIDTH, 1, dtype=object)
    for mask in masks:
        paths = paths @ mask.astype(int).astype(object)
    return int(paths.sum())


print("networkx", networkx.__version__)
generator = np.random.default_rng(0)
right = {}
for density in (1.0, 0.5):
    masks = [generator.random((WIDTH, WIDTH)) < density for _ in range(16)]
    for depth in (10, 11, 12, 13, 14, 16):
        found, walks = counted(masks[:depth])
        true = exact(masks[:depth])
        right[density, depth] = found == true
        print(f"density {density}, {depth} layers: networkx counts {found}, there are {true}")
        if density == 1.0 and depth >= 12:
            assert not any(any(ends.values()) for ends in walks.values()), "this has changed"
assert [right[1.0, depth] for depth in (10, 11, 12, 13, 14, 16)] == [True] * 2 + [False] * 4, "this has changed"
assert right[0.5, 12] and not right[0.5, 14] and not right[0.5, 16], "this has changed"
print("as described")
PY
