"""Compaction asks for a bounded amount of memory, whatever its inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compact_nets import agree, awake, sparse_net
from torch.utils._python_dispatch import TorchDispatchMode
from volume_nets import SIZE, LargestResult, VolumeNet

from growfx.passes.compact.network import compact
from growfx.passes.trials import convolution as compact_convolution
from growfx.passes.trials.precision import widened

pytestmark = pytest.mark.slow

GEOMETRIES = [
    (4, 6, {}),
    (4, 6, {"padding": 1}),
    (4, 6, {"stride": 2, "padding": 2, "dilation": 2}),
    (4, 6, {"groups": 2}),
    (5, 3, {"padding": "same"}),
    (1, 3, {"bias": False}),
]


class Convolutions(TorchDispatchMode):
    """Counts what runs below, and the elements of the columns that each unfolds, as its result and weight say."""

    def __init__(self) -> None:
        super().__init__()
        self.columns: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            places = (args[0] if args[6] else result).shape[2:].numel()
            self.columns.append(len(args[0]) * args[1][0].numel() * places)
        return result


@pytest.mark.parametrize("kind", ["Conv1d", "Conv2d", "Conv3d", "ConvTranspose2d", "ConvTranspose3d"])
@pytest.mark.parametrize(("inputs", "outputs", "options"), GEOMETRIES)
def test_pieces_give_what_the_whole_gives(
    kind: str, inputs: int, outputs: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "Transpose" in kind and options.get("padding") == "same":
        options = {"stride": 2, "output_padding": 1}
    torch.manual_seed(0)
    layer = getattr(torch.nn, kind)(inputs, outputs, 3, **options).double()
    x = torch.randn(3, inputs, *[7, 8, 9][: int(kind[-2])], dtype=torch.float64)
    with torch.no_grad():
        expected = layer(x)
        with Convolutions() as whole, widened():
            assert torch.equal(layer(x), expected)
        assert len(whole.columns) == 1
        per_channel = whole.columns[0] // 3 // layer.weight.shape[1]
        monkeypatch.setattr(compact_convolution, "_MOST", 2 * per_channel)
        with Convolutions() as parts, widened():
            torch.testing.assert_close(layer(x), expected, rtol=1e-13, atol=1e-13)
    assert len(parts.columns) >= 2
    if options.get("groups", 1) == 1:
        assert max(parts.columns) <= 2 * per_channel


def test_a_network_on_volumes_is_compacted_within_a_few_hundred_megabytes() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 1, SIZE, SIZE, SIZE)
    net = sparse_net(awake(VolumeNet()), x, 0.5, 0.4)
    with LargestResult() as largest:
        result = compact(net)
    assert largest.bytes < 200 << 20, largest.operator
    assert result.report.removed > 0
    agree(net, result.model, x)
