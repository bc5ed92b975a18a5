"""A zoo of tiny architectures with random weights, and modules that users write."""

import timm
import torch
import torchvision
import transformers
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg
from torch import nn

CLASSES = 5
PLAIN = {"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": 32}
STAGES = {"depths": (2, 2), "embed_dim": 16, "num_heads": (2, 4), "img_size": 64, "window_size": 4}
TRANSFORMERS = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32,
    "patch_size": 8, "num_labels": CLASSES,
}  # fmt: skip
TRANSFORMERS_SWIN = {
    "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "image_size": 64, "num_labels": CLASSES,
}  # fmt: skip


# --- the user's own modules --------------------------------------------------------------------------


class Patches(nn.Module):
    """Images to (batch, 16, 32) tokens."""

    def __init__(self, width=32):
        super().__init__()
        self.proj = nn.Conv2d(3, width, 8, 8)

    def forward(self, images):
        return self.proj(images).flatten(2).transpose(1, 2)


class EncoderNet(nn.Module):
    """`nn.TransformerEncoder`, as the user configures it."""

    def __init__(self, **layer):
        super().__init__()
        self.patches, self.batch_first = Patches(), layer.get("batch_first", False)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64, **layer), 2)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, images):
        tokens = self.patches(images)
        if self.batch_first:
            return self.head(self.encoder(tokens).mean(1))
        return self.head(self.encoder(tokens.transpose(0, 1)).mean(0))


class AttentionNet(nn.Module):
    """`nn.MultiheadAttention` that gives its maps back as well."""

    def __init__(self, batch_first):
        super().__init__()
        self.patches, self.batch_first = Patches(), batch_first
        self.attention = nn.MultiheadAttention(32, 2, batch_first=batch_first)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, images):
        tokens = self.patches(images)
        tokens = tokens if self.batch_first else tokens.transpose(0, 1)
        result, maps = self.attention(tokens, tokens, tokens, need_weights=True)
        return {"logits": self.head((tokens + result).mean(1 if self.batch_first else 0)), "maps": maps}


class Handwritten(nn.Module):
    """Attention in plain code, with the batch size read by `len`."""

    def __init__(self, width=32, heads=2):
        super().__init__()
        self.heads, self.patches = heads, Patches(width)
        self.norm, self.qkv, self.proj = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x):
        batch = len(x)
        x = self.patches(x)
        q, k, v = self.qkv(self.norm(x)).reshape(batch, x.shape[1], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        probs = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        x = x + self.proj((probs @ v).transpose(1, 2).reshape(batch, x.shape[1], -1))
        return self.head(x.mean(1))


class Einsum(nn.Module):
    """Attention by `torch.einsum`."""

    def __init__(self):
        super().__init__()
        self.patches, self.qkv, self.head = Patches(), nn.Linear(32, 96), nn.Linear(32, CLASSES)

    def forward(self, x):
        x = self.patches(x)
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).unbind(2)
        probs = torch.einsum("bihd,bjhd->bhij", q, k).div(4).softmax(-1)
        return self.head((x + torch.einsum("bhij,bjhd->bihd", probs, v).flatten(2)).mean(1))


class BatchNormed(nn.Module):
    """A convolutional stem with batch-norm, dropout, and layers whose running statistics stay as they are."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 8, 8), nn.BatchNorm2d(32), nn.ReLU(inplace=True))
        self.encoder = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, dropout=0.5)
        self.head = nn.Sequential(nn.BatchNorm1d(32), nn.Dropout(0.5), nn.Linear(32, CLASSES))

    def forward(self, x):
        return self.head(self.encoder(self.stem(x).flatten(2).transpose(1, 2)).mean(1))


class Untidy(nn.Module):
    """Tied weights, unused parameters, buffers of every sort, and tensors made in forward."""

    def __init__(self):
        super().__init__()
        self.net = Handwritten()
        self.first, self.second = nn.Linear(CLASSES, CLASSES), nn.Linear(CLASSES, CLASSES)
        self.second.weight = self.first.weight
        self.unused = nn.Linear(3, 3)
        self.empty = nn.Parameter(torch.randn(2), requires_grad=False)
        self.register_buffer("scale", torch.rand(CLASSES))
        self.register_buffer("shift", torch.rand(CLASSES), persistent=False)
        self.register_buffer("never_read", torch.arange(3))

    def forward(self, x):
        logits = self.second(self.first(self.net(x))) * self.scale + self.shift
        return logits, [torch.arange(CLASSES) + logits, None]


# --- the zoo -----------------------------------------------------------------------------------------


def from_timm(name, **arguments):
    return lambda: timm.create_model(name, num_classes=CLASSES, **arguments)


def from_transformers(name, **arguments):
    kind = getattr(transformers, f"{name}ForImageClassification")
    return lambda: kind(getattr(transformers, f"{name}Config")(**arguments))


def mvit():
    return MultiScaleVit(MultiScaleVitCfg(depths=(1, 1), embed_dim=16, num_heads=1), img_size=32, num_classes=CLASSES)


ZOO = {
    "timm deit": (from_timm("deit_tiny_patch16_224", **PLAIN), 32),
    "timm deit distilled": (from_timm("deit_tiny_distilled_patch16_224", **PLAIN), 32),
    "timm vit": (from_timm("vit_tiny_patch16_224", qk_norm=True, init_values=0.1, **PLAIN), 32),
    "timm dinov2 with registers": (from_timm("vit_small_patch14_reg4_dinov2", **{**PLAIN, "img_size": 28}), 28),
    "timm siglip": (from_timm("vit_base_patch16_siglip_224", **PLAIN), 32),
    "timm beit": (from_timm("beit_base_patch16_224", **PLAIN), 32),
    "timm cait": (from_timm("cait_xxs24_224", **PLAIN), 32),
    "timm eva02": (from_timm("eva02_tiny_patch14_224", **{**PLAIN, "img_size": 28}), 28),
    "timm xcit": (from_timm("xcit_nano_12_p16_224", cls_attn_layers=1, **PLAIN), 32),
    "timm swin": (from_timm("swin_tiny_patch4_window7_224", **STAGES), 64),
    "timm swinv2": (from_timm("swinv2_tiny_window8_256", **{**STAGES, "depths": (1, 1)}), 64),
    "timm levit": (
        from_timm("levit_128s", embed_dim=(16, 32), depth=(1, 1), num_heads=(2, 2), key_dim=8, img_size=32),
        32,
    ),
    "timm tiny_vit": (
        from_timm("tiny_vit_5m_224", embed_dims=(8, 16), depths=(1, 1), num_heads=(1, 2), window_sizes=(4, 4)),
        32,
    ),
    "timm pvt_v2": (
        from_timm("pvt_v2_b0", depths=(1, 1, 1, 1), embed_dims=(8, 8, 16, 16), num_heads=(1, 1, 2, 2)),
        64,
    ),
    "timm mvitv2": (mvit, 32),
    "timm crossvit": (
        from_timm("crossvit_tiny_240", embed_dim=(16, 32), depth=((1, 1, 0),), num_heads=(2, 2), img_size=120),
        120,
    ),
    "transformers vit": (from_transformers("ViT", **TRANSFORMERS), 32),
    "transformers deit": (from_transformers("DeiT", **TRANSFORMERS), 32),
    "transformers beit": (
        from_transformers("Beit", use_relative_position_bias=True, out_indices=[1], **TRANSFORMERS),
        32,
    ),
    "transformers dinov2": (from_transformers("Dinov2", **TRANSFORMERS), 32),
    "transformers swin": (from_transformers("Swin", **TRANSFORMERS_SWIN), 64),
    "torchvision vit": (
        lambda: torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=CLASSES),
        32,
    ),
    "torchvision swin": (
        lambda: torchvision.models.SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=CLASSES),
        64,
    ),
    "encoder post-norm relu": (EncoderNet, 32),
    "encoder pre-norm gelu batch-first": (
        lambda: EncoderNet(norm_first=True, activation="gelu", batch_first=True),
        32,
    ),
    "encoder post-norm relu batch-first": (lambda: EncoderNet(batch_first=True), 32),
    "encoder pre-norm gelu": (lambda: EncoderNet(norm_first=True, activation="gelu"), 32),
    "attention maps": (lambda: AttentionNet(batch_first=False), 32),
    "attention maps batch-first": (lambda: AttentionNet(batch_first=True), 32),
    "handwritten, len of the batch": (Handwritten, 32),
    "einsum": (Einsum, 32),
    "batch-norm": (BatchNormed, 32),
    "untidy": (Untidy, 32),
}


def vary(model):
    """Random values everywhere, lest a zero-initialized layer hides what is behind it."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean += 0.1 * torch.randn_like(module.running_mean)
                module.running_var *= 0.5 + torch.rand_like(module.running_var)
