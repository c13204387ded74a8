"""Guests of the zoo over graphs, tables and densities."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Final

import torch
from torch import Tensor, nn

from growfx.commands.zoo import guest_nets as zoo_guest_nets
from growfx.commands.zoo.guest import Draw, Guest, Package

__all__ = ["PACKAGES"]

_NODES: Final = 6


def _edges(draw: Draw, nodes: int) -> Tensor:
    """A ring with random chords through every graph of the batch: (2, edges)."""
    generator = torch.Generator().manual_seed(draw.seed)
    ring = torch.arange(nodes)
    chords = torch.randint(nodes, (2, nodes), generator=generator)
    one = torch.cat([torch.stack([ring, (ring + 1) % nodes]), chords], 1)
    return torch.cat([one + nodes * row for row in range(draw.batch)], 1)


def _graph(draw: Draw) -> tuple[Any, ...]:
    """Features of nodes and edges of `batch` graphs in one."""
    nodes = draw.size(_NODES)
    return draw.normal(nodes, 8).flatten(0, 1), _edges(draw, nodes)


def _data(draw: Draw) -> tuple[Any, ...]:
    """The same as one `Data` object that says which node belongs to which graph."""
    x, edges = _graph(draw)
    data = import_module("torch_geometric.data").Data(x=x, edge_index=edges)
    data.batch = torch.arange(draw.batch).repeat_interleave(len(x) // draw.batch)
    return (data,)


def _convolutions(kind: str, width: int = 16, **options: Any) -> Guest:
    """Two graph convolutions of one kind and a head."""

    def build(_: Any) -> nn.Module:
        layer = getattr(import_module("torch_geometric.nn"), kind)
        return zoo_guest_nets.GraphNet(layer(8, width, **options), layer(width, width, **options), width)

    return Guest(build, _graph)


def _graph_model(kind: str, masked: str) -> Guest:
    """A model without a head, whose linear layers are all torch_geometric's own."""
    return Guest(lambda _: getattr(import_module("torch_geometric.nn"), kind)(8, 16, 2, 4), _graph, (masked,))


_TORCH_GEOMETRIC: Final = {
    "gcn-conv": _convolutions("GCNConv"),
    "gat-conv": _convolutions("GATConv", heads=2, concat=False),
    "gatv2-conv": _convolutions("GATv2Conv", heads=2, concat=False),
    "sage-conv": _convolutions("SAGEConv"),
    "graph-conv": _convolutions("GraphConv"),
    "tag-conv": _convolutions("TAGConv"),
    "cheb-conv": _convolutions("ChebConv", K=2),
    "transformer-conv": _convolutions("TransformerConv", heads=2, concat=False),
    "gcn": _graph_model("GCN", "*.lin.weight"),
    "gin": _graph_model("GIN", "*.lins.*.weight"),
    "graph-sage": _graph_model("GraphSAGE", "*.lin_?.weight"),
    "gat-of-data": Guest(
        lambda _: zoo_guest_nets.DataNet(import_module("torch_geometric.nn").GAT(8, 16, 2, 16, heads=2), 16), _data
    ),
    "gcn-of-data": Guest(
        lambda _: zoo_guest_nets.DataNet(import_module("torch_geometric.nn").GCN(8, 16, 2, 16), 16), _data
    ),
}


def _row(width: int) -> Any:
    return lambda draw: (draw.normal(width),)


def _flow(evaluate: Any, make: Any, context: int = 0, masked: tuple[str, ...] = ()) -> Guest:
    inputs = lambda draw: (draw.normal(5), *([draw.normal(context)] if context else []))  # noqa: E731
    return Guest(lambda package: zoo_guest_nets.LogProbability(make(package), evaluate), inputs, masked)


def _zuko(make: Any, context: int = 0, masked: tuple[str, ...] = ()) -> Guest:
    return _flow(lambda flow, x, given: flow(given).log_prob(x), make, context, masked)


_ZUKO: Final = {
    "maf": _zuko(lambda z: z.flows.MAF(5, transforms=2, hidden_features=[16, 16])),
    "maf-context": _zuko(lambda z: z.flows.MAF(5, 3, transforms=2, hidden_features=[16, 16]), 3),
    "nsf": _zuko(lambda z: z.flows.NSF(5, transforms=2, hidden_features=[16, 16])),
    "nice": _zuko(lambda z: z.flows.NICE(5, transforms=2, hidden_features=[16, 16]), masked=("*.hyper.*.weight",)),
    "masked-mlp": Guest(
        lambda z: z.nn.MaskedMLP(torch.tril(torch.ones(5, 5, dtype=torch.bool)), hidden_features=[16, 16]), _row(5)
    ),
}


def _nflow(transform: Any) -> Guest:
    def make(nflows: Any) -> nn.Module:
        flows = import_module("nflows.flows.base")
        normal = import_module("nflows.distributions.normal").StandardNormal
        return flows.Flow(transform(import_module("nflows.transforms")), normal([5]))

    return _flow(lambda flow, x, given: flow.log_prob(x, given), make)


_NFLOWS: Final = {
    "masked-affine": _nflow(lambda t: t.MaskedAffineAutoregressiveTransform(5, 16)),
    "masked-spline": _nflow(
        lambda t: t.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
            5, 16, num_bins=4, tails="linear", tail_bound=3.0
        )
    ),
    "coupling": _nflow(
        lambda t: t.AffineCouplingTransform(
            torch.tensor([1, 0, 1, 0, 1]),
            lambda i, o: import_module("nflows.nn.nets").ResidualNet(i, o, hidden_features=16),
        )
    ),
    "made": Guest(lambda _: import_module("nflows.transforms.made").MADE(5, 16, use_batch_norm=True), _row(5)),
}

_SNNTORCH: Final = {
    "leaky": Guest(lambda _: zoo_guest_nets.snn_net(False), lambda draw: (draw.normal(1, 16, 16),)),
    "leaky-state": Guest(lambda _: zoo_guest_nets.snn_net(True), lambda draw: (draw.normal(1, 16, 16),)),
}


def _mlp() -> list[nn.Module]:
    """What stands behind six embedded numbers."""
    return [nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 3)]


_RTDL_NUM_EMBEDDINGS: Final = {
    "periodic": Guest(
        lambda r: nn.Sequential(r.PeriodicEmbeddings(6, 8, lite=False), *_mlp()),
        _row(6),
    ),
    "linear-relu": Guest(
        lambda r: nn.Sequential(r.LinearReLUEmbeddings(6, 8), *_mlp()),
        _row(6),
    ),
    "piecewise-linear": Guest(
        lambda r: nn.Sequential(
            r.PiecewiseLinearEmbeddings([torch.linspace(-2, 2, 7) for _ in range(6)], 8, activation=True, version="B"),
            *_mlp(),
        ),
        _row(6),
    ),
}  # fmt: skip

_RTDL: Final = {
    "mlp": Guest(lambda r: r.MLP(d_in=6, d_out=3, n_blocks=2, d_block=32, dropout=0.1), _row(6)),
    "resnet": Guest(
        lambda r: r.ResNet(
            d_in=6, d_out=3, n_blocks=2, d_block=32, d_hidden=None, d_hidden_multiplier=2.0, dropout1=0.1, dropout2=0.0
        ),
        _row(6),
    ),
    "ft-transformer": Guest(
        lambda r: r.FTTransformer(
            n_cont_features=6, cat_cardinalities=[3, 4], d_out=3, n_blocks=2, d_block=32, attention_n_heads=4,
            attention_dropout=0.1, ffn_d_hidden=None, ffn_d_hidden_multiplier=2.0, ffn_dropout=0.1,
            residual_dropout=0.0,
        ),
        lambda draw: (draw.normal(6), draw.integers(3, 2)),
    ),
}  # fmt: skip

_TAB_TRANSFORMER: Final = {
    "tab-transformer": Guest(
        lambda t: t.TabTransformer(
            categories=(3, 4, 5), num_continuous=4, dim=16, depth=2, heads=2, dim_head=8, mlp_act=nn.ReLU()
        ),
        lambda draw: (draw.integers(3, 3), draw.normal(4)),
    ),
    "ft-transformer": Guest(
        lambda t: t.FTTransformer(categories=(3, 4, 5), num_continuous=4, dim=16, depth=2, heads=2, dim_head=8),
        lambda draw: (draw.integers(3, 3), draw.normal(4)),
    ),
}


def _tensor_product(e3nn: Any) -> nn.Module:
    o3 = import_module("e3nn.o3")
    first = o3.Linear("16x0e + 16x1o", "32x0e + 16x1o")
    gate = import_module("e3nn.nn").Gate("16x0e", [torch.relu], "16x0e", [torch.sigmoid], "16x1o")
    return nn.Sequential(first, gate, o3.Linear(gate.irreps_out, "3x0e"))


def _irreps(e3nn: Any) -> nn.Module:
    return nn.Sequential(
        import_module("e3nn.nn").FullyConnectedNet([8, 16, 16], torch.nn.functional.silu), nn.Linear(16, 3)
    )


_E3NN: Final = {
    "linear-gate": Guest(_tensor_product, _row(64), masked=("?.weight",)),
    "fully-connected": Guest(_irreps, _row(8)),
    "tensor-product": Guest(
        lambda _: import_module("e3nn.o3").FullyConnectedTensorProduct("4x0e + 2x1o", "1x0e + 1x1o", "4x0e + 2x1o"),
        lambda draw: (draw.normal(10), draw.normal(4)),
        masked=("weight",),
    ),
}

PACKAGES: Final = (
    Package("torch_geometric", "torch_geometric", _TORCH_GEOMETRIC),
    Package("zuko", "zuko", _ZUKO),
    Package("nflows", "nflows", _NFLOWS),
    Package("snntorch", "snntorch", _SNNTORCH),
    Package("rtdl_num_embeddings", "rtdl_num_embeddings", _RTDL_NUM_EMBEDDINGS),
    Package("rtdl_revisiting_models", "rtdl_revisiting_models", _RTDL),
    Package("tab-transformer-pytorch", "tab_transformer_pytorch", _TAB_TRANSFORMER),
    Package("e3nn", "e3nn", _E3NN),
)
