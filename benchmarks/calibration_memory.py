"""Peak memory of calibration by the number of images: it must not grow with it.

    python benchmarks/calibration_memory.py [--images 100 1000] [--recipes minmax ...]

DeiT-Tiny, random images in batches of 50, each run in a process of its own; peak resident memory as the
operating system counts it. Prints the table of docs/results.md. Needs no data. About ten minutes.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from collections.abc import Iterator

BATCH = 50


def main() -> None:
    """Run every recipe with every number of images and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="*", default=[100, 1000])
    parser.add_argument("--recipes", nargs="*", default=["minmax", "moving-average", "percentile", "omse"])
    parser.add_argument("--child", nargs=2, metavar=("RECIPE", "IMAGES"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(peak_megabytes(arguments.child[0], int(arguments.child[1])))
        return
    print("| recipe | " + " | ".join(f"{images} images, MB" for images in arguments.images) + " |")
    print("|---" * (1 + len(arguments.images)) + "|")
    for recipe in arguments.recipes:
        peaks = []
        for images in arguments.images:
            command = [sys.executable, __file__, "--child", recipe, str(images)]
            peaks.append(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())
        print(f"| {recipe} | " + " | ".join(peaks) + " |", flush=True)


def peak_megabytes(recipe: str, images: int) -> int:
    """Peak resident memory of this process after calibrating, in megabytes."""
    import timm
    import torch

    import vitquant

    def data() -> Iterator[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        for _ in range(images // BATCH):
            yield torch.randn(BATCH, 3, 224, 224, generator=generator)

    vitquant.quantize(timm.create_model("deit_tiny_patch16_224"), recipe, data())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


if __name__ == "__main__":
    main()
