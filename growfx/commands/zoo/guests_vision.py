"""Guests of the zoo that look at images, volumes and video."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Final

from torch import nn

from growfx.commands.zoo import guest_nets as zoo_guest_nets
from growfx.commands.zoo.guest import Guest, Package

__all__ = ["PACKAGES"]


def _image(size: int, channels: int = 3, other: int | None = None) -> Any:
    """One image: (batch, channels, size, size)."""
    return lambda draw: (draw.normal(channels, draw.size(size, other), draw.size(size, other)),)


def _volume(size: int, other: int | None = None, channels: int = 1) -> Any:
    """One volume: (batch, channels, size, size, size)."""
    return lambda draw: (draw.normal(channels, *[draw.size(size, other)] * 3),)


_SEGMENTATION: Final = {
    "unet-resnet18": Guest(lambda smp: smp.Unet("resnet18", encoder_weights=None), _image(64)),
    "unetplusplus-efficientnet": Guest(
        lambda smp: smp.UnetPlusPlus("efficientnet-b0", encoder_weights=None), _image(64)
    ),
    "fpn-mobilenet": Guest(lambda smp: smp.FPN("mobilenet_v2", encoder_weights=None), _image(64)),
    "deeplabv3plus-resnet18": Guest(lambda smp: smp.DeepLabV3Plus("resnet18", encoder_weights=None), _image(64)),
    "segformer-mit": Guest(lambda smp: smp.Segformer("mit_b0", encoder_weights=None), _image(64)),
    "manet-resnet18": Guest(lambda smp: smp.MAnet("resnet18", encoder_weights=None), _image(64)),
}


def _yolo(task: str, configuration: str) -> Guest:
    return Guest(
        lambda _: getattr(import_module("ultralytics.nn.tasks"), task)(configuration, verbose=False), _image(64)
    )


_ULTRALYTICS: Final = {
    "yolov8n": _yolo("DetectionModel", "yolov8n.yaml"),
    "yolo11n": _yolo("DetectionModel", "yolo11n.yaml"),
    "yolo12n": _yolo("DetectionModel", "yolo12n.yaml"),
    "yolov8n-seg": _yolo("SegmentationModel", "yolov8n-seg.yaml"),
    "yolov8n-cls": _yolo("ClassificationModel", "yolov8n-cls.yaml"),
    "yolov8n-pose": _yolo("PoseModel", "yolov8n-pose.yaml"),
}

_CLIP_TEXT: Final = {"context_length": 12, "vocab_size": 99, "width": 32, "heads": 2, "layers": 2}
_CLIP_VISION: Final = {"layers": 2, "width": 64, "head_width": 16, "patch_size": 8, "image_size": 32}


def _coca(clip: Any) -> nn.Module:
    model = clip.CoCa(
        32,
        multimodal_cfg={**_CLIP_TEXT, "attn_pooler_heads": 2, "dim_head": 16},
        text_cfg={**_CLIP_TEXT, "embed_cls": True, "output_tokens": True},
        vision_cfg={**_CLIP_VISION, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
    )
    nn.init.normal_(model.text_decoder.text_projection, std=0.1)  # made by torch.empty, for a checkpoint to fill
    return model


_OPEN_CLIP: Final = {
    "vit": Guest(
        lambda clip: clip.CLIP(32, _CLIP_VISION, _CLIP_TEXT),
        lambda draw: (draw.normal(3, 32, 32), draw.integers(99, 12)),
    ),
    "resnet": Guest(
        lambda clip: clip.CLIP(
            32,
            {"layers": [1, 1, 1, 1], "width": 16, "patch_size": None, "image_size": 64},
            _CLIP_TEXT,
        ),
        lambda draw: (draw.normal(3, 64, 64), draw.integers(99, 12)),
    ),
    "coca": Guest(
        _coca,
        lambda draw: (draw.normal(3, 32, 32), draw.integers(99, 12, low=1)),
    ),
}


def _monai(make: Any, inputs: Any) -> Guest:
    return Guest(lambda _: make(import_module("monai.networks.nets")), inputs)


_MONAI: Final = {
    "unet": _monai(lambda n: n.UNet(3, 1, 2, channels=(8, 16, 32), strides=(2, 2), num_res_units=1), _volume(16, 24)),
    "basic-unet": _monai(lambda n: n.BasicUNet(2, 1, 2, features=(8, 8, 16, 16, 32, 8)), _image(32, 1, 48)),
    "swin-unetr": _monai(
        lambda n: n.SwinUNETR(1, 2, feature_size=12), lambda draw: (draw.normal(1, 64, 32, draw.size(32, 64)),)
    ),
    "unetr": _monai(
        lambda n: n.UNETR(1, 2, 32, feature_size=8, hidden_size=48, mlp_dim=96, num_heads=4), _volume(32, 32)
    ),
    "segresnet": _monai(lambda n: n.SegResNet(3, 8, 1, 2), _volume(16, 24)),
    "dynunet": _monai(
        lambda n: n.DynUNet(3, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[8, 16, 32], deep_supervision=False),
        _volume(16, 24),
    ),
    "attention-unet": _monai(lambda n: n.AttentionUnet(2, 1, 2, (8, 16, 32), (2, 2)), _image(32, 1, 48)),
    "vnet": _monai(lambda n: n.VNet(2, 1, 2), _image(32, 1, 48)),
    "densenet121": _monai(lambda n: n.DenseNet121(3, 1, 2, init_features=16, growth_rate=8), _volume(32, 48)),
}


_DIFFUSERS: Final = {
    "unet2d": Guest(
        lambda d: d.UNet2DModel(
            sample_size=16,
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        ),
        lambda draw: {"sample": draw.normal(3, draw.size(16, 32), draw.size(16, 32)), "timestep": 3},
    ),
    "unet2d-condition": Guest(
        lambda d: d.UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=4,
            cross_attention_dim=12,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        ),
        lambda draw: {
            "sample": draw.normal(4, draw.size(16, 32), draw.size(16, 32)),
            "timestep": draw.integers(100),
            "encoder_hidden_states": draw.normal(5, 12),
        },
    ),
    "autoencoder-kl": Guest(
        lambda d: d.AutoencoderKL(
            block_out_channels=(16, 32),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
        ),
        _image(32),
    ),
    "vq": Guest(
        lambda d: d.VQModel(
            block_out_channels=(16, 32),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            num_vq_embeddings=16,
        ),
        _image(32),
    ),
    "dit": Guest(
        lambda d: d.DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            num_layers=2,
            sample_size=8,
            num_embeds_ada_norm=10,
            norm_num_groups=4,
        ),
        lambda draw: {
            "hidden_states": draw.normal(4, 8, 8),
            "timestep": draw.integers(100),
            "class_labels": draw.integers(10),
        },
    ),
}

_VIT_PYTORCH: Final = {
    "vit": Guest(
        lambda v: v.ViT(image_size=32, patch_size=8, num_classes=10, dim=32, depth=2, heads=2, mlp_dim=64, dim_head=16),
        _image(32),
    ),
    "simple-vit": Guest(
        lambda v: v.SimpleViT(image_size=32, patch_size=8, num_classes=10, dim=32, depth=2, heads=2, mlp_dim=64),
        _image(32),
    ),
    "cait": Guest(
        lambda _: import_module("vit_pytorch.cait").CaiT(
            image_size=32, patch_size=8, num_classes=10, dim=32, depth=2, cls_depth=1, heads=2, mlp_dim=64,
            layer_dropout=0.05,
        ),
        _image(32),
    ),
    "cvt": Guest(
        lambda _: import_module("vit_pytorch.cvt").CvT(
            num_classes=10, s1_emb_dim=16, s2_emb_dim=32, s2_heads=2, s2_depth=1, s3_emb_dim=48, s3_heads=3, s3_depth=1
        ),
        _image(64),
    ),
    "cross-vit": Guest(
        lambda _: import_module("vit_pytorch.cross_vit").CrossViT(
            image_size=32, num_classes=10, depth=1, sm_dim=32, sm_patch_size=8, sm_enc_depth=1, sm_enc_heads=2,
            sm_enc_mlp_dim=64, sm_enc_dim_head=16, lg_dim=48, lg_patch_size=16, lg_enc_depth=1, lg_enc_heads=2,
            lg_enc_mlp_dim=64, lg_enc_dim_head=16, cross_attn_depth=1, cross_attn_heads=2, cross_attn_dim_head=16,
        ),
        _image(32),
    ),
    "mobile-vit": Guest(
        lambda _: import_module("vit_pytorch.mobile_vit").MobileViT(
            image_size=(64, 64), dims=[32, 40, 48], num_classes=10,
            channels=[8, 8, 16, 16, 24, 24, 32, 32, 40, 40, 64],
        ),
        _image(64),
    ),
}  # fmt: skip


def _loftr(kornia: Any) -> nn.Module:
    configuration = kornia.feature.loftr.loftr.default_cfg
    small = {
        **configuration,
        # Random weights match nothing well: take every mutual match.
        "match_coarse": {**configuration["match_coarse"], "thr": 0.0, "border_rm": 0},
        "backbone_type": "ResNetFPN",
        "resnetfpn": {"initial_dim": 16, "block_dims": [16, 24, 32]},
        "coarse": {**configuration["coarse"], "d_model": 32, "d_ffn": 32, "nhead": 2, "layer_names": ["self", "cross"]},
        "fine": {**configuration["fine"], "d_model": 16, "d_ffn": 16, "nhead": 2, "layer_names": ["self", "cross"]},
    }
    return kornia.feature.LoFTR(pretrained=None, config=small)


_KORNIA: Final = {
    "hardnet": Guest(lambda k: k.feature.HardNet(pretrained=False), _image(32, 1, 32)),
    "hardnet8": Guest(lambda k: k.feature.HardNet8(pretrained=False), _image(32, 1, 32)),
    "sosnet": Guest(lambda k: k.feature.SOSNet(pretrained=False), _image(32, 1, 32)),
    "tfeat": Guest(lambda k: k.feature.TFeat(pretrained=False), _image(32, 1, 32)),
    "loftr": Guest(
        _loftr, lambda draw: ({"image0": draw.uniform(1, 64, 64), "image1": draw.uniform(1, 64, draw.size(64, 96))},)
    ),
    "keynet": Guest(lambda k: k.feature.KeyNet(pretrained=False), _image(32, 1)),
    "disk": Guest(
        lambda k: k.feature.DISK(
            desc_dim=16,
            unet=import_module("kornia.feature.disk._unets.unet").Unet(in_features=3, size=5, down=[8, 16], up=[17]),
        ),
        _image(32),
    ),
    "dexined": Guest(lambda k: import_module("kornia.filters.dexined").DexiNed(pretrained=False), _image(64)),
}

_EFFICIENTNET: Final = {
    f"efficientnet-{size}": Guest(
        lambda e, size=size: e.EfficientNet.from_name(f"efficientnet-{size}", num_classes=10), _image(64)
    )
    for size in ("b0", "b1", "b2")
}

_PYTORCHCV: Final = {
    name.replace("_", "-"): Guest(
        lambda _, name=name: import_module("pytorchcv.model_provider").get_model(name, pretrained=False), _image(32)
    )
    for name in (
        "resnet20_cifar10",
        "preresnet20_cifar10",
        "densenet40_k12_cifar10",
        "shakeshakeresnet20_2x16d_cifar10",
        "diaresnet20_cifar10",
        "ror3_56_cifar10",
        "xdensenet40_2_k24_bc_cifar10",
    )
}

_SPIKES: Final = {
    "resnet18": Guest(
        lambda _: zoo_guest_nets.spiking_resnet(step="m"),
        lambda draw: (draw.normal(3, 32, 32).unsqueeze(0).repeat(2, 1, 1, 1, 1),),
    ),
    "resnet18-steps": Guest(lambda _: zoo_guest_nets.spiking_resnet(step="s"), _image(32)),
}


_LIGHTLY: Final = {
    "simsiam": Guest(lambda _: zoo_guest_nets.simsiam(), _image(32)),
    "barlow-twins": Guest(lambda _: zoo_guest_nets.barlow_twins(), _image(32)),
    "resnet-generator": Guest(
        lambda _: import_module("lightly.models").ResNetGenerator("resnet-18", 1, 10), _image(32)
    ),
}

_NNUNET: Final = {
    "plain-unet": Guest(
        lambda _: import_module("dynamic_network_architectures.architectures.unet").PlainConvUNet(
            1, 3, (8, 16, 32), nn.Conv3d, 3, (1, 2, 2), (1, 1, 1), 2, (1, 1), conv_bias=True,
            norm_op=nn.InstanceNorm3d, norm_op_kwargs={"affine": True}, nonlin=nn.LeakyReLU, deep_supervision=True,
        ),
        _volume(16, 24),
    ),
    "residual-unet": Guest(
        lambda _: import_module("dynamic_network_architectures.architectures.unet").ResidualEncoderUNet(
            1, 3, (8, 16, 32), nn.Conv2d, 3, (1, 2, 2), (1, 1, 1), 2, (1, 1), conv_bias=True,
            norm_op=nn.InstanceNorm2d, norm_op_kwargs={"affine": True}, nonlin=nn.LeakyReLU,
        ),
        _image(32, 1),
    ),
}  # fmt: skip


def _sam_encoder(sam: Any) -> nn.Module:
    return sam.modeling.ImageEncoderViT(
        img_size=64, patch_size=8, embed_dim=32, depth=2, num_heads=2, out_chans=16, use_rel_pos=True,
        window_size=4, global_attn_indexes=(1,),
    )  # fmt: skip


def _sam_decoder(sam: Any) -> nn.Module:
    transformer = sam.modeling.transformer.TwoWayTransformer(depth=2, embedding_dim=16, mlp_dim=32, num_heads=2)
    return sam.modeling.MaskDecoder(transformer_dim=16, transformer=transformer, iou_head_hidden_dim=16)


_SAM: Final = {
    "image-encoder": Guest(_sam_encoder, _image(64)),
    "mask-decoder": Guest(
        _sam_decoder,
        lambda draw: {
            "image_embeddings": draw.normal(16, 8, 8)[:1],
            "image_pe": draw.normal(16, 8, 8)[:1],
            "sparse_prompt_embeddings": draw.normal(2, 16),
            "dense_prompt_embeddings": draw.normal(16, 8, 8),
            "multimask_output": True,
        },
    ),
}

PACKAGES: Final = (
    Package("segmentation-models-pytorch", "segmentation_models_pytorch", _SEGMENTATION),
    Package("ultralytics", "ultralytics", _ULTRALYTICS),
    Package("open_clip_torch", "open_clip", _OPEN_CLIP),
    Package("monai", "monai", _MONAI),
    Package("diffusers", "diffusers", _DIFFUSERS),
    Package("vit-pytorch", "vit_pytorch", _VIT_PYTORCH),
    Package("kornia", "kornia", _KORNIA),
    Package("efficientnet_pytorch", "efficientnet_pytorch", _EFFICIENTNET),
    Package("pytorchcv", "pytorchcv", _PYTORCHCV),
    Package("spikingjelly", "spikingjelly", _SPIKES),
    Package("lightly", "lightly", _LIGHTLY),
    Package("dynamic_network_architectures", "dynamic_network_architectures", _NNUNET),
    Package("segment-anything", "segment_anything", _SAM),
)
