"""The search of scales in several processes, and on a Ray cluster: the same model, whatever is lost."""

from __future__ import annotations

import math
import multiprocessing
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from architectures import ZOO, vary

import vitquant
from vitquant.errors import CalibrationError, LoweringError, WorkerError
from vitquant.methods.evolving_block import EvolvingBlock
from vitquant.methods.evolving_shard import Shard, Trial
from vitquant.model.saved import digest
from vitquant.quantizers import UniformQuantizer
from vitquant.spec import QParams, QuantSpec
from vitquant.workers.opening import opened

SETTINGS = {
    "evolve-scales.passes": 2, "evolve-scales.cycles": 2, "evolve-scales.population": 4,
    "evolve-scales.mutation": 0.05, "evolve-scales.relative": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def deit() -> tuple[torch.nn.Module, list[torch.Tensor]]:
    build, size = ZOO["timm deit"]
    torch.manual_seed(0)
    model = build().eval()
    vary(model)
    images = torch.randn(11, 3, size, size, generator=torch.Generator().manual_seed(0))
    return model, list(images.split(3))  # the last batch has two images


def searched(deit: Any, workers: int | str, **options: Any) -> vitquant.QuantizedModel:
    model, batches = deit
    settings = SETTINGS | options.pop("settings", {})
    return vitquant.quantize(model, "evol-q", batches, settings=settings, workers=workers, **options)


@pytest.fixture(scope="module")
def serial(deit) -> dict[str, vitquant.QuantizedModel]:
    """What one process finds, by the fitness."""
    return {
        fitness: searched(deit, 0, settings={"evolve-scales.fitness": fitness})
        for fitness in ("simulation", "integers")
    }


@pytest.mark.parametrize(
    ("workers", "fitness", "memory"),
    [(2, "simulation", 4.0), (3, "integers", 4.0), (9, "simulation", 1e-6), (1, "simulation", 4.0)],
)
def test_it_finds_what_one_process_finds(deit, serial, workers: int, fitness: str, memory: float) -> None:
    found = searched(deit, workers, memory=memory, settings={"evolve-scales.fitness": fitness})
    assert digest(found) == digest(serial[fitness])
    assert found.records == serial[fitness].records
    assert not multiprocessing.active_children()


def test_what_a_lost_worker_had_is_computed_again(deit, serial) -> None:
    killed: list[int] = []

    def kill(what: str, done: int, total: int) -> None:
        if what.startswith("evolving block") and done in (1, 5):
            (process, *_) = multiprocessing.active_children()
            process.kill()
            killed.append(done)

    found = searched(deit, 2, progress=kill)
    assert killed == [1, 5]
    assert digest(found) == digest(serial["simulation"])


def test_an_error_is_a_line_and_no_process_stays(deit) -> None:
    model, batches = deit
    with pytest.raises(CalibrationError, match="batch 5 has one image"):
        searched((model, [*batches, batches[0][:1]]), 2)
    assert not multiprocessing.active_children()


def test_a_recipe_without_such_a_search_starts_no_process(deit) -> None:
    model, batches = deit
    vitquant.quantize(model, "minmax", batches, workers=2, progress=lambda *_: _none_runs())
    with pytest.raises(WorkerError, match="it is a number of processes"):
        vitquant.quantize(model, "minmax", batches, workers="rai")


def _none_runs() -> None:
    assert not multiprocessing.active_children()


class Undeployable:
    """Outputs that are those of a block's scale; a scale above one cannot be deployed."""

    def __init__(self, quantizer: UniformQuantizer) -> None:
        self.quantizer = quantizer

    def outputs(self, block: int) -> Iterator[tuple[torch.Tensor, ...]]:
        yield (self.quantizer.scale.view(1, 1).repeat(2, 1),)

    def changed(self, block: int) -> None:
        if self.quantizer.scale > 1:
            raise LoweringError("a sum could overflow")

    def renew(self) -> None:
        pass


def test_the_losses_of_a_trial_do_not_depend_on_those_before_it() -> None:
    quantizer = UniformQuantizer(QuantSpec(8), QParams(torch.tensor(0.5), torch.tensor(0)))
    shard = Shard(
        {0: EvolvingBlock({"x": quantizer}, ("scale",))}, Undeployable(quantizer), [[torch.zeros(2, 1)]], "mse"
    )
    trials = [Trial(0, 0, {0: torch.tensor([scale], dtype=torch.float64)}) for scale in (0.5, 0.75, 2.0)]
    expected = [[0.5], [1.125], [math.inf]]
    for place in (0, 2, 2, 1, 2, 0, 0, 1, 1):
        assert shard(trials[place]) == expected[place]


# --- a Ray cluster ---


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A cluster of two nodes on this machine, to which this process is connected."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.second = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def test_on_a_cluster_a_node_is_killed_in_mid_search(deit, serial, cluster, monkeypatch) -> None:
    killed: list[int] = []

    def kill(what: str, done: int, total: int) -> None:
        if what.startswith("evolving block") and done == 3:
            cluster.remove_node(cluster.second, allow_graceful=False)
            killed.append(done)

    assert digest(searched(deit, "ray")) == digest(serial["simulation"])
    monkeypatch.setattr("vitquant.workers.on_ray.__version__", "0.0")
    with pytest.raises(
        WorkerError, match=r"node \w+ of the Ray cluster has .*, and here is vitquant 0\.0, torch .*: install"
    ):
        searched(deit, "ray")
    monkeypatch.undo()
    assert digest(searched(deit, "ray", progress=kill)) == digest(serial["simulation"])
    assert killed == [3]


class Unreadable:
    """Something that no worker can read."""

    def __reduce__(self) -> Any:
        return len, (7,)


def test_what_workers_of_a_cluster_cannot_read_is_named(cluster) -> None:
    with opened("ray") as workers:
        assert workers is not None
        worker = workers.start(Unreadable())  # type: ignore[arg-type]
        worker.ask(1)
        with pytest.raises(WorkerError, match=r"lost 3 times at the same request \(.*object of type 'int' has no len"):
            worker.answer()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", r"the Ray cluster at 127\.0\.0\.1:1 cannot be reached: Connection refused"),
        ("127.0.0.1:99999999", r"the Ray cluster at .* cannot be reached"),
        ("nowhere", r"the Ray cluster cannot be used: Invalid address format: nowhere"),
    ],
)
def test_a_cluster_that_cannot_be_reached_is_refused_at_once(monkeypatch, address: str, message: str) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(WorkerError, match=message), opened("ray"):
        pass


def test_without_ray_it_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(WorkerError, match=r"pip install 'vitquant\[ray\]'"), opened("ray"):
        pass
