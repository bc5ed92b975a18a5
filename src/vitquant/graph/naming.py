"""Names of operations that are the same for every library where the structure is the same.

`blocks.3.attn.scores` is the fourth block's product of query and key whether timm, transformers or
torchvision wrote the model. An operation without a place in the common structure is named after its module.

The structure is derived from the residual additions. An addition one of whose operands depends on the
other closes a *branch*; a branch with attention in it begins a block, and a branch without attention that
follows is the block's MLP. Attention outside of a branch (attention pooling, a change of stage) is no block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from vitquant.graph.attention import Attention
from vitquant.graph.kinds import KINDS
from vitquant.graph.operators import arguments
from vitquant.graph.outputs import output_names
from vitquant.graph.walk import ancestors, depends_on_input, positions, root

Operation = tuple[Node, str, dict[str, Node]]

_BARE_ATTENTION = {"scores", "softmax", "context", "residual"}


@dataclass(frozen=True)
class _Branch:
    """The operations between a tensor and the residual addition that adds their result to it.

    Arguments:
        addition: the residual addition.
        members: positions of the operations on the way, as a bit set, the addition included.
        block: number of the block, counted from 0; None when the branch belongs to no block.
        part: "attn", "mlp", or "" for a branch without linear layers.
    """

    addition: Node
    members: int
    block: int | None
    part: str


class _Structure:
    """Where each operation lies in the structure of branches and blocks; made once per graph."""

    def __init__(self, module: GraphModule, operations: list[Operation], attention: Attention) -> None:
        self.place = positions(module.graph)
        self.before = ancestors(module.graph)
        self.dynamic = depends_on_input(module.graph)
        self.operations = operations
        self.attention = attention
        self.branches = self._find_branches()
        self.numbered = [branch for branch in self.branches if branch.block is not None]
        self.first = min((self.start_of(branch) for branch in self.numbered), default=len(self.place))
        self.last = max((self.place[branch.addition] for branch in self.numbered), default=-1)

    def depends(self, node: Node, on: Node) -> bool:
        return bool(self.before[node] >> self.place[on] & 1)

    def start_of(self, branch: _Branch) -> int:
        return (branch.members & -branch.members).bit_length() - 1

    def innermost(self, node: Node) -> _Branch | None:
        holding = [branch for branch in self.branches if branch.members >> self.place[node] & 1]
        return min(holding, key=lambda branch: branch.members.bit_count(), default=None)

    def beside_attention(self, node: Node) -> bool:
        """Whether an attention outside of every block lies between the same two blocks as the node."""
        place = self.place[node]
        start = max((end for b in self.numbered if (end := self.place[b.addition]) < place), default=-1)
        stop = min((begin for b in self.numbered if (begin := self.start_of(b)) > place), default=len(self.place))
        return self._attention_between(start, stop, [(b.addition, b.members) for b in self.branches])

    def _find_branches(self) -> list[_Branch]:
        additions = [(node, operands) for node, kind, operands in self.operations if kind == "residual"]
        found = [(node, members) for node, operands in additions if (members := self._members(node, operands))]
        # A query added to its own context (MViTv2) is a part of the attention around it.
        found = [(node, members) for node, members in found if self._kinds(members) != _BARE_ATTENTION]
        around = self._union([members for _, members in found])
        for node, operands in additions:
            members = self._members_beside_shortcut(node, operands)
            if "scores" in self._kinds(members & ~around):
                found.append((node, members))
        found.sort(key=lambda branch: self.place[branch[0]])
        branches, block, attended = [], -1, -1
        for node, members in found:
            nested = [other for _, other in found if other != members and other & ~members == 0]
            kinds = self._kinds(members & ~self._union(nested))
            numbered = True
            if "scores" in kinds:
                block, attended = block + 1, self.place[node]
                part = "attn"
            else:
                part = "mlp" if any(KINDS[kind].layer for kind in kinds) else ""
                numbered = part != "" and block >= 0 and not self._attention_between(attended, self.place[node], found)
            branches.append(_Branch(node, members, block if numbered else None, part))
        return branches

    def _kinds(self, members: int) -> set[str]:
        kinds = {kind for operation, kind, _ in self.operations if members >> self.place[operation] & 1}
        return kinds - {"product", "gate"}  # they compute position biases, or gate

    def _attention_between(self, start: int, stop: int, found: list[tuple[Node, int]]) -> bool:
        """Whether an attention between two places of the graph lies in no branch."""
        inside = self._union([members for _, members in found])
        places = [self.place[node] for node, kind, _ in self.operations if kind == "scores"]
        return any(start < place < stop and not inside >> place & 1 for place in places)

    def _members(self, node: Node, operands: dict[str, Node]) -> int:
        left, right = operands["lhs"], operands["rhs"]
        for stream, branch in ((left, right), (right, left)):
            origin = root(stream)
            if origin is not root(branch) and self.depends(branch, origin):
                on_the_way = [
                    place
                    for other, place in self.place.items()
                    if other is not origin and self.depends(other, origin) and self.depends(branch, other)
                ]
                return sum(1 << place for place in on_the_way) | 1 << self.place[node]
        return 0

    def _members_beside_shortcut(self, node: Node, operands: dict[str, Node]) -> int:
        """The members of a branch beside a projected or pooled shortcut: all from the norm in front of both paths."""
        left, right = operands["lhs"], operands["rhs"]
        shared = [other for other in self.dynamic if self.depends(left, other) and self.depends(right, other)]
        origin = max(shared, key=self.place.__getitem__, default=node)
        if origin in (root(left), root(right), node):
            return 0
        members = 1 << self.place[node]
        for other, place in self.place.items():
            if other is not origin and self.depends(other, origin) and self.depends(node, other):
                members |= 1 << place
        is_norm = any(other is origin and KINDS[kind].norm for other, kind, _ in self.operations)
        return members | 1 << self.place[origin] if is_norm else members

    @staticmethod
    def _union(sets: list[int]) -> int:
        union = 0
        for members in sets:
            union |= members
        return union


def name_operations(
    module: GraphModule, operations: list[Operation], attention: Attention
) -> list[tuple[str, int | None]]:
    """A unique name for each operation, and the number of its block.

    Arguments:
        module: the captured graph.
        operations: node, kind and operands of each operation, in graph order.
        attention: what `find_attention` found in the graph.
    """
    structure = _Structure(module, operations, attention)
    taken: Counter[str] = Counter()
    outputs = _outputs(module, operations)
    names: list[tuple[str, int | None]] = []
    for operation in operations:
        if operation[1] == "output":
            names.append((_unique(next(outputs), taken), None))
            continue
        branch = structure.innermost(operation[0])
        if branch is not None and branch.block is not None:
            name, block = _name_in_block(operation, branch, structure), branch.block
        else:
            name, block = _name_outside(operation, structure, taken)
        names.append((_unique(name or _fallback(operation), taken), block))
    return names


def _outputs(module: GraphModule, operations: list[Operation]) -> Iterator[str]:
    """The site names of the outputs: `output`, or `output.NAME` with the model's own names where there are several."""
    given = [operands["input"] for _, kind, operands in operations if kind == "output"]
    results = next(arguments(node)[0] for node in module.graph.nodes if node.op == "output")
    named = (name for name, result in zip(output_names(module), results, strict=True) if result in given)
    word = KINDS["output"].word
    return (f"{word}.{name}" if len(given) > 1 else word for name in named)


def _unique(name: str, taken: Counter[str]) -> str:
    """A name that no site has yet: this one, or this one with a number."""
    taken[name] += 1
    while taken[name] > 1 and taken[f"{name}_{taken[name]}"]:
        taken[name] += 1
    if taken[name] == 1:
        return name
    numbered = f"{name}_{taken[name]}"
    taken[numbered] += 1
    return numbered


def _fallback(operation: Operation) -> str:
    node, kind, operands = operation
    weight = operands.get("weight")
    if weight is not None and weight.op == "get_attr":
        return str(weight.target).rpartition(".")[0]
    module = str(node.meta.get("module", ""))
    return f"{module}.{kind}" if module else kind


def _name_in_block(operation: Operation, branch: _Branch, structure: _Structure) -> str:
    node, kind, _ = operation
    prefix, attn = f"blocks.{branch.block}", branch.part == "attn"
    if node is branch.addition:
        return f"{prefix}.{KINDS['residual'].word}{1 if attn else 2}"
    if not attn:
        return _name_in_mlp(operation, branch, structure, prefix)
    if KINDS[kind].of_attention or kind == "softmax":
        return f"{prefix}.attn.{KINDS[kind].word}"
    role = _attention_role(node, branch, structure)
    if KINDS[kind].norm:
        inside = role not in ("", "proj") and _after_linear(node, branch, structure)
        return f"{prefix}.attn.{role}_norm" if inside else f"{prefix}.norm1"
    if kind == "linear" and role:
        return f"{prefix}.attn.{role}"
    return ""


def _name_in_mlp(operation: Operation, branch: _Branch, structure: _Structure, prefix: str) -> str:
    node, kind, _ = operation
    if KINDS[kind].norm:
        return f"{prefix}.norm2"
    if kind == "activation":
        return f"{prefix}.mlp.{KINDS[kind].word}"
    if kind == "linear":
        earlier = [
            other
            for other, other_kind, _ in structure.operations
            if other_kind == "linear" and structure.innermost(other) is branch
        ]
        return f"{prefix}.mlp.fc{earlier.index(node) + 1}"
    return ""


def _attention_role(node: Node, branch: _Branch, structure: _Structure) -> str:
    """Which operands of attention depend on an operation: `qkv`, `query`, `key_value`, ...; `proj` after attention."""
    reached: list[str] = []
    behind = False
    for other, kind, operands in structure.operations:
        if not KINDS[kind].of_attention or structure.innermost(other) is not branch:
            continue
        for operand in ("query", "key", "value"):
            if operand in operands and structure.depends(operands[operand], node) and operand not in reached:
                reached.append(operand)
        behind = behind or (kind == "context" and structure.depends(node, other))
    if behind:
        return "proj"
    return "qkv" if len(reached) == 3 else "_".join(reached)


def _after_linear(node: Node, branch: _Branch, structure: _Structure) -> bool:
    return any(
        kind == "linear" and structure.innermost(other) is branch and structure.depends(node, other)
        for other, kind, _ in structure.operations
    )


def _name_outside(operation: Operation, structure: _Structure, taken: Counter[str]) -> tuple[str, int | None]:
    node, kind, operands = operation
    place = structure.place[node]
    if KINDS[kind].norm and (block := _post_norm_of(node, operands, structure)) is not None:
        return block
    if place < structure.first:
        return _name_in_stem(operation, structure, taken), None
    if place > structure.last:
        return _name_behind(operation, structure), None
    return _name_of_merging(operation, structure), None


def _post_norm_of(node: Node, operands: dict[str, Node], structure: _Structure) -> tuple[str, int | None] | None:
    """The name and block of a post-norm: a norm of a block's residual sum whose output the next branch adds to."""
    source = root(operands["input"])
    for branch in structure.branches:
        if branch.addition is source and branch.block is not None:
            adds = any(
                kind == "residual" and node in (root(read["lhs"]), root(read["rhs"]))
                for _, kind, read in structure.operations
            )
            last = branch is structure.branches[-1] and branch.part == "mlp"
            if adds or (last and _is_post_norm(structure)):
                return f"blocks.{branch.block}.norm{1 if branch.part == 'attn' else 2}", branch.block
    return None


def _is_post_norm(structure: _Structure) -> bool:
    """Whether the first block's attention reads its input without a norm in front."""
    return not any(
        KINDS[kind].norm and (branch := structure.innermost(node)) is not None and branch.block == 0
        for node, kind, _ in structure.operations
    )


def _name_in_stem(operation: Operation, structure: _Structure, taken: Counter[str]) -> str:
    _, kind, operands = operation
    if kind == "conv" and not taken["patch_embed"]:
        return "patch_embed"
    if KINDS[kind].of_tokens:
        return "patch_embed.norm" if not taken["patch_embed.norm"] else ""
    if kind == "residual" and operands["rhs"] not in structure.dynamic:
        return "pos_embed"
    return KINDS[kind].word if kind == "concat" else ""


def _name_behind(operation: Operation, structure: _Structure) -> str:
    """Names after the last block: the final norm, pooling, and linear layers that no other weighted layer follows."""
    node, kind, operands = operation
    if kind == "linear" or KINDS[kind].of_tokens:
        weighed = [other for other, other_kind, _ in structure.operations if other_kind in ("linear", "conv", "scores")]
        if kind == "linear":
            return "" if any(other is not node and structure.depends(other, node) for other in weighed) else "head"
        behind = [other for other in weighed if structure.place[other] > structure.last]
        return "" if any(structure.depends(operands["input"], other) for other in behind) else "norm"
    return KINDS[kind].word if kind == "pool" else ""


def _name_of_merging(operation: Operation, structure: _Structure) -> str:
    """Names between two blocks: the norm and the linear layer that lead from one stage to the next (patch merging)."""
    node, kind, _ = operation
    if kind != "linear" and not KINDS[kind].of_tokens:
        return ""
    outside = [
        other
        for other, other_kind, _ in structure.operations
        if other_kind == kind
        and structure.first < structure.place[other] < structure.last
        and structure.innermost(other) is None
        and not structure.beside_attention(other)
    ]
    if node not in outside:
        return ""
    return f"merge.{outside.index(node)}.{KINDS[kind].word or 'reduction'}"
