"""growfx in a training loop of your own: wrap, attach a method, call `step` and `report`, save.

What `growfx.train` adds to this: annealed and averaged growth rounds, checkpoints, a run folder.
"""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import growfx


def digits(split: slice) -> TensorDataset:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.tensor(bunch.images[split], dtype=torch.float32).unsqueeze(1) / 8 - 1
    return TensorDataset(images, torch.tensor(bunch.target[split]))


def accuracy(net: nn.Module, loader: DataLoader) -> float:
    net.eval()
    with torch.no_grad():
        correct = sum(int((net(x).argmax(1) == y).sum()) for x, y in loader)
    net.train()
    return correct / len(loader.dataset)


def main(out: str = "runs/plain-loop", growth_epochs: int = 60, final_epochs: int = 5) -> float:
    torch.manual_seed(0)
    train_loader = DataLoader(digits(slice(0, 1400)), batch_size=64, shuffle=True, drop_last=True)
    val_loader = DataLoader(digits(slice(1400, None)), batch_size=256)
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
    net = growfx.wrap(model, torch.randn(1, 1, 8, 8))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    criterion = nn.CrossEntropyLoss()

    method = growfx.methods.create("pwmpr", seed_density=0.05, tolerance=0.01)
    steps = len(train_loader)
    method.attach(net, optimizer, total_steps=final_epochs * steps, steps_per_epoch=steps)

    def epoch() -> float:
        for x, y in train_loader:
            loss = criterion(net(x), y)
            loss.backward()
            optimizer.step()
            method.step()
            optimizer.zero_grad()
        return accuracy(net, val_loader)

    for _ in range(growth_epochs):
        if not method.growing:
            break
        method.report(epoch())
    print(f"growth: {method.stop_reason or 'still going'}, density {net.density:.3f}")
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    final = [epoch() for _ in range(final_epochs)][-1]
    info = growfx.save(net, out)
    print(f"accuracy {final:.4f}, {info.nnz} of {info.numel} weights, {info.bytes} bytes in {out}")
    return final


if __name__ == "__main__":
    main()
