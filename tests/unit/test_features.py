"""Features beside the float model's: figures by their definition, whatever the batches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vitquant.errors import DataError, ModelError
from vitquant.tasks import features
from vitquant.tasks.features import evaluate


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Rows:
    """Gives rows of a table, whichever images it is given."""

    def __init__(self, *tables):
        self.tables, self.done = tables, 0

    def __call__(self, images):
        rows = slice(self.done, self.done + len(images))
        self.done += len(images)
        return [table[rows] for table in self.tables]


def batches_of(count, size):
    return list(torch.zeros(count, 3, 4, 4).split(size))


def nearest(x, bank):
    """By the definition: for each image the one among the first `bank` with the largest cosine, itself left out."""
    unit = (x if x.ndim == 2 else x.mean(1)).double()
    unit = unit / unit.norm(dim=1, keepdim=True)
    similar = unit @ unit[:bank].T
    for place in range(min(bank, len(x))):
        similar[place, place] = -torch.inf
    return similar.argmax(1)


@settings(deadline=None)
@given(
    count=st.integers(3, 30), size=st.integers(1, 12), bank=st.integers(2, 12), tokens=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_figures_are_those_of_their_definition_for_any_batches_and_any_bank(count, size, bank, tokens, seed):
    shape = (count, 3, 5) if tokens else (count, 5)
    exact = noise(*shape, seed=seed)
    found = exact + 0.5 * noise(*shape, seed=seed + 100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "BANK", bank)
        result = evaluate(Rows(found), Rows(exact), batches_of(count, size), engine="mine")
    (output,) = result.outputs
    cosines = torch.cosine_similarity(found.double().flatten(1), exact.double().flatten(1))
    assert (result.images, result.engine, output.name, output.shape) == (count, "mine", "0", shape[1:])
    assert output.cosine == pytest.approx(cosines.mean().item())
    assert output.lowest_cosine == pytest.approx(cosines.min().item())
    same = nearest(found, bank) == nearest(exact, bank)
    assert output.neighbours == pytest.approx(100 * same.double().mean().item())


def test_what_is_the_same_is_the_same_and_maps_have_no_neighbours():
    rows, maps = noise(9, 4), noise(9, 2, 3, 3)
    first, second = evaluate(Rows(rows, maps), Rows(rows, maps), batches_of(9, 4)).outputs
    assert (first.cosine, first.lowest_cosine, first.neighbours) == (pytest.approx(1), pytest.approx(1), 100)
    assert (second.shape, second.neighbours) == ((2, 3, 3), None)
    apart = evaluate(Rows(rows.roll(1, 0)), Rows(rows), batches_of(9, 4)).outputs[0]
    assert apart.neighbours < 100
    assert apart.cosine < 0.9


def test_two_images_have_no_neighbours_to_compare_and_it_says_so():
    result = evaluate(Rows(noise(2, 4)), Rows(noise(2, 4)), batches_of(2, 2))
    assert result.outputs[0].neighbours is None
    assert result.notes == ("nearest neighbours are compared among three images or more",)
    assert evaluate(Rows(noise(3, 4)), Rows(noise(3, 4)), batches_of(3, 3)).notes == ()


def test_models_are_run_as_they_are_evaluated_and_given_back_as_they_were():
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 4), nn.Dropout(0.5)).train()
    result = evaluate(model, model, [(noise(4, 3, 4, 4), torch.zeros(4))])
    assert result.outputs[0].cosine == pytest.approx(1)
    assert result.outputs[0].name == "output"
    assert model.training


def test_bad_input_is_refused_in_a_line():
    good, images = noise(4, 5), batches_of(4, 2)
    with pytest.raises(ModelError, match="the float model, which is not there"):
        evaluate(Rows(good), None, images)
    with pytest.raises(DataError, match="no images"):
        evaluate(Rows(good), Rows(good), [])
    with pytest.raises(ModelError, match=r"of shape \[\(2, 5\)\] for 2 images, the float model \[\(2, 4\)\]"):
        evaluate(Rows(good), Rows(noise(4, 4)), images)
    with pytest.raises(ModelError, match="of shape"):
        evaluate(lambda x: None, lambda x: None, images)
    bad = good.clone()
    bad[3, 2] = torch.inf
    with pytest.raises(ModelError, match="the model gives NaN or infinity, first for image 3"):
        evaluate(Rows(bad), Rows(good), images)
    with pytest.raises(ModelError, match="the float model gives NaN or infinity, first for image 3"):
        evaluate(Rows(good), Rows(bad), images)
