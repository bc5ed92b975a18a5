"""Sites and values: the same names wherever the structure is the same, and one value for one tensor."""

import re

import pytest
import timm
import torch
import torchvision
import transformers
from torch import nn

from vitquant.graph.capture import capture
from vitquant.graph.kinds import KINDS, OPERANDS
from vitquant.graph.operators import aten, calls, is_rearrangement, is_selection
from vitquant.graph.sites import find_sites, find_values

CLASSES = 5


# --- models ------------------------------------------------------------------------------------------


class PreNorm(nn.Module):
    """A user's Vision Transformer on `nn.TransformerEncoder`."""

    def __init__(self, post_norm=False, activation="gelu", batch_first=True):
        super().__init__()
        self.proj = nn.Conv2d(3, 32, 8, 8)
        self.cls, self.pos = nn.Parameter(torch.randn(1, 1, 32)), nn.Parameter(torch.randn(1, 17, 32))
        self.batch_first = batch_first
        layer = nn.TransformerEncoderLayer(
            32, 2, 64, activation=activation, batch_first=batch_first, norm_first=not post_norm
        )
        self.encoder = nn.TransformerEncoder(layer, 2, norm=None if post_norm else nn.LayerNorm(32))
        self.fc = nn.Linear(32, CLASSES)

    def forward(self, x):
        x = self.proj(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.pos
        x = self.encoder(x) if self.batch_first else self.encoder(x.transpose(0, 1)).transpose(0, 1)
        return self.fc(x[:, 0])


class Rotary(nn.Module):
    """Rotary position embedding on query and key, an additive mask, and the scale on the query."""

    def __init__(self):
        super().__init__()
        self.proj, self.norm = nn.Conv2d(3, 32, 8, 8), nn.LayerNorm(32)
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))
        self.register_buffer("mask", torch.triu(torch.full((16, 16), float("-inf")), 1), persistent=False)
        self.fc = nn.Linear(32, CLASSES)

    def rotate(self, x):
        angle = torch.arange(16)[:, None] / 10 ** torch.arange(8)
        first, second = x.chunk(2, -1)
        return torch.cat([first * angle.cos() - second * angle.sin(), first * angle.sin() + second * angle.cos()], -1)

    def forward(self, x):
        x = self.proj(x).flatten(2).transpose(1, 2)
        y = self.norm(x)
        q, k, v = (layer(y).unflatten(-1, (2, 16)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        probs = ((self.rotate(q) * 0.25) @ self.rotate(k).mT + self.mask).softmax(-1)
        return self.fc((x + self.o((probs @ v).transpose(1, 2).flatten(2))).mean(1))


class ConvolutionalStem(nn.Module):
    """Convolutions with a residual addition in front of attention, pooled over the image at the end."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 8, 8), nn.BatchNorm2d(32), nn.ReLU())
        self.conv, self.gain = nn.Conv2d(32, 32, 3, padding=1), nn.Parameter(torch.ones(32, 1, 1))
        self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))
        self.fc = nn.Linear(32, CLASSES)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.gain * self.conv(x)
        y = x.flatten(2).transpose(1, 2)
        y = y + (self.q(y) @ self.k(y).mT * 0.2).softmax(-1) @ self.v(y)
        return self.fc(y.transpose(1, 2).unflatten(2, (4, 4)).mean((2, 3)))


def timm_vit():
    return timm.create_model(
        "deit_tiny_patch16_224", depth=2, embed_dim=32, num_heads=2, img_size=32, patch_size=8, num_classes=CLASSES
    )


def torchvision_vit():
    return torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=CLASSES)


def transformers_vit(kind="ViT"):
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8,
        num_labels=CLASSES,
    )  # fmt: skip
    return getattr(transformers, f"{kind}ForImageClassification")(config)


def timm_swin():
    return timm.create_model(
        "swin_tiny_patch4_window7_224", depths=(2, 2), embed_dim=16, num_heads=(2, 4), img_size=64, window_size=4,
        num_classes=CLASSES,
    )  # fmt: skip


def torchvision_swin():
    return torchvision.models.SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=CLASSES)


def transformers_swin():
    config = transformers.SwinConfig(
        embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, image_size=64, num_labels=CLASSES
    )
    return transformers.SwinForImageClassification(config)


def timm_model(name, size=32, plain=True, **arguments):
    if plain:
        arguments |= {"depth": 2, "embed_dim": 32, "num_heads": 2}
    return lambda: timm.create_model(name, num_classes=CLASSES, img_size=size, **arguments), size


MODELS = {
    "timm deit": (timm_vit, 32),
    "torchvision vit": (torchvision_vit, 32),
    "transformers vit": (transformers_vit, 32),
    "transformers deit": (lambda: transformers_vit("DeiT"), 32),
    "encoder": (PreNorm, 32),
    "encoder, sequence first": (lambda: PreNorm(batch_first=False), 32),
    "encoder, post-norm": (lambda: PreNorm(post_norm=True, activation="relu"), 32),
    "timm swin": (timm_swin, 64),
    "torchvision swin": (torchvision_swin, 64),
    "transformers swin": (transformers_swin, 64),
    "rotary": (Rotary, 32),
    "convolutional stem": (ConvolutionalStem, 32),
    "registers": timm_model("vit_small_patch14_reg4_dinov2", 28),
    "distilled": timm_model("deit_tiny_distilled_patch16_224"),
    "cait": timm_model("cait_xxs24_224"),
    "eva02": timm_model("eva02_tiny_patch14_224", 28),
    "siglip": timm_model("vit_base_patch16_siglip_224"),
    "mean pooling": timm_model("vit_tiny_patch16_224", class_token=False, global_pool="avg", qk_norm=True),
    "hiera": timm_model("hiera_tiny_224", 64, plain=False, stages=(1, 1, 1, 1), embed_dim=16, num_heads=1),
    "levit": timm_model("levit_128s", plain=False, embed_dim=(16, 32), depth=(1, 1), num_heads=(2, 2), key_dim=8),
}
CAPTURED = {}


def sites_of(name):
    """Graph, sites and values of a model, captured once."""
    if name not in CAPTURED:
        build, size = MODELS[name]
        torch.manual_seed(0)
        graph = capture(build().eval(), torch.randn(2, 3, size, size))
        sites = find_sites(graph)
        CAPTURED[name] = graph, sites, find_values(graph, sites)
    return CAPTURED[name]


def described(name):
    """What names a site: its name, kind, operands and block."""
    return [(site.name, site.kind, tuple(site.operands), site.block) for site in sites_of(name)[1]]


def value_named(name, reader):
    values = sites_of(name)[2]
    return next(value for value in values if reader in map(str, value.readers))


# --- names -------------------------------------------------------------------------------------------

JOINT = [f"blocks.{{}}.{part}" for part in (
    "norm1", "attn.qkv", "attn.scores", "attn.softmax", "attn.context", "attn.proj", "residual1", "norm2", "mlp.fc1",
    "mlp.act", "mlp.fc2", "residual2",
)]  # fmt: skip


def blocks(numbers):
    return [name.format(number) for number in numbers for name in JOINT]


def test_a_vision_transformers_names():
    names = [site.name for site in sites_of("timm deit")[1]]
    assert names == ["patch_embed", "tokens", "pos_embed", *blocks(range(2)), "norm", "head", "output"]


def test_a_swins_names():
    names = [site.name for site in sites_of("timm swin")[1]]
    merging = ["merge.0.norm", "merge.0.reduction"]
    stem, end = ["patch_embed", "patch_embed.norm"], ["norm", "pool", "head", "output"]
    assert names == [*stem, *blocks([0, 1]), *merging, *blocks([2, 3]), *end]


@pytest.mark.parametrize(
    ("name", "made_by"),
    [
        (
            "timm deit",
            {
                "patch_embed:input": "image", "patch_embed:weight": "", "blocks.0.attn.qkv:input": "layer_norm",
                "blocks.0.attn.scores:query": "linear", "blocks.0.attn.proj:input": "context",
                "blocks.0.mlp.fc2:input": "activation", "blocks.0.norm1:input": "residual", "head:input": "layer_norm",
            },
        ),
        ("siglip", {"blocks.0.attn.scores:query": "linear"}),
        # turned in two halves, which are several things, and then scaled
        ("rotary", {"blocks.0.attn.scores:query": "", "blocks.0.attn.context:value": "linear"}),
        ("mean pooling", {"blocks.0.attn.scores:query": "layer_norm"}),
        ("timm swin", {"merge.0.reduction:input": "layer_norm", "head:input": "pool"}),
    ],
)  # fmt: skip
def test_what_values_come_from(name, made_by):
    assert {reader: value_named(name, reader).made_by for reader in made_by} == made_by


@pytest.mark.parametrize("other", ["torchvision vit", "encoder", "encoder, sequence first"])
def test_vision_transformers_are_named_alike(other):
    assert described(other) == described("timm deit")


def test_swins_are_named_alike():
    assert described("torchvision swin") == described("timm swin")


@pytest.mark.parametrize(
    ("other", "reference"),
    [
        ("transformers vit", "timm deit"),
        ("transformers deit", "distilled"),
        ("transformers swin", "timm swin"),
    ],
)
def test_transformers_differs_in_its_separate_projections_only(other, reference):
    def rest(name):
        return {site for site in described(name) if not re.search(r"attn\.(qkv|query|key|value)$", site[0])}

    def projections(name, number):
        names = [site for site, *_ in described(name) if re.search(r"attn\.(qkv|query|key|value)$", site)]
        return {site.rpartition(".")[2] for site in names if site.startswith(f"blocks.{number}.")}

    heads = {("head_2", "linear", ("input", "weight"), None), ("residual", "residual", ("lhs", "rhs"), None)}
    # timm's distilled head is two heads and their mean; transformers' classifier reads the class token alone
    assert rest(other) == rest(reference) - heads
    assert projections(other, 1) == {"query", "key", "value"}
    assert projections(reference, 1) == {"qkv"}


def test_post_norm_blocks_end_with_their_norms():
    names = [site.name for site in sites_of("encoder, post-norm")[1] if site.block == 1]
    parts = [name.removeprefix("blocks.1.") for name in names]
    assert parts == [
        "attn.qkv", "attn.scores", "attn.softmax", "attn.context", "attn.proj", "residual1", "norm1",
        "mlp.fc1", "mlp.act", "mlp.fc2", "residual2", "norm2",
    ]  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_names_are_unique_and_their_words_are_known(name):
    graph, sites, values = sites_of(name)
    assert len({site.name for site in sites}) == len(sites)
    assert len({value.name for value in values}) == len(values)
    assert {site.kind for site in sites} <= set(KINDS)
    assert {operand for site in sites for operand in site.operands} <= set(OPERANDS)
    nodes = {node.name for node in graph.graph.nodes}
    assert {operand for site in sites for operand in site.operands.values()} <= nodes
    assert [site.name for site in sites][-1] == "output"
    assert len([site for site in sites if site.name == "head"]) == 1


@pytest.mark.parametrize("name", MODELS)
def test_blocks_are_numbered_in_order(name):
    numbers = [site.block for site in sites_of(name)[1] if site.kind == "scores" and site.block is not None]
    assert numbers == list(range(len(numbers)))
    for site in sites_of(name)[1]:
        prefix = re.match(r"blocks\.(\d+)\.(norm|attn\.(scores|proj)|residual|mlp)", site.name)
        if prefix and site.block is not None:
            assert int(prefix.group(1)) == site.block


def test_attention_pooling_is_no_block():
    names = [site.name for site in sites_of("siglip")[1]]
    assert names[3 + 24 - 1 :] == [
        "norm", "attn_pool.kv", "attn_pool.scores", "attn_pool.softmax", "attn_pool.context", "attn_pool.proj",
        "attn_pool.norm.layer_norm", "attn_pool.mlp.fc1", "attn_pool.mlp.act.activation", "attn_pool.mlp.fc2",
        "attn_pool.residual", "head", "output",
    ]  # fmt: skip


def test_a_block_whose_shortcut_is_projected_is_a_block():
    sites = [site for site in sites_of("hiera")[1] if site.block == 1]
    assert [site.name for site in sites if site.name in blocks([1])] == blocks([1])
    assert len(sites) == len(blocks([1])) + 3  # the shortcut's projection and pooling, and the query's pooling


def test_attention_between_stages_has_the_names_of_its_modules():
    sites = sites_of("levit")[1]
    changing = [site for site in sites if "downsample" in site.name]
    assert {"scores", "softmax", "context", "linear", "residual"} <= {site.kind for site in changing}
    assert all(site.block is None for site in changing)
    assert [site.name for site in sites if site.kind == "scores"][::2] == [
        "blocks.0.attn.scores",
        "blocks.1.attn.scores",
    ]


def test_norms_on_query_and_key_are_told_from_the_blocks():
    names = [site.name for site in sites_of("mean pooling")[1] if site.block == 0]
    assert names[:4] == [f"blocks.0.{part}" for part in ("norm1", "attn.qkv", "attn.query_norm", "attn.key_norm")]


def test_every_head_is_a_head():
    assert [site.name for site in sites_of("distilled")[1]][-5:] == ["norm", "head", "head_2", "residual", "output"]


# --- kinds -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "count"),
    [
        ("timm deit", "conv", 1),
        ("timm deit", "concat", 1),
        ("registers", "concat", 1),
        ("timm deit", "residual", 5),
        ("timm deit", "linear", 9),
        ("timm deit", "layer_norm", 5),
        ("timm deit", "scores", 2),
        ("timm deit", "softmax", 2),
        ("timm deit", "context", 2),
        ("timm deit", "activation", 2),
        ("timm deit", "pool", 0),
        ("timm deit", "output", 1),
        ("mean pooling", "pool", 1),
        ("timm swin", "pool", 1),
        ("timm swin", "concat", 0),  # merging joins parts of one tensor
        ("timm swin", "residual", 8),
        ("torchvision swin", "product", 0),
        ("siglip", "scores", 3),
        ("cait", "scores", 4),
        ("levit", "batch_norm", 19),
        ("rotary", "product", 0),
        ("rotary", "gate", 0),
        ("eva02", "gate", 2),
        ("eva02", "product", 0),
        ("rotary", "residual", 1),
    ],
)
def test_every_kind_is_found(name, kind, count):
    assert sum(site.kind == kind for site in sites_of(name)[1]) == count


@pytest.mark.parametrize("name", ["rotary", "eva02", "timm swin", "torchvision swin", "transformers swin"])
def test_rotary_embeddings_masks_and_bias_tables_are_no_sites(name):
    _, sites, _ = sites_of(name)
    attention = [site for site in sites if site.block == 0 and ".attn." in site.name]
    allowed = {"linear", "scores", "softmax", "context"} | ({"layer_norm"} if name == "eva02" else set())
    assert {site.kind for site in attention} <= allowed
    assert sum(site.kind == "residual" for site in sites if site.block == 0) == (1 if name == "rotary" else 2)


# --- the canonical form of attention -----------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in MODELS if name != "levit"])
def test_the_scale_is_on_the_scores(name):
    graph, sites, _ = sites_of(name)
    nodes = {node.name: node for node in graph.graph.nodes}
    for site in sites:
        if site.kind == "scores":
            for operand in ("query", "key"):
                chain = [nodes[site.operands[operand]]]
                while is_rearrangement(chain[-1]) or is_selection(chain[-1]):
                    chain.append(chain[-1].all_input_nodes[0])
                last = chain[-1]
                is_constant = calls(last, {aten.mul, aten.div}) and not isinstance(last.args[1], torch.fx.Node)
                assert not is_constant, f"{site.name}:{operand} is multiplied by {last.args[1]}"
            readers = set(nodes[site.node].users)
            assert any(calls(reader, {aten.mul, aten.div}) for reader in readers)


# --- values ------------------------------------------------------------------------------------------


def test_every_operand_has_one_value():
    for name in MODELS:
        _, sites, values = sites_of(name)
        readers = [str(reader) for value in values for reader in value.readers]
        assert sorted(readers) == sorted(f"{site.name}:{operand}" for site in sites for operand in site.operands)


def test_query_key_and_value_projections_read_one_value():
    value = value_named("transformers vit", "blocks.0.attn.query:input")
    assert [str(reader) for reader in value.readers] == [
        f"blocks.0.attn.{part}:input" for part in ("query", "key", "value")
    ]
    assert value == value_named("transformers vit", "blocks.0.attn.value:input")


@pytest.mark.parametrize("name", ["timm deit", "transformers vit", "torchvision vit", "encoder", "timm swin"])
def test_the_stream_is_one_value_for_the_norm_and_the_addition(name):
    assert [str(reader) for reader in value_named(name, "blocks.1.norm1:input").readers] == [
        "blocks.1.norm1:input",
        "blocks.1.residual1:lhs",
    ]


def test_post_norm_streams_are_what_the_norms_give():
    assert [str(reader) for reader in value_named("encoder, post-norm", "blocks.0.norm1:input").readers] == [
        "blocks.0.norm1:input"
    ]
    assert [str(reader) for reader in value_named("encoder, post-norm", "blocks.0.mlp.fc1:input").readers] == [
        "blocks.0.mlp.fc1:input",
        "blocks.0.residual2:lhs",
    ]


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("siglip", "levit", "hiera")])
def test_the_stream_is_the_left_operand(name):
    """What is added depends on the stream, never the stream on what is added."""
    graph, sites, _ = sites_of(name)
    nodes = {node.name: node for node in graph.graph.nodes}

    def reaches(start, goal):
        pending, seen = [start], set()
        while pending:
            node = pending.pop()
            if node is goal:
                return True
            if node not in seen:
                seen.add(node)
                pending += node.all_input_nodes
        return False

    for site in sites:
        if site.kind == "residual" and site.block is not None:
            stream = nodes[site.operands["lhs"]]
            while is_rearrangement(stream) or is_selection(stream):
                stream = stream.all_input_nodes[0]
            assert reaches(nodes[site.operands["rhs"]], stream), site.name
            assert site.operands["rhs"] != stream.name


def test_class_attentions_query_shares_the_norms_value():
    value = value_named("cait", "blocks.2.attn.query:input")
    assert {str(reader) for reader in value.readers} == {
        f"blocks.2.attn.{part}:input" for part in ("query", "key", "value")
    }


@pytest.mark.parametrize("name", ["timm swin", "torchvision swin", "transformers swin"])
def test_patch_merging_is_one_value(name):
    value = value_named(name, "merge.0.norm:input")
    assert [str(reader) for reader in value.readers] == ["merge.0.norm:input"]
    assert value.shape[-1] == 64  # four neighbours of 16 channels
    assert value.shape[0] == -1


def test_query_key_and_value_are_values_of_their_own_in_every_library():
    for name in ("timm deit", "transformers vit", "torchvision vit", "encoder"):
        found = [value_named(name, f"blocks.0.attn.{reader}") for reader in ("scores:query", "scores:key")]
        found.append(value_named(name, "blocks.0.attn.context:value"))
        assert [len(value.readers) for value in found] == [1, 1, 1]
        assert len({value.node for value in found}) == 3


@pytest.mark.parametrize("name", ["timm deit", "transformers vit", "torchvision vit", "encoder"])
@pytest.mark.parametrize(
    ("reader", "shape", "axis"),
    [
        ("patch_embed:input", (-1, 3, 32, 32), 1),
        ("patch_embed:weight", (32, 3, 8, 8), 0),
        ("tokens:input", (-1, 17, 32), -1),
        ("blocks.1.norm1:input", (-1, 17, 32), -1),
        ("blocks.1.attn.scores:query", (-1, 2, 17, 16), -1),
        ("blocks.1.attn.scores:key", (-1, 2, 16, 17), -2),
        ("blocks.1.attn.softmax:input", (-1, 2, 17, 17), -1),
        ("blocks.1.attn.context:probs", (-1, 2, 17, 17), -1),
        ("blocks.1.attn.context:value", (-1, 2, 17, 16), -1),
        ("blocks.1.mlp.fc1:weight", None, 0),
        ("blocks.1.mlp.fc2:input", None, -1),
        ("head:input", (-1, 32), -1),
        ("output:input", (-1, CLASSES), -1),
    ],
)
def test_shapes_and_channel_axes(name, reader, shape, axis):
    value = value_named(name, reader)
    assert shape is None or value.shape == shape
    assert value.channel_axis == axis


@pytest.mark.parametrize(
    ("name", "reader", "axis"),
    [
        ("timm swin", "pool:input", -1),  # (batch, height, width, channels)
        ("torchvision swin", "pool:input", 1),  # (batch, channels, height, width)
        ("transformers swin", "pool:input", 1),  # (batch, channels, tokens)
        ("mean pooling", "pool:input", -1),
        ("levit", "stem.act1.activation:input", 1),
        ("levit", "stem.conv2.linear:input", 1),
        ("levit", "stem.conv2.bn.batch_norm:input", 1),
        ("convolutional stem", "stem.2.activation:input", 1),
        ("convolutional stem", "residual:lhs", 1),
        ("convolutional stem", "residual:rhs", 1),
        ("convolutional stem", "pool:input", 1),
        ("convolutional stem", "blocks.0.attn.query:input", -1),
    ],
)
def test_channels_are_axis_1_around_convolutions(name, reader, axis):
    assert value_named(name, reader).channel_axis == axis


@pytest.mark.parametrize("name", MODELS)
def test_shapes_are_what_runs_and_channels_are_what_norms_scale(name):
    graph, sites, values = sites_of(name)
    size = MODELS[name][1]
    seen = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, node):
            seen[node.name] = result = super().run_node(node)
            return result

    with torch.no_grad():
        Recorder(graph).run(torch.randn(3, 3, size, size))
    for value in values:
        found = tuple(seen[value.node].shape)
        assert len(found) == len(value.shape)
        assert all(expected in (-1, size) for expected, size in zip(value.shape, found, strict=True)), value.name
        assert value.parameter is None or torch.equal(seen[value.node], graph.get_parameter(value.parameter))
        for reader in value.readers:
            if reader.kind in ("layer_norm", "batch_norm", "linear") and reader.operand == "input":
                site = next(site for site in sites if site.name == reader.site)
                node = next(node for node in graph.graph.nodes if node.name == site.node)
                weight = graph.get_parameter(str(node.args[2 if reader.kind == "layer_norm" else 1].target))
                assert found[value.channel_axis] == weight.shape[-1], str(reader)


class Shared(nn.Module):
    """An attention, and a convolution whose output one layer reads whole and another in part."""

    def __init__(self, part):
        super().__init__()
        self.stem, self.part = nn.Conv2d(3, 8, 4, 4), part
        self.whole, self.some = nn.Conv2d(8, 8, 1), nn.Conv2d(4, 8, 1)

    def forward(self, images):
        x = self.stem(images)
        tokens = (self.some(self.part(x)) + self.whole(x)).flatten(2).mT  # the part is read first
        return ((tokens @ tokens.mT).softmax(-1) @ tokens).mean(1)


@pytest.mark.parametrize(
    "part",
    [
        lambda x: x.split(4, 1)[1],
        lambda x: x.chunk(2, 1)[0],
        lambda x: x.unflatten(1, (2, 4)).unbind(1)[1],
        lambda x: x.unflatten(1, (4, 2)).unbind(2)[0],
        lambda x: x[:, 4:],
    ],
)
def test_a_value_that_is_read_whole_and_in_part_has_its_channels_where_both_readers_have_them(part):
    captured = capture(Shared(part).eval(), torch.randn(2, 3, 16, 16))
    values = find_values(captured, find_sites(captured))
    (shared,) = [value for value in values if len(value.readers) == 2 and value.readers[0].kind == "conv"]
    assert (shared.shape, shared.channel_axis) == ((-1, 8, 4, 4), 1)
