"""Fuse what follows a step into it: factors and summands into weights, operations on single numbers into its end."""

from __future__ import annotations

from growfx.passes.lower.plan.graph import RESHAPE, Chained, Graph, Node
from growfx.runtime.native.plan import OPERATIONS, WITH_OPERAND, Constant, Size

__all__ = ["fold_factors", "fuse_chains", "fuse_gates", "merge_views"]

_ADD, _MUL, _SUB = (OPERATIONS.index(name) for name in ("add", "mul", "sub"))
_BINARY = {OPERATIONS.index(name): name for name in WITH_OPERAND}
# With the operands exchanged.
_PAIRS = (("sub", "rsub"), ("div", "rdiv"), ("greater_than", "less_than"), ("at_least", "at_most"))
_TURNED = {a: b for pair in _PAIRS for a, b in (pair, pair[::-1])}
# The axis of the output that the rows of the weight make.
_CHANNEL_AXIS = {"convolution": 1, "linear": -1}


def merge_views(graph: Graph) -> None:
    """A view of a view is one view, a reshape of a reshape one reshape."""
    uses, replaced = graph.uses(), dict[int, Node]()
    for node in graph.nodes:
        source = node.inputs[0] if node.inputs else None
        if not isinstance(source, Node) or source.post or node.kernel != source.kernel:
            continue
        if node.kernel == RESHAPE:
            node.inputs = list(source.inputs)
        elif node.kernel == "view" and uses[id(source)] == 1:
            node.ints = source.ints + node.ints
            node.inputs = list(source.inputs)
            replaced[id(source)] = node
    graph.nodes = [node for node in graph.nodes if id(node) not in replaced]


def fold_factors(graph: Graph) -> int:
    """Fold factors and summands of channels that follow a convolution or linear layer into its weight and bias.

    Batch norms and layer scales are of this kind. Computed in double precision; masks stay. Returns how many.
    """
    folded = 0
    for node in list(graph.nodes):
        if node.kernel != "binary" or node.ints[0] not in (_ADD, _MUL, _SUB) or node.post:
            continue
        uses = graph.uses()
        for turned, (source, other) in enumerate((node.inputs, reversed(node.inputs))):
            if not isinstance(source, Node) or not isinstance(other, Constant):
                continue
            layer = _owner(source, uses)
            if layer is not None and not (turned and node.ints[0] == _SUB) and _fold(layer, other, node):
                _stand_in(graph, node, source)
                folded += 1
                break
    return folded


def _fold(layer: Node, other: Constant, node: Node) -> bool:
    """Fold `other` into a layer where it has one number for each channel; whether it was done."""
    axis = _CHANNEL_AXIS.get(layer.kernel)
    if axis is None or layer.post or (layer.shape != node.shape and (axis != -1 or layer.shape[-1] != node.shape[-1])):
        return False
    weight = layer.inputs[1]
    if not isinstance(weight, Constant):
        return False
    channels = weight.tensor.shape[0]
    sizes = [1] * len(node.shape)
    sizes[axis] = channels
    given = [1] * (len(node.shape) - other.tensor.dim()) + list(other.tensor.shape)
    if given != sizes and other.tensor.numel() != 1:
        return False
    values = other.tensor.double().reshape(-1).expand(channels)
    bias = layer.inputs[2] if len(layer.inputs) > 2 else None
    assert bias is None or isinstance(bias, Constant)
    if node.ints[0] == _MUL:
        scaled = weight.tensor.double() * values.reshape(-1, *[1] * (weight.tensor.dim() - 1))
        layer.inputs[1] = Constant(scaled.float(), weight.mask)
        if bias is not None:
            layer.inputs[2] = Constant((bias.tensor.double() * values).float())
        return True
    shift = -values if node.ints[0] == _SUB else values
    total = shift if bias is None else bias.tensor.double() + shift
    layer.inputs[2:] = [Constant(total.float())]
    return True


def fuse_chains(graph: Graph) -> None:
    """Let operations on single numbers be done at the end of the step whose result they alone read.

    Of two results of one shape that are combined, the one that is computed last takes the operation over.
    """
    places = {id(node): i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        uses = graph.uses()
        if node.kernel == "pointwise" and isinstance(node.inputs[0], Node):
            base = _owner(node.inputs[0], uses)
            if base is not None and _is_before(node.post, base, places):
                base.post += node.post
                _stand_in(graph, node, node.inputs[0])
        elif node.kernel == "binary":
            _fuse_binary(graph, node, uses, places)


def fuse_gates(graph: Graph) -> None:
    """Let pointwise convolutions multiply the channels that they read by a gate, which nothing else reads gated.

    So do squeeze-and-excitation blocks: what a gate is multiplied by is read once instead of being written again.
    """
    for node in graph.nodes:
        if node.kernel != "convolution" or not _is_pointwise(node):
            continue
        gated = node.inputs[0]
        if not isinstance(gated, Node) or gated.kernel != "binary" or gated.ints[0] != _MUL or gated.post:
            continue
        first, second = gated.inputs
        if graph.uses()[id(gated)] != 1 or not isinstance(first, Node) or not isinstance(second, Node):
            continue
        values, gate = (first, second) if first.shape == gated.shape else (second, first)
        one = (*gated.shape[:2], *[Size(0, 1)] * (len(gated.shape) - 2))
        if values.shape == gated.shape and gate.shape == one != gated.shape:
            node.kernel, node.inputs = "gated_convolution", [values, node.inputs[1], gate, *node.inputs[2:]]


def _is_pointwise(node: Node) -> bool:
    """Whether a convolution of images reads each place by itself.

    `ints` are the number of axes, strides, paddings, dilations, and the number of groups.
    """
    weight, axes = node.inputs[1], node.ints[0]
    window = weight.tensor.shape[2:] if isinstance(weight, Constant) else (0,)
    strides, paddings = node.ints[1 : 1 + axes], node.ints[1 + axes : 1 + 2 * axes]
    return axes <= 2 and all(size == 1 for size in (*window, *strides)) and not any(paddings)


def _owner(node: Node, uses: dict[int, int]) -> Node | None:
    """The step whose memory a node is, where nothing else reads it."""
    while uses[id(node)] == 1 and node.kernel == RESHAPE and isinstance(node.inputs[0], Node):
        node = node.inputs[0]
    return node if uses[id(node)] == 1 and node.kernel not in ("input", RESHAPE) else None


def _is_before(post: list[Chained], base: Node, places: dict[int, int]) -> bool:
    """Whether the operands are there when `base` is computed."""
    return all(
        not isinstance(chained.operand, Node) or places[id(chained.operand)] < places[id(base)] for chained in post
    )


def _stand_in(graph: Graph, node: Node, source: Node) -> None:
    if node.shape == source.shape:
        graph.replace({id(node): source})
    else:
        node.kernel, node.post, node.ints, node.inputs = RESHAPE, [], [], [source]


def _fuse_binary(graph: Graph, node: Node, uses: dict[int, int], places: dict[int, int]) -> None:
    name = _BINARY[node.ints[0]]
    sides = list(zip(node.inputs, reversed(node.inputs), (name, _TURNED.get(name, name)), strict=True))
    for source, other, operation in sorted(sides, key=lambda side: -places.get(id(side[0]), -1)):
        if not isinstance(source, Node) or source is other or source.shape != node.shape:
            continue
        whole = other.shape == node.shape if isinstance(other, Node) else _is_whole(other, node)
        base = _owner(source, uses) if whole else None
        chained = [Chained(operation, other), *node.post]
        if base is not None and _is_before(chained, base, places):
            base.post += chained
            _stand_in(graph, node, source)
            return


def _is_whole(other: Constant, node: Node) -> bool:
    sizes = [size.fixed for size in node.shape]
    return not any(size.per_batch for size in node.shape) and list(other.tensor.shape) == sizes
