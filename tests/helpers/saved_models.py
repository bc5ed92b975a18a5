"""Small saved models and the digests of their programs, which every processor and every version of torch has to give.

`python tests/helpers/saved_models.py` prints the digests of the programs as they are lowered here, and with `digests`
writes them: after a change of the files that programs are.
`python tests/helpers/saved_models.py write [NAME]` quantizes the models of `MODELS` (or one) again and writes them, and
the digests of all, into `tests/saved_models/`: after a change of what is saved. A new model is one more line of
`MODELS`.
"""

import hashlib
import json
import sys
import tempfile
from pathlib import Path

import torch
from architectures import vary

import vitquant
from vitquant.lowering import lower
from vitquant.program.storage import save_program
from vitquant.zoo import ModelSource, create

FOLDER = Path(__file__).parents[1] / "saved_models"
DIGESTS = FOLDER / "programs.json"
PLAIN = {"depth": 1, "embed_dim": 24, "num_heads": 2, "img_size": 32, "num_classes": 5}
STAGES = {
    "depths": [2, 1], "embed_dim": 8, "num_heads": [1, 2], "img_size": 32, "patch_size": 4, "window_size": 4,
    "num_classes": 5,
}  # fmt: skip
LEVIT = {"embed_dim": [8, 16], "depth": [1, 1], "num_heads": [1, 2], "key_dim": 8, "img_size": 32, "num_classes": 5}
MODELS = {  # name: source, arguments, recipe
    "vit fq-vit": ("timm:vit_tiny_patch16_224", PLAIN, "fq-vit"),
    "vit repq-vit": ("timm:vit_tiny_patch16_224", PLAIN, "repq-vit+fully-integer"),
    "vit default": ("timm:vit_tiny_patch16_224", PLAIN, "default"),
    # Masks, tables of relative positions, padding.
    "swin fq-vit": ("timm:swin_tiny_patch4_window7_224", STAGES, "fq-vit"),
    # Batch norm and hardswish.
    "levit fq-vit": ("timm:levit_128s", LEVIT, "fq-vit"),
    # Sines and cosines that timm computes when it builds the model; SiLU.
    "eva repq-vit": ("timm:eva02_tiny_patch14_224", {**PLAIN, "img_size": 28}, "repq-vit+fully-integer"),
    # A product of parameters: the query of its pooling.
    "siglip fq-vit": ("timm:vit_base_patch16_siglip_224", PLAIN, "fq-vit"),
}


def folder(name):
    """Where the model of that name is saved."""
    return FOLDER / name.replace(" ", "-")


def digest(name):
    """The digest of a saved model's program."""
    return digest_of(vitquant.load(folder(name)))


def digest_of(model):
    """The sha256 of the file that a model's program is."""
    program = lower(model)
    with tempfile.TemporaryDirectory() as directory:
        save_program(program, Path(directory) / "program")
        return hashlib.sha256((Path(directory) / "program").read_bytes()).hexdigest()


def write(name):
    """Quantize a model and save it."""
    source, arguments, recipe = MODELS[name]
    made = ModelSource(source, arguments, weights="random")
    model, random = create(made), torch.Generator().manual_seed(0)
    vary(model)
    images = [torch.randn(4, 3, arguments["img_size"], arguments["img_size"], generator=random) for _ in range(2)]
    vitquant.quantize(model, recipe, images, source=made).save(folder(name), force=True)


if __name__ == "__main__":
    if sys.argv[1:2] in (["write"], ["digests"]):
        for name in (sys.argv[2:] or MODELS) if sys.argv[1] == "write" else ():
            write(name)
        DIGESTS.write_text(json.dumps({name: digest(name) for name in MODELS}, indent=2) + "\n")
    else:
        print(json.dumps({name: digest(name) for name in MODELS}))
