#!/usr/bin/env bash
# Guess:    tie_weights of a transformers model leaves the mask of an output layer pruned by torch.nn.utils.prune alone: the layer's
#           weight_orig is the embedding, as it was, and its mask keeps a tenth of it.
# Happens:  in BERT's masked language model the mask itself is replaced by the embedding: what is to be tied is found by the
#           beginning of its name, and weight_mask begins with weight. The layer then computes with the embedding's squares,
#           nothing is said, and the pattern is lost. In GPT-2 a second `weight` is made beside weight_orig and weight_mask, and
#           the next forward raises a TypeError. resize_token_embeddings ties the weights as well.
# Seen with transformers 5.24.0, torch 2.15.0 and numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet 'torch==2.15.0' 'transformers==5.24.0' 'numpy==2.4.6'
"$folder/venv/bin/python" - <<'PY'
import torch
import transformers
from torch.nn.utils import prune
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 50}
tokens = torch.arange(6)[None]
print("transformers", transformers.__version__)


def tied(name, tie):
    """The output layer of a model pruned and tied again, the embedding, and the change of the logits."""
    torch.manual_seed(0)
    if name == "BERT":
        model = BertForMaskedLM(BertConfig(**sizes)).eval()
    else:
        config = GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=50, bos_token_id=0, eos_token_id=0)
        model = GPT2LMHeadModel(config).eval()
    head = model.get_output_embeddings()
    prune.l1_unstructured(head, "weight", 0.9)
    with torch.no_grad():
        before = model(tokens).logits
        tie(model)
        try:
            change = float((model(tokens).logits - before).abs().max())
        except TypeError as error:
            change = f"TypeError: {error}"
    return head, model.get_input_embeddings().weight, change


for name, tie in {
    "tie_weights": lambda model: model.tie_weights(),
    "resize_token_embeddings": lambda model: model.resize_token_embeddings(50),
}.items():
    head, embedding, change = tied("BERT", tie)
    ones = float((head.weight_mask == 1).float().mean())
    print(f"BERT, {name}: mask is the embedding {torch.equal(head.weight_mask, embedding)}, change of the logits {change}")
    print("  ones in the mask", ones, "weight is the square of the embedding", torch.allclose(head.weight, embedding**2))
    if name == "tie_weights":
        assert torch.equal(head.weight_mask, embedding) and torch.allclose(head.weight, embedding**2), "this has changed"
        assert change > 0.1 and ones == 0, "this has changed"
head, _, change = tied("GPT-2", lambda model: model.tie_weights())
print("GPT-2:", change)
assert str(change).startswith("TypeError"), "this has changed"
print("as described")
PY
