"""Files of someone who knows the formats: whatever is changed, the checksums are right."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save_file

import vitquant

TINY = {"img_size": 32, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 7}


def save_tiny(directory: Path, recipe: str = "fq-vit") -> vitquant.QuantizedModel:
    """Quantize and save a Vision Transformer of one block, with the source that it can be made from."""
    from vitquant.zoo import create

    source = vitquant.ModelSource("timm:vit_tiny_patch16_224", TINY, "random")
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    about = {"input_size": [3, 32, 32]}
    quantized = vitquant.quantize(create(source), recipe, [images], source=source, preprocessing=about)
    quantized.save(directory)
    return quantized


def digest(config: dict[str, Any]) -> str:
    """What `config.json` says of itself."""
    text = json.dumps(config, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def forge_config(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the config of a saved model, and its digest with it."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config.pop("digest")
    change(config)
    path.write_text(json.dumps({**config, "digest": digest(config)}))


def forge_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a saved model, and all that says what they are."""
    path = directory / "model.safetensors"
    tensors = load(path.read_bytes())
    change(tensors)
    save_file(tensors, path)
    seal(directory)


def seal(directory: Path) -> None:
    """Let the config of a saved model say what its tensors' file is now."""
    content = (directory / "model.safetensors").read_bytes()
    about = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    forge_config(directory, lambda config: config["files"].update({"model.safetensors": about}))
