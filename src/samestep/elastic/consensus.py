"""What the nodes of a generation tell each other before they start, and conclude.

Every node's leader tells the same facts to all and draws the same conclusions from
them: no messages are needed after that.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from samestep.errors import PlacementError, ReplicasDiffer, SamestepError


@dataclass(frozen=True)
class NodeStatus:
    """What one node says of itself."""

    host: str
    workers: int = 0
    conditions: Mapping[str, str] = field(default_factory=dict)
    """Whatever decides bits: recipe, data, own code, samestep, torch, processor."""
    generation: int = 0
    """The newest that its run directory knows."""
    step: int = -1
    """Of the newest state that it holds; -1: none."""
    checksum: int = 0
    """Of that state."""
    sees: Sequence[int] = ()
    """The nodes that share its run directory, and itself."""
    interface: str = ""
    """What it is to use; empty: nothing was said."""
    address: str = ""
    """Of this interface."""
    interfaces: str = ""
    """Those that it has, in words."""
    error: str = ""
    """Why it cannot take part."""

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Agreement:
    """What all nodes conclude."""

    generation: int
    step: int
    """From which they go on; 0: from the beginning."""
    donor: int
    """The node that gives its state to those who have an older one or none."""
    receivers: list[int]


def agree(facts: Sequence[NodeStatus]) -> Agreement:
    """Raises PlacementError, ReplicasDiffer, alike on all nodes."""
    _check_errors(facts)
    _check_conditions(facts)
    _check_interfaces(facts)
    step = max(fact.step for fact in facts)
    holders = [node for node, fact in enumerate(facts) if fact.step == step]
    _check_states(facts, holders)
    behind = [node for node in range(len(facts)) if node not in holders]
    return Agreement(
        generation=max(fact.generation for fact in facts) + 1,
        step=max(step, 0),
        donor=holders[0],
        receivers=behind,
    )


def is_writer(facts: Sequence[NodeStatus], node: int) -> bool:
    """Whether no lower node sees the same run directory."""
    return node == min(facts[node].sees)


def _check_errors(facts: Sequence[NodeStatus]) -> None:
    errors = [f"{fact.host}: {fact.error}" for fact in facts if fact.error]
    if errors:
        raise PlacementError(f"Not all machines can take part. {' '.join(errors)}")


def _check_conditions(facts: Sequence[NodeStatus]) -> None:
    names = sorted({name for fact in facts for name in fact.conditions})
    differences = []
    for name in names:
        hosts: dict[str, list[str]] = {}
        for fact in facts:
            value = fact.conditions.get(name, "nothing")
            hosts.setdefault(value, []).append(fact.host)
        if len(hosts) > 1:
            told = (f"{value} on {', '.join(some)}" for value, some in hosts.items())
            differences.append(f"{name}: {' and '.join(told)}")
    if differences:
        raise PlacementError(
            "All machines of a training must have the same of whatever decides its "
            f"bits. They differ in {'; '.join(differences)}. Make them equal."
        )


def _check_interfaces(facts: Sequence[NodeStatus]) -> None:
    silent = {fact.host: fact.interfaces for fact in facts if not fact.interface}
    if silent and len({fact.host for fact in facts}) > 1:
        told = "; ".join(f"{host} has {some}" for host, some in silent.items())
        raise PlacementError(
            "Several machines need to know the network between them, and nothing was "
            "said. Use `--interface` with a name, an address or a network such as "
            f"10.0.0.0/24: {told}."
        )


def _check_states(facts: Sequence[NodeStatus], holders: Sequence[int]) -> None:
    """Any state of a recipe after a step has the same bits, wherever it is."""
    checksums = {facts[node].checksum for node in holders}
    if len(checksums) > 1:
        told = ", ".join(f"{facts[n].checksum:08x} on {facts[n].host}" for n in holders)
        raise ReplicasDiffer(
            "All machines must hold the same state after step "
            f"{facts[holders[0]].step}; its checksum is {told}. Own code that depends "
            "on the rank or on hidden state is likely (`samestep check` looks for it), "
            "or else a machine computes wrongly: find out which with `samestep train` "
            "on each alone."
        )


def refusal(error: SamestepError, host: str) -> NodeStatus:
    """What a node says that cannot take part."""
    return NodeStatus(host, error=str(error))
