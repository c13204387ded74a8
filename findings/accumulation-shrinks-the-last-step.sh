#!/usr/bin/env bash
# Guess:    gradient accumulation over four micro-batches averages over the micro-batches of a step; where an epoch has ten, its
#           last step averages over two, and the three training loops that offer it, Lightning, accelerate and transformers'
#           Trainer, agree.
# Happens:  Lightning and accelerate divide each loss by four whatever the step holds, and make the step at the end of the epoch
#           with what is there: its gradient is half as long, a quarter with one micro-batch left over. transformers' Trainer
#           divides by the number that there are. For plain SGD the last samples of each epoch count half; a pruning score or a
#           growth taken from the gradient at the end of an epoch is half of that a step before. Nothing is said.
# Seen with lightning 2.6.6, accelerate 1.15.0, transformers 5.24.0, torch 2.15.0 and numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet 'torch==2.15.0' 'lightning==2.6.6' 'accelerate==1.15.0' \
    'transformers==5.24.0' 'numpy==2.4.6'
"$folder/venv/bin/python" - <<'PY'
import logging
import tempfile
import warnings

import lightning
import torch
import transformers
from accelerate import Accelerator
from accelerate import __version__ as accelerate_version
from torch import nn
from torch.utils.data import DataLoader

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)
print("lightning", lightning.__version__, "accelerate", accelerate_version, "transformers", transformers.__version__)
every = 4


class Lit(lightning.LightningModule):
    """The gradient of the weight is 1 for every sample, and so is that of any mean over samples."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen = nn.Parameter(torch.zeros(1)), []

    def training_step(self, batch, _):
        return (self.weight * batch).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_before_optimizer_step(self, _):
        self.seen.append(self.weight.grad.item())


def by_lightning(samples):
    module = Lit()
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = lightning.Trainer(accelerator="cpu", max_epochs=2, accumulate_grad_batches=every, **quiet)
    trainer.fit(module, DataLoader(samples, batch_size=1))
    return module.seen


def by_accelerate(samples):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=every)
    net = nn.Linear(1, 1, bias=False)
    net, optimizer, loader = accelerator.prepare(
        net, torch.optim.SGD(net.parameters(), lr=0.1), DataLoader(samples, batch_size=1)
    )
    seen = []
    for _ in range(2):
        for batch in loader:
            with accelerator.accumulate(net):
                accelerator.backward(net(batch).mean())
                if accelerator.sync_gradients:
                    seen.append(net.weight.grad.item())
                optimizer.step()
                optimizer.zero_grad()
    return seen


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return {"loss": (self.weight * x).mean()}


class Watch(transformers.TrainerCallback):
    def __init__(self, net):
        self.net, self.seen = net, []

    def on_pre_optimizer_step(self, *_, **__):
        self.seen.append(self.net.weight.grad.item())


def by_transformers(samples):
    net = Net()
    watch = Watch(net)
    options = transformers.TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=every,
        num_train_epochs=2,
        use_cpu=True,
        report_to=[],
        max_grad_norm=0,
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
    )
    transformers.Trainer(model=net, args=options, train_dataset=[{"x": x} for x in samples], callbacks=[watch]).train()
    return watch.seen


for count, last in ((8, 1.0), (10, 0.5), (9, 0.25)):
    samples = torch.ones(count, 1)
    seen = {run.__name__: run(samples) for run in (by_lightning, by_accelerate, by_transformers)}
    print(f"{count} samples, two epochs, {every} to a step: gradients", seen)
    epoch = [1.0, 1.0] if count == 8 else [1.0, 1.0, last]
    assert seen["by_lightning"] == seen["by_accelerate"] == epoch * 2, "this has changed"
    assert set(seen["by_transformers"]) == {1.0}, "this has changed"
print("as described")
PY
