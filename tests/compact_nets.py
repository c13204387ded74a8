"""Networks with dead units, and what they are compared with."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import growfx


def sparse_net(model: nn.Module, x: Tensor, density: float, dead: float, seed: int = 0) -> growfx.MaskedGraph:
    """A net with random masks of which whole rows and columns are gone."""
    net = growfx.wrap(model, x)
    generator = torch.Generator().manual_seed(seed)
    for layer in net.layers.values():
        mask = torch.rand(layer.mask.shape, generator=generator) < density
        mask[torch.rand(mask.shape[0], generator=generator) < dead] = False
        if mask.shape[1] > 1:
            mask[:, torch.rand(mask.shape[1], generator=generator) < dead / 2] = False
        layer.mask.copy_(mask)
    net.settle()
    return net.eval()


def awake(model: nn.Module) -> nn.Module:
    """No parameter or statistic at a value of its initialisation that hides mistakes."""
    generator = torch.Generator().manual_seed(5)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.weight, module.bias, module.running_mean):
                if tensor is not None:
                    tensor.data.copy_(torch.randn(tensor.shape, generator=generator))
        bias = getattr(module, "bias", None)
        if isinstance(bias, Tensor):
            bias.data.copy_(torch.randn(bias.shape, generator=generator) * 0.3)
    return model.eval()


def agree(net: growfx.MaskedGraph, small: nn.Module, *inputs: Tensor) -> None:
    for x in inputs:
        with torch.no_grad():
            expected, got = net.eval()(x), small(x)
        scale = float(expected.abs().max())
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6 * scale)


class RandomNet(nn.Module):
    """Residuals, concatenations, gates, groups, shuffles, norms and pools in random order."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.kinds = torch.randint(6, (6,), generator=generator).tolist()
        acts = (nn.ReLU(), nn.SiLU(), nn.Sigmoid(), nn.ReLU6())
        self.stem, width = nn.Conv2d(3, 8, 3), 8
        steps = []
        for kind in self.kinds:
            padding = int(torch.randint(2, (), generator=generator)) if kind != 0 else 1
            act = acts[int(torch.randint(4, (), generator=generator))]
            wider = width + 4 if kind in (2, 5) else width
            size, groups = (1, 2) if kind == 4 else (3, width if kind == 3 else 1)
            inner = nn.Conv2d(width, wider, size, padding=padding if size > 1 else 0, groups=groups)
            steps.append(nn.ModuleList([inner, nn.BatchNorm2d(inner.out_channels), act, nn.Conv2d(width, width, 1)]))
            width = inner.out_channels + (width if kind == 1 else 0)
        self.steps, self.head = nn.ModuleList(steps), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for kind, step in zip(self.kinds, self.steps, strict=True):
            inner, norm, act, gate = step  # type: ignore[misc]
            y = act(norm(inner(F.relu(x))))
            if kind == 0:
                x = x + y
            elif kind == 1:
                x = torch.cat([F.adaptive_avg_pool2d(x, y.shape[-2:]), y], 1)
            elif kind == 3:
                x = y * torch.sigmoid(gate(x.mean((2, 3), keepdim=True)))
            elif kind == 4:
                x = y.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
            else:
                x = F.max_pool2d(y, 3, 1, 1)
        return self.head(x.mean((2, 3)))
