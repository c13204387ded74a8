"""A small network without randomness and its data, for the tests of other frameworks' loops."""

import torch
from torch import nn

import growfx

STEPS, BATCH, EPOCHS = 4, 8, 4


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """Images (32, 1, 6, 6) of four classes, brightest in their own corner."""
    generator = torch.Generator().manual_seed(2)
    images, targets = torch.randn(STEPS * BATCH, 1, 6, 6, generator=generator), torch.arange(STEPS * BATCH) % 4
    for image, target in zip(images, targets.tolist(), strict=True):
        row, column = 3 * (target // 2), 3 * (target % 2)
        image[0, row : row + 3, column : column + 3] += 2.0
    return images, targets


def net(seed: int = 0) -> growfx.MaskedGraph:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4),
    )  # fmt: skip
    return growfx.wrap(model, torch.randn(1, 1, 6, 6))


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def rigl():
    """New masks after steps 3, 6 and 9, so that updates and the ends of epochs fall together in no way."""
    return growfx.methods.create("rigl", density=0.3, update_every=3, drop_fraction=0.4, update_until=0.7)


def pwmpr():
    return growfx.methods.create("pwmpr", seed_density=0.2, growth_ratio=1.5, epochs_per_round=1)


def accuracy(model: nn.Module, images: torch.Tensor, targets: torch.Tensor) -> float:
    training = model.training
    with torch.no_grad():
        right = model.eval()(images).argmax(1) == targets
    model.train(training)
    return float(right.float().mean())


def clip_present(model: growfx.MaskedGraph, largest: float) -> None:
    """Clip by the norm of the gradients of present edges, whatever else `.grad` holds."""
    masks = {id(layer.parameter): layer.mask for layer in model.layers.values()}
    present = [p.grad if id(p) not in masks else torch.where(masks[id(p)], p.grad, 0) for p in model.parameters()]
    nn.utils.clip_grads_with_norm_(model.parameters(), largest, nn.utils.get_total_norm(present))


def plain_loop(method, epochs: int = EPOCHS, accumulate: int = 1, clip: float | None = None) -> growfx.MaskedGraph:
    """The reference: a loop of plain torch, in the order of the data."""
    images, targets = data()
    model = net()
    optimizer = optimizer_of(model)
    method.attach(model, optimizer, total_steps=epochs * STEPS // accumulate, steps_per_epoch=STEPS // accumulate)
    model.train()
    for _ in range(epochs):
        for batch in range(STEPS):
            rows = slice(batch * BATCH, (batch + 1) * BATCH)
            loss = nn.functional.cross_entropy(model(images[rows]), targets[rows])
            (loss / accumulate).backward()
            if (batch + 1) % accumulate == 0:
                if clip is not None:
                    clip_present(model, clip)
                optimizer.step()
                method.step()
                optimizer.zero_grad()
        method.report(accuracy(model, images, targets))
    return model
