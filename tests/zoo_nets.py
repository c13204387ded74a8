"""Models for the tests of `growfx zoo`: built and run in processes of their own, by name."""

import os
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F


class _Small(nn.Module):
    """Takes images of 32 x 32 (and others), fast."""

    pretrained_cfg = {"input_size": (3, 32, 32)}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(F.relu(self.norm(self.conv(x))).mean((2, 3)))


class _Acting(_Small):
    """Does something once it has values."""

    def act(self):
        raise NotImplementedError

    def forward(self, x):
        if not x.is_meta:
            self.act()
        return super().forward(x)


class _Hanging(_Acting):
    def act(self):
        if "HANGING_NET" in os.environ:  # a file that tells when, and in which process
            Path(os.environ["HANGING_NET"]).write_text(str(os.getpid()))
        time.sleep(60)


class _Dying(_Acting):
    def act(self):
        os.write(2, b"no way on from here\n")
        os._exit(7)


class _Greedy(_Acting):
    def act(self):
        self.held = [torch.ones(2**26) for _ in range(6)]
        time.sleep(60)


class _Loud(_Small):
    def forward(self, x):
        print("so much to say")
        return super().forward(x)


class _FixedSize(_Small):
    def forward(self, x):
        assert x.shape[-2:] == (32, 32), "32 x 32 only"
        return super().forward(x)


class _OwnWeight(_Small):
    """A linear map that is no module: nobody masks it."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(4, 4))
        self.gain = nn.Parameter(torch.ones(8, 1, 1, 1))

    def forward(self, x):
        x = F.conv2d(x, self.conv.weight * self.gain, padding=1)
        return F.linear(self.head(x.mean((2, 3))), self.matrix)


class _Refusing(_Small):
    def forward(self, x):
        raise ValueError("not today")


good, hanging, dying, greedy, loud = _Small, _Hanging, _Dying, _Greedy, _Loud
fixed_size, own_weight, refusing = _FixedSize, _OwnWeight, _Refusing
