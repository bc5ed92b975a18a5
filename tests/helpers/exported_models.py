"""Tiny models with weights of a size that training gives, and their QDQ ONNX."""

from __future__ import annotations

import functools

import torch

import vitquant
from vitquant.exports.qdq import onnx_qdq_model


def timm_vit():
    import timm

    return timm.create_model("vit_tiny_patch16_224", depth=2, embed_dim=48, num_heads=3, img_size=64, num_classes=7)


def timm_swin():
    import timm

    sizes = {"depths": (2, 2), "embed_dim": 24, "num_heads": (2, 4), "img_size": 64, "window_size": 4}
    return timm.create_model("swin_tiny_patch4_window7_224", num_classes=7, **sizes)


def transformers_vit():
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=64, num_labels=7))


def transformers_deit():
    from transformers import DeiTConfig, DeiTForImageClassification

    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
    return DeiTForImageClassification(DeiTConfig(**sizes, image_size=64, num_labels=7))


def transformers_swin():
    from transformers import SwinConfig, SwinForImageClassification

    sizes = {"embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "image_size": 64}
    return SwinForImageClassification(SwinConfig(**sizes, num_labels=7))


def torchvision_vit():
    from torchvision.models import VisionTransformer

    return VisionTransformer(64, 16, 2, 3, 48, 96, num_classes=7)


def torchvision_swin():
    from torchvision.models.swin_transformer import SwinTransformer

    return SwinTransformer([4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=7)


def trained(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_((1.0 if "norm" in name and name.endswith("weight") else 0.0) + 0.1 * noise)
            else:
                parameter.copy_(noise / max(1, parameter[0].numel()) ** (0.5 * (parameter.shape[0] > 1)))
    return model.eval()


def photos(count, seed=0):
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


@functools.cache
def exported(make, recipe, bits=None, settings=()):
    """A quantized model and its ONNX form; nobody changes them."""
    torch.manual_seed(0)
    quantized = vitquant.quantize(trained(make()), recipe, list(photos(8).split(4)), bits=bits, settings=settings)
    return quantized, onnx_qdq_model(quantized)
