#!/usr/bin/env bash
# Guess:    a sparse checkpoint in compressed-tensors' sparse-bitmask format, as llm-compressor wrote them for pruned models, is
#           decompressed by today's transformers and compressed-tensors, or refused: its config names the format.
# Happens:  the format's name is still known, its code is gone, and the sparsity_config is passed over. from_pretrained returns a model
#           whose pruned layers, all linear ones of a language model, are drawn at random, other ones in each call. What tells is
#           the report of missing and unexpected keys that a model with a new head gets too; the format is not mentioned. The
#           release that wrote the file still reads it.
# Seen with compressed-tensors 0.20.1 (file by 0.9.4), transformers 5.24.0, torch 2.15.0 and numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.15.0' 'transformers==5.24.0' 'compressed-tensors==0.20.1' 'numpy==2.4.6'
"$folder/venv/bin/pip" install --quiet --no-deps --target "$folder/old" 'compressed-tensors==0.9.4'
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from torch import nn
from torch.nn.utils import prune
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 64}
model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, **sizes)).eval()
for name, layer in model.named_modules():
    if isinstance(layer, nn.Linear) and name != "lm_head":
        prune.l1_unstructured(layer, "weight", 0.5)
        prune.remove(layer, "weight")
model.save_pretrained("model")
torch.save(model(torch.arange(10)[None]).logits.detach(), "logits.pt")
PY
PYTHONPATH="$folder/old" "$folder/venv/bin/python" -W ignore - <<'PY'
import json

import torch
from compressed_tensors.compressors.sparse_compressors.sparse_bitmask import BitmaskCompressor
from compressed_tensors.config import BitmaskConfig
from safetensors.torch import load_file, save_file

weights = load_file("model/model.safetensors")
layers = {name.removesuffix(".weight") for name in weights if "proj" in name}
compressor = BitmaskCompressor(BitmaskConfig())
save_file(compressor.compress(weights, layers), "model/model.safetensors", {"format": "pt"})
back = dict(compressor.decompress("model"))
assert all(torch.equal(back[f"{name}.weight"], weights[f"{name}.weight"]) for name in layers)
config = json.load(open("model/config.json"))
sparsity = {"format": "sparse-bitmask", "global_sparsity": 0.5, "sparsity_structure": "unstructured", "targets": ["Linear"]}
config["quantization_config"] = {"quant_method": "compressed-tensors", "version": "0.9.4", "sparsity_config": sparsity}
json.dump(config, open("model/config.json", "w"))
print("written, and read again, by the old release:", len(layers), "layers")
PY
"$folder/venv/bin/python" -W ignore - 2> report.txt <<'PY'
from importlib.metadata import version

import torch
from transformers import AutoModelForCausalLM

print("compressed-tensors", version("compressed-tensors"), "transformers", version("transformers"))
wanted, outputs = torch.load("logits.pt"), []
for seed in (0, 1):
    torch.manual_seed(seed)
    model, report = AutoModelForCausalLM.from_pretrained("model", output_loading_info=True)
    outputs.append(model(torch.arange(10)[None]).logits.detach())
    density = float((model.model.layers[0].mlp.up_proj.weight != 0).float().mean())
    print(f"loaded: density {density:.2f}, missing keys {len(report['missing_keys'])}", end=", ")
    print(f"error {float((outputs[-1] - wanted).norm() / wanted.norm()):.2f} of the output's size")
    assert density == 1 and len(report["missing_keys"]) == 7, "this has changed"
    assert (outputs[-1] - wanted).norm() > 0.1 * wanted.norm(), "this has changed"
assert not torch.allclose(outputs[0], outputs[1], atol=1e-3), "this has changed"
PY
if grep -i 'bitmask' report.txt | grep -vi 'UNEXPECTED'; then echo "this has changed"; exit 1; fi
echo "as described"
