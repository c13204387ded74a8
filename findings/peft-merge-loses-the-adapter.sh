#!/usr/bin/env bash
# Guess:    merge_and_unload() of a LoRA adapter on a pruned layer gives a model that computes what the adapted one did (with zeros
#           filled in again), or refuses, at least with safe_merge=True.
# Happens:  as long as the layer is under torch.nn.utils.prune, or its weight under a parametrization that masks it, the adapter is
#           added to the weight that was last computed, and the next forward computes it anew from weight_orig and the mask. The
#           merged model is the one from before the training, exactly; nothing is said. After prune.remove the merge is right.
#           merge_adapter() loses the adapter in the same way, and a weight under nn.utils.parametrizations.weight_norm, too.
# Seen with peft 0.21.2, transformers 5.24.0, torch 2.15.0 and numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet 'torch==2.15.0' 'transformers==5.24.0' 'peft==0.21.2' 'numpy==2.4.6'
"$folder/venv/bin/python" - 2>"$folder/log" <<'PY' || { cat "$folder/log"; exit 1; }
import warnings
from collections import OrderedDict

import peft
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

warnings.simplefilter("error", UserWarning)  # a warning of peft's would end the script


class Mask(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight):
        return weight * self.mask


def under_prune(layer):
    prune.l1_unstructured(layer, "weight", 0.9)


def removed(layer):
    under_prune(layer)
    prune.remove(layer, "weight")


def under_parametrization(layer):
    parametrize.register_parametrization(layer, "weight", Mask((torch.rand(16, 16) < 0.1).float()))


def merge(adapted, **options):
    return adapted.merge_and_unload(**options)


def merge_in_place(adapted):
    adapted.merge_adapter()
    return adapted


@torch.no_grad()
def distances(prepare, merged_by, **options):
    """How far the merged model is from the adapted one, and from the one without an adapter."""
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(hidden=nn.Linear(16, 16), relu=nn.ReLU(), head=nn.Linear(16, 4))).eval()
    prepare(model.hidden)
    x = torch.randn(32, 16)
    before = model(x)
    config = peft.LoraConfig(target_modules=["hidden"], r=4, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    trained = adapted(x)
    assert not torch.allclose(trained, before, atol=0.01)
    merged = merged_by(adapted, **options)(x)
    return float((merged - trained).abs().max()), float((merged - before).abs().max())


print("peft", peft.__version__, "torch", torch.__version__)
lost = {
    "under torch.nn.utils.prune": (under_prune, merge),
    "under a masking parametrization": (under_parametrization, merge),
    "under weight_norm": (parametrizations.weight_norm, merge),
    "under torch.nn.utils.prune, merge_adapter()": (under_prune, merge_in_place),
}
for name, (prepare, merged_by) in lost.items():
    for options in ({}, {"safe_merge": True}) if merged_by is merge else ({},):
        from_adapted, from_before = distances(prepare, merged_by, **options)
        print(
            f"{name}, {options}: distance from the adapted model {from_adapted:.3f}, without adapter {from_before:.0e}"
        )
        assert from_adapted > 0.1 and from_before < 1e-6, "this has changed"
from_adapted, from_before = distances(removed, merge)
print(f"after prune.remove: distance from the adapted model {from_adapted:.0e}, without adapter {from_before:.3f}")
assert from_adapted < 1e-5 and from_before > 0.1, "this has changed"
print("as described")
PY
