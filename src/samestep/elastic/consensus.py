"""The decision that all nodes of a generation reach before they start.

Every leader publishes its node's status, reads all others, and applies the same pure
functions to them. Equal inputs give equal decisions, so no vote has to be taken.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from samestep.errors import PlacementError, ReplicasDiffer


@dataclass(frozen=True)
class NodeStatus:
    """The status that one node publishes to all others."""

    host: str
    workers: int = 0
    conditions: Mapping[str, str] = field(default_factory=dict)
    """All that decides bits: recipe, data, user code, samestep, torch, processor. And
    the options that decide what all workers do together."""
    generation: int = 0
    """The newest generation recorded in its run directory."""
    step: int = -1
    """The step of its newest state; -1 if it has none."""
    checksum: int = 0
    """The checksum of that state."""
    ledgers: Mapping[str, str] = field(default_factory=dict)
    """The checksum of each ledger up to that step; empty if it lacks some of them."""
    sees: Sequence[int] = ()
    """The nodes that share its run directory, itself included."""
    interface: str = ""
    """The network interface to use; empty if none was named."""
    address: str = ""
    """The address of that interface."""
    interfaces: str = ""
    """All interfaces of the node, as text for an error message."""
    error: str = ""
    """The reason why it cannot take part; empty if it can."""


@dataclass(frozen=True)
class Agreement:
    """The decision of all nodes."""

    generation: int
    step: int
    """The step to continue from; 0 is the beginning."""
    donor: int
    """The node that sends its state and its ledgers to the receivers."""
    receivers: list[int]
    """The nodes whose state is older, or missing, or that have other ledgers."""
    ledgers: Sequence[str] = ()
    """The ledgers that the run goes on with, if it has begun."""


def agree(nodes: Sequence[NodeStatus]) -> Agreement:
    """Return the decision that follows from the status of all nodes.

    Raises PlacementError or ReplicasDiffer, the same on every node.
    """
    _check_errors(nodes)
    _check_conditions(nodes)
    _check_interfaces(nodes)
    step = max(node.step for node in nodes)
    newest = [number for number, node in enumerate(nodes) if node.step == step]
    _check_states(nodes, newest)
    donor = max(newest, key=lambda number: _whole_ledgers(nodes[number]))
    has = step, nodes[donor].ledgers
    behind = [n for n, node in enumerate(nodes) if (node.step, node.ledgers) != has]
    return Agreement(
        generation=max(node.generation for node in nodes) + 1,
        step=max(step, 0),
        donor=donor,
        receivers=behind,
        ledgers=tuple(nodes[donor].ledgers) if step > 0 else (),
    )


def _whole_ledgers(node: NodeStatus) -> int:
    return sum(map(bool, node.ledgers.values()))


def is_writer(nodes: Sequence[NodeStatus], number: int) -> bool:
    """Return whether a node is the first of those that share its run directory."""
    return number == min(nodes[number].sees)


def _check_errors(nodes: Sequence[NodeStatus]) -> None:
    errors = [f"{node.host}: {node.error}" for node in nodes if node.error]
    if errors:
        raise PlacementError(f"Some machines cannot take part. {' '.join(errors)}")


def _check_conditions(nodes: Sequence[NodeStatus]) -> None:
    differences = []
    for name in sorted({name for node in nodes for name in node.conditions}):
        hosts: dict[str, list[str]] = {}
        for node in nodes:
            value = node.conditions.get(name, "nothing")
            hosts.setdefault(value, []).append(node.host)
        if len(hosts) > 1:
            values = (f"{value} on {', '.join(some)}" for value, some in hosts.items())
            differences.append(f"{name}: {' and '.join(values)}")
    if differences:
        raise PlacementError(
            "All machines must agree on everything that affects the result, and on "
            "what all workers do together. They differ in "
            f"{'; '.join(differences)}. Make these equal."
        )


def _check_interfaces(nodes: Sequence[NodeStatus]) -> None:
    missing = {node.host: node.interfaces for node in nodes if not node.interface}
    if missing and len({node.host for node in nodes}) > 1:
        choices = "; ".join(f"{host} has {some}" for host, some in missing.items())
        raise PlacementError(
            "With several machines, the network between them must be named, and "
            "`--interface` was not given. Use a name, an address or a network such "
            f"as 10.0.0.0/24: {choices}."
        )


def _check_states(nodes: Sequence[NodeStatus], holders: Sequence[int]) -> None:
    """Check that all states of the newest step have the same bits."""
    checksums = {nodes[number].checksum for number in holders}
    if len(checksums) > 1:
        newest = [nodes[number] for number in holders]
        listed = ", ".join(f"{node.checksum:08x} on {node.host}" for node in newest)
        raise ReplicasDiffer(
            "All machines must hold the same state after step "
            f"{nodes[holders[0]].step}; the checksums are {listed}. The usual cause is "
            "code of your own that depends on the rank or on hidden state (`samestep "
            "check` looks for it). Otherwise a machine computes wrongly: find out "
            "which by running `samestep train` on each alone."
        )
