"""Which products of a graph are attention: query times key before a softmax, probabilities times value after it."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Graph, Node

from vitquant.graph.operators import (
    JOINS,
    LINEAR,
    ON_SCORES,
    PRODUCTS,
    SOFTMAX,
    arguments,
    calls,
    is_rearrangement,
    is_selection,
)
from vitquant.graph.walk import depends_on_input


@dataclass(frozen=True)
class Attention:
    """The parts of all the attentions in a graph.

    Arguments:
        scores: products of query and key.
        contexts: products of probabilities and value; True where the probabilities are the left operand.
        inside: what lies between a product and its softmax (scaling, bias, mask), and between the projections
            and their product (rotary position embedding, normalization of query and key).
    """

    scores: set[Node]
    contexts: dict[Node, bool]
    inside: set[Node]


def find_attention(graph: Graph) -> Attention:
    """Find every softmax that lies between two products, and these products.

    A softmax that lacks either of them (a classifier's, a gate's) is not attention.
    """
    found = Attention(set(), {}, set())
    dynamic = depends_on_input(graph)
    for softmax in graph.nodes:
        if not calls(softmax, SOFTMAX):
            continue
        products, between = _products_before(arguments(softmax)[0])
        # A query's product with a table of positions is a bias; a learned query (attention pooling) is a query.
        products = {product for product in products if arguments(product)[1] in dynamic}
        contexts = _products_after(softmax)
        if products and contexts:
            found.scores.update(products)
            found.contexts.update(contexts)
            found.inside.update(between)
            for product in products:
                found.inside.update(_elementwise_before(product))
    return found


def _products_before(node: Node) -> tuple[set[Node], set[Node]]:
    products: set[Node] = set()
    between: set[Node] = set()
    pending = [(node, False)]
    while pending:
        node, mixed = pending.pop()
        if node in between:
            continue
        if calls(node, PRODUCTS):
            products.add(node)
        elif calls(node, ON_SCORES) or is_rearrangement(node) or is_selection(node):
            between.add(node)
            pending += [(argument, mixed) for argument in node.all_input_nodes]
        elif _mixes_heads(node) and not mixed:
            pending.append((arguments(node)[0], True))
    return products, between


def _elementwise_before(product: Node) -> set[Node]:
    found: set[Node] = set()
    pending = list(product.all_input_nodes)
    while pending:
        node = pending.pop()
        if node not in found and (calls(node, ON_SCORES | JOINS) or is_rearrangement(node) or is_selection(node)):
            found.add(node)
            pending += node.all_input_nodes
    return found


def _products_after(node: Node) -> dict[Node, bool]:
    products: dict[Node, bool] = {}
    pending, seen = [node], set()
    while pending:
        node = pending.pop()
        for user in node.users:
            if user in seen:
                continue
            seen.add(user)
            if calls(user, PRODUCTS):
                products[user] = arguments(user)[0] is node
            elif calls(user, ON_SCORES) or is_rearrangement(user) or is_selection(user) or _mixes_heads(user):
                pending.append(user)
    return products


def _mixes_heads(node: Node) -> bool:
    """Whether the node is a talking-heads projection: a square linear map over the heads."""
    if not calls(node, LINEAR):
        return False
    rows, columns = arguments(node)[1].meta["shape"]
    return rows == columns and rows <= 64
