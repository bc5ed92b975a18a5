"""How far log-int-softmax is from the real one, on the real DeiT-Tiny's attention.

    python benchmarks/softmax_codes.py [--images 50]

For FQ-ViT's arithmetic as published and for ours: the share of attention probabilities whose exponent differs from
the one nearest to -log2 of the softmax of the same quantized scores, and what the rows sum to (mean, standard
deviation). Scores of the float model, quantized on scales calibrated on 200 photographs. Prints the table of
docs/fq-vit.md; the layer with the smallest and the one with the largest share are given beside the mean.
"""

from __future__ import annotations

import argparse

import torch
from real_deit import PREPROCESSING, SHARED, float_deit, row, spread

import vitquant
from vitquant.integer.exponential import exact_exponential, polynomial_exponential
from vitquant.integer.softmax import distances, log_int_softmax, published_log_int_softmax
from vitquant.tasks.images import batches, load_listing, subset

VARIANTS = {
    "polynomial, rounding as published": (polynomial_exponential, published_log_int_softmax),
    "exact table, rounding as published": (exact_exponential, published_log_int_softmax),
    "polynomial, rounding of the logarithm": (polynomial_exponential, log_int_softmax),
    "exact table, rounding of the logarithm (`fq-vit`)": (exact_exponential, log_int_softmax),
}


def main() -> None:
    """Tap the scores of every block and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=50)
    arguments = parser.parse_args()
    model = float_deit()
    calibration = subset(load_listing(SHARED / "images" / "photos_calibration"), 200, 0)
    quantized = vitquant.quantize(model, "fq-vit", batches(calibration, PREPROCESSING, 100))
    evaluation = load_listing(SHARED / "images" / "photos_eval")[: arguments.images]
    (images, _), *_ = batches(evaluation, PREPROCESSING, arguments.images)
    scores: dict[str, torch.Tensor] = {}
    names = [f"blocks.{number}.attn.softmax:input" for number in quantized.index.blocks]
    taps = {name: lambda x, name=name: scores.__setitem__(name, x.clone()) for name in names}
    with torch.inference_mode():
        quantized.run(images, taps, quantized=False)
        print(row(("arithmetic", "codes that differ, %", "sum of a row, mean", "standard deviation")))
        print("|---" * 4 + "|")
        for variant, (exponential, softmax) in VARIANTS.items():
            wrong, mean, deviation = [], [], []
            for name in names:
                quantizer = quantized.quantizers[name]
                codes, scale = quantizer.encode(scores[name]).long(), quantizer.scale.item()
                nearest = (-torch.log2(torch.softmax(codes.double() * scale, -1))).round().clamp(max=16)
                table = exponential(scale)
                found = softmax(
                    distances(codes, None, table), table, 16 if softmax is published_log_int_softmax else 15
                )
                last = 16 if softmax is published_log_int_softmax else 15
                wrong.append(100 * (found != nearest.clamp(max=last)).double().mean().item())
                sums = torch.where(found < last, torch.exp2(-found.double()), 0.0).sum(-1)
                mean.append(sums.mean().item())
                deviation.append(sums.std().item())
            print(row((variant, spread(wrong, 2), spread(mean, 3), spread(deviation, 3))))


if __name__ == "__main__":
    main()
