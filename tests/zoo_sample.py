"""Small models of timm and torchvision, one for each kind of connectivity, as small as their builders let them be."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from timm.layers import GroupNormAct, StdConv2d
from timm.models import (
    _efficientnet_builder,
    byobnet,
    convmixer,
    cspnet,
    efficientnet,
    focalnet,
    gcvit,
    ghostnet,
    hrnet,
    levit,
    metaformer,
    mlp_mixer,
    mvitv2,
    nest,
    resnetv2,
    tiny_vit,
    vgg,
    volo,
)
from torch import Tensor, nn
from torchvision.models import _utils, maxvit, shufflenetv2, swin_transformer, vision_transformer
from torchvision.models.optical_flow import raft
from torchvision.models.segmentation import deeplabv3, fcn
from torchvision.models.video import mvit
from torchvision.models.video import resnet as video
from torchvision.models.video import swin_transformer as video_swin

import growfx

CLASSES = 10
SIZE = (3, 64, 64)
SMALL = (3, 32, 32)
VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2}


@dataclass(frozen=True)
class Sample:
    """A model and what it is called with.

    Attributes:
        build: makes the model.
        shape: of one image, without the batch.
        off_path: patterns of the layers that no path crosses, all of them.
        arguments: from a batch of images to the arguments of the model.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = SIZE
    off_path: tuple[str, ...] = ()
    arguments: Callable[[Tensor], tuple[Any, ...]] = lambda x: (x,)


def named(spec: str, shape: tuple[int, ...] = SIZE, off_path: tuple[str, ...] = (), **options: Any) -> Sample:
    """A model by its name; few classes, so that the head weighs little."""
    build = functools.partial(growfx.create_model, spec, num_classes=CLASSES, **options)
    return Sample(build, shape, off_path)


def direct(
    build: Callable[..., nn.Module],
    *args: Any,
    shape: tuple[int, ...] = SIZE,
    off_path: tuple[str, ...] = (),
    **options: Any,
) -> Sample:
    """A model by its class, where its named builders do not let it be small."""
    return Sample(functools.partial(build, *args, num_classes=CLASSES, **options), shape, off_path)


def own_blocks(*blocks: dict[str, Any], **options: Any) -> Sample:
    """timm's configurable network with blocks of these kinds, one each."""
    stages = tuple(byobnet.ByoBlockCfg(**{"d": 1, "c": 32, "s": 2, "gs": 0, "br": 0.5, **block}) for block in blocks)
    config = byobnet.ByoModelCfg(blocks=stages, stem_chs=16, stem_pool="", **options)
    return direct(byobnet.ByobNet, config, img_size=SIZE[1])


def inverted(*blocks: str, **options: Any) -> Sample:
    """timm's mobile network of inverted residuals, by the description of its blocks."""
    stages = _efficientnet_builder.decode_arch_def([[block] for block in blocks])
    return direct(efficientnet.EfficientNet, stages, num_features=32, stem_size=8, **options)


def self_attention(kind: str, **options: Any) -> Sample:
    """A residual network with self-attention of this kind on the feature map."""
    return own_blocks({"type": "bottle", "s": 2}, {"type": "self_attn"}, self_attn_layer=kind, self_attn_kwargs=options)


def segmentation(model: Any, head: Any) -> Sample:
    """A segmentation network with an auxiliary head over a narrow residual one."""

    def build() -> nn.Module:
        body = growfx.create_model("resnet10t", channels=(8, 16, 16, 32), stem_width=8)
        body = _utils.IntermediateLayerGetter(body, {"layer3": "aux", "layer4": "out"})
        return model(body, head(32, CLASSES), fcn.FCNHead(16, CLASSES))

    return Sample(build)


def spatiotemporal(convolution: Any, stem: Any) -> Sample:
    """The first half of a residual network over frames; the second half is wide and of the same kind."""

    def build() -> nn.Module:
        model = video.VideoResNet(video.BasicBlock, [convolution] * 4, [1, 1, 1, 1], stem, CLASSES)
        model.layer3 = model.layer4 = nn.Identity()
        model.fc = nn.Linear(128, CLASSES)
        return model

    return Sample(build, (3, 4, 32, 32))


def optical_flow() -> nn.Module:
    """RAFT, narrow: two encoders, a correlation volume and an update block that is run again and again."""
    return raft._raft(
        feature_encoder_layers=(8, 8, 12, 16, 16),
        feature_encoder_block=raft.BottleneckBlock,
        feature_encoder_norm_layer=nn.InstanceNorm2d,
        context_encoder_layers=(8, 8, 12, 16, 24),
        context_encoder_block=raft.BottleneckBlock,
        context_encoder_norm_layer=nn.BatchNorm2d,
        corr_block_num_levels=2,
        corr_block_radius=2,
        motion_encoder_corr_layers=(16,),
        motion_encoder_flow_layers=(16, 8),
        motion_encoder_out_channels=14,
        recurrent_block_hidden_state_size=16,
        recurrent_block_kernel_size=(3,),
        recurrent_block_padding=(1,),
        flow_head_hidden_size=16,
        use_mask_predictor=False,
    )


def csp(**options: Any) -> Sample:
    """A cross-stage partial network of two short stages."""
    stages = cspnet.CspStagesCfg(
        depth=(2, 1), out_chs=(24, 32), stride=(1, 2), expand_ratio=2.0, bottle_ratio=0.5, **options
    )
    return direct(cspnet.CspNet, cspnet.CspModelCfg(cspnet.CspStemCfg(out_chs=16, stride=4, pool="max"), stages))


def high_resolution() -> Sample:
    """HRNet: branches of several resolutions, each fed by all."""
    config: dict[str, Any] = {"stem_width": 16}
    for stage in (1, 2, 3, 4):
        config[f"stage{stage}"] = {
            "num_modules": 1,
            "num_branches": stage,
            "block_type": "BASIC",
            "num_blocks": (1,) * stage,
            "num_channels": (8, 12, 16, 20)[:stage],
            "fuse_method": "SUM",
        }
    return direct(hrnet.HighResolutionNetFeatures, config)


def pooled_stages() -> list[mvit.MSBlockConfig]:
    """The two stages of a pooled attention network."""
    pooled = {"kernel_q": [3, 3, 3], "kernel_kv": [3, 3, 3], "stride_q": [1, 2, 2], "stride_kv": [1, 2, 2]}
    whole = {**pooled, "stride_q": [1, 1, 1]}
    return [mvit.MSBlockConfig(1, 16, 16, **whole), mvit.MSBlockConfig(2, 16, 32, **pooled)]


NARROW: dict[str, Any] = {"channels": (16, 24, 32, 48), "layers": (1, 1, 1, 1), "stem_width": 8}
FOUR: dict[str, Any] = {"depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2)}
WINDOWS: dict[str, Any] = {"img_size": 32, "patch_size": 2, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}

CONVOLUTIONS: dict[str, Sample] = {
    "plain chain": direct(vgg.VGG, [8, "M", 16, "M"], mlp_ratio=0.01, shape=(3, 28, 28)),
    "residual": named("resnet18", **NARROW),
    "residual bottleneck, averaging shortcut": named("resnet26d", **NARROW),
    "groups of channels": named("resnext50_32x4d", **NARROW, cardinality=4, base_width=16),
    "squeeze and excitation": inverted("ds_r1_k3_s2_e1_c16_se0.25_nre", "ir_r2_k5_s2_e3_c24_se0.25"),
    "channel attention by one small convolution": named("ecaresnet26t", **NARROW),
    "global context": own_blocks({"type": "bottle"}, {"type": "bottle"}, attn_layer="gca"),
    "bilinear attention": own_blocks(
        {"type": "bottle"}, {"type": "bottle"}, attn_layer="bat", attn_kwargs={"block_size": 4}
    ),
    "split attention": named("resnest14d", channels=(16, 24, 32, 48), stem_width=8),
    "selective kernels": named("skresnet18", channels=(16, 24, 32, 48)),
    "groups in series": named("res2net50_48w_2s", **NARROW),
    "dense concat": named("densenet121", growth_rate=8, block_config=(2, 2, 2)),
    "dense concat, blur pool": named("densenetblur121d", growth_rate=8, block_config=(2, 2)),
    "dual path": named("dpn48b", num_init_features=8, k_r=16, groups=4, k_sec=(1, 1, 1, 1), inc_sec=(4, 4, 4, 8)),
    "partial cross-stage": csp(),
    "partial cross-stage, linear": csp(cross_linear=True),
    "tree": named("dla46_c", levels=(1, 1, 1, 2, 1, 1), channels=(8, 8, 16, 16, 24, 32)),
    "one-shot aggregation": named("ese_vovnet19b_slim_dw"),
    "shuffle": direct(shufflenetv2.ShuffleNetV2, [2, 2, 1], [8, 16, 24, 32, 48]),
    "fire": named("torchvision/squeezenet1_1"),
    "ghost features": direct(
        ghostnet.GhostNet, [[[3, 16, 16, 0, 1]], [[3, 48, 24, 0, 2]], [[5, 48, 24, 0.25, 1]]], width=0.5
    ),
    "branches of several resolutions": high_resolution(),
    "inception, auxiliary heads": named("torchvision/googlenet", off_path=("aux*",), init_weights=False),
    "mixed depthwise": inverted("ir_r1_k3.5.7_a1.1_p1.1_s2_e6_c16", "ir_r1_k3.5_a1_p1.1_s2_e3_c24_se0.5_nsw"),
    "conditional convolution": inverted("ir_r1_k3_s2_e4_c16_cc4", "ir_r1_k3_s2_e4_c24_se0.25_cc4"),
    "parallel branches to be fused": own_blocks({"type": "rep"}, {"type": "one"}),
    "standardised convolution": direct(
        resnetv2.ResNetV2,
        (1, 1),
        (32, 48),
        stem_chs=16,
        conv_layer=StdConv2d,
        norm_layer=functools.partial(GroupNormAct, num_groups=4),
    ),
    "without normalisation": named("test_nfnet"),
    "EvoNorm": named("test_efficientnet_evos"),
    "blur pool": named("resnetblur18", **NARROW),
    "large kernels, layer scale": named("test_convnext"),
    "global response norm": named("test_convnext3"),
    "star product": named("starnet_s050", depths=(1, 1, 1, 1), base_dim=8),
    "gated convolution": named("test_mambaout"),
    "focal gates": direct(
        focalnet.FocalNet, depths=(1, 1), embed_dim=16, focal_levels=(2, 2), focal_windows=(3, 3), shape=SMALL
    ),
    "patches and depthwise": direct(convmixer.ConvMixer, dim=24, depth=2, kernel_size=5, patch_size=4, shape=SMALL),
    "repeated spatial pools": direct(metaformer.MetaFormer, depths=(1, 1), dims=(16, 24), shape=SMALL),
}

ATTENTION: dict[str, Sample] = {
    "class token": named("vit_tiny_patch16_224", SMALL, **VIT),
    "torch's attention module": direct(vision_transformer.VisionTransformer, 32, 8, 2, 2, 32, 48, shape=SMALL),
    "distillation token": named("deit_tiny_distilled_patch16_224", SMALL, **VIT),
    "class attention": named("cait_xxs24_224", SMALL, ("blocks_token_only.0.attn.q",), **VIT),
    "channel cross-covariance": named(
        "xcit_nano_12_p16_224",
        off_path=("pos_embed*", "cls_attn_blocks.0.attn.q"),
        **{**VIT, "img_size": 64, "patch_size": 16},
    ),
    "shared relative-position tables": named("beit_base_patch16_224", SMALL, **VIT),
    "rotary, gated units": named("eva02_tiny_patch14_224", SMALL, **VIT),
    "rotary, registers": named("vit_small_patch16_dinov3", SMALL, **VIT),
    "attention pool": named("vit_base_patch16_siglip_224", SMALL, ("attn_pool.q",), **VIT),
    "parallel attention and MLP": named("vit_base_patch16_xp_224", SMALL, **VIT),
    "relative positions by an MLP": named("vit_relpos_medium_patch16_cls_224", SMALL, ("*rel_pos.mlp*",), **VIT),
    "talking heads, gated positions": named("convit_tiny", SMALL, ("*pos_proj",), **VIT, local_up_to_layer=1),
    "shifted windows": named("swin_tiny_patch4_window7_224", SMALL, **WINDOWS, window_size=4),
    "cosine windows": named("swinv2_tiny_window8_256", SMALL, ("*cpb_mlp*",), **WINDOWS, window_size=4),
    "shifted windows by functions": direct(
        swin_transformer.SwinTransformer, [4, 4], 16, [1, 2], [2, 2], [4, 4], shape=SMALL
    ),
    "windows of regular and dilated grids": direct(maxvit.MaxVit, SIZE[1:], 16, 4, [16, 24], [1, 1], 8, 0.2),
    "mixed scales of two branches": named(
        "crossvit_tiny_240",
        (3, 48, 48),
        img_size=48,
        img_scale=(1.0, 2 / 3),
        patch_size=(12, 16),
        embed_dim=(16, 32),
        depth=((1, 2, 0),),
        num_heads=(2, 2),
        multi_conv=False,
    ),
    "several scales in parallel": named(
        "coat_tiny", img_size=64, embed_dims=(16,) * 4, serial_depths=(1,) * 4, parallel_depth=1
    ),
    "transformer in transformer": named(
        "tnt_s_patch16_224",
        SMALL,
        img_size=32,
        depth=2,
        embed_dim=32,
        inner_dim=8,
        num_heads_outer=2,
        num_heads_inner=2,
    ),
    "outlook attention": direct(
        volo.VOLO,
        layers=(1, 1, 1, 1),
        img_size=64,
        embed_dims=(16, 32, 32, 32),
        num_heads=(2, 2, 2, 2),
        outlook_attention=(True, False, False, False),
        off_path=("post_network.0.attn.q",),
    ),
    "local and global windows": named("twins_svt_small", img_size=64, embed_dims=(16, 32, 32, 32), **FOUR),
    "spatial reduction": named("pvt_v2_b0", embed_dims=(8, 16, 24, 32), **FOUR),
    "linear spatial reduction": named("pvt_v2_b2_li", embed_dims=(8, 16, 24, 32), **FOUR),
    "pooled attention": direct(
        mvitv2.MultiScaleVit,
        mvitv2.MultiScaleVitCfg(
            depths=(1, 1), embed_dim=16, num_heads=1, stride_q=((1, 1), (2, 2)), stride_kv_adaptive=(2, 2)
        ),
        img_size=(64, 64),
    ),
    "nested blocks": direct(
        nest.Nest, img_size=32, embed_dims=(16, 24, 32), num_heads=(2, 2, 2), depths=(1, 1, 1), shape=SMALL
    ),
    "channel groups as tokens": named("davit_tiny", depths=(1, 1), embed_dims=(16, 24), num_heads=(2, 2)),
    "global queries": direct(
        gcvit.GlobalContextVit, img_size=(64, 64), embed_dim=16, depths=(2, 2), num_heads=(1, 2), window_size=(4, 4)
    ),
    "mask units": named("hiera_tiny_224", img_size=64, stages=(1, 1, 1, 1), embed_dim=16),
    "biases per offset, subsampled queries": direct(
        levit.Levit, img_size=64, embed_dim=(16, 24), key_dim=8, num_heads=(2, 3), depth=(1, 1)
    ),
    "linear attention": named(
        "efficientvit_b0", widths=(8, 8, 16, 16, 16), depths=(1, 1, 1, 1, 1), head_dim=8, head_widths=(32, 32)
    ),
    "groups in cascade": named(
        "efficientvit_m0", img_size=64, embed_dim=(16, 24, 32), depth=(1, 1, 1), num_heads=(2, 2, 2)
    ),
    "state space": named("efficientvim_m1", embed_dim=(16, 24, 32), depths=(1, 1, 1)),
    "patch unfolding": own_blocks(
        {"type": "bottle"},
        {"type": "mobilevit", "s": 1, "block_kwargs": {"transformer_dim": 24, "transformer_depth": 1, "patch_size": 2}},
    ),
    "separable attention": own_blocks(
        {"type": "bottle"},
        {"type": "mobilevit2", "s": 1, "gs": 1, "block_kwargs": {"transformer_depth": 1, "patch_size": 2}},
    ),
    "split depthwise, transposed attention": named(
        "edgenext_xx_small",
        depths=(1, 1, 1, 1),
        dims=(16, 24, 32, 48),
        heads=(2,) * 4,
        off_path=("*token_projection",),
    ),
    "halo attention": self_attention("halo", block_size=4, halo_size=1),
    "bottleneck attention": self_attention("bottleneck"),
    "lambda attention": self_attention("lambda", r=3),
    "convolutions before attention": named("vit_tiny_r_s16_p8_224", img_size=64, depth=2, embed_dim=48, num_heads=2),
    "decomposed relative positions": named(
        "samvit_base_patch16_224",
        img_size=64,
        depth=2,
        embed_dim=32,
        num_heads=2,
        global_attn_indexes=(1,),
        window_size=3,
        neck_chans=16,
    ),
    "coordinates instead of positions": named("naflexvit_base_patch16_parfac_gap", depth=2, embed_dim=48, num_heads=2),
    "convolution and attention stages": named("test_coatnet", img_size=64),
    "windows in stages of both kinds": direct(
        tiny_vit.TinyVit, depths=(1, 1, 1), embed_dims=(16, 24, 32), num_heads=(1, 2, 2), window_sizes=(4, 4, 4)
    ),
}

OTHERS: dict[str, Sample] = {
    "token mixer": direct(mlp_mixer.MlpMixer, img_size=32, patch_size=8, num_blocks=2, embed_dim=24, shape=SMALL),
    "spatial gates": direct(
        mlp_mixer.MlpMixer,
        img_size=32,
        patch_size=8,
        num_blocks=2,
        embed_dim=24,
        shape=SMALL,
        mlp_ratio=4,
        block_layer=mlp_mixer.SpatialGatingBlock,
        mlp_layer=mlp_mixer.GatedMlp,
    ),
    "affine token mixer": direct(
        mlp_mixer.MlpMixer,
        img_size=32,
        patch_size=8,
        num_blocks=2,
        embed_dim=24,
        shape=SMALL,
        mlp_ratio=4,
        block_layer=mlp_mixer.ResBlock,
        norm_layer=mlp_mixer.Affine,
    ),
    "gated linear units": direct(
        mlp_mixer.MlpMixer,
        img_size=32,
        patch_size=8,
        num_blocks=2,
        embed_dim=24,
        shape=SMALL,
        mlp_ratio=(1.0, 4.0),
        mlp_layer=mlp_mixer.GluMlp,
        act_layer=nn.SiLU,
    ),
    "recurrences": named("sequencer2d_s", layers=(1, 1, 1, 1), embed_dims=(16, 24, 24, 24), hidden_sizes=(4, 6, 6, 6)),
    "dict of segmentations": segmentation(fcn.FCN, fcn.FCNHead),
    "dict of segmentations, dilated": segmentation(deeplabv3.DeepLabV3, deeplabv3.DeepLabHead),
    "video": spatiotemporal(video.Conv3DSimple, video.BasicStem),
    "video, factored": spatiotemporal(video.Conv2Plus1D, video.R2Plus1dStem),
    "video windows": direct(
        video_swin.SwinTransformer3d, [2, 4, 4], 16, [1, 2], [2, 2], [2, 4, 4], shape=(3, 4, 32, 32)
    ),
    "pooled video attention": direct(
        mvit.MViT,
        (32, 32),
        4,
        pooled_stages(),
        True,
        False,
        True,
        True,
        shape=(3, 4, 32, 32),
        off_path=("blocks.1.attn.pool_q.pool",),
    ),
    "optical flow": Sample(optical_flow, (3, 64, 64), arguments=lambda x: (x, x.flip(-1), 3)),
}
SAMPLES = {**CONVOLUTIONS, **ATTENTION, **OTHERS}
