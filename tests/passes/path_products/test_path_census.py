"""Every operator that occurs in timm and torchvision has a path rule, or a reason to need none.

The names are the census of all architectures recorded, without those of the model libraries' own functions: these are
recorded through, which is tested at the end.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from growfx.passes.operators.classes import row_of
from growfx.passes.path_products.endings import is_selection
from growfx.passes.path_products.rules import table as path_rules
from growfx.passes.path_products.values import ComparedValue, PathValue
from growfx.passes.record.recording import record

_TORCH = """
Conv1d Conv2d Conv3d ConvTranspose2d Linear MultiheadAttention LSTM BatchNorm1d BatchNorm2d BatchNorm3d LayerNorm
GroupNorm InstanceNorm2d Dropout Dropout2d Identity ReLU ReLU6 LeakyReLU GELU SiLU Sigmoid Hardsigmoid Hardswish Tanh
Softmax MaxPool2d MaxPool3d AvgPool1d AvgPool2d AvgPool3d AdaptiveAvgPool2d AdaptiveAvgPool3d Flatten Unfold Upsample
ZeroPad2d ConstantPad2d
"""
MODULES = [
    *("torch.nn." + name for name in _TORCH.split()),
    *("timm.layers.norm." + name for name in ("GroupNorm1", "LayerNorm", "LayerNorm2d", "RmsNorm", "RmsNorm2d")),
    *("timm.layers.norm_act." + name for name in ("BatchNormAct2d", "GroupNormAct", "LayerNormAct2d")),
    *("timm.layers.std_conv." + name for name in ("StdConv2d", "StdConv2dSame", "ScaledStdConv2d")),
    *("timm.models.metaformer." + name for name in ("LayerNormNoBias", "LayerNorm2dNoBias", "GroupNorm1NoBias")),
    *("timm.layers.pool2d_same." + name for name in ("AvgPool2dSame", "MaxPool2dSame")),
    *("timm.layers.linear.Linear", "timm.layers.conv2d_same.Conv2dSame", "timm.layers.cond_conv2d.CondConv2d"),
    *("timm.layers.std_conv.ScaledStdConv2dSame", "timm.layers.drop.DropPath"),
    *("torchvision.models.video.resnet.Conv3DSimple", "torchvision.models.video.resnet.Conv3DNoTemporal"),
    *("torchvision.models.convnext.LayerNorm2d", "torchvision.ops.misc.FrozenBatchNorm2d"),
    *("torchvision.ops.stochastic_depth.StochasticDepth", "torch.nn.modules.linear.NonDynamicallyQuantizableLinear"),
]
_METHODS = """
add mul reshape permute transpose mean __getitem__ flatten view unbind add_ contiguous matmul expand unsqueeze softmax
sigmoid div chunk size sub to sum split float __eq__ new_zeros ne masked_fill neg type_as exp pow expand_as squeeze
__rsub__ amax __rpow__ repeat norm repeat_interleave tile max clone numel zero_ unfold div_ __invert__ cumsum flip
clamp long tanh var sqrt detach all reshape_as mul_ square rsqrt
"""
METHODS = _METHODS.split()
_FUNCTIONS = """
operator.getitem operator.mul operator.sub operator.add operator.pow operator.truediv operator.neg builtins.getattr
torch.cat torch._C._nn.scaled_dot_product_attention torch._assert torch.flatten torch.nn.functional.pad
torch.functional.split torch._C._nn.gelu torch.stack torch.nn.functional.interpolate torch.nn.functional.dropout
torch._C._nn.linear torch.nn.functional.softmax torch.roll torch.nn.functional.normalize torch.sigmoid torch.permute
torch.clamp torch.nn.functional.relu torch.nn.functional.adaptive_avg_pool2d torch._C._nn.avg_pool2d torch.sum
torch.mean torch.div torch.functional.einsum torch.addcmul torch.conv2d torch.nn.functional.rms_norm torch.matmul
torch.transpose torch.rsqrt torch.nn.functional.max_pool2d torch.softmax torch.chunk torch._C._nn.one_hot torch.unbind
torch.nn.functional.fold torch.tensor_split torch.sqrt torch.tanh torch.nn.functional.grid_sample
torch.nn.functional.adaptive_max_pool2d torch.var torch.mul torch.logical_not torch.square torch.maximum torch.exp
torch.swapaxes torch.repeat_interleave torch.nn.functional.unfold growfx.recorded.graph_ops.set_item
"""
FUNCTIONS = _FUNCTIONS.split()
LIBRARY_OPERATORS = ["torchvision.roi_align", "torchvision.deform_conv2d"]
# Only ever on sizes, positions, tables and masks: constants are executed, so these need no rule, and without one they
# are an error where they meet an activation.
_ON_CONSTANTS = """
operator.floordiv torch.arange torch.functional.meshgrid math.ceil torch.zeros torch.ones torch.tensor
torch.device torch.linspace torch.eye torch._assert_async
"""
ON_CONSTANTS = _ON_CONSTANTS.split()
METHODS_ON_CONSTANTS = ["__floordiv__"]


def named(dotted: str) -> Any:
    parts = dotted.split(".")
    for length in range(len(parts) - 1, 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise AssertionError(dotted)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_that_occurs_has_a_rule(name: str) -> None:
    assert row_of(path_rules.MODULES, named(name)) is not None


@pytest.mark.parametrize("name", METHODS)
def test_a_method_that_occurs_has_a_rule(name: str) -> None:
    assert hasattr(Tensor, name)
    assert path_rules.method_rule(name) is not None


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_that_occurs_has_a_rule(name: str) -> None:
    assert path_rules.function_rule(named(name)) is not None


@pytest.mark.parametrize("name", LIBRARY_OPERATORS)
def test_an_operator_registered_by_a_library_has_a_rule(name: str) -> None:
    importlib.import_module("torchvision")
    packet = getattr(torch.ops.torchvision, name.partition(".")[2])
    assert path_rules.function_rule(packet) is path_rules.function_rule(packet.default) is not None


@pytest.mark.parametrize("name", ON_CONSTANTS + METHODS_ON_CONSTANTS)
def test_what_occurs_on_constants_only_has_none(name: str) -> None:
    found = path_rules.method_rule(name) if "." not in name else path_rules.function_rule(named(name))
    assert found is None


SELECTIONS: list[tuple[Any, bool]] = [
    *((name, False) for name in ("topk", "sort", "nonzero", "unique")),
    *((target, False) for target in (torch.topk, torch.sort, torch.nonzero, torch.where)),
    *((target, True) for target in ("__getitem__", "gather", "index_select", torch.gather, torch.masked_select)),
]


@pytest.mark.parametrize(("target", "by_index"), SELECTIONS, ids=lambda item: getattr(item, "__name__", str(item)))
def test_paths_end_at_a_selection_by_data(target: Any, by_index: bool) -> None:
    operation = "call_method" if isinstance(target, str) else "call_function"
    node = fx.Graph().create_node(operation, target)
    value = PathValue(torch.ones(2, 3))
    judged = ComparedValue(torch.ones(2, dtype=torch.bool), (value,))
    table, mask = torch.ones(2, 3), torch.ones(2, dtype=torch.bool)
    if by_index:
        assert is_selection(node, (value, judged), {})
        assert is_selection(node, (table, judged), {})
        assert not is_selection(node, (value, mask), {})
    else:
        assert is_selection(node, (judged,), {})
        assert not is_selection(node, (table,), {})
    if target is torch.where:
        assert not is_selection(node, (judged, value, value), {})


def test_suppression_ends_paths() -> None:
    importlib.import_module("torchvision")
    node = fx.Graph().create_node("call_function", torch.ops.torchvision.nms)
    assert is_selection(node, (PathValue(torch.ones(2, 4)), torch.ones(2), 0.5), {})


@pytest.mark.parametrize(
    "key", [*path_rules.FUNCTIONS, *path_rules.METHODS], ids=lambda key: getattr(key, "__name__", str(key))
)
def test_every_row_names_something_that_exists(key: Any) -> None:
    if not isinstance(key, str):
        assert callable(key)
    elif key.startswith("sj_"):  # registered by a package that is not installed here
        assert key.endswith(".forward")
    elif "." in key:
        importlib.import_module("torchvision")
        assert hasattr(torch.ops.torchvision, key.partition(".")[2])
    else:
        assert hasattr(Tensor, key) or key in ("rsub", "dropout", "__rdiv__"), key


HELPERS: list[tuple[str, tuple[Any, ...]]] = [
    ("timm.models.swin_transformer.window_reverse", (torch.ones(4, 2, 2, 3), (2, 2), 4, 4)),
    ("timm.models.swin_transformer_v2.window_reverse", (torch.ones(4, 2, 2, 3), (2, 2), (4, 4))),
    ("timm.models.davit.window_reverse", (torch.ones(4, 2, 2, 3), (2, 2), 4, 4)),
    ("timm.models.gcvit.window_reverse", (torch.ones(4, 2, 2, 3), (2, 2), (4, 4))),
    ("timm.models.maxxvit.window_reverse", (torch.ones(4, 2, 2, 3), (2, 2), (4, 4))),
    ("timm.models.maxxvit.grid_reverse", (torch.ones(4, 2, 2, 3), (2, 2), (4, 4))),
    ("timm.models.nest.deblockify", (torch.ones(1, 4, 4, 3), 2)),
    ("timm.models.crossvit.scale_image", (torch.ones(1, 3, 8, 8), (4, 4), True)),
    ("timm.models.vision_transformer_sam.get_rel_pos", (4, 4, torch.ones(7, 3))),
    ("timm.layers.pos_embed.resample_abs_pos_embed", (torch.ones(1, 17, 3), [2, 2])),
]


@pytest.mark.parametrize(("name", "arguments"), HELPERS, ids=[row[0] for row in HELPERS])
def test_helpers_of_the_libraries_are_recorded_as_the_operators_they_run(name: str, arguments: Any) -> None:
    function = named(name)

    class Calling(nn.Module):
        def forward(self, *args: Any) -> Any:
            return function(*args)

    graph = record(Calling().eval(), arguments).graph
    for node in graph.nodes:
        if node.op == "call_function":
            assert not str(node.target.__module__).startswith(("timm", "torchvision"))
