"""PRESETS: the arguments of ViTs by timm's names.

A name says much: `vit_small_patch16_reg4_dinov2` is of size "small", cuts patches of 16 pixels and
has 4 registers; a number alone is the height and width of the image. What a name doesn't say, its
family's line does, and a number after a colon is the width of its classifier where the family's
others have another. All is what timm 1.0.31 builds for the name without a tag, with the mean and
std that its weights were trained with. Old names, which timm maps to newer ones, stand beside them.
"""

from typing import Any

# (embed_dim, depth, num_heads, hidden width of the MLP where it is not four times embed_dim)
SIZES: dict[str, tuple[int, ...]] = {
    "tiny": (192, 12, 3),
    "xsmall": (256, 10, 4),
    "wee": (256, 14, 4, 1280),
    "dwee": (256, 14, 4, 1280),
    "pwee": (256, 16, 4, 1280),
    "dpwee": (256, 16, 4, 1280),
    "little": (320, 14, 5, 1792),
    "dlittle": (320, 14, 5, 1792),
    "small": (384, 12, 6),
    "medium": (512, 12, 8),
    "mediumd": (512, 20, 8),
    "betwixt": (640, 12, 10),
    "base": (768, 12, 12),
    "so150m": (896, 18, 14, 2304),
    "so150m2": (832, 21, 13, 2176),
    "intern300m": (1024, 24, 16),
    "large": (1024, 24, 16),
    "so400m": (1152, 27, 16, 4304),
    "huge": (1280, 32, 16),
    "giant": (1408, 40, 16, 6144),
    "giantopt": (1536, 40, 16),
    "gigantic": (1664, 48, 16, 8192),
}
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
OPENAI = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
}
UNCHANGED = {"mean": 0.0, "std": 1.0}


def _sizes(dim: int, depth: int, heads: int, hidden: int = 0) -> dict[str, Any]:
    ratio = {"mlp_ratio": hidden / dim} if hidden else {}
    return {"embed_dim": dim, "depth": depth, "num_heads": heads, **ratio}


HEADLESS = {"num_classes": 0}
NO_TOKEN = {"class_token": False, "global_pool": "avg"}
GAP = {**NO_TOKEN, "fc_norm": False}
SIGLIP = {**HEADLESS, "class_token": False, "global_pool": "map"}
SIGLIP_GAP = {**HEADLESS, **GAP}
TANH = {"act_layer": "gelu_tanh"}
CLIP = {"pre_norm": True, "norm_layer": ("layernorm", 1e-5), **OPENAI}
OPENCLIP_L = {"pre_norm": True, "norm_layer": ("layernorm", 1e-5)}  # trained with 0.5
QUICK = {**CLIP, "act_layer": "quick_gelu"}
SWIGLU_G = {"mlp_layer": "swiglu_packed", "act_layer": "silu", **_sizes(1536, 40, 24, 8192)}
DINOV2 = {**HEADLESS, "init_values": 1e-5, **IMAGENET}
DINOV2_REG = {**DINOV2, "no_embed_class": True}
TIPS = {**HEADLESS, "init_values": 1.0, "no_embed_class": True, **UNCHANGED}
RADIO = {**HEADLESS, "img_size": 512, "no_embed_class": True, "final_norm": False, **OPENAI}
AIM = {
    **HEADLESS,
    **GAP,
    "qkv_bias": False,
    "proj_bias": False,
    "act_layer": "silu",
    "mlp_layer": "swiglu",
    "norm_layer": ("rmsnorm", 1e-5),
    "embed_norm_layer": ("rmsnorm", 1e-5),
    **OPENAI,
}
BEIT3 = {
    "scale_attn_norm": True,
    "scale_mlp_norm": True,
    "global_pool": "avg",
    "norm_layer": ("layernorm", 1e-5),
    **IMAGENET,
}
SW_GAP = {**GAP, "qkv_bias": False, "init_values": 1e-6}
SW_REG = {**NO_TOKEN, "init_values": 1e-5, "no_embed_class": True}
XP = {
    "pre_norm": True,
    "no_embed_class": True,
    "norm_layer": "rmsnorm",
    "block_fn": "parallel_scaling",
    "qkv_bias": False,
    "qk_norm": True,
}
DEIT3 = {"no_embed_class": True, "init_values": 1e-6, **IMAGENET}
RELPOS = {
    **GAP,
    "pos_embed": "none",
    "rel_pos": "mlp",
    "qkv_bias": False,
    "init_values": 1e-6,
    "weight_init": "reset",
}
RELPOS_FC = {**RELPOS, "fc_norm": True}
RELPOS_POST = {**RELPOS, "block_fn": "res_post_norm"}
R_STEM = {"embed_layer": ("resnetv2", ()), "patch_size": 8}
R26 = {"embed_layer": ("resnetv2", (2, 2, 2, 2)), "patch_size": 1}
R50_S16 = {"embed_layer": ("resnetv2", (3, 4, 9)), "patch_size": 1}
R50_S32 = {"embed_layer": ("resnetv2", (3, 4, 6, 3)), "patch_size": 1}
MOBILE = {"embed_layer": ("conv_stem", (4, 2, 2)), "patch_size": 1, "no_embed_class": True}
TIMM_RESNET = {"patch_size": 1, **IMAGENET}
NARROW = _sizes(768, 8, 8, 2304)
PLUS = _sizes(896, 12, 14)

# fmt: off
# Options, then names.
_FAMILIES: tuple[tuple[dict[str, Any], str], ...] = (
    # Dosovitskiy et al., 2020; Steiner et al., "How to train your ViT?", 2021
    ({}, """
        vit_tiny_patch16_224 vit_tiny_patch16_224_in21k:21843 vit_tiny_patch16_384
        vit_small_patch16_224 vit_small_patch16_224_in21k:21843 vit_small_patch16_384
        vit_small_patch32_224 vit_small_patch32_224_in21k:21843 vit_small_patch32_384
        vit_base_patch8_224 vit_base_patch8_224_in21k:21843
        vit_base_patch16_224 vit_base_patch16_224_in21k:21843 vit_base_patch16_384
        vit_base_patch32_224 vit_base_patch32_224_in21k:21843 vit_base_patch32_384
        vit_large_patch14_224 vit_large_patch16_224 vit_large_patch16_224_in21k:21843
        vit_large_patch16_384 vit_large_patch32_224:0 vit_large_patch32_224_in21k:0
        vit_large_patch32_384 vit_huge_patch14_224:0 vit_huge_patch14_224_in21k:0
        vit_giant_patch14_224 vit_gigantic_patch14_224
    """),
    (R_STEM, "vit_tiny_r_s16_p8_224 vit_tiny_r_s16_p8_224_in21k:21843 vit_tiny_r_s16_p8_384"),
    (R26, "vit_small_r26_s32_224 vit_small_r26_s32_224_in21k:21843 vit_small_r26_s32_384"),
    (R26, "vit_base_r26_s32_224"),
    (R50_S16, "vit_base_r50_s16_224:0 vit_base_r50_s16_224_in21k:0 vit_base_r50_s16_384"),
    (R50_S16, "vit_base_resnet50_224_in21k:0 vit_base_resnet50_384"),
    (R50_S32, "vit_large_r50_s32_224 vit_large_r50_s32_224_in21k:21843 vit_large_r50_s32_384"),
    # timm's ResNets, up to a stage
    ({**TIMM_RESNET, "embed_layer": ("timm", ("resnet26d", 4))}, "vit_base_resnet26d_224"),
    ({**TIMM_RESNET, "embed_layer": ("timm", ("resnet50d", 4))}, "vit_base_resnet50d_224"),
    ({**TIMM_RESNET, **NARROW, "embed_layer": ("timm", ("resnet26d", 4))},
     "vit_small_resnet26d_224"),
    ({**TIMM_RESNET, **NARROW, "embed_layer": ("timm", ("resnet50d", 3))},
     "vit_small_resnet50d_s16_224"),
    # Caron et al., "DINO", 2021
    ({**HEADLESS, **IMAGENET}, "vit_small_patch8_224 vit_small_patch8_224_dino"),
    ({**HEADLESS, **IMAGENET}, "vit_small_patch16_224_dino vit_base_patch8_224_dino"),
    ({**HEADLESS, **IMAGENET}, "vit_base_patch16_224_dino"),
    # Ridnik et al., "ImageNet-21K Pretraining for the Masses", 2021
    ({"qkv_bias": False, **UNCHANGED},
     "vit_base_patch16_224_miil:11221 vit_base_patch16_224_miil_in21k:11221"),
    # Touvron et al., "DeiT", 2021; "DeiT III", 2022; "Three things ...", 2022
    (IMAGENET, "deit_tiny_patch16_224 deit_small_patch16_224"),
    (IMAGENET, "deit_base_patch16_224 deit_base_patch16_384"),
    ({**IMAGENET, "distilled": True}, """
        deit_tiny_distilled_patch16_224 deit_small_distilled_patch16_224
        deit_base_distilled_patch16_224 deit_base_distilled_patch16_384
    """),
    (DEIT3, """
        deit3_small_patch16_224 deit3_small_patch16_384 deit3_medium_patch16_224
        deit3_base_patch16_224 deit3_base_patch16_384 deit3_large_patch16_224
        deit3_large_patch16_384 deit3_huge_patch14_224
        deit3_small_patch16_224_in21ft1k deit3_small_patch16_384_in21ft1k
        deit3_medium_patch16_224_in21ft1k deit3_base_patch16_224_in21ft1k
        deit3_base_patch16_384_in21ft1k deit3_large_patch16_224_in21ft1k
        deit3_large_patch16_384_in21ft1k deit3_huge_patch14_224_in21ft1k
    """),
    ({**_sizes(384, 36, 6), "init_values": 1e-5}, "vit_small_patch16_36x1_224"),
    ({**_sizes(384, 18, 6), "init_values": 1e-5, "block_fn": "parallel_things"},
     "vit_small_patch16_18x2_224"),
    ({**_sizes(768, 18, 12), "init_values": 1e-5, "block_fn": "parallel_things"},
     "vit_base_patch16_18x2_224"),
    # Radford et al., "CLIP", 2021; OpenCLIP; MetaCLIP; data filtering networks
    (CLIP, """
        vit_xsmall_patch16_clip_224:512 vit_medium_patch16_clip_224:512
        vit_medium_patch32_clip_224:512 vit_betwixt_patch32_clip_224:512
        vit_base_patch16_clip_224 vit_base_patch16_clip_384 vit_base_patch32_clip_224
        vit_base_patch32_clip_256:512 vit_base_patch32_clip_384 vit_base_patch32_clip_448
        vit_huge_patch14_clip_224 vit_huge_patch14_clip_336 vit_huge_patch14_clip_378:1024
        vit_giant_patch14_clip_224:1024 vit_gigantic_patch14_clip_224:1280
        vit_gigantic_patch14_clip_378:1280 vit_base_patch32_224_clip_laion2b:512
        vit_huge_patch14_224_clip_laion2b:1024 vit_giant_patch14_224_clip_laion2b:1024
    """),
    (OPENCLIP_L, """
        vit_large_patch14_clip_224 vit_large_patch14_clip_336
        vit_large_patch14_224_clip_laion2b:768
    """),
    ({**CLIP, **PLUS}, "vit_base_patch16_plus_clip_240:640"),
    (QUICK, """
        vit_base_patch16_clip_quickgelu_224:512 vit_base_patch32_clip_quickgelu_224:512
        vit_large_patch14_clip_quickgelu_224:768 vit_large_patch14_clip_quickgelu_336:768
        vit_huge_patch14_clip_quickgelu_224:1024 vit_huge_patch14_clip_quickgelu_378:1024
        vit_gigantic_patch14_clip_quickgelu_224:1280
    """),
    # Vasu et al., "MobileCLIP", 2024
    ({**MOBILE, **UNCHANGED}, "vit_base_mci_224:512"),
    # Zhai et al., "SigLIP", 2023; Tschannen et al., "SigLIP 2", 2025
    (SIGLIP, """
        vit_base_patch16_siglip_224 vit_base_patch16_siglip_256 vit_base_patch16_siglip_384
        vit_base_patch16_siglip_512 vit_large_patch16_siglip_256 vit_large_patch16_siglip_384
        vit_so400m_patch14_siglip_224 vit_so400m_patch14_siglip_378 vit_so400m_patch14_siglip_384
    """),
    ({**SIGLIP, **TANH}, """
        vit_base_patch32_siglip_256 vit_large_patch16_siglip_512 vit_so400m_patch16_siglip_256
        vit_so400m_patch16_siglip_384 vit_so400m_patch16_siglip_512
        vit_giantopt_patch16_siglip_256 vit_giantopt_patch16_siglip_384
    """),
    (SIGLIP_GAP, """
        vit_base_patch16_siglip_gap_224 vit_base_patch16_siglip_gap_256
        vit_base_patch16_siglip_gap_384 vit_base_patch16_siglip_gap_512
        vit_large_patch16_siglip_gap_256 vit_large_patch16_siglip_gap_384
        vit_so400m_patch14_siglip_gap_224 vit_so400m_patch14_siglip_gap_378
        vit_so400m_patch14_siglip_gap_384 vit_so400m_patch14_siglip_gap_448
        vit_so400m_patch14_siglip_gap_896
    """),
    ({**SIGLIP_GAP, **TANH}, """
        vit_base_patch32_siglip_gap_256 vit_large_patch16_siglip_gap_512
        vit_so400m_patch16_siglip_gap_256 vit_so400m_patch16_siglip_gap_384
        vit_so400m_patch16_siglip_gap_512
        vit_giantopt_patch16_siglip_gap_256 vit_giantopt_patch16_siglip_gap_384
    """),
    # Oquab et al., "DINOv2", 2023; Darcet et al., "Registers", 2023
    (DINOV2, "vit_small_patch14_dinov2 vit_base_patch14_dinov2 vit_large_patch14_dinov2"),
    ({**DINOV2, **SWIGLU_G}, "vit_giant_patch14_dinov2"),
    (DINOV2_REG, """
        vit_small_patch14_reg4_dinov2 vit_base_patch14_reg4_dinov2 vit_large_patch14_reg4_dinov2
    """),
    ({**DINOV2_REG, **SWIGLU_G}, "vit_giant_patch14_reg4_dinov2"),
    # Google, "TIPS", 2024
    (TIPS, "vit_base_patch14_reg1_tipsv2 vit_large_patch14_reg1_tipsv2"),
    (TIPS, "vit_so400m_patch14_reg1_tipsv2"),
    ({**TIPS, **SWIGLU_G}, "vit_giant_patch14_reg1_tipsv2"),
    # NVIDIA, "C-RADIO", 2025
    ({**RADIO, "reg_tokens": 7, "init_values": 1e-5},
     "vit_base_patch16_radio_v3 vit_large_patch16_radio_v3"),
    ({**RADIO, "reg_tokens": 7}, "vit_huge_patch16_radio_v3"),
    ({**RADIO, "reg_tokens": 7, **_sizes(1536, 40, 24, 6144)}, "vit_giant_patch16_radio_v3"),
    ({**RADIO, "reg_tokens": 9}, "vit_huge_patch16_radio_v4 vit_so400m_patch16_radio_v4"),
    # Chen et al., "InternVL", 2023
    ({**HEADLESS, "init_values": 0.1, "final_norm": False, "dynamic_img_size": True, **IMAGENET},
     "vit_intern300m_patch14_448"),
    # Assran et al., "I-JEPA", 2023
    ({**HEADLESS, **GAP, **IMAGENET}, "vit_huge_patch14_gap_224 vit_huge_patch16_gap_448"),
    ({**HEADLESS, **GAP, **IMAGENET}, "vit_giant_patch16_gap_224"),
    # Fini et al., "AIMv2", 2024
    ({**AIM, **_sizes(1024, 24, 8, 2816)},
     "aimv2_large_patch14_224 aimv2_large_patch14_336 aimv2_large_patch14_448"),
    ({**AIM, **_sizes(1536, 24, 12, 4096)},
     "aimv2_huge_patch14_224 aimv2_huge_patch14_336 aimv2_huge_patch14_448"),
    ({**AIM, **_sizes(2048, 24, 16, 5632)},
     "aimv2_1b_patch14_224 aimv2_1b_patch14_336 aimv2_1b_patch14_448"),
    ({**AIM, **_sizes(3072, 24, 24, 8192)},
     "aimv2_3b_patch14_224 aimv2_3b_patch14_336 aimv2_3b_patch14_448"),
    # Wang et al., "BEiT-3", 2022; Fang et al., "EVA", 2022; Beyer et al., "FlexiViT", 2022
    (BEIT3, "beit3_base_patch16_224 beit3_large_patch16_224"),
    (BEIT3, "beit3_giant_patch14_224 beit3_giant_patch14_336"),
    ({"global_pool": "avg", **OPENAI}, "eva_large_patch14_196 eva_large_patch14_336"),
    ({"img_size": 240, "no_embed_class": True}, "flexivit_small flexivit_base flexivit_large"),
    # timm's own
    ({**PLUS, "init_values": 1e-5}, "vit_base_patch16_plus_240 vit_base_patch32_plus_256"),
    ({**GAP, "num_heads": 16}, "vit_base_patch16_gap_224"),
    (SW_GAP, """
        vit_medium_patch16_gap_240:11821 vit_medium_patch16_gap_256 vit_medium_patch16_gap_384
        vit_betwixt_patch16_gap_256
    """),
    (SW_REG, """
        vit_wee_patch16_reg1_gap_256 vit_little_patch16_reg1_gap_256
        vit_little_patch16_reg4_gap_256 vit_medium_patch16_reg1_gap_256
        vit_medium_patch16_reg4_gap_256 vit_mediumd_patch16_reg4_gap_256
        vit_mediumd_patch16_reg4_gap_384 vit_betwixt_patch16_reg1_gap_256
        vit_betwixt_patch16_reg4_gap_256 vit_betwixt_patch16_reg4_gap_384
    """),
    ({**SW_REG, "block_fn": "parallel_scaling"}, "vit_pwee_patch16_reg1_gap_256"),
    ({**SW_REG, "block_fn": "diff_parallel_scaling"}, "vit_dpwee_patch16_reg1_gap_256"),
    ({**SW_REG, "attn_layer": "diff"},
     "vit_dwee_patch16_reg1_gap_256 vit_dlittle_patch16_reg1_gap_256"),
    ({**NO_TOKEN, "no_embed_class": True}, "vit_base_patch16_reg4_gap_256"),
    (GAP, "vit_so150m_patch16_reg4_gap_256 vit_so150m_patch16_reg4_gap_384"),
    ({"class_token": False, "global_pool": "map"}, "vit_so150m_patch16_reg4_map_256"),
    ({**NO_TOKEN, "qkv_bias": False, "init_values": 1e-5}, """
        vit_so150m2_patch16_reg1_gap_256 vit_so150m2_patch16_reg1_gap_384
        vit_so150m2_patch16_reg1_gap_448
    """),
    ({**NO_TOKEN, "qkv_bias": False, "init_values": 1e-5, "block_fn": "res_post_norm"},
     "vit_base_patch16_rpn_224"),
    (XP, "vit_base_patch16_xp_224 vit_large_patch14_xp_224 vit_huge_patch14_xp_224"),
    (RELPOS_FC, """
        vit_relpos_small_patch16_224 vit_relpos_medium_patch16_224 vit_relpos_base_patch16_224
    """),
    ({**RELPOS_FC, "class_token": True}, "vit_relpos_base_patch16_clsgap_224"),
    ({**RELPOS, "class_token": True, "global_pool": "token"}, "vit_relpos_base_patch16_cls_224"),
    ({**RELPOS, "class_token": True, "global_pool": "token", "rel_pos_dim": 256},
     "vit_relpos_medium_patch16_cls_224"),
    ({**RELPOS, **PLUS, "qkv_bias": True}, "vit_relpos_base_patch16_plus_240"),
    (RELPOS_POST, """
        vit_relpos_small_patch16_rpn_224 vit_relpos_medium_patch16_rpn_224
        vit_relpos_base_patch16_rpn_224
    """),
    ({**RELPOS_POST, **PLUS, "qkv_bias": True}, "vit_relpos_base_patch32_plus_rpn_256"),
    ({**RELPOS, "rel_pos_dim": 384, "shared_rel_pos": True}, "vit_srelpos_small_patch16_224"),
    ({**RELPOS, "rel_pos_dim": 512, "shared_rel_pos": True}, "vit_srelpos_medium_patch16_224"),
    # for timm's tests
    ({"img_size": 160, **_sizes(64, 6, 2, 192), "dynamic_img_size": True}, "test_vit"),
    ({**NO_TOKEN, **_sizes(64, 8, 2, 192), "img_size": 160, "reg_tokens": 1, "init_values": 1e-5,
      "dynamic_img_size": True},
     "test_vit2"),
    ({**_sizes(96, 9, 3, 192), "img_size": 160, "class_token": False, "reg_tokens": 1,
      "global_pool": "map", "pool_include_prefix": True, "init_values": 1e-5},
     "test_vit3"),
    ({**NO_TOKEN, **_sizes(96, 9, 3, 288), "img_size": 160, "reg_tokens": 1, "init_values": 1e-5,
      "dynamic_img_size": True, "norm_layer": "rmsnorm"},
     "test_vit4"),
    ({**RELPOS_FC, **_sizes(96, 9, 3, 192), "img_size": 160}, "test_vit_relpos"),
)
# fmt: on


def _read(name: str) -> dict[str, Any]:
    """What the words of a name say."""
    said: dict[str, Any] = {}
    for word in name.split("_"):
        if word in SIZES:
            said |= _sizes(*SIZES[word])
        elif word.startswith("patch"):
            said["patch_size"] = int(word.removeprefix("patch"))
        elif word.startswith("reg") and word[3:].isdigit():
            said["reg_tokens"] = int(word[3:])
        elif word.isdigit():
            said["img_size"] = int(word)
        elif word == "dinov2":
            said["img_size"] = 518
        elif word == "tipsv2":
            said["img_size"] = 448
    return said


def _presets() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for options, names in _FAMILIES:
        for entry in names.split():
            name, _, classes = entry.partition(":")
            found[name] = {**_read(name), **options}
            if classes:
                found[name]["num_classes"] = int(classes)
    return found


PRESETS: dict[str, dict[str, Any]] = _presets()


def preset(name: str, **overrides: Any) -> dict[str, Any]:
    """PRESETS[name] with arguments replaced.

    With other than three channels, mean and std are the average over the preset's three: what a
    grey or a fourth channel was trained with, nobody knows.
    """
    arguments = {**PRESETS[name], **overrides}
    if arguments.get("in_chans", 3) != 3:
        for key in {"mean", "std"} - overrides.keys():
            if isinstance(arguments.get(key), tuple):
                arguments[key] = sum(arguments[key]) / len(arguments[key])
    return arguments


_SAM = "SAM's windowed attention with decomposed relative positions is not built here"
_GONE = "timm itself can't build it: the name stands for weights that timm no longer lists"
# Names in timm's files of ViTs that are not built here -> why.
REFUSED: dict[str, str] = {
    "samvit_base_patch16": _SAM,
    "samvit_base_patch16_224": _SAM,
    "samvit_large_patch16": _SAM,
    "samvit_huge_patch16": _SAM,
    "vit_base_patch16_224_sam": f"{_GONE}; the architecture is vit_base_patch16_224",
    "vit_base_patch32_224_sam": f"{_GONE}; the architecture is vit_base_patch32_224",
}
