"""Words of commands about a tiny ViT, and its weights."""

import timm
import torch

ARGUMENTS = {"depth": 1, "embed_dim": 48, "num_heads": 3, "img_size": 64, "num_classes": 10}
MODEL = ["timm:vit_tiny_patch16_224"] + [f"--model-arg={key}={value}" for key, value in ARGUMENTS.items()]


def state_dict(**arguments):
    torch.manual_seed(1)
    model = timm.create_model("vit_tiny_patch16_224", **{**ARGUMENTS, **arguments})
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def quantize_words(images, out, *words, weights="random", model=MODEL):
    given = ["--weights", str(weights), "--calibration", str(images), "--output", str(out)]
    sizes = [] if "--batch" in words else ["--batch", "10"]
    recipe = [] if "--recipe" in words else ["--recipe", "minmax"]
    return ["quantize", *model, *given, *sizes, *recipe, *map(str, words)]


def sensitivity_words(workshop, *words):
    data = ["--weights", workshop / "weights.safetensors", "--calibration", workshop / "images", "--images", 4]
    return ["sensitivity", *MODEL, *map(str, (*data, *words))]


def landscape_words(workshop, *words):
    data = ["--weights", workshop / "weights.safetensors", "--calibration", workshop / "images", "--images", 4]
    sizes = ["--held-out", 3, "--points", 3, "--directions", 1, "--cycles", 2]
    return ["landscape", *MODEL, *map(str, (*data, *sizes, *words))]
