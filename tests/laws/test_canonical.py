"""Rewrites of graphs preserve the function; questions about dataflow have the answers of a plain search."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.fx import Graph, GraphModule

from vitquant.errors import CaptureError
from vitquant.graph.canonical import canonicalize
from vitquant.graph.capture import capture
from vitquant.graph.einsum import einsum_to_matmul
from vitquant.graph.fingerprint import structural_fingerprint
from vitquant.graph.operators import aten, packet
from vitquant.graph.walk import ancestors, depends_on_input, path_between, positions, root, selected_from

FEW = settings(max_examples=60, deadline=None)
BOUND = 1e-12


def graph_of(*calls, **inputs):
    """A graph of ATen calls `(operator, arguments, keywords)`; a string among the arguments names an input or `%i`."""
    graph, nodes, values = Graph(), {}, {}

    def put(node, name, value):
        nodes[name], values[name] = node, value
        if isinstance(value, torch.Tensor):
            node.meta = {"shape": tuple(value.shape), "dtype": value.dtype, "module": "here"}

    def given_as(argument, known):
        if isinstance(argument, list):
            return [given_as(part, known) for part in argument]
        return known.get(argument, argument) if isinstance(argument, str) else argument

    for name, value in inputs.items():
        put(graph.placeholder(name), name, value)
    for index, (target, arguments, *keywords) in enumerate(calls):
        named = keywords[0] if keywords else {}
        made = [[given_as(part, known) for part in arguments] for known in (nodes, values)]
        kwargs = [{key: given_as(part, known) for key, part in named.items()} for known in (nodes, values)]
        put(graph.call_function(target, tuple(made[0]), kwargs[0]), f"%{index}", target(*made[1], **kwargs[1]))
    graph.output([nodes[f"%{len(calls) - 1}"]])
    return GraphModule(nn.Module(), graph)


def assert_preserved(module, *inputs, bound=BOUND):
    """Canonical form gives what the graph gave; returns the operators that it holds."""
    before = module(*inputs)[0]
    canonicalize(module)
    after = module(*inputs)[0]
    assert after.shape == before.shape
    assert after.dtype == before.dtype
    assert (after - before).abs().max() <= bound * max(1, before.abs().max())
    for node in module.graph.nodes:
        assert node.op in ("placeholder", "output", "get_attr") or node.meta["shape"] is not None
    return [packet(node) for node in module.graph.nodes if node.op == "call_function"]


def assert_shapes_are_right(module, *inputs):
    seen = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, node):
            seen[node] = super().run_node(node)
            return seen[node]

    Recorder(module).run(*inputs)
    for node, value in seen.items():
        if isinstance(value, torch.Tensor):
            assert tuple(node.meta["shape"]) == tuple(value.shape), node
            assert node.meta["dtype"] == value.dtype, node


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


# --- attention ---------------------------------------------------------------------------------------


@FEW
@given(
    batch=st.integers(1, 3), heads=st.integers(1, 3), rows=st.integers(1, 5), columns=st.integers(1, 5),
    width=st.integers(1, 6), mask=st.sampled_from(["none", "bool", "float", "causal"]),
    scale=st.sampled_from([None, 1.0, 0.3]), broadcast=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_attention_is_product_scale_mask_softmax_product(
    batch, heads, rows, columns, width, mask, scale, broadcast, seed
):
    torch.manual_seed(seed)
    inputs = {
        "query": randn(batch, heads, rows, width),
        "key": randn(batch, heads, columns, width),
        "value": randn(batch, heads, columns, width + 1),
    }
    keywords = {"scale": scale, "is_causal": mask == "causal"}
    shape = (rows, columns) if broadcast else (batch, heads, rows, columns)
    if mask == "bool":
        inputs["mask"] = torch.rand(shape) > 0.4
        inputs["mask"][..., 0] = True  # a row that sees nothing is undefined
    if mask == "float":
        inputs["mask"] = randn(*shape)
    if "mask" in inputs:
        keywords["attn_mask"] = "mask"
    module = graph_of((aten.scaled_dot_product_attention.default, ["query", "key", "value"], keywords), **inputs)
    operators = assert_preserved(module, *inputs.values())
    assert_shapes_are_right(module, *inputs.values())
    assert operators.count(aten.matmul) == 2
    assert operators.count(aten.softmax) == 1
    assert aten.scaled_dot_product_attention not in operators
    after_first = operators[operators.index(aten.matmul) + 1]
    assert after_first is aten.mul


def test_grouped_query_attention_is_refused():
    inputs = {"q": randn(1, 4, 3, 2), "k": randn(1, 2, 3, 2), "v": randn(1, 2, 3, 2)}
    module = graph_of((aten.scaled_dot_product_attention.default, ["q", "k", "v"], {"enable_gqa": True}), **inputs)
    with pytest.raises(CaptureError, match="grouped-query"):
        canonicalize(module)


@FEW
@given(
    factors=st.tuples(*[st.sampled_from([None, 0.5, 3.0, -2.0])] * 2), divide=st.booleans(), moved=st.booleans(),
    shared=st.booleans(),
)  # fmt: skip
def test_a_constant_factor_of_an_operand_stands_behind_the_product(factors, divide, moved, shared):
    inputs = {"q": randn(2, 3, 4), "k": randn(2, 4, 3)}
    calls, operands = [], []
    for name, factor in zip("qk", factors, strict=True):
        if factor is not None:
            calls.append((aten.div.Tensor if divide else aten.mul.Tensor, [name, factor]))
            name = f"%{len(calls) - 1}"
        if moved:
            calls += [(aten.transpose.int, [name, 1, 2]), (aten.transpose.int, [f"%{len(calls)}", 1, 2])]
            name = f"%{len(calls) - 1}"
        operands.append(name)
    calls.append((aten.matmul.default, operands))
    if shared:  # something else reads the scaled query: the factor has to stay
        calls.append((aten.matmul.default, [f"%{len(calls) - 1}", operands[0]]))
    module = graph_of(*calls, **inputs)
    operators = assert_preserved(module, *inputs.values())
    assert_shapes_are_right(module, *inputs.values())
    if not shared:
        scales = [operator for operator in operators if operator in (aten.mul, aten.div)]
        product = (factors[0] or 1) * (factors[1] or 1)
        assert len(scales) == (0 if product == 1 else 1)
        assert aten.mul not in operators[: operators.index(aten.matmul)]
        assert aten.div not in operators[: operators.index(aten.matmul)]


# --- products ----------------------------------------------------------------------------------------


@FEW
@given(
    alpha=st.sampled_from([None, 0, 0.5, -2]), beta=st.sampled_from([None, 0, 1, 0.25]), broadcast=st.booleans(),
)  # fmt: skip
def test_baddbmm_is_product_and_sum(alpha, beta, broadcast):
    inputs = {"added": randn(*((1, 1, 5) if broadcast else (2, 3, 5))), "left": randn(2, 3, 4), "right": randn(2, 4, 5)}
    keywords = {key: value for key, value in {"alpha": alpha, "beta": beta}.items() if value is not None}
    module = graph_of((aten.baddbmm.default, list(inputs), keywords), **inputs)
    operators = assert_preserved(module, *inputs.values())
    assert aten.matmul in operators
    assert aten.baddbmm not in operators
    assert_shapes_are_right(module, *inputs.values())


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("keywords", [{}, {"alpha": 2}, {"beta": 0.5}])
def test_addmm_is_linear_unless_it_scales(transposed, keywords):
    inputs = {"bias": randn(5), "left": randn(3, 4), "right": randn(5, 4) if transposed else randn(4, 5)}
    calls = [(aten.t.default, ["right"])] if transposed else []
    calls.append((aten.addmm.default, ["bias", "left", "%0" if transposed else "right"], keywords))
    module = graph_of(*calls, **inputs)
    operators = assert_preserved(module, *inputs.values())
    assert (aten.linear in operators) == (not keywords)
    assert_shapes_are_right(module, *inputs.values())


def test_bmm_is_matmul():
    inputs = {"left": randn(2, 3, 4), "right": randn(2, 4, 5)}
    assert assert_preserved(graph_of((aten.bmm.default, list(inputs)), **inputs), *inputs.values()) == [aten.matmul]


@FEW
@given(st.data())
def test_einsum_of_two_tensors_is_one_matmul(data):
    labels = data.draw(st.permutations("abcdefg"))[: data.draw(st.integers(1, 6))]
    sizes = {label: data.draw(st.integers(1, 4)) for label in labels}
    roles = {label: data.draw(st.sampled_from(["batch", "left", "right", "summed"])) for label in labels}
    terms = [
        "".join(data.draw(st.permutations([label for label in labels if roles[label] in kept])))
        for kept in (("batch", "left", "summed"), ("batch", "right", "summed"), ("batch", "left", "right"))
    ]
    assume(terms[0] and terms[1])
    equation = f"{terms[0]},{terms[1]}->{terms[2]}"
    first, second = (randn(*(sizes[label] for label in term)) for term in terms[:2])
    module = graph_of((aten.einsum.default, [equation, ["first", "second"]]), first=first, second=second)
    operators = assert_preserved(module, first, second)
    assert operators.count(aten.matmul) == 1
    assert aten.einsum not in operators
    assert_shapes_are_right(module, first, second)


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("ab->ba", [(2, 3)]),
        ("ab,bc,cd->ad", [(2, 3), (3, 4), (4, 5)]),
        ("aab,bc->ac", [(2, 2, 3), (3, 4)]),
        ("...ab,...bc->...ac", [(2, 3, 4), (2, 4, 5)]),
        ("ab,cd->ac", [(2, 3), (4, 5)]),
        ("ab,bc", [(2, 3), (3, 4)]),
        ("ab,bc->ac", [(2, 1), (3, 4)]),
    ],
)
def test_other_einsums_are_left_alone(equation, shapes):
    inputs = {f"x{index}": randn(*shape) for index, shape in enumerate(shapes)}
    module = graph_of((aten.einsum.default, [equation, list(inputs)]), **inputs)
    assert assert_preserved(module, *inputs.values()) == [aten.einsum]


def test_an_axis_that_grows_with_the_batch_may_be_merged_once():
    module = graph_of((aten.einsum.default, ["bnhd,bmhd->bhnm", ["q", "k"]]), q=randn(2, 3, 4, 5), k=randn(2, 6, 4, 5))
    call = next(node for node in module.graph.nodes if node.op == "call_function")
    for node in call.all_input_nodes:
        node.meta["shape"] = (-1, *node.meta["shape"][1:])
    einsum_to_matmul(call)
    module.recompile()
    q, k = randn(7, 3, 4, 5), randn(7, 6, 4, 5)
    assert torch.allclose(module(q, k)[0], torch.einsum("bnhd,bmhd->bhnm", q, k), rtol=0, atol=BOUND)
    product = next(node for node in module.graph.nodes if packet(node) is aten.matmul)
    assert product.meta["shape"] == (-1, 4, 3, 6)


# --- what does nothing -------------------------------------------------------------------------------

END = 2**63 - 1


@pytest.mark.parametrize(
    "call",
    [
        (aten.clone.default, ["x"]),
        (aten.contiguous.default, ["x"]),
        (aten.detach.default, ["x"]),
        (aten.alias.default, ["x"]),
        (aten.dropout.default, ["x", 0.5, False]),
        (aten._to_copy.default, ["x"], {"dtype": torch.float64}),
        (aten.slice.Tensor, ["x", 1, 0, END]),
        (aten.slice.Tensor, ["x", 1, 0, 3]),
        (aten.slice.Tensor, ["x"]),
        (aten.pad.default, ["x", [0, 0, 0, 0]]),
        (aten.roll.default, ["x", [0, 0], [1, 2]]),
        (aten.expand.default, ["x", [-1, 3, 4]]),
        (aten.copy.default, ["y", "x"]),
        (aten.slice_scatter.default, ["y", "x", 1, 0, END]),
    ],
)
def test_what_does_nothing_is_gone(call):
    inputs = {"x": randn(2, 3, 4), "y": randn(2, 3, 4)}
    module = graph_of(call, (aten.relu.default, ["%0"]), **inputs)
    assert assert_preserved(module, *inputs.values(), bound=0) == [aten.relu]


@pytest.mark.parametrize(
    "call",
    [
        (aten.slice.Tensor, ["x", 1, 0, 2]),
        (aten.slice.Tensor, ["x", 1, 0, END, 2]),
        (aten.slice.Tensor, ["x", 1, 1, END]),
        (aten._to_copy.default, ["x"], {"dtype": torch.float32}),
        (aten.pad.default, ["x", [0, 1]]),
        (aten.pad.default, ["x", [1, -1]]),
        (aten.roll.default, ["x", [1], [1]]),
        (aten.expand.default, ["z", [2, 3, 4]]),
        (aten.copy.default, ["x", "z"]),
        (aten.slice_scatter.default, ["x", "z", 1, 0, 1]),
        (aten.dropout.default, ["x", 1.0, True]),
    ],
)
def test_what_does_something_stays(call):
    inputs = {"x": randn(2, 3, 4), "z": randn(2, 1, 4)}
    module = graph_of(call, (aten.relu.default, ["%0"]), **inputs)
    assert assert_preserved(module, *inputs.values(), bound=0) == [call[0].overloadpacket, aten.relu]


@pytest.mark.parametrize(
    "call",
    [
        (aten.slice.Tensor, ["x", 0, 1, END]),
        (aten.slice.Tensor, ["x", 0, 0, END, 2]),
        (aten.slice.Tensor, ["x", 0, 0, 2]),
        (aten.slice_scatter.default, ["x", "y", 0, 1, END]),
        (aten.slice_scatter.default, ["x", "y", 0, 0, 2]),
    ],
)
def test_a_part_of_the_batch_is_not_the_batch(call):
    inputs = {"x": randn(3, 4), "y": randn(2, 4)}
    module = graph_of(call, (aten.relu.default, ["%0"]), **inputs)
    for node in module.graph.nodes:
        if "shape" in node.meta:
            node.meta["shape"] = (-1, 4)
    assert assert_preserved(module, *inputs.values(), bound=0) == [call[0].overloadpacket, aten.relu]


def test_a_view_may_follow_a_dropped_copy():
    inputs = {"x": randn(2, 3, 4)}
    module = graph_of(
        (aten.permute.default, ["x", [0, 2, 1]]),
        (aten.clone.default, ["%0"], {"memory_format": torch.contiguous_format}),
        (aten.view.default, ["%1", [2, 12]]),
        **inputs,
    )
    assert assert_preserved(module, inputs["x"], bound=0) == [aten.permute, aten.reshape]


def test_canonical_form_is_its_own_canonical_form():
    captured = capture(Net().double(), randn(2, 3, 8, 8))
    before = structural_fingerprint(captured)
    canonicalize(captured)
    assert structural_fingerprint(captured) == before


# --- walk --------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, width=8, depth=2, eps=1e-5, activation="relu", hidden=16):
        super().__init__()
        self.proj = nn.Conv2d(3, width, 4, 4)
        layer = nn.TransformerEncoderLayer(
            width, 2, hidden, activation=activation, layer_norm_eps=eps, batch_first=True
        )
        self.layers = nn.TransformerEncoder(layer, depth)
        self.eval()

    def forward(self, x):
        return self.layers(self.proj(x).flatten(2).transpose(1, 2))


@pytest.fixture(scope="module")
def captured():
    return capture(Net(), torch.randn(2, 3, 8, 8))


def test_ancestors_are_what_a_search_finds(captured):
    graph = captured.graph
    found, place = ancestors(graph), positions(graph)
    for node in graph.nodes:
        pending, seen = [node], set()
        while pending:
            other = pending.pop()
            if other not in seen:
                seen.add(other)
                pending += other.all_input_nodes
        assert found[node] == sum(1 << place[other] for other in seen)


def test_what_depends_on_the_input_changes_with_it(captured):
    values = []

    class Recorder(torch.fx.Interpreter):
        def run_node(self, node):
            values[-1][node] = result = super().run_node(node)
            return result

    for images in (torch.rand(2, 3, 8, 8), 2 + torch.rand(2, 3, 8, 8)):
        values.append({})
        Recorder(captured).run(images)
    dynamic = depends_on_input(captured.graph)
    for node, first in values[0].items():
        second = values[1][node]
        if isinstance(first, torch.Tensor):
            assert (node in dynamic) == (not torch.equal(first, second)), node


def test_roots_selections_and_paths():
    module = graph_of(
        (aten.relu.default, ["x"]),  # 0
        (aten.permute.default, ["%0", [0, 2, 1]]),
        (aten.reshape.default, ["%1", [2, 12]]),  # 2
        (aten.slice.Tensor, ["%0", 1, 0, 2]),
        (aten.transpose.int, ["%3", 1, 2]),  # 4
        (aten.slice.Tensor, ["%0", 1, 1, 3]),
        (aten.cat.default, [["%3", "%5"], 1]),  # 6: parts of one tensor
        (aten.cat.default, [["%0", "%3"], 1]),  # 7: a tensor and a part of it
        (aten.select.int, ["%3", 1, 0]),  # 8
        (aten.relu.default, ["%4"]),
        x=randn(2, 3, 4),
    )
    calls = [node for node in module.graph.nodes if node.op == "call_function"]
    x = next(iter(module.graph.nodes))
    assert [root(node) for node in calls[:5]] == [calls[0], calls[0], calls[0], calls[3], calls[3]]
    assert root(x) is x
    assert selected_from(calls[0]) is None
    assert [selected_from(calls[index]) for index in (3, 6, 8)] == [calls[0], calls[0], calls[3]]
    assert selected_from(calls[7]) is None
    assert path_between(calls[0], calls[2]) == calls[1:3]
    assert path_between(calls[2], calls[2]) == []


# --- fingerprint -------------------------------------------------------------------------------------


def fingerprint(size=8, **arguments):
    return structural_fingerprint(capture(Net(**arguments), torch.randn(2, 3, size, size)))


def test_the_fingerprint_tells_structures_apart_and_nothing_else():
    first = fingerprint()
    assert fingerprint() == first  # other weights
    assert structural_fingerprint(capture(Net().double(), randn(3, 3, 8, 8))) != first
    others = [
        fingerprint(depth=3), fingerprint(eps=1e-6), fingerprint(activation="gelu"), fingerprint(width=16),
        fingerprint(hidden=24), fingerprint(size=12),
    ]  # fmt: skip
    assert len({first, *others}) == 7


def test_the_fingerprint_does_not_read_names_or_values(captured):
    before = structural_fingerprint(captured)
    with torch.no_grad():
        next(captured.parameters()).add_(1)
    for index, node in enumerate(captured.graph.nodes):
        if node.op == "call_function":
            node.name = f"other_{index}"
    assert structural_fingerprint(captured) == before


def test_the_default_scale_is_that_of_the_width():
    module = graph_of(
        (aten.scaled_dot_product_attention.default, ["q", "k", "v"]), q=randn(1, 1, 2, 9), k=randn(1, 1, 2, 9),
        v=randn(1, 1, 2, 9),
    )  # fmt: skip
    canonicalize(module)
    scale = next(node for node in module.graph.nodes if packet(node) is aten.mul).args[1]
    assert scale == 1 / math.sqrt(9)
