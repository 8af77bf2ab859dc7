"""What every rule leaves behind, and carries over, when it replaces a node."""

from __future__ import annotations

import onnx_ir as ir

from qmoe_rules import ops

__all__ = ["Leftovers", "carry_notes"]


class Leftovers:
    """The constants that a rule has replaced, and those that it has made instead.

    The rewriter removes unused initializers of the main graph only, and only in `rewrite`; and a
    dry run builds replacements that it then throws away.
    """

    def __init__(self) -> None:
        self._replaced: dict[ir.Value, None] = {}
        self._made: dict[ir.Value, None] = {}

    def replaced(self, *values: ir.Value) -> None:
        """Remembers constants that the new node does not use."""
        self._replaced.update(dict.fromkeys(values))

    def made(self, *values: ir.Value) -> None:
        """Remembers initializers that were registered for the new node."""
        self._made.update(dict.fromkeys(values))

    def sweep(self) -> None:
        """Removes the replaced constants that no node uses any more, in subgraphs too.

        After a dry run it is the new initializers that no node of the model uses.
        """
        for value in self._made:
            graph = value.graph
            if graph is not None and all(node.graph is None for node in value.consumers()):
                del graph.initializers[str(value.name)]
        self._made.clear()
        for source in self._replaced:
            ops.discard(source)
        # What a node of an outer graph still uses is for that graph's clean-up.
        self._replaced = {source: None for source in self._replaced if source.uses()}


def carry_notes(old: ir.Value, new: ir.Value) -> None:
    """Carries over what the rewriter loses: doc strings and the output's metadata."""
    ops.producer(new).doc_string = ops.producer(old).doc_string
    new.doc_string = old.doc_string
    new.metadata_props.update(old.metadata_props)
