"""Guests of the zoo that read text, listen, or model sequences."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Final

import torch

from growfx.commands.zoo import guest_nets as zoo_guest_nets
from growfx.commands.zoo.guest import Draw, Guest, Package

__all__ = ["PACKAGES"]

_VOCABULARY: Final = 99
# Settings that nearly all configurations of transformers share.
_SMALL: Final[dict[str, Any]] = {
    "vocab_size": _VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "max_position_embeddings": 64,
}
_DECODER: Final[dict[str, Any]] = {**_SMALL, "num_key_value_heads": 2, "intermediate_size": 48, "pad_token_id": 0}
_SEEN: Final[dict[str, Any]] = {**_SMALL, "image_size": 32, "patch_size": 8}


def _tokens(length: int) -> Any:
    return lambda draw: (draw.integers(_VOCABULARY, draw.size(length), low=3),)


def _text(draw: Draw) -> dict[str, Any]:
    """Tokens with an attention mask whose last column is padding in the first row."""
    ids = draw.integers(_VOCABULARY, draw.size(12), low=3)
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _pairs(draw: Draw) -> dict[str, Any]:
    return {**_text(draw), "decoder_input_ids": draw.integers(_VOCABULARY, draw.size(8), low=3)}


def _pixels(size: int, other: int | None = None) -> Any:
    return lambda draw: {"pixel_values": draw.normal(3, draw.size(size, other), draw.size(size, other))}


def _hugging(kind: str, inputs: Any, head: str = "Model", **configuration: Any) -> Guest:
    """A model of transformers: `kind` is the stem of its classes, `<kind>Config` and `<kind><head>`."""
    return Guest(lambda t: getattr(t, kind + head)(getattr(t, kind + "Config")(**configuration)), inputs)


def _clip(t: Any) -> Any:
    text, vision = t.CLIPTextConfig(**_SMALL, projection_dim=16), t.CLIPVisionConfig(**_SEEN, projection_dim=16)
    return t.CLIPModel(t.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16))


def _sam(t: Any) -> Any:
    vision = t.SamVisionConfig(
        hidden_size=32, output_channels=16, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=8,
        mlp_dim=64, window_size=4, global_attn_indexes=[1], num_pos_feats=8,
    )  # fmt: skip
    prompt = t.SamPromptEncoderConfig(hidden_size=16, image_size=64, patch_size=8, mask_input_channels=4)
    decoder = t.SamMaskDecoderConfig(
        hidden_size=16, mlp_dim=32, num_hidden_layers=2, num_attention_heads=2, iou_head_hidden_dim=16
    )
    return t.SamModel(t.SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder))


def _rt_detr(t: Any) -> Any:
    backbone = t.RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"], out_indices=[2, 3, 4],
    )  # fmt: skip
    return t.RTDetrForObjectDetection(
        t.RTDetrConfig(
            backbone_config=backbone, encoder_hidden_dim=32, encoder_in_channels=[16, 24, 32], encoder_ffn_dim=48,
            encoder_attention_heads=2, d_model=32, num_queries=20, decoder_in_channels=[32, 32, 32], decoder_ffn_dim=48,
            decoder_attention_heads=2, decoder_layers=2, num_denoising=0, hidden_expansion=0.5, num_labels=5,
        )
    )  # fmt: skip


def _mask2former(t: Any) -> Any:
    backbone = t.SwinConfig(
        image_size=64, embed_dim=16, depths=[1, 1, 1, 1], num_heads=[2, 2, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    return t.Mask2FormerForUniversalSegmentation(
        t.Mask2FormerConfig(
            backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=48,
            encoder_layers=2, decoder_layers=3, num_attention_heads=2, dim_feedforward=48, num_queries=10, num_labels=5,
        )
    )  # fmt: skip


_TRANSFORMERS: Final = {
    "bert": _hugging("Bert", _text, **_SMALL),
    "bert-masked-lm": _hugging("Bert", _text, "ForMaskedLM", **_SMALL),
    "deberta-v2": _hugging(
        "DebertaV2", _text, "ForSequenceClassification", **_SMALL, relative_attention=True,
        pos_att_type=["p2c", "c2p"], position_buckets=8, norm_rel_ebd="layer_norm", share_att_key=True,
    ),
    "t5": _hugging("T5", _pairs, vocab_size=_VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4),
    "m2m100": _hugging(
        "M2M100", _pairs, vocab_size=_VOCABULARY, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=48,
        decoder_ffn_dim=48, encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=64,
    ),
    "gpt2": _hugging(
        "GPT2", _text, "LMHeadModel", vocab_size=_VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64
    ),
    "llama": _hugging("Llama", _text, "ForCausalLM", **_DECODER),
    "mixtral": _hugging("Mixtral", _text, "ForCausalLM", **_DECODER, num_local_experts=4),
    "mamba": _hugging(
        "Mamba", _tokens(12), "ForCausalLM", vocab_size=_VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4
    ),
    "clip": Guest(_clip, lambda draw: {**_text(draw), "pixel_values": draw.normal(3, 32, 32)}),
    "vit": _hugging("ViT", _pixels(32, 32), "ForImageClassification", **_SEEN),
    "dinov3-vit": _hugging("DINOv3ViT", _pixels(32), **_SEEN),
    "convnext": _hugging(
        "ConvNext", _pixels(64), "ForImageClassification", hidden_sizes=[16, 24, 32, 40], depths=[1, 1, 2, 1]
    ),
    "segformer": _hugging(
        "Segformer", _pixels(64), "ForSemanticSegmentation", hidden_sizes=[16, 24, 32, 40], depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 2, 4], decoder_hidden_size=32,
    ),
    "swin": _hugging(
        "Swin", _pixels(32), "ForImageClassification", image_size=32, patch_size=2, embed_dim=16, depths=[1, 2],
        num_heads=[2, 2], window_size=4,
    ),
    "sam": Guest(
        _sam, lambda draw: {"pixel_values": draw.normal(3, 64, 64), "input_points": 64 * draw.uniform(1, 1, 2)}
    ),
    "rt-detr": Guest(_rt_detr, _pixels(64)),
    "mask2former": Guest(_mask2former, _pixels(64)),
    "wav2vec2": _hugging(
        "Wav2Vec2", lambda draw: {"input_values": draw.normal(draw.size(800))}, **_SMALL, conv_dim=(16, 16, 16),
        conv_stride=(5, 2, 2), conv_kernel=(10, 3, 3), num_feat_extract_layers=3, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    ),
}  # fmt: skip


def _x_transformer(**options: Any) -> Guest:
    layers = {"dim": 32, "depth": 2, "heads": 2, "attn_dim_head": 16}
    return Guest(
        lambda x: x.TransformerWrapper(
            num_tokens=_VOCABULARY, max_seq_len=64, attn_layers=x.Decoder(**layers, **options)
        ),
        _tokens(12),
    )


_X_TRANSFORMERS: Final = {
    "decoder": _x_transformer(),
    "decoder-rotary-swiglu": _x_transformer(rotary_pos_emb=True, ff_glu=True, ff_swish=True, use_rmsnorm=True),
    "decoder-alibi": _x_transformer(alibi_pos_bias=True, attn_qk_norm=True),
    "encoder": Guest(
        lambda x: x.TransformerWrapper(
            num_tokens=_VOCABULARY, max_seq_len=64, attn_layers=x.Encoder(dim=32, depth=2, heads=2, rel_pos_bias=True)
        ),
        _tokens(12),
    ),
    "continuous": Guest(
        lambda x: x.ContinuousTransformerWrapper(
            dim_in=8, dim_out=5, max_seq_len=64, attn_layers=x.Encoder(dim=32, depth=2, heads=2)
        ),
        lambda draw: (draw.normal(draw.size(12), 8),),
    ),
    "vit": Guest(
        lambda x: x.ViTransformerWrapper(
            image_size=32, patch_size=8, num_classes=10, attn_layers=x.Encoder(dim=32, depth=2, heads=2)
        ),
        lambda draw: (draw.normal(3, 32, 32),),
    ),
}


def _lengths(draw: Draw, length: int) -> torch.Tensor:
    return torch.tensor([length - 4 * row for row in range(draw.batch)])


def _frames(length: int, features: int) -> Any:
    """Frames (batch, time, features) and their lengths."""

    def inputs(draw: Draw) -> tuple[Any, ...]:
        size = draw.size(length)
        return draw.normal(size, features), _lengths(draw, size)

    return inputs


_TORCHAUDIO: Final = {
    "conformer": Guest(lambda a: a.models.Conformer(16, 2, 32, 2, 7), _frames(24, 16)),
    "conv-tasnet": Guest(
        lambda a: a.models.ConvTasNet(2, 16, 16, 3, 16, 24, 3, 2), lambda draw: (draw.normal(1, draw.size(320)),)
    ),
    "deep-speech": Guest(lambda a: a.models.DeepSpeech(16, 32, 20), lambda draw: (draw.normal(1, draw.size(12), 16),)),
    "wav2letter": Guest(
        lambda a: a.models.Wav2Letter(20, "mfcc", 13), lambda draw: (draw.normal(13, draw.size(64)),)
    ),
    "wav2vec2": Guest(
        lambda a: a.models.wav2vec2_model(
            "layer_norm", [(16, 10, 5), (16, 3, 2)], True, 32, 0.1, 4, 2, 2, 4, 0.1, 48, 0.1, 0.1, True, 0.05, 20
        ),
        lambda draw: (draw.normal(draw.size(400)),),
    ),
    "wave-rnn": Guest(
        lambda a: a.models.WaveRNN(
            [4, 4], 16, 16, n_res_block=2, n_rnn=16, n_fc=16, n_freq=12, n_hidden=16, n_output=16
        ),
        lambda draw: (draw.uniform(1, 16 * 6), draw.normal(1, 12, 10)),
    ),
    "emformer": Guest(
        lambda a: a.models.Emformer(16, 2, 32, 2, 4, right_context_length=1),
        lambda draw: (draw.normal(13, 16), torch.full((draw.batch,), 12)),
    ),
}  # fmt: skip


def _mambapy(use_pscan: bool) -> Guest:
    def build(_: Any) -> Any:
        mamba = import_module("mambapy.mamba")
        return mamba.Mamba(mamba.MambaConfig(d_model=16, n_layers=2, d_state=4, pscan=use_pscan))

    return Guest(build, lambda draw: (draw.normal(draw.size(12), 16),))


def _jamba(_: Any) -> Any:
    jamba = import_module("mambapy.jamba")
    return jamba.Jamba(
        jamba.JambaLMConfig(
            d_model=16, n_layers=4, mlp_size=32, num_attention_heads=2, num_key_value_heads=1, attn_layer_period=2,
            attn_layer_offset=1, num_experts=2, num_experts_per_tok=1, expert_layer_period=2, expert_layer_offset=1,
            d_state=4, dt_rank=4,
        )
    )  # fmt: skip


_MAMBAPY: Final = {
    "mamba": _mambapy(True),
    "mamba-sequential": _mambapy(False),
    "jamba": Guest(_jamba, lambda draw: (draw.normal(12, 16),)),
}


def _lobe(module: str, kind: str, inputs: Any, *args: Any, **options: Any) -> Guest:
    """A model of `speechbrain.lobes.models`."""
    return Guest(lambda _: getattr(import_module(f"speechbrain.lobes.models.{module}"), kind)(*args, **options), inputs)


_SPEECHBRAIN: Final = {
    "ecapa-tdnn": _lobe(
        "ECAPA_TDNN", "ECAPA_TDNN", lambda draw: (draw.normal(draw.size(40), 16),), 16, lin_neurons=24,
        channels=[32, 32, 32, 32, 64], attention_channels=16, res2net_scale=4, se_channels=16,
    ),
    "xvector": _lobe(
        "Xvector", "Xvector", lambda draw: (draw.normal(draw.size(40), 16),), device="cpu", in_channels=16,
        tdnn_blocks=3, tdnn_channels=[24, 24, 48], tdnn_kernel_sizes=[5, 3, 1], tdnn_dilations=[1, 2, 1],
        lin_neurons=16,
    ),
    "crdnn": _lobe(
        "CRDNN", "CRDNN", lambda draw: (draw.normal(draw.size(24), 16),), input_shape=[None, None, 16],
        cnn_channels=[8, 8],
        rnn_layers=1, rnn_neurons=16, dnn_blocks=1, dnn_neurons=16,
    ),
    "transformer-asr": Guest(
        lambda _: import_module("speechbrain.lobes.models.transformer.TransformerASR").TransformerASR(
            input_size=16, tgt_vocab=_VOCABULARY, d_model=32, nhead=2, num_encoder_layers=2, num_decoder_layers=1,
            d_ffn=48,
        ),
        lambda draw: (draw.normal(draw.size(16), 16), draw.integers(_VOCABULARY, 6, low=1)),
    ),
}  # fmt: skip


def _encodec(masked: tuple[str, ...] = (), **options: Any) -> Guest:
    def build(encodec: Any) -> Any:
        modules, model = encodec.modules, encodec.EncodecModel
        small = {"n_filters": 4, "dimension": 16, "ratios": [4, 2], "norm": "weight_norm", **options}
        quantizer = import_module("encodec.quantization").ResidualVectorQuantizer(dimension=16, n_q=2, bins=16)
        encoder, decoder = modules.SEANetEncoder(**small), modules.SEANetDecoder(**small)
        return model(encoder, decoder, quantizer, [1.5], 8000, 1)

    return Guest(build, lambda draw: (draw.normal(1, draw.size(256)),), masked)


_ENCODEC: Final = {
    "causal": _encodec(("*.weight_v",), causal=True),
    "time-group-norm": _encodec(norm="time_group_norm", lstm=0),
}

_TCN: Final = {
    "tcn": Guest(lambda t: t.TCN(8, [16, 16, 16]), lambda draw: (draw.normal(8, draw.size(24)),)),
    "tcn-gated": Guest(
        lambda t: t.TCN(
            8, [16, 16], causal=False, use_norm="layer_norm", use_skip_connections=True, activation="gelu",
            use_gate=True, output_projection=4,
        ),
        lambda draw: (draw.normal(8, draw.size(24)),),
    ),
}  # fmt: skip


def _lora(kind: str) -> Guest:
    def build(lora: Any) -> Any:
        linear, nn = lora.Linear, torch.nn
        if kind == "mlp":
            return nn.Sequential(
                linear(16, 32, r=4), nn.ReLU(), lora.MergedLinear(32, 48, r=4, enable_lora=[True, False, True])
            )
        return nn.Sequential(lora.Conv2d(3, 8, 3, r=4, padding=1), nn.ReLU(), nn.Flatten(), linear(8 * 64, 10, r=4))

    return Guest(build, lambda draw: (draw.normal(16) if kind == "mlp" else draw.normal(3, 8, 8),))


_LORALIB: Final = {"mlp": _lora("mlp"), "conv": _lora("conv")}

_NORSE: Final = {
    "lif": Guest(lambda _: zoo_guest_nets.norse_net(False), lambda draw: (draw.normal(5, 16).transpose(0, 1) * 3,)),
    "lif-recurrent": Guest(
        lambda _: zoo_guest_nets.norse_net(True), lambda draw: (draw.normal(5, 16).transpose(0, 1) * 3,)
    ),
}

PACKAGES: Final = (
    Package("transformers", "transformers", _TRANSFORMERS),
    Package("x-transformers", "x_transformers", _X_TRANSFORMERS),
    Package("torchaudio", "torchaudio", _TORCHAUDIO),
    Package("mambapy", "mambapy", _MAMBAPY),
    Package("speechbrain", "speechbrain", _SPEECHBRAIN),
    Package("encodec", "encodec", _ENCODEC),
    Package("pytorch-tcn", "pytorch_tcn", _TCN),
    Package("loralib", "loralib", _LORALIB),
    Package("norse", "norse", _NORSE),
)
