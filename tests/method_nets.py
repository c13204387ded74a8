"""A small network and its training steps, shared by the tests of methods."""

import torch
from torch import nn
from torch.nn import functional as F

import growfx

OPTIMIZERS = {
    "sgd": lambda net: torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda net: torch.optim.AdamW(net.parameters(), lr=1e-2),
}


class Small(nn.Module):
    """A residual block with norms between a stem and a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.block = nn.Conv2d(8, 8, 3, padding=1)
        self.wide = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = F.relu(self.bn(self.stem(x)))
        x = x + self.block(x)
        return self.head(F.relu(self.wide(x)).mean((2, 3)))


def small_net(seed: int = 0) -> growfx.MaskedGraph:
    torch.manual_seed(seed)
    return growfx.wrap(Small(), torch.randn(2, 3, 8, 8))


def train_steps(net, optimizer, method, count: int, start: int = 0) -> list[bool]:
    """`count` steps on data that depend on the number of the step alone."""
    changed = []
    net.train()
    for number in range(start, start + count):
        noise = torch.Generator().manual_seed(number)
        images = torch.randn(8, 3, 8, 8, generator=noise)
        loss = F.cross_entropy(net(images), images.mean((1, 2, 3)).gt(0).long())
        loss.backward()
        optimizer.step()
        changed.append(method.step())
        optimizer.zero_grad()
    return changed
