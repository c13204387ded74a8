"""timm's training recipe with a sparse network: the loop of timm's `train.py`, and growfx in four places.

    python examples/timm_loop.py path/to/folder --model resnet18 --method rigl --density 0.1

The folder has train/ and val/ of class folders. Everything else is timm's: data and augmentation, mixup and cutmix,
loss, optimizer, schedule, averaging.
"""

from __future__ import annotations

import argparse

import torch
from timm import create_model
from timm.data import Mixup, create_dataset, create_loader, resolve_data_config
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, ModelEmaV3, accuracy, random_seed

import growfx


def options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="folder with train/ and val/ of class folders")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--method", default="rigl", help="one that works step by step, see `growfx methods`")
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--out", default="runs/timm-loop", help="folder of the artifact")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--warmup-epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--img-size", type=int)
    parser.add_argument("--opt", default="lamb")
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--weight-decay", type=float, default=0.02)
    parser.add_argument("--sched", default="cosine")
    parser.add_argument("--aa", default="rand-m7-mstd0.5-inc1")
    parser.add_argument("--mixup", type=float, default=0.1)
    parser.add_argument("--cutmix", type=float, default=1.0)
    parser.add_argument("--model-ema-decay", type=float, default=0.999)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def loaders(args: argparse.Namespace, model: torch.nn.Module) -> tuple:
    config = resolve_data_config({"img_size": args.img_size}, model=model)
    train, val = (
        create_loader(
            create_dataset("", root=args.data, split=split, is_training=split == "train"),
            input_size=config["input_size"],
            batch_size=args.batch_size,
            is_training=split == "train",
            auto_augment=args.aa if split == "train" else None,
            interpolation=config["interpolation"],
            mean=config["mean"],
            std=config["std"],
            crop_pct=config["crop_pct"],
            num_workers=args.workers,
            persistent_workers=False,
            use_prefetcher=False,
        )
        for split in ("train", "val")
    )
    return train, val, config["input_size"]


@torch.no_grad()
def validate(net: torch.nn.Module, loader, device: torch.device) -> float:
    net.eval()
    top1 = AverageMeter()
    for images, targets in loader:
        output = net(images.to(device))
        top1.update(accuracy(output, targets.to(device))[0].item(), len(targets))
    return top1.avg


def main(arguments: list[str] | None = None) -> float:
    args = options(arguments)
    random_seed(args.seed)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    classes = len(create_dataset("", root=args.data, split="train").reader.class_to_idx)
    model = create_model(args.model, num_classes=classes)
    train_loader, val_loader, input_size = loaders(args, model)
    steps = len(train_loader)

    net = growfx.wrap(model, torch.randn(1, *input_size)).to(device)  # growfx, 1: the masked network
    optimizer = create_optimizer_v2(net, opt=args.opt, lr=args.lr, weight_decay=args.weight_decay)
    schedule, epochs = create_scheduler_v2(
        optimizer,
        sched=args.sched,
        num_epochs=args.epochs,
        warmup_epochs=min(args.warmup_epochs, args.epochs // 2),
        step_on_epochs=False,
        updates_per_epoch=steps,
    )
    method = growfx.methods.create(args.method, density=args.density, seed=args.seed)  # growfx, 2: the method ...
    method.attach(net, optimizer, total_steps=epochs * steps, steps_per_epoch=steps)  # ... draws the starting masks
    average = ModelEmaV3(net, decay=args.model_ema_decay, use_warmup=True)
    mixup = Mixup(args.mixup, args.cutmix, label_smoothing=0.1, num_classes=classes)
    criterion = SoftTargetCrossEntropy()

    top1 = 0.0
    for epoch in range(epochs):
        net.train()
        losses = AverageMeter()
        for batch, (images, targets) in enumerate(train_loader):
            images, targets = mixup(images.to(device), targets.to(device))
            loss = criterion(net(images), targets)
            loss.backward()
            optimizer.step()
            method.step()  # growfx, 3: after each step of the optimizer
            optimizer.zero_grad()
            update = epoch * steps + batch + 1
            average.update(net, step=update)
            schedule.step_update(update)
            losses.update(loss.item(), len(targets))
        top1 = validate(average.module, val_loader, device)
        rate = optimizer.param_groups[0]["lr"]
        print(f"epoch {epoch}: loss {losses.avg:.3f}, top-1 {top1:.2f} %, density {net.density:.4f}, lr {rate:.3g}")
    info = growfx.save(average.module, args.out)  # growfx, 4: the artifact, of the averaged weights
    print(f"{info.nnz} of {info.numel} weights, {info.bytes} bytes in {args.out}")
    return top1


if __name__ == "__main__":
    main()
