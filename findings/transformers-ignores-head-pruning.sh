#!/usr/bin/env bash
# Guess:    head pruning written for transformers 4 works in 5 or is refused: a config's pruned_heads makes a smaller model, and
#           head_mask in the forward switches heads off.
# Happens:  both are accepted and do nothing. A BertConfig with pruned_heads keeps the entry, saves it and builds every head; a
#           forward that masks all heads gives the same output as one that masks none, as the forward takes any keyword. Only
#           prune_heads itself is missed, with an AttributeError. Heads that are tried one by one through head_mask all seem to be
#           worth nothing.
# Seen with transformers 5.24.0, torch 2.15.0 and numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet 'torch==2.15.0' 'transformers==5.24.0' 'numpy==2.4.6'
"$folder/venv/bin/python" - <<'PY'
import torch
import transformers
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 50}
tokens = torch.arange(6)[None]
print("transformers", transformers.__version__)

config = BertConfig(**sizes, pruned_heads={0: [0, 1]})
torch.manual_seed(0)
bert = BertModel(config).eval()
gpt2 = GPT2Model(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, bos_token_id=0, eos_token_id=0)).eval()
query = bert.encoder.layer[0].attention.self.query
print("pruned_heads in the saved config:", config.to_dict()["pruned_heads"], "rows of the query's weight:", query.out_features)
changes = {}
for name, model in {"BERT": bert, "GPT-2": gpt2}.items():
    with torch.no_grad():
        whole = model(tokens).last_hidden_state
        masked = model(tokens, head_mask=torch.zeros(2, 4)).last_hidden_state
    changes[name] = float((whole - masked).abs().max())
    print(f"{name}: largest change of the output with every head masked {changes[name]}")
assert query.out_features == 32 and config.to_dict()["pruned_heads"], "this has changed"
assert set(changes.values()) == {0.0}, "this has changed"
assert not hasattr(bert, "prune_heads"), "this has changed"
print("as described")
PY
