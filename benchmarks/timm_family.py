"""Which Vision Transformers of timm can be captured, and which become integer programs, each at its smallest setting.

Writes `docs/timm-vision-transformers.md`.

Command: python benchmarks/timm_family.py --results RESULTS.jsonl
Cost: about an hour on one core; names that RESULTS.jsonl already holds are not tried again.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import itertools
import json
import logging
import multiprocessing
import re
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch.utils import _pytree as pytree

from vitquant.errors import VitquantError
from vitquant.graph.capture import capture
from vitquant.graph.sites import find_sites
from vitquant.graph.walk import depends_on_input
from vitquant.lowering import lower
from vitquant.model.simulation import ExactSimulation
from vitquant.runtime.on_images import interpreted
from vitquant.tasks.classification import logits_of
from vitquant.workflows import quantize

DOCUMENT = Path(__file__).parents[1] / "docs" / "timm-vision-transformers.md"

# What makes an architecture small, by timm module; the first setting that it accepts is taken, else its own size.
_NARROW = {"embed_dim": 192, "num_heads": 3}
_PLAIN = [
    *({"depth": 2, **_NARROW, "img_size": size} for size in (64, 56)),
    *({"depth": 2, "img_size": size} for size in (64, 56, 96, 160)),
    {"depth": 2},
]
_FOUR_STAGES = [{"depths": (1, 1, 1, 1)}]
_WINDOWS = [
    {"depths": (2, 2), "embed_dim": 48, "num_heads": (2, 4), "img_size": 64, "window_size": 4},
    {"depths": (2, 2), "embed_dim": 48, "num_heads": (2, 4), "img_size": 64},
    {"depths": (2, 2, 2, 2), "img_size": 128},
]
SMALLEST: dict[str, list[dict[str, Any]]] = {
    "beit": _PLAIN,
    "cait": [{"depth": 2, **_NARROW, "img_size": 64}],
    "coat": [{"serial_depths": (1, 1, 1, 1), "parallel_depth": depth, "img_size": 64} for depth in (1, 0)],
    "convit": [{"depth": 3, "local_up_to_layer": 2, "img_size": 64}],
    "cpubone": [{"depth_list": (1, 1, 1, 1, 1)}],
    "crossvit": [{"depth": ((1, 1, 0),)}],
    "csatv2": [{"depths": (1, 1, 2, 2), "transformer_depths": (0, 0, 1, 1)}],
    "davit": _FOUR_STAGES,
    "deepseek_vit": _PLAIN,
    "deit": _PLAIN,
    "edgenext": [{"depths": (2, 2, 2, 2)}],
    "efficientformer": [{"depths": (1, 1, 1, 2), "num_vit": 1}],
    "efficientformer_v2": [{"depths": (1, 1, 2, 2), "num_vit": 1, "img_size": 64}],
    "efficientvit_mit": [{"depths": (1, 1, 1, 1)}],
    "efficientvit_msra": [{"depth": (1, 1, 1), "img_size": 128}],
    "eva": [
        *_PLAIN[:2],
        {"depth": 2, "embed_dim": 256, "num_heads": 4, "num_kv_heads": 2, "img_size": 64},
        *_PLAIN[2:],
    ],
    "fastvit": [{"layers": (1, 1, 1, 1)}],
    "gcvit": [{"img_size": 64}],
    "gemma4_vit": [{"depth": 2, "img_size": 96}],
    "hiera": [{"stages": (1, 1, 1, 1)}],
    "hieradet_sam2": [{"stages": (1, 1, 1, 1)}],
    "iformer": [],
    "levit": [{"depth": (1, 1, 1), "img_size": 64}],
    "lowformer": [{"depth_list": (1, 1, 1, 1, 1)}],
    "maxxvit": [{"depths": (1, 1, 1, 1), "img_size": size} for size in (64, 128, 224, 256)],
    "metaformer": [],
    "mobilenetv5": [],
    "mobilevit": [],
    "mvitv2": [{"img_size": 64}],
    "naflexvit": [{"depth": 2, **_NARROW}, {"depth": 2}],
    "nest": [{"img_size": 64}],
    "nextvit": [],
    "pit": [{"depth": (1, 1, 1), "img_size": 64}],
    "pvt_v2": _FOUR_STAGES,
    "qwen3_vit": [{"depth": 2, "img_size": 64}],
    "shvit": [{"depth": (1, 1, 1)}],
    "swiftformer": [{"layers": (1, 1, 1, 1)}],
    "swin_transformer": _WINDOWS,
    "swin_transformer_v2": _WINDOWS,
    "swin_transformer_v2_cr": [{"depths": (2, 2), "embed_dim": 48, "num_heads": (2, 4), "img_size": 64}],
    "tiny_vit": _FOUR_STAGES,
    "tnt": [{"depth": 2, "img_size": 64}],
    "twins": [{"depths": (2, 2, 2, 2), "img_size": 64}],
    "visformer": [{"depth": (2, 2, 2), "img_size": 64}, {"depth": 4, "img_size": 64}],
    "vision_transformer": _PLAIN,
    "vision_transformer_hybrid": [{"depth": 2, "img_size": size} for size in (64, 128)],
    "vision_transformer_relpos": _PLAIN,
    "vision_transformer_sam": [{"depth": 2, **_NARROW, "img_size": 64, "global_attn_indexes": (1,)}, *_PLAIN],
    "vitamin": [{"depth": 2, "img_size": 64}],
    "volo": [{"img_size": 64}],
    "xcit": [{"depth": 2, "cls_attn_layers": 1, "img_size": 64}],
}
LEFT_OUT = {
    "byoanet, byobnet, mobilenetv3, nfnet, resnet and the like": "convolutional networks, some with attention inside",
    "convnext, efficientnet, ...": "convolutional networks",
    "efficientvim, mambaout": "state-space models",
    "fasternet, focalnet, inception_next, rdnet, repvit, starnet": "no attention",
    "mlp_mixer, sequencer": "multi-layer perceptrons and recurrent networks in place of attention",
}
SIZES = (64, 96, 128, 192, 224, 256)  # of images, where the constructor is not told
SECONDS = 300  # for one name
LARGEST = 4e8  # parameters, where nothing makes it smaller
SAME_LOGITS = 0.4  # of two images; one code that flips in float64 too may change all logits of one of them
BOUND = 1e-4  # of the largest output, in float32
_ANSWERS = {True: "yes", False: "no", None: "-"}
_OF_THE_WEIGHTS = {"pretrained_cfg", "default_cfg"}

_NAMED = re.compile(
    r"(blocks\.\d+\.(attn\.(scores|softmax|context|proj|qkv|(query|key|value)(_(key|value))?)(_norm)?|mlp\.(act|fc\d)"
    r"|norm\d|residual\d)|patch_embed(\.norm)?|tokens|pos_embed|norm|head|pool|output|merge\.\d+\.(norm|reduction))(_\d+)?"
)


@dataclass(frozen=True)
class Finding:
    """What became of one name.

    Arguments:
        name, module: timm's.
        setting: what the constructor was told, and the image size.
        captured: whether capture succeeded and the graph equals the model at batch 1, 2 and 5.
        difference: largest difference of an output, over the largest output.
        sites, attention, unnamed: how many sites, how many of them scores, how many named after their module.
        reason: why it was not captured, or not found to be attention.
        lowers: whether `fq-vit` gives an integer program whose logits are those of the float64 simulation; None where
            nobody tried.
        refused: why it does not.
        seconds: capture and sites.
        structure: the same for two names that differ in nothing at their smallest setting.
    """

    name: str
    module: str
    setting: str = ""
    captured: bool = False
    difference: float = 0.0
    sites: int = 0
    attention: int = 0
    unnamed: int = 0
    reason: str = ""
    lowers: bool | None = None
    refused: str = ""
    seconds: float = 0.0
    structure: str = ""


def family() -> list[tuple[str, str]]:
    """Module and name of every Vision Transformer of the installed timm."""
    return [(module, name) for module in SMALLEST for name in timm.list_models(module=module)]


def examine(module: str, name: str, known: Mapping[str, Finding]) -> Finding:
    """Build one name at its smallest setting, capture it, compare it and find its sites.

    Arguments:
        module, name: timm's.
        known: earlier findings by structure; the same structure is not captured again.
    """
    torch.manual_seed(0)
    started = time.monotonic()
    try:
        model, size, setting = _smallest(module, name)
    except ValueError as error:
        return Finding(name, module, reason=f"not built: {error}")
    if (structure := _structure(model, size)) in known:
        return replace(known[structure], name=name, module=module, setting=setting, seconds=0.0)
    vary(model)
    try:
        started = time.monotonic()
        captured = capture(model, torch.randn(2, 3, size, size))
        sites = find_sites(captured)
        difference = max(relative_difference(captured, model, torch.randn(n, 3, size, size)) for n in (1, 2, 5))
    except VitquantError as error:
        seconds = round(time.monotonic() - started, 1)
        return Finding(name, module, setting, reason=str(error), seconds=seconds, structure=structure)
    attention = sum(site.kind == "scores" for site in sites)
    same_keys = captured.state_dict().keys() == model.state_dict().keys()
    reason = "" if same_keys else "other state-dict keys"
    if difference >= BOUND:
        reason = "not the float model"
    elif not attention:
        softmax = any("softmax" in str(node.target) for node in depends_on_input(captured.graph))
        reason = "its softmax does not lie between two products" if softmax else "no softmax"
    refused = _refused(model, size)
    return Finding(
        name,
        module,
        setting,
        lowers=not refused,
        refused=refused,
        captured=same_keys and difference < BOUND,
        difference=difference,
        sites=len(sites),
        attention=attention,
        unnamed=sum(_NAMED.fullmatch(site.name) is None for site in sites),
        reason=reason,
        seconds=round(time.monotonic() - started, 1),
        structure=structure,
    )


def _refused(model: nn.Module, size: int) -> str:
    """Why the model has no integer program by `fq-vit` on random images; empty when it has, and it is right."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(2, 3, size, size, generator=generator) for _ in range(2)]
    try:
        quantized = quantize(model, "fq-vit", batches, simulated=True)
        program = lower(quantized)
    except VitquantError as error:
        return str(error).partition(";")[0]
    with torch.inference_mode():
        codes = interpreted(program)(batches[0])
        simulated = logits_of(ExactSimulation(quantized)(batches[0])).float()
    same = torch.isclose(codes, simulated, rtol=1e-5).double().mean().item()
    return "" if same > SAME_LOGITS else f"only {same:.0%} of the logits are the simulation's"


def _smallest(module: str, name: str) -> tuple[nn.Module, int, str]:
    """The model by the first setting that its constructor and its forward accept."""
    refused = ""
    own = timm.get_pretrained_cfg(name)
    for arguments, classes in itertools.product([*SMALLEST[module], {}], ({"num_classes": 10}, {})):
        try:
            if not arguments and (parameters := _parameters(name)) > LARGEST:
                raise ValueError(f"{parameters / 1e6:.0f} million parameters at its own size; {refused}")
            model = timm.create_model(name, **{**arguments, **classes}).eval()  # type: ignore[arg-type]
        except Exception as error:
            refused = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        sizes = [arguments["img_size"]] if "img_size" in arguments else [*SIZES, own.input_size[-1] if own else 224]
        for size in sizes:
            try:
                with torch.no_grad():
                    model(torch.zeros(1, 3, size, size))
            except Exception as error:
                refused = f"{type(error).__name__}: {error}".splitlines()[0]
                continue
            text = ", ".join(f"{key}={value}" for key, value in arguments.items() if key != "img_size")
            return model, size, f"{text or 'own size'}; {size} px"
        del model
        gc.collect()
    raise ValueError(refused)


def _parameters(name: str) -> int:
    """How many parameters a name has at its own size, without memory for them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in timm.create_model(name).parameters())


def _structure(model: nn.Module, size: int) -> str:
    """A hash of every module's class and settings, and of the shapes of all tensors."""
    digest = hashlib.sha256(f"{size}".encode())
    for path, module in model.named_modules():
        settings = {key: value for key, value in vars(module).items() if key[0] != "_" and key not in _OF_THE_WEIGHTS}
        text = re.sub(r" at 0x[0-9a-f]+", "", repr(settings))
        tensors = [(key, tuple(tensor.shape)) for key, tensor in module.state_dict(keep_vars=True).items()]
        digest.update(f"{path} {type(module)} {text} {tensors}".encode())
    return digest.hexdigest()[:16]


def vary(model: nn.Module) -> None:
    """Random values everywhere, lest a zero-initialized layer or layer scale hides the blocks behind it."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                module.running_mean += 0.1 * torch.randn_like(module.running_mean)
                module.running_var *= 0.5 + torch.rand_like(module.running_var)  # type: ignore[operator]


@torch.no_grad()
def relative_difference(captured: nn.Module, model: nn.Module, images: torch.Tensor) -> float:
    """The largest difference of an output, over the largest output."""
    pairs = zip(pytree.tree_leaves(captured(images)), pytree.tree_leaves(model(images)), strict=True)
    tensors = [(left, right) for left, right in pairs if isinstance(right, torch.Tensor)]
    return max(((left - right).abs().max() / right.abs().max().clamp(min=1e-9)).item() for left, right in tensors)


def _one(module: str, name: str, known: Mapping[str, Finding], pipe: Any) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    try:
        finding = examine(module, name, known)
    except Exception as error:  # a fault of ours, to be read in the table
        finding = Finding(name, module, reason=f"{type(error).__name__}: {error}".splitlines()[0])
    pipe.send(asdict(finding))


def examine_apart(module: str, name: str, known: Mapping[str, Finding]) -> Finding:
    """As `examine`, in a process of its own that is ended after a time limit."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_one, args=(module, name, known, there))
    process.start()
    there.close()
    try:
        if here.poll(SECONDS):
            return Finding(**here.recv())
        return Finding(name, module, reason=f"not done after {SECONDS} seconds")
    except EOFError:
        return Finding(name, module, reason="the process ended without a result")
    finally:
        process.kill()
        process.join()


def read_results(path: Path) -> dict[str, Finding]:
    """What earlier runs found, by name."""
    if not path.exists():
        return {}
    findings = (Finding(**json.loads(line)) for line in path.read_text().splitlines())
    return {finding.name: finding for finding in findings}


# --- the document ------------------------------------------------------------------------------------


def document(findings: Iterable[Finding]) -> str:
    """The committed list: names with the same outcome share a row."""
    findings = list(findings)
    captured, attention = sum(f.captured for f in findings), sum(f.captured and f.attention > 0 for f in findings)
    lowered, tried = sum(f.lowers is True for f in findings), sum(f.lowers is not None for f in findings)
    lines = [
        "# Vision Transformers of timm: which can be captured, and which run in integers",
        "",
        "Made by `python benchmarks/timm_family.py --results RESULTS.jsonl`;",
        f"timm {timm.__version__}, torch {torch.__version__.partition('+')[0]}.",
        "`tests/zoo/test_timm_family.py` checks it.",
        "",
        f"{len(findings)} names: {captured} captured, {attention} of them with a softmax between two products,",
        f"{lowered} of {tried} that were tried with an integer program.",
        "Each is made by its own entry point with the fewest layers, width and image size that it accepts, with random",
        "weights, and compared with its capture in float32 at batch 1, 2 and 5; names that give the same modules with",
        "the same settings are captured once. *Difference* is the largest one of an output, over the largest output,",
        "from rounding in another order. *Attention* counts products of query and key; *by module* the sites that",
        "the common structure has no name for, so that they are named after their module. *Lowers*: the recipe",
        "`fq-vit` gives an integer program, whose logits were compared with the float64 simulation's on two images;",
        "else the remark says what has no integer form.",
        "",
        "Not in the list:",
        "",
        *(f"- {modules}: {reason}" for modules, reason in LEFT_OUT.items()),
    ]
    for module, group in itertools.groupby(sorted(findings, key=_order), key=lambda finding: finding.module):
        lines += [
            "",
            f"## {module}",
            "",
            "| names | captured | difference | sites | attention | by module | lowers | remark |",
        ]
        lines += ["|---|---|---|---|---|---|---|---|"]
        lines += list(_rows(group))
    return "\n".join(lines) + "\n"


def _order(finding: Finding) -> tuple:
    return finding.module, *_outcome(finding), finding.name


def _outcome(finding: Finding) -> tuple:
    counts = finding.sites, finding.attention, finding.unnamed
    return not finding.captured, *counts, str(finding.lowers), finding.reason, finding.refused


def _rows(findings: Iterable[Finding]) -> Iterator[str]:
    for _, group in itertools.groupby(findings, key=_outcome):
        same = list(group)
        first = same[0]
        names = ", ".join(f"`{finding.name}`" for finding in same)
        worst = f"{max(finding.difference for finding in same):.0e}" if first.sites else "-"
        counts = [str(count) if first.sites else "-" for count in (first.sites, first.attention, first.unnamed)]
        remark = "; ".join(text for text in (first.reason, first.refused) if text).replace("|", "\\|")
        yield f"| {' | '.join([names, _ANSWERS[first.captured], worst, *counts, _ANSWERS[first.lowers], remark])} |"


def read_document(text: str) -> dict[str, tuple[bool, int, int, int, bool | None]]:
    """For each name of the committed list: captured, sites, attention, sites named after their module, lowers."""
    found = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| `"):
            counts = tuple(0 if cell == "-" else int(cell) for cell in cells[3:6])
            for name in re.findall("`([^`]+)`", cells[0]):
                found[name] = (cells[1] == "yes", *counts, {"yes": True, "no": False}.get(cells[6]))
    return found


def versions_of_document(text: str) -> dict[str, str]:
    """The versions of timm and torch that the committed list was made with."""
    return dict(re.findall(r"\b(timm|torch) (\d+(?:\.\d+)+)", text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--results", type=Path, required=True, help="JSON lines, one for each name done; outside of the repository"
    )
    parser.add_argument("--only", default="", help="a regular expression that names must match; writes no document")
    arguments = parser.parse_args()
    done = read_results(arguments.results)
    names = [(module, name) for module, name in family() if re.search(arguments.only, name)]
    for index, (module, name) in enumerate(names):
        if name in done:
            continue
        known = {finding.structure: finding for finding in done.values() if finding.structure}
        done[name] = finding = examine_apart(module, name, known)
        with arguments.results.open("a") as file:
            file.write(json.dumps(asdict(finding)) + "\n")
        print(f"{index + 1}/{len(names)} {name}: {'captured' if finding.captured else finding.reason}", flush=True)
    if not arguments.only:
        DOCUMENT.write_text(document(done[name] for _, name in names))


if __name__ == "__main__":
    main()
