"""Losses between outputs of a quantized model and those of the float model, one number for each image.

Unless said otherwise arguments are (images, ...) of any floating dtype, of one batch; results are float64 (images,).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

OutputLoss = Callable[[Tensor, Tensor], Tensor]

TEMPERATURE = 3.0


def infonce(quantized: Tensor, reference: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """How hard it is to tell from a quantized output which image of the batch it belongs to.

    With unit vectors q_i of the quantized and k_j of the float outputs it is -2T log softmax_j(q_i k_j / T) at j = i:
    the other images of the batch are the negatives.

    Arguments:
        quantized, reference: (images, ...), at least two images.
        temperature: T.

    Source: Evol-Q, Frumkin et al. 2023, equation 3, with the factor 2T of its code.

    Pitfall: it depends on the whole batch; with one image it is zero whatever the outputs are.
    """
    q, k = (functional.normalize(_rows(each), dim=1) for each in (quantized, reference))
    return -2 * temperature * torch.log_softmax(q @ k.T / temperature, dim=1).diagonal()


def mean_squared_error(quantized: Tensor, reference: Tensor) -> Tensor:
    """The mean of the squared differences."""
    return (_rows(quantized) - _rows(reference)).square().mean(1)


def cosine_distance(quantized: Tensor, reference: Tensor) -> Tensor:
    """One minus the cosine of the angle between the outputs."""
    return (1 - functional.cosine_similarity(_rows(quantized), _rows(reference), dim=1)).clamp(min=0)


def kl_divergence(quantized: Tensor, reference: Tensor) -> Tensor:
    """The Kullback-Leibler divergence KL(softmax(reference) || softmax(quantized)), over all numbers of an image."""
    q, p = (torch.log_softmax(_rows(each), dim=1) for each in (quantized, reference))
    return (p.exp() * (p - q)).sum(1).clamp(min=0)  # rounding can make it negative


def _rows(outputs: Tensor) -> Tensor:
    return outputs.to(torch.float64).flatten(1)


OUTPUT_LOSSES: dict[str, OutputLoss] = {
    "infonce": infonce,
    "mse": mean_squared_error,
    "cosine": cosine_distance,
    "kl": kl_divergence,
}


def batch_loss(loss: OutputLoss, outputs: Sequence[Tensor], references: Sequence[Tensor]) -> float:
    """The sum of a loss over the images of a batch, its mean over the outputs of a model.

    Arguments:
        loss: one of `OUTPUT_LOSSES`.
        outputs, references: of the quantized and the float model, one (images, ...) for each output.
    """
    return torch.stack([loss(*pair).sum() for pair in zip(outputs, references, strict=True)]).mean().item()
