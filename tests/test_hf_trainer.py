"""The callback for the Hugging Face Trainer, where it is installed; its reference is a loop of plain torch."""

import shutil
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from breadth import some
from loop_nets import BATCH, EPOCHS, STEPS, data, net, optimizer_of, plain_loop, pwmpr, rigl
from torch import nn

import growfx
from growfx.errors import CheckpointError, ConfigError
from growfx.runs.checkpoint import content_digest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what its imports announce of one another
    transformers: Any = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

from growfx.hf_trainer import STATE_FILE, SparseTraining

# the Trainer asks for pinned memory by default, and torch of some versions says that a CPU has none
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")


class Classifier(nn.Module):
    def __init__(self, seed: int = 0):
        super().__init__()
        self.net = net(seed)

    def forward(self, images, labels):
        logits = self.net(images)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def examples():
    return [{"images": image, "labels": label} for image, label in zip(*data(), strict=True)]


def fit(model, callback, folder, *, epochs=EPOCHS, resume=None, accumulate=1, **options):
    args = transformers.TrainingArguments(
        str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=STEPS * BATCH,
        gradient_accumulation_steps=accumulate,
        **{"max_grad_norm": 0} | options,
        train_sampling_strategy="sequential",
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    optimizer = optimizer_of(model)
    trainer = transformers.Trainer(
        model,
        args,
        train_dataset=examples(),
        eval_dataset=examples(),
        callbacks=[callback],
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1)),
        compute_metrics=lambda p: {"accuracy": float(np.mean(p.predictions.argmax(1) == p.label_ids))},
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def same(model, callback, expected, method) -> bool:
    ours = content_digest([dict(model.net.state_dict()), callback.loop.method.state_dict()])
    return ours == content_digest([dict(expected.state_dict()), method.state_dict()])


def sparse(make, **options):
    return SparseTraining(make(), monitor="eval_accuracy", **options)


@pytest.mark.parametrize("accumulate", some([1, 2], lambda count: count == 2))
@pytest.mark.parametrize("make", [rigl, pwmpr])
def test_a_method_in_the_trainer_ends_as_in_a_loop_of_plain_torch(tmp_path, make, accumulate):
    model, callback, method = Classifier(), sparse(make), make()
    fit(model, callback, tmp_path, accumulate=accumulate)
    assert same(model, callback, plain_loop(method, accumulate=accumulate), method)


def test_clipping_in_the_trainer_counts_present_edges_alone(tmp_path):
    model, callback, method = Classifier(), sparse(rigl), rigl()
    fit(model, callback, tmp_path, max_grad_norm=0.1)
    assert same(model, callback, plain_loop(method, clip=0.1), method)


@pytest.mark.parametrize("make", [rigl, pwmpr])
def test_training_continues_exactly_from_a_checkpoint(tmp_path, make):
    method = make()
    expected = plain_loop(method)
    fit(Classifier(), sparse(make), tmp_path)
    model, callback = Classifier(seed=9), sparse(make)
    fit(model, callback, tmp_path, resume=str(tmp_path / f"checkpoint-{2 * STEPS}"))
    assert same(model, callback, expected, method)


@pytest.mark.slow
def test_a_checkpoint_elsewhere_is_given_by_hand_and_a_wrong_one_is_refused(tmp_path):
    fit(Classifier(), sparse(rigl), tmp_path / "old")
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path / "old" / f"checkpoint-{2 * STEPS}", moved)
    with pytest.raises(CheckpointError, match=f"from step 8, but `.*{STATE_FILE}` is not there; give the folder"):
        fit(Classifier(), sparse(rigl), tmp_path / "new", resume=str(moved))
    wrong = tmp_path / "old" / f"checkpoint-{STEPS}"
    with pytest.raises(CheckpointError, match="is of other masks than the network's"):
        fit(Classifier(), sparse(rigl, resume_from=wrong), tmp_path / "new", resume=str(moved))
    callback = sparse(rigl, resume_from=moved)
    fit(Classifier(), callback, tmp_path / "new", resume=str(moved))
    assert callback.loop.method.state_dict()["steps"] == EPOCHS * STEPS
    (moved / STATE_FILE).write_bytes(b"no checkpoint")
    with pytest.raises(CheckpointError, match="cannot be read"):
        fit(Classifier(), sparse(rigl, resume_from=moved), tmp_path / "new", resume=str(moved))


def test_a_checkpoint_for_a_training_that_starts_anew_is_told_of(tmp_path):
    with pytest.warns(growfx.GrowfxWarning, match="`resume_from` = `old` has no effect .* first step"):
        fit(Classifier(), sparse(rigl, resume_from="old"), tmp_path)


@pytest.mark.filterwarnings("ignore:.* steps has no update:growfx.GrowfxWarning")
def test_a_metric_that_is_not_measured_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"`monitor` = `eval_top1` is not a metric of this .*`eval_accuracy`"):
        fit(Classifier(), SparseTraining(rigl(), monitor="eval_top1"), tmp_path, epochs=1)


@pytest.mark.filterwarnings("ignore:.* steps has no update:growfx.GrowfxWarning")
def test_evaluation_alone_needs_no_method(tmp_path):
    trainer = fit(Classifier(), sparse(rigl), tmp_path, epochs=1)
    assert 0 <= trainer.evaluate()["eval_accuracy"] <= 1
