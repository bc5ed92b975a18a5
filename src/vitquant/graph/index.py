"""The sites, values and blocks of a captured graph, found once and looked up by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from torch.fx import GraphModule

from vitquant.graph.fingerprint import structural_fingerprint
from vitquant.graph.sites import Site, Value, find_sites, find_values


@dataclass(frozen=True)
class GraphIndex:
    """The sites and values of a graph, by their names.

    It holds names instead of graph nodes, so that it stays valid when quantizers are inserted into the graph, and when
    the graph is copied or pickled.

    Arguments:
        sites: in graph order.
        values: in the order of their first readers.
        fingerprint: a hash of the graph's structure, see `structural_fingerprint`.
    """

    sites: tuple[Site, ...]
    values: tuple[Value, ...]
    fingerprint: str

    @classmethod
    def of(cls, module: GraphModule) -> GraphIndex:
        """The index of a captured graph without quantizers."""
        sites = find_sites(module)
        return cls(sites, find_values(module, sites), structural_fingerprint(module))

    def site(self, name: str) -> Site:
        """The site of that name (`blocks.0.attn.scores`).

        Raises:
            KeyError: there is no such site.
        """
        return self._by_name[name]

    def site_at(self, node: str) -> Site | None:
        """The site whose operation is the graph node of that name; None where the node belongs to no site."""
        return self._by_node.get(node)

    def value(self, operand: str) -> Value:
        """The value that an operand reads (`blocks.0.attn.scores:query`).

        Raises:
            KeyError: there is no such operand.
        """
        return self._by_operand[operand]

    def read_by(self, site: Site) -> dict[str, Value]:
        """The values that a site reads, by operand."""
        return {operand: self.value(str(site.reader(operand))) for operand in site.operands}

    @cached_property
    def blocks(self) -> Mapping[int, tuple[Site, ...]]:
        """The sites of each transformer block, by its number."""
        numbers = sorted({site.block for site in self.sites if site.block is not None})
        return {number: tuple(site for site in self.sites if site.block == number) for number in numbers}

    @cached_property
    def _by_name(self) -> dict[str, Site]:
        return {site.name: site for site in self.sites}

    @cached_property
    def _by_node(self) -> dict[str, Site]:
        return {site.node: site for site in self.sites}

    @cached_property
    def _by_operand(self) -> dict[str, Value]:
        return {str(reader): value for value in self.values for reader in value.readers}
