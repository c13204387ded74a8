"""The Lightning callback, where Lightning is installed; its reference is a loop of plain torch."""

import warnings
from typing import Any

import pytest
import torch
from breadth import some
from error_facts import facts
from loop_nets import BATCH, EPOCHS, data, net, optimizer_of, plain_loop, pwmpr, rigl
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from growfx.errors import ConfigError
from growfx.runs.checkpoint import content_digest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what its imports announce of one another
    lightning: Any = pytest.importorskip("lightning.pytorch")

from growfx.lightning import SparseTraining

pytestmark = [
    # Lightning about its own use of torch
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    # advice: the folder of a training that is continued, loaders on a machine of many cores, one with a GPU
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:GPU available but not used:UserWarning"),
]


class Module(lightning.LightningModule):
    def __init__(self, seed: int = 0):
        super().__init__()
        self.net = net(seed)

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, index):
        self.log("val_acc", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return optimizer_of(self)


def fit(module, callback, folder, *, epochs=EPOCHS, resume=None, accumulate=1, trainer=None, **options):
    if trainer is None:
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            callbacks=[callback, lightning.callbacks.ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}")],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accumulate_grad_batches=accumulate,
            **options,
        )
    images = TensorDataset(*data())
    trainer.fit(module, DataLoader(images, BATCH), DataLoader(images, len(images)), ckpt_path=resume)
    return trainer


def same(module, callback, expected, method) -> bool:
    ours = content_digest([dict(module.net.state_dict()), callback.state_dict()])
    return ours == content_digest([dict(expected.state_dict()), method.state_dict()])


@pytest.mark.parametrize("accumulate", some([1, 2], lambda count: count == 2))
@pytest.mark.parametrize("make", [rigl, pwmpr])
def test_a_method_in_lightning_ends_as_in_a_loop_of_plain_torch(tmp_path, make, accumulate):
    module, callback, method = Module(), SparseTraining(make(), monitor="val_acc"), make()
    fit(module, callback, tmp_path, accumulate=accumulate)
    assert same(module, callback, plain_loop(method, accumulate=accumulate), method)


def test_clipping_in_lightning_counts_present_edges_alone(tmp_path):
    module, callback, method = Module(), SparseTraining(rigl(), monitor="val_acc"), rigl()
    fit(module, callback, tmp_path, gradient_clip_val=0.1)
    assert same(module, callback, plain_loop(method, clip=0.1), method)


@pytest.mark.parametrize("make", [rigl, pwmpr])
def test_training_continues_exactly_from_a_checkpoint(tmp_path, make):
    method = make()
    expected = plain_loop(method)
    first = SparseTraining(make(), monitor="val_acc", total_steps=16)
    fit(Module(), first, tmp_path, epochs=2)
    module, callback = Module(seed=9), SparseTraining(make(), monitor="val_acc")
    fit(module, callback, tmp_path, resume=str(tmp_path / "epoch=1.ckpt"))
    assert same(module, callback, expected, method)


def test_a_second_fit_of_the_same_network_continues_and_one_of_another_begins_anew(tmp_path):
    module, callback = Module(), SparseTraining(rigl(), monitor="val_acc", total_steps=16)
    fit(module, callback, tmp_path, epochs=1)
    digest = module.net.mask_digest()
    fit(module, callback, tmp_path, epochs=1)
    assert callback.state_dict()["steps"] == 8
    assert module.net.mask_digest() != digest
    fit(Module(), callback, tmp_path, epochs=1)
    assert callback.state_dict()["steps"] == 4


def test_an_endless_training_and_a_metric_that_is_not_logged_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="`total_steps`"):
        fit(Module(), SparseTraining(rigl()), tmp_path, epochs=-1)
    callback = SparseTraining(pwmpr(), total_steps=1000)
    fit(Module(), callback, tmp_path, epochs=-1, max_time={"seconds": 1})
    assert len(callback.state_dict()["trace"]) > 1  # an epoch has its length all the same
    with pytest.raises(ConfigError, match=facts("`monitor` = `top1`", "`val_acc`")):
        fit(Module(), SparseTraining(rigl(), monitor="top1"), tmp_path, num_sanity_val_steps=2)


def test_validation_alone_needs_no_method(tmp_path):
    trainer = lightning.Trainer(accelerator="cpu", callbacks=[SparseTraining(rigl(), monitor="val_acc")], logger=False)
    found = trainer.validate(Module(), DataLoader(TensorDataset(*data()), BATCH), verbose=False)
    assert 0 <= found[0]["val_acc"] <= 1
    assert torch.is_grad_enabled()


def test_the_mode_of_the_net_is_that_of_the_model_whoever_switches_it(tmp_path):
    class Modes(Module):
        def training_step(self, batch, index):
            seen.append((self.net.training, self.net.shell.training, *(m.training for m in self.net.modules())))
            return super().training_step(batch, index)

        def validation_step(self, batch, index):
            seen.append((self.net.training, self.net.shell.training, *(m.training for m in self.net.modules())))
            super().validation_step(batch, index)

    seen: list[tuple[bool, ...]] = []
    module = Modes()
    fit(module, SparseTraining(rigl(), monitor="val_acc"), tmp_path, epochs=2, num_sanity_val_steps=0)
    assert all(len(set(modes)) == 1 for modes in seen)
    order = [modes[0] for modes in seen]
    assert order == ([True] * 4 + [False]) * 2
    for switch in (module.net.shell.eval, module.net.shell.train, module.eval, module.train, module.net.eval):
        switch()
        assert module.net.training is module.net.shell.training is ("train" in switch.__name__)
