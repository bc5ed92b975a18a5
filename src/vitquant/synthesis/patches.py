"""The attentions of a float model whose patches are compared, and which of their tokens are patches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vitquant.errors import ModelError
from vitquant.graph.captured import CapturedModel
from vitquant.graph.segments import IMAGES
from vitquant.graph.sites import Site
from vitquant.graph.taps import by_image

_ALIKE = 1e-4  # relative difference of what two images give, below which they are the same but for rounding


@dataclass(frozen=True)
class PatchFeatures:
    """Where a model computes features of patches: the contexts of its attentions.

    Arguments:
        sites: the names of the contexts, in graph order.
        patches: for each the tokens that are patches, int64; all of them when None.
    """

    sites: tuple[str, ...]
    patches: tuple[Tensor | None, ...]

    @classmethod
    def of(cls, model: CapturedModel) -> PatchFeatures:
        """The contexts of a model that have at least two patches.

        Class and register tokens are those whose queries in the first attention are the same for every image. They are
        left out of all contexts with as many tokens.

        Arguments:
            model: in float.

        Raises:
            ModelError: it has no attention between patches.
        """
        nodes = {node.name: node for node in model.graph_module.graph.nodes}
        contexts = [site for site in model.sites if site.kind == "context"]
        scores = next((site for site in model.sites if site.kind == "scores"), None)
        if scores is None or not contexts:
            raise ModelError("the model has no attention, whose patches could be compared; noise needs none")
        varying = _varying_tokens(model, scores)
        found: dict[str, Tensor | None] = {}
        for site in contexts:
            tokens = nodes[site.node].meta["shape"][-2]
            kept = varying if len(varying) == tokens else None
            count = tokens if kept is None else int(kept.sum())
            if count > 1:
                found[site.name] = None if kept is None or count == tokens else kept.nonzero().flatten()
        if not found:
            raise ModelError("no attention of the model is between patches: each is of one token")
        return cls(tuple(found), tuple(found.values()))

    def split(self, contexts: tuple[Tensor, ...], images: int) -> list[Tensor]:
        """The features of the patches in each context: (images, windows, patches, channels), the mean over the heads.

        Arguments:
            contexts: of `sites`, (images * windows, heads, tokens, channels), or (images * windows, tokens, channels).
            images: their number.
        """
        found = []
        for context, patches in zip(contexts, self.patches, strict=True):
            features = by_image(context.to(torch.promote_types(context.dtype, torch.float32)), 0, images)
            features = features.mean(2) if features.ndim == 5 else features
            found.append(features if patches is None else features[:, :, patches.to(features.device)])
        return found


def _varying_tokens(model: CapturedModel, scores: Site) -> Tensor:
    """Which tokens of an attention depend on the image, bool (tokens,); all of them if none does."""
    example = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        images = torch.randn(2, *model.input_shape, generator=generator).to(example)
        query = by_image(model.segment(IMAGES, f"{scores.name}:query")(images), 0, 2)
    first, second = query.movedim(-2, 1).flatten(2).float()  # (tokens, everything else) of each image
    alike = max(_ALIKE, 8 * torch.finfo(example.dtype).eps)
    varying = ((first - second).abs().amax(1) > alike * query.abs().max()).cpu()
    return varying if bool(varying.any()) else torch.ones_like(varying)
