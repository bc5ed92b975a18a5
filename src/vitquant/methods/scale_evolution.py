"""Scale evolution: search the scales of one block after another by the loss of the model's outputs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from vitquant.calibration_data import RepeatedBatches
from vitquant.errors import CalibrationError, CheckpointError, RecipeError
from vitquant.graph.kinds import OPERANDS
from vitquant.graph.segments import IMAGES
from vitquant.methods.context import Context
from vitquant.methods.evolving_block import PARAMETERS, EvolvingBlock, EvolvingLayer, evolves
from vitquant.methods.evolving_shard import Shard, ShardFactory, Trial, shards
from vitquant.methods.float_outputs import FloatOutputs
from vitquant.methods.recomputed import RecomputedSimulation
from vitquant.methods.searched_layer import LAYERS
from vitquant.methods.weight_correction import correctable_layers, why_not_correctable
from vitquant.model import QuantizedModel, Record
from vitquant.model.checkpoint import DIGEST
from vitquant.objectives.output_loss import OUTPUT_LOSSES
from vitquant.schema import Integer, ListOf, Number, Table, nearest
from vitquant.search.coordinate_descent import CoordinateDescent
from vitquant.search.evolution import Evolution, EvolutionSettings
from vitquant.search.genes import Genes, Search, within
from vitquant.search.random_search import RandomSearch
from vitquant.work import Saved, WorkState
from vitquant.workers.worker import Kept

Evaluate = Callable[[Trial], list[float]]  # the sum of the loss over the images of each batch
FITNESS = ("simulation", "integers")

# From genes, the fitness of the start, the settings and a random generator.
SEARCHES: dict[str, Callable[[Genes, float, EvolutionSettings, torch.Generator], Search]] = {
    "evolution": Evolution,
    "random": lambda genes, fitness, settings, generator: RandomSearch(genes, fitness, generator, settings.rate),
    "coordinates": lambda genes, fitness, _, generator: CoordinateDescent(genes, fitness, generator),
}


@dataclass(frozen=True)
class EvolveScalesSettings:
    """Which parameters evolve, by which loss, and how long.

    Arguments:
        sites: globs of the names of sites.
        operands: of these sites.
        parameters: of the operands' quantizers: `scale`, `zero_point`, `factor` (of power-of-two factors).
        blocks: the numbers of the blocks that evolve; all when empty.
        loss: one of `OUTPUT_LOSSES`.
        search: one of `SEARCHES`, which get the same number of evaluations.
        passes: how many times to evolve every block.
        cycles: the number of children of a block in a pass.
        population, sample, rate: see `EvolutionSettings`.
        mutation: how far a scale of at most 4 bits may move at once: an amount, or a share of it if `relative`.
        wide_mutation: the same for scales of more than 4 bits.
        relative: see `mutation`.
        fitness: whether the loss is that of the `simulation` or of the `integers` that are deployed, for recipes that
            compute in integers.
        keep_moments: whether every child's quantized weights keep the mean and the variance of each output channel.

    Raises:
        RecipeError: a word is unknown or a number out of range.
    """

    sites: tuple[str, ...] | list[str] = ("*",)
    operands: tuple[str, ...] | list[str] = ("weight",)
    parameters: tuple[str, ...] | list[str] = ("scale",)
    blocks: tuple[int, ...] | list[int] = ()
    loss: str = "infonce"
    search: str = "evolution"
    passes: int = 10
    cycles: int = 3
    population: int = 15
    sample: int = 10
    rate: float = 1.0
    mutation: float = 1e-3
    wide_mutation: float = 1e-4
    relative: bool = False
    fitness: str = "simulation"
    keep_moments: bool = False

    def __post_init__(self) -> None:
        for name, known in (("operands", OPERANDS), ("parameters", PARAMETERS), ("sites", ())):
            words = getattr(self, name)
            if isinstance(words, str) or not words or not all(isinstance(word, str) for word in words):
                raise RecipeError(f"evolve-scales: {name} = {words!r}: it is a list of words, one at least")
            for word in words if known else ():
                if word not in known:
                    raise RecipeError(f"evolve-scales: {name} has no {word!r}; {nearest(word, known)}")
        for name, known in (("loss", OUTPUT_LOSSES), ("search", SEARCHES), ("fitness", FITNESS)):
            word = getattr(self, name)
            if word not in known:
                raise RecipeError(f"evolve-scales: {name} = {word!r} is unknown; {nearest(word, known)}")
        if not all(isinstance(number, int) and not isinstance(number, bool) for number in self.blocks):
            raise RecipeError(f"evolve-scales: blocks = {self.blocks!r}: it is a list of whole numbers")
        for name in ("passes", "cycles", "population", "sample"):
            if not isinstance(getattr(self, name), int) or not 1 <= getattr(self, name) <= 10_000:
                raise RecipeError(
                    f"evolve-scales: {name} = {getattr(self, name)}: it is a whole number from 1 to 10,000"
                )
        if not 0 < self.rate <= 1:
            raise RecipeError(f"evolve-scales: rate = {self.rate}: it is above 0 and at most 1")
        for name in ("mutation", "wide_mutation"):
            if not 0 < getattr(self, name) < (1 if self.relative else math.inf):
                most = "below 1: more could make a scale zero or negative" if self.relative else "finite"
                raise RecipeError(f"evolve-scales: {name} = {getattr(self, name)}: it is positive and {most}")

    @property
    def reach(self) -> tuple[float, float, bool]:
        """`mutation`, `wide_mutation` and `relative`."""
        return self.mutation, self.wide_mutation, self.relative


def evolve_scales(model: QuantizedModel, context: Context, settings: EvolveScalesSettings) -> Record:
    """Search scales of one block after another, the last block first, by the loss of the model's outputs.

    For each block a population of copies of its scales evolves for some cycles, and the fittest is taken. Fitness is
    the mean loss of the outputs of the quantized model against those of the float model, over all images. Only the part
    of the model behind the block's inputs is computed for it: its inputs are held in memory within the budget.

    Arguments:
        model: calibrated, its operations still in float; scales change, and with `keep_moments` stored weights and
            biases.
        context: its data are iterated over several times; its teacher is used. After an interruption, a later call with
            the same work state continues; at the deadline it ends with the best so far.
        settings: see `EvolveScalesSettings`.

    Returns:
        The loss before, after each pass and after, and for each block how much its children lowered it.

    Raises:
        CalibrationError: no data; a batch of one image, which has no negatives for `infonce`; the loss is NaN or
            infinite; or a mutation could make a scale zero or negative.
        RecipeError: see `check_evolution`.

    Source: Evol-Q, Frumkin et al. 2023, algorithm 1. docs/evol-q.md.
    """
    model.require_calibrated()
    check_evolution(model, settings)
    assert context.teacher is not None
    for names in evolving_names(model, settings).values():  # refuse mutations before long work
        EvolvingBlock({name: model.quantizers[name] for name in names}, settings.parameters).genes(*settings.reach)
    data = RepeatedBatches(context.data)
    context = replace(context, data=data)
    blocks = evolving_blocks(model, context, settings)
    evaluate, sizes = _evaluation(model, context, settings, blocks)
    search = _Search(settings, context, blocks, evaluate, sizes, data.digest)
    of_inference = any(each.is_inference() for each in model.parameters())  # these cannot change outside of that mode
    with torch.inference_mode(of_inference), torch.no_grad():
        search.run()
    return search.record()


def check_evolution(model: QuantizedModel, settings: EvolveScalesSettings) -> None:
    """Refuse settings that leave nothing of a model to evolve.

    Raises:
        RecipeError: there is no such block, or no quantizer has the operands and parameters in question; or the fitness
            is of integers, and the recipe leaves operations in float.
    """
    if settings.fitness == "integers" and all(each.name != "integer-operations" for each in model.recipe.methods):
        raise RecipeError(
            f"fitness = integers, and {model.recipe.name} leaves operations in float: lay +fully-integer over it"
        )
    known = sorted(model.index.blocks)
    for number in settings.blocks:
        if number not in known:
            there = f"its blocks are {known[0]} to {known[-1]}" if known else "it has none"
            raise RecipeError(f"the model has no block {number}; {there}")
    evolving_names(model, settings)


# --- what evolves ---------------------------------------------------------------------------------------


def evolving_names(model: QuantizedModel, settings: EvolveScalesSettings) -> dict[int, list[str]]:
    """The names of the values that evolve, by the number of the first block that reads them, the last block first.

    A value that something outside of the blocks reads too does not evolve.
    """
    found: dict[int, list[str]] = {number: [] for number in settings.blocks or model.index.blocks}
    fixed = 0
    for value in model.values:
        readers = [reader for reader in value.readers if reader.operand in settings.operands]
        matched = [reader for reader in readers if any(fnmatchcase(reader.site, glob) for glob in settings.sites)]
        numbers = [model.index.site(reader.site).block for reader in value.readers]
        spec = model.assignments[value.name].spec
        first = min((number for number in numbers if number is not None), default=None)
        if spec is None or not matched or None in numbers or first not in found:
            continue
        if any(evolves(spec, parameter) for parameter in settings.parameters):
            found[first].append(value.name)
        else:
            fixed += 1
    if any(found.values()):
        return {number: found[number] for number in sorted(found, reverse=True) if found[number]}
    if fixed:
        raise RecipeError(
            f"no quantizer of {', '.join(settings.operands)} has a {' or '.join(settings.parameters)} that may change: "
            "powers of two are fixed, and zero points of symmetric specs; only power_of_two_factor has factors"
        )
    raise RecipeError(
        f"no quantized operand in a block is one of {', '.join(settings.operands)} at sites that match "
        f"{', '.join(settings.sites)}; the sites are such as {', '.join(_some_sites(model))}"
    )


def _some_sites(model: QuantizedModel) -> list[str]:
    return [site.name for sites in list(model.index.blocks.values())[:1] for site in sites][:4]


def evolving_blocks(
    model: QuantizedModel, context: Context, settings: EvolveScalesSettings
) -> dict[int, EvolvingBlock]:
    """The blocks that have something to evolve, the last first."""
    quantizers, names = model.quantizers, evolving_names(model, settings)
    evolving = {name for some in names.values() for name in some}
    layers: dict[str, EvolvingLayer] = {}
    if settings.keep_moments:
        of_weights = [
            site
            for site in model.sites
            if site.kind in LAYERS
            and model.index.read_by(site)["weight"].name in evolving
            and not why_not_correctable(model, site)
        ]
        assert context.teacher is not None
        inputs = [str(site.reader("input")) for site in of_weights]
        read = context.teacher.segment(IMAGES, inputs) if inputs else None
        found = correctable_layers(model, of_weights, read, context.data)
        layers = {layer.name: EvolvingLayer.of(layer) for layer in found}
    return {
        number: EvolvingBlock(
            {name: quantizers[name] for name in some},
            tuple(settings.parameters),
            tuple(layers[name] for name in some if name in layers),
        )
        for number, some in names.items()
    }


def _evaluation(
    model: QuantizedModel, context: Context, settings: EvolveScalesSettings, blocks: Mapping[int, EvolvingBlock]
) -> tuple[Evaluate, list[int]]:
    """What evaluates a trial on all batches, and the number of images of each batch."""
    teacher, workers = context.teacher, context.workers
    recompute = RecomputedSimulation if settings.fitness == "simulation" else context.integers
    assert teacher is not None
    assert recompute is not None
    outputs_of = FloatOutputs(teacher, settings.loss)
    references: list[tuple[Tensor, ...]] = []
    sizes: list[int] = []
    kept: list[Kept] = []
    for batch in context.data:
        references.append(outputs_of(batch, f"batch {len(sizes) + 1}"))
        sizes.append(len(batch))
        if workers is not None:
            kept.append(workers.keep(batch))
    if not sizes:
        raise CalibrationError("no calibration images: give at least one batch")
    memory = max(context.memory * 1e9 - sum(each.nbytes for batch in references for each in batch), 0.0)
    if workers is not None:
        factory = ShardFactory(model, blocks, kept, sizes, references, settings.loss, recompute, memory)
        return shards(workers, factory), sizes
    changing = {number: block.changing for number, block in blocks.items()}
    recomputed = recompute(model, context.data, sizes, changing, memory)
    return Shard(blocks, recomputed, references, settings.loss), sizes


# --- the search -----------------------------------------------------------------------------------------

_STATE = Table(
    {
        "data": DIGEST,
        "evaluations": Integer(0),
        "losses": ListOf(Number(0.0, 1e30), most=2**21),
        "gains": ListOf(Number(-1e30, 1e30), most=2**16),
    }
)


@dataclass
class _Search:
    """The search, and how far it is.

    Arguments:
        settings, context: of the method.
        blocks: what evolves, by the number of the block, in the order in which they evolve.
        evaluate: gives the sum of the loss over each batch.
        sizes: the number of images of each batch.
        data: the digest of the images.
        evaluations: how many children have been evaluated.
        losses: the loss before, and the loss at the end of each pass; the last is the current one.
        gains: by how much the loss fell at each block.
    """

    settings: EvolveScalesSettings
    context: Context
    blocks: Mapping[int, EvolvingBlock]
    evaluate: Evaluate
    sizes: Sequence[int]
    data: str
    evaluations: int = 0
    losses: list[float] = field(default_factory=list)
    gains: list[float] = field(default_factory=list)

    @property
    def of(self) -> int:
        """The number of evaluations in all."""
        return self.settings.passes * len(self.blocks) * self.settings.cycles

    def run(self) -> None:
        """Search until all passes are done, or the time is up, and leave the best in the quantizers."""
        settings, work, numbers = self.settings, self.context.work, list(self.blocks)
        genes = {number: block.genes(*settings.reach) for number, block in self.blocks.items()}
        best = {number: each.start for number, each in genes.items()}
        saved = self._resumed(work, genes, best)
        if saved is None:
            self.losses, self.gains = [self._loss(0, numbers[0], best)], [0.0] * len(numbers)
        started, before = time.monotonic(), self.evaluations
        for turn in range(self.evaluations // settings.cycles, settings.passes * len(numbers)):
            number, place = numbers[turn % len(numbers)], turn % len(numbers)
            if len(self.losses) < turn // len(numbers) + 2:  # a new pass
                self.losses.append(self.losses[-1])
            search = self._search(replace(genes[number], start=best[number]), turn)
            if saved is not None:
                _restore(search, saved)
                saved = None
            while self.evaluations < (turn + 1) * settings.cycles:
                if self.context.out_of_time or work.due:
                    self._save(work, best, search)
                if self.context.out_of_time:
                    best[number] = search.best[0]
                    self.gains[place] += self.losses[-1] - search.best[1]
                    self.losses[-1] = search.best[1]
                    self._put(best)
                    return
                rate = (self.evaluations - before) / max(time.monotonic() - started, 1e-9)
                what = f"evolving block {number}: loss {search.best[1]:.6g}, {rate:.2g} evaluations/s"
                self.context.progress(what, self.evaluations, self.of)
                child = search.ask()
                fitness = self._loss(turn // len(numbers), number, {**best, number: child})
                search.tell(child, fitness)
                self.evaluations += 1
            best[number], loss = search.best
            self.gains[place] += self.losses[-1] - loss
            self.losses[-1] = loss
        self._put(best)
        self.context.progress("evolving scales", self.of, self.of)

    def record(self) -> Record:
        """The losses, and for each block how many operands evolved and by how much the loss fell."""
        summary = {
            "images": sum(self.sizes),
            "loss": self.settings.loss,
            "loss before": self.losses[0],
            "loss after each pass": self.losses[1:],  # the last of an unfinished pass is the current one
            "loss after": self.losses[-1],
            "evaluations": self.evaluations,
            "of": self.of,
        }
        decisions = {
            f"block {number}": {"operands": len(block.quantizers), "loss lowered by": gain}
            for (number, block), gain in zip(self.blocks.items(), self.gains, strict=True)
        }
        return Record("evolve-scales", summary, decisions)

    def _search(self, genes: Genes, turn: int) -> Search:
        settings = EvolutionSettings(self.settings.population, self.settings.sample, self.settings.rate)
        generator = self.context.generator(f"evolve-scales {turn}")
        return SEARCHES[self.settings.search](genes, self.losses[-1], settings, generator)

    def _loss(self, passed: int, number: int, genes: Mapping[int, Tensor]) -> float:
        """The mean loss over all images with some genes; infinite if they cannot be deployed."""
        losses = torch.tensor(self.evaluate(Trial(passed, number, genes)), dtype=torch.float64)
        mean = losses.sum().item() / sum(self.sizes)
        if not self.losses and not math.isfinite(mean):
            raise CalibrationError(f"the loss is {mean} before the search: the quantized model gives no finite outputs")
        return mean

    def _put(self, best: Mapping[int, Tensor]) -> None:
        for number, genes in best.items():
            self.blocks[number].put(genes)

    def _save(self, work: WorkState, best: Mapping[int, Tensor], search: Search) -> None:
        tensors = {f"genes/{number}": each for number, each in best.items()}
        tensors |= {f"search/{name}": each for name, each in search.state().items()}
        work.save(
            tensors, {"data": self.data, "evaluations": self.evaluations, "losses": self.losses, "gains": self.gains}
        )

    def _resumed(self, work: WorkState, genes: Mapping[int, Genes], best: dict[int, Tensor]) -> Saved | None:
        """Continue from the state that a killed run saved; None if there is none."""
        saved = work.load(_STATE)
        if saved is None:
            return None
        if saved.values["data"] != self.data:
            raise CheckpointError(f"{saved.file} is of other calibration images: give those again, or remove it")
        self.evaluations, self.losses, self.gains = (saved.values[key] for key in ("evaluations", "losses", "gains"))
        passes = self.evaluations // (self.settings.cycles * len(self.blocks))
        if self.evaluations >= self.of or len(self.losses) != passes + 2 or len(self.gains) != len(self.blocks):
            raise saved.damaged()
        for number in self.blocks:
            best[number] = saved.tensor(f"genes/{number}", genes[number].start)
            if not within(genes[number], best[number]):
                raise saved.damaged()
        return saved


def _restore(search: Search, saved: Saved) -> None:
    """Continue a search from a saved state, which may come from any file."""
    state = {name: saved.tensor(f"search/{name}", like) for name, like in search.state().items()}
    try:
        search.restore(state)
    except ValueError as refused:
        raise saved.damaged() from refused
