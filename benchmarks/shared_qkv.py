"""What one scale for query, key and value, as in FQ-ViT's code, does to the real DeiT-Tiny.

    python benchmarks/shared_qkv.py [--recipe fq-vit-published+uniform-probs] [--bits w8a8]

The official code quantizes the output of the joint projection with one scale. Here the three have one each; this
script gives all three the range of their union, and prints top-1, agreement and cosine of both forms, beside those of
the official logits, and the paired 95 % interval of the difference in agreement between the two forms and to the
official code. Minmax only.
"""

from __future__ import annotations

import argparse

import torch
from real_deit import PREPROCESSING, SHARED, cosine, float_deit, interval, official_logits, row, run

import vitquant
from vitquant.quantizers import build_quantizer, params_from_range
from vitquant.tasks.classification import compare, paired_interval
from vitquant.tasks.images import batches, load_listing, subset


def main() -> None:
    """Quantize once, evaluate, share the scales, evaluate again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="fq-vit-published+uniform-probs")
    parser.add_argument("--bits", default="w8a8")
    parser.add_argument("--official", default="fqvit_minmax_ptf_888")
    arguments = parser.parse_args()
    model = float_deit()
    evaluation = batches(load_listing(SHARED / "images" / "photos_eval"), PREPROCESSING, 100)
    labels = torch.cat([label for _, label in evaluation])
    reference = run(model, evaluation)
    listing = subset(load_listing(SHARED / "images" / "photos_calibration"), 1000, 0)
    quantized = vitquant.quantize(model, arguments.recipe, batches(listing, PREPROCESSING, 100), bits=arguments.bits)
    apart = run(quantized, evaluation)
    decisions = quantized.records[0].decisions
    for block in quantized.index.blocks:
        names = [f"blocks.{block}.attn.{operand}" for operand in ("scores:query", "scores:key", "context:value")]
        low, high = (
            torch.tensor(choose(decisions[name][end] for name in names), dtype=torch.float64)
            for choose, end in ((min, "low"), (max, "high"))
        )
        spec = quantized.quantizers[names[0]].spec
        quantized.insert({name: build_quantizer(spec, params_from_range(low, high, spec)) for name in names})
    shared, official = run(quantized, evaluation), official_logits(arguments.official)
    print(row(("query, key, value", "top-1", "agreement", "cosine", "agreement - first, 95 %")))
    print("|---" * 5 + "|")
    first = apart.argmax(1) == reference.argmax(1)
    for name, logits in (("a scale each", apart), ("one scale", shared), ("official code", official)):
        result, same = compare(logits, reference, labels), logits.argmax(1) == reference.argmax(1)
        difference = interval(paired_interval(same, first))
        print(
            row((name, f"{result.top1:.1f}", f"{result.agreement:.1f}", f"{cosine(logits, reference):.4f}", difference))
        )


if __name__ == "__main__":
    main()
