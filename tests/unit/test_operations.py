"""What is said of every operation, and that it is true."""

import json

import pytest
import torch
from rich.console import Console

from vitquant.recipe import Assignment
from vitquant.report.operations import classify, list_operations, summarize
from vitquant.report.tables import operations_table, summary_text
from vitquant.spec import Log2, PerAxis, PerHead, QuantSpec
from vitquant.workflows import quantize


def vit(**arguments):
    import timm

    sizes = {"depth": 1, "embed_dim": 48, "num_heads": 3, "img_size": 32, "num_classes": 7}
    return timm.create_model("vit_tiny_patch16_224", **{**sizes, **arguments}).eval()


def operations_of(model, *settings, size=32):
    images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    quantized = quantize(model, "minmax", [images], settings=settings)
    return quantized, {operation.name: operation for operation in list_operations(quantized)}


@pytest.fixture(scope="module")
def plain():
    return operations_of(vit(init_values=0.1))  # with LayerScale


def assigned(**operands):
    return {
        name: Assignment(spec, None if spec is None else "minmax", "a-rule" if spec else "left-alone")
        for name, spec in operands.items()
    }


U8, S8 = QuantSpec(8), QuantSpec(8, signed=True, symmetric=True, granularity=PerAxis(0))


def test_products_of_quantized_operands_are_integer():
    assert classify("linear", assigned(input=U8, weight=S8), True)[0] == "integer"
    assert classify("scores", assigned(query=QuantSpec(8, granularity=PerHead()), key=U8), True)[0] == "integer"
    assert classify("context", assigned(probs=QuantSpec(4, scheme=Log2()), value=U8), True)[0] == "integer"


@pytest.mark.parametrize("kind", ["layer_norm", "softmax", "activation"])
def test_what_has_no_integer_kernel_is_float_whatever_is_quantized(kind):
    assert classify(kind, assigned(input=U8), True) == ("float", "between quantized tensors")
    assert classify(kind, assigned(input=U8), False) == ("float", "on a quantized tensor")


def test_an_operand_left_in_float_makes_its_operation_float_and_is_named_with_the_rule():
    assert classify("linear", assigned(input=U8, weight=None), True) == (
        "float",
        "its weight is left in float by rule left-alone",
    )
    unmatched = {"input": Assignment(None, None, "")}
    assert classify("activation", unmatched, True) == ("float", "its input is matched by no rule")


def test_more_than_8_bits_are_not_called_integer():
    arithmetic, reason = classify("linear", assigned(input=QuantSpec(10), weight=S8), True)
    assert arithmetic == "float"
    assert "10 bits" in reason


@pytest.mark.parametrize(("kind", "operand"), [("linear", "input"), ("scores", "key"), ("context", "probs")])
def test_a_scale_for_each_summed_channel_is_not_called_integer(kind, operand):
    spec = QuantSpec(8, granularity=PerAxis(-1))
    arithmetic, reason = classify(kind, assigned(**{operand: spec, "weight": S8}), True)
    assert arithmetic == "float"
    assert operand in reason
    assert classify("context", assigned(value=spec, probs=U8), True)[0] == "integer"  # its channels stay apart


def test_every_operation_of_the_graph_is_listed_once(plain):
    quantized, operations = plain
    nodes = quantized.graph_module.graph.nodes
    computing = [n for n in nodes if n.op == "call_function" and ("shape" in n.meta or "shapes" in n.meta)]
    assert len(list_operations(quantized)) == len(computing) + 1  # and the output
    assert {site.name for site in quantized.sites} <= set(operations)


def test_a_block_of_a_vit(plain):
    _, operations = plain
    found = {
        name: operations[f"blocks.0.{name}"].arithmetic for name in ("norm1", "attn.qkv", "attn.scores", "mlp.act")
    }
    assert found == {"norm1": "float", "attn.qkv": "integer", "attn.scores": "integer", "mlp.act": "float"}
    assert operations["blocks.0.mlp.act"].reason == "its input is left in float by rule activation-inputs"
    assert operations["blocks.0.attn.softmax"].reason == "between quantized tensors"
    assert operations["norm"].reason == "between quantized tensors"  # the head reads one token of it


def test_operations_that_are_no_sites(plain):
    _, operations = plain
    others = [(o.kind, o.arithmetic, o.reason) for o in operations.values() if not o.operands]
    assert others.count(("mul", "fused", "part of blocks.0.attn.scores")) == 1  # 1 / sqrt(head width)
    assert others.count(("mul", "fused", "part of blocks.0.attn.proj")) == 1  # LayerScale
    assert others.count(("mul", "fused", "part of blocks.0.mlp.fc2")) == 1
    assert ("expand", "constant", "the same for every image") in others  # the class token
    assert ("permute", "moves data", "moves data") in others
    assert not {kind for kind, arithmetic, _ in others if arithmetic == "float"}


def test_operands_tell_the_numbers_of_their_quantizers(plain):
    quantized, operations = plain
    for name, quantizer in quantized.quantizers.items():
        site, _, operand_name = name.partition(":")
        operand = next(o for o in operations[site].operands if o.name == operand_name)
        assert operand.spec == quantizer.spec
        assert operand.scale == (quantizer.scale.min().item(), quantizer.scale.max().item())
        low, high = quantizer.range()
        assert operand.range == (low.min().item(), high.max().item())
    left = operations["blocks.0.mlp.act"].operands[0]
    assert (left.spec, left.scale, left.rule) == (None, None, "activation-inputs")


def test_macs_are_those_of_the_formulas(plain):
    quantized, operations = plain
    tokens, width, heads = 5, 48, 3  # 2 x 2 patches and the class token
    expected = {
        "patch_embed": 4 * width * 3 * 16 * 16,
        "blocks.0.attn.qkv": tokens * width * 3 * width,
        "blocks.0.attn.scores": heads * tokens * tokens * (width // heads),
        "blocks.0.attn.context": heads * tokens * tokens * (width // heads),
        "blocks.0.attn.proj": tokens * width * width,
        "blocks.0.mlp.fc1": tokens * width * 4 * width,
        "blocks.0.mlp.fc2": tokens * width * 4 * width,
        "head": width * 7,
    }
    assert {name: o.macs for name, o in operations.items() if o.macs} == expected
    summary = summarize(list_operations(quantized))
    assert summary["macs"] == summary["quantized_macs"] == sum(expected.values())


def test_products_with_an_operand_in_float_do_not_count_as_quantized():
    quantized, operations = operations_of(vit(), "weights.float=true")
    summary = summarize(list_operations(quantized))
    attention = sum(operations[f"blocks.0.attn.{name}"].macs for name in ("scores", "context"))
    assert summary["quantized_macs"] == attention
    assert summary["quantized_operands"] < summary["operands"]


def test_windows_are_counted_although_they_stand_in_the_batch_dimension():
    import timm

    model = timm.create_model(
        "swin_tiny_patch4_window7_224", depths=(2,), embed_dim=24, num_heads=(2,), img_size=32, window_size=4
    ).eval()
    _, operations = operations_of(model)
    tokens = 8 * 8
    assert operations["blocks.1.attn.qkv"].macs == tokens * 24 * 72
    assert operations["blocks.1.attn.scores"].macs == tokens * 16 * 24  # each token with the 16 of its window
    parts = [o.kind for o in operations.values() if o.reason == "part of blocks.1.attn.scores"]
    assert sorted(parts) == ["add", "add", "mul"]  # position bias, mask of the shifted windows, scale


def test_plain_values_are_json_and_tables_cut_nothing_at_80_columns(plain):
    quantized, operations = plain
    listed = list_operations(quantized)
    assert json.loads(json.dumps([o.to_dict() for o in listed], allow_nan=False))[0]["operands"][0]["bits"] == 8
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(operations_table(listed))
    text = console.export_text()
    assert "…" not in text
    named = [o.name for o in operations.values() if o.operands]
    assert named
    assert all(name in text for name in named)
    assert "100.0 % of" in summary_text(summarize(listed))
