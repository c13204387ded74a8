#!/usr/bin/env bash
# Guess:    Lightning's ModelPruning("l1_unstructured", amount=0.5) leaves half of the weights after training, and prunes
#           weights of linear layers and convolutions, not biases and norms.
# Happens:  it prunes half of what is left at the end of every epoch: after three epochs 12.5 % of all parameters remain.
#           Biases and the scales and shifts of norms are ranked among the weights by size, so that all shifts and the
#           whole classifier, whose values are small, are zero: the network's output is constant.
# Seen with lightning 2.6.6, torch 2.15.0 and numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet 'torch==2.15.0' 'lightning==2.6.6' 'numpy==2.4.6'
"$folder/venv/bin/python" - <<'PY'
import logging
import warnings

import lightning
import torch
from lightning.pytorch.callbacks import ModelPruning
from torch import nn

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)
torch.manual_seed(0)


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4))

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


data = torch.utils.data.TensorDataset(torch.randn(64, 16), torch.randint(0, 4, (64,)))
left, parts = {}, {}
for epochs in (1, 2, 3):
    model = Classifier()
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[ModelPruning("l1_unstructured", amount=0.5)],
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        logger=False,
    )
    trainer.fit(model, torch.utils.data.DataLoader(data, 16))
    values = torch.cat([p.detach().flatten() for p in model.parameters()])
    left[epochs] = f"{int(values.count_nonzero())} of {values.numel()}"
    parts = {name: int(p.count_nonzero()) for name, p in model.named_parameters()}
print("parameters left after 1, 2, 3 epochs:", left)
print("parameters left by tensor after 3:", parts)
with torch.no_grad():
    outputs = model.eval().net(torch.randn(100, 16))
print("largest spread of an output over 100 inputs:", float(outputs.std(0).max()))
assert left == {1: "370 of 740", 2: "185 of 740", 3: "93 of 740"}, "this has changed"
assert parts["net.3.weight"] == parts["net.1.bias"] == 0 and parts["net.1.weight"] == 32, "this has changed"
assert float(outputs.std(0).max()) == 0, "this has changed"
print("as described")
PY
