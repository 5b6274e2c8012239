"""Where the blocks of other libraries keep the parts of x + attn(norm1(x)), x + mlp(norm2(x))."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Layout:
    """Dotted names, from the block on; "" for what there is not.

    between: modules that only hold others -> the class whose `forward` is understood here.
    qkv: one linear layer, or three, or an nn.MultiheadAttention, whose out_proj `proj` then names.
    fc1: one linear layer, or gate and value. packed: fc1 is both, the gate first.
    heads, scale: attributes, the number of heads and the factor of the logits. rate: dropout of
    attention weights, a number. drops: dropout modules. idle: modules that must do nothing.
    ls1, ls2: parameters of LayerScale. argument: what `forward` calls the stream.
    """

    between: tuple[tuple[str, str], ...]
    norm1: str
    qkv: tuple[str, ...]
    proj: str
    norm2: str
    fc1: tuple[str, ...]
    fc2: str
    act: str
    heads: str
    scale: str = ""
    rate: str = ""
    q_norm: str = ""
    k_norm: str = ""
    ls1: str = ""
    ls2: str = ""
    drop_path1: str = ""
    drop_path2: str = ""
    drops: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()
    packed: bool = False
    activation: str = ""
    argument: str = "hidden_states"


def _under(parent: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{parent}.{name}" for name in names)


def _transformers_5(family: str) -> Layout:
    """ViT and what was written after it."""
    return Layout(
        between=(
            ("attention", f"transformers.{family}Attention"),
            ("mlp", f"transformers.{family}MLP"),
        ),
        norm1="layernorm_before",
        qkv=_under("attention", "q_proj", "k_proj", "v_proj"),
        proj="attention.o_proj",
        norm2="layernorm_after",
        fc1=("mlp.fc1",),
        fc2="mlp.fc2",
        act="mlp.activation_fn",
        heads="attention.num_attention_heads",
        scale="attention.scaling",
        rate="attention.attention_dropout",
        drops=("dropout",),
    )


def _transformers_4(family: str) -> Layout:
    """The same networks before version 5."""
    return Layout(
        between=(
            ("attention", f"transformers.{family}Attention"),
            ("attention.attention", f"transformers.{family}SelfAttention"),
            ("attention.output", f"transformers.{family}SelfOutput"),
            ("intermediate", f"transformers.{family}Intermediate"),
            ("output", f"transformers.{family}Output"),
        ),
        norm1="layernorm_before",
        qkv=_under("attention.attention", "query", "key", "value"),
        proj="attention.output.dense",
        norm2="layernorm_after",
        fc1=("intermediate.dense",),
        fc2="output.dense",
        act="intermediate.intermediate_act_fn",
        heads="attention.attention.num_attention_heads",
        scale="attention.attention.scaling",
        rate="attention.attention.dropout_prob",
        drops=("attention.output.dropout", "output.dropout"),
    )


def _dinov2(layout: Layout, family: str) -> tuple[Layout, ...]:
    """DINOv2's names around attention of either version, with both kinds of MLP."""
    attention = tuple(pair for pair in layout.between if pair[0].startswith("attention"))
    mlp = replace(
        layout,
        between=(
            *attention,
            ("mlp", f"transformers.{family}MLP"),
            ("layer_scale1", f"transformers.{family}LayerScale"),
            ("layer_scale2", f"transformers.{family}LayerScale"),
        ),
        norm1="norm1",
        norm2="norm2",
        fc1=("mlp.fc1",),
        fc2="mlp.fc2",
        act="mlp.activation_fn" if layout.act.startswith("mlp") else "mlp.activation",
        ls1="layer_scale1.lambda1",
        ls2="layer_scale2.lambda1",
        drop_path1="drop_path",
        drop_path2="drop_path",
        drops=tuple(name for name in layout.drops if name.startswith("attention")),
    )
    swiglu = replace(
        mlp,
        between=tuple(
            (name, f"transformers.{family}SwiGLUFFN" if name == "mlp" else cls)
            for name, cls in mlp.between
        ),
    )
    return (
        mlp,
        replace(swiglu, fc1=_under("mlp", "gate_proj", "up_proj"), fc2="mlp.down_proj",
                act="mlp.act_fn"),
        replace(swiglu, fc1=("mlp.weights_in",), fc2="mlp.weights_out", act="", packed=True,
                activation="silu"),
    )  # fmt: skip


def _clip(family: str) -> Layout:
    """CLIP and what was written after it, in both versions."""
    return Layout(
        between=(
            ("self_attn", f"transformers.{family}Attention"),
            ("mlp", f"transformers.{family}MLP"),
        ),
        norm1="layer_norm1",
        qkv=_under("self_attn", "q_proj", "k_proj", "v_proj"),
        proj="self_attn.out_proj",
        norm2="layer_norm2",
        fc1=("mlp.fc1",),
        fc2="mlp.fc2",
        act="mlp.activation_fn",
        heads="self_attn.num_heads",
        scale="self_attn.scale",
        rate="self_attn.dropout",
    )


_TIMM = Layout(
    between=(
        ("attn", "timm.Attention"),
        ("mlp", "timm.Mlp"),
        ("ls1", "timm.LayerScale"),
        ("ls2", "timm.LayerScale"),
    ),
    norm1="norm1",
    qkv=("attn.qkv",),
    proj="attn.proj",
    norm2="norm2",
    fc1=("mlp.fc1",),
    fc2="mlp.fc2",
    act="mlp.act",
    heads="attn.num_heads",
    scale="attn.scale",
    q_norm="attn.q_norm",
    k_norm="attn.k_norm",
    ls1="ls1.gamma",
    ls2="ls2.gamma",
    drop_path1="drop_path1",
    drop_path2="drop_path2",
    drops=("attn.attn_drop", "attn.proj_drop", "mlp.drop1", "mlp.drop2"),
    idle=("attn.norm", "attn.gate", "mlp.norm"),
    argument="x",
)


def _timm_mlp(cls: str) -> tuple[tuple[str, str], ...]:
    return tuple((name, cls if name == "mlp" else known) for name, known in _TIMM.between)


_TORCHVISION = Layout(
    between=(("self_attention", "torch.MultiheadAttention"), ("mlp", "torchvision.MLPBlock")),
    norm1="ln_1",
    qkv=("self_attention",),
    proj="self_attention.out_proj",
    norm2="ln_2",
    fc1=("mlp.0",),
    fc2="mlp.3",
    act="mlp.1",
    heads="self_attention.num_heads",
    rate="self_attention.dropout",
    drops=("dropout", "mlp.2", "mlp.4"),
    argument="input",
)
_OPEN_CLIP = Layout(
    between=(
        ("attn", "torch.MultiheadAttention"),
        ("mlp", "torch.Sequential"),
        ("ls_1", "open_clip.LayerScale"),
        ("ls_2", "open_clip.LayerScale"),
    ),
    norm1="ln_1",
    qkv=("attn",),
    proj="attn.out_proj",
    norm2="ln_2",
    fc1=("mlp.c_fc",),
    fc2="mlp.c_proj",
    act="mlp.gelu",
    heads="attn.num_heads",
    rate="attn.dropout",
    ls1="ls_1.gamma",
    ls2="ls_2.gamma",
    idle=("ln_1_kv",),
    argument="q_x",
)

# Block -> where its parts may be.
LAYOUTS: dict[str, tuple[Layout, ...]] = {
    "timm.Block": (
        _TIMM,
        replace(_TIMM, between=_timm_mlp("timm.SwiGLU"), fc1=("mlp.fc1_g", "mlp.fc1_x")),
        replace(_TIMM, between=_timm_mlp("timm.GluMlp"), packed=True),
    ),
    "torchvision.EncoderBlock": (_TORCHVISION,),
    "open_clip.ResidualAttentionBlock": (_OPEN_CLIP,),
    **{
        f"transformers.{family}Layer": (_transformers_5(family), _transformers_4(family))
        for family in ("ViT", "DeiT", "ViTMAE", "ViTMSN", "IJepa")
    },
    **{
        f"transformers.{family}Layer": (
            *_dinov2(_transformers_5(family), family),
            *_dinov2(_transformers_4(family), family),
        )
        for family in ("Dinov2", "Dinov2WithRegisters")
    },
    **{
        f"transformers.{family}EncoderLayer": (_clip(family),)
        for family in ("CLIP", "CLIPSeg", "OwlViT", "Owlv2", "AltCLIP", "Siglip")
    },
}
# Blocks whose towers for text are causal: nothing to gain there, as their own forward runs.
CAUSAL_TEXT = ("CLIP", "CLIPSeg", "OwlViT", "Owlv2")

_PAIR = Layout(
    between=(
        ("0", "vit_pytorch.Attention"),
        ("0.attend", "torch.Softmax"),
        ("0.to_out", "torch.Sequential"),
        ("1", "vit_pytorch.FeedForward"),
        ("1.net", "torch.Sequential"),
    ),
    norm1="0.norm",
    qkv=("0.to_qkv",),
    proj="0.to_out.0",
    norm2="1.net.0",
    fc1=("1.net.1",),
    fc2="1.net.4",
    act="1.net.2",
    heads="0.heads",
    scale="0.scale",
    drops=("0.dropout", "0.to_out.1", "1.net.3", "1.net.5"),
    argument="x",
)
# Stacks of pairs, attention and MLP, whose sums the stack itself makes -> a pair's parts.
PAIRS: dict[str, tuple[Layout, ...]] = {
    "vit_pytorch.Transformer": (_PAIR,),
    "vit_pytorch.simple_vit.Transformer": (
        replace(
            _PAIR,
            between=(
                ("0", "vit_pytorch.simple_vit.Attention"),
                ("0.attend", "torch.Softmax"),
                ("1", "vit_pytorch.simple_vit.FeedForward"),
                ("1.net", "torch.Sequential"),
            ),
            proj="0.to_out",
            fc2="1.net.3",
            drops=(),
        ),
    ),
}
