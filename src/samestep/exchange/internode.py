"""Messages between the leaders, the first workers of all nodes, over TCP (Gloo).

They go from one leader to one other, so that a leader knows for whom it waits: the
error of a collective that times out names no peer.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import accumulate

from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store, Work
from torch.distributed import ProcessGroupGloo

from samestep.errors import PeerLost, SamestepError, WorkerLate


Message = tuple[int, Tensor]
"""The other node, and contiguous values; both ends know their number and type."""

Wait = Callable[[], None]
Post = Callable[[list[Tensor], int, int], Work]


class Leaders:
    """One leader's connections to all others."""

    def __init__(
        self, store: Store, node: int, sizes: Sequence[int], timeout_seconds: float
    ) -> None:
        """All leaders: connect them. `sizes` are the workers of each node."""
        self.node, self._ends = node, list(accumulate(sizes, initial=0))
        self._timeout_seconds = timeout_seconds
        timeout = timedelta(seconds=timeout_seconds)
        keys = PrefixStore("leaders", store)
        group = ProcessGroupGloo(keys, node, len(sizes), timeout)
        # They are missing in torch's type stubs.
        self._send: Post = group.send  # type: ignore[attr-defined]
        self._recv: Post = group.recv  # type: ignore[attr-defined]

    @property
    def others(self) -> list[int]:
        """The other nodes."""
        return [node for node in range(len(self._ends) - 1) if node != self.node]

    def receive(self, messages: Sequence[Message]) -> Wait:
        """Receive messages, in the order in which each other leader sends them to us.

        Returns a function that waits until all of them are here. Both raise WorkerLate
        or PeerLost, which name the node.
        """
        return self._post(self._recv, messages)

    def send(self, messages: Sequence[Message]) -> Wait:
        """Return what waits until all have left. Raises as `receive` does."""
        return self._post(self._send, messages)

    def _post(self, post: Post, messages: Sequence[Message]) -> Wait:
        works: list[tuple[int, Work]] = []
        for node, values in messages:
            if values.numel():
                with self._talking_to(node):  # messages of one tag keep their order
                    works.append((node, post([values], node, 0)))

        def wait() -> None:
            for node, work in works:
                with self._talking_to(node):
                    work.wait()

        return wait

    def merge(self, values: Tensor) -> None:
        """All leaders: fill the cells, of which one leader has each; the rest are zero.

        Each sends to all others at once rather than around a ring: cells are few.
        """
        received = [(node, values.new_empty(values.shape)) for node in self.others]
        arrive = self.receive(received)
        leave = self.send([(node, values) for node in self.others])
        arrive()
        leave()
        for _, cells in received:
            values += cells

    @contextmanager
    def _talking_to(self, node: int) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise self._lost(node, str(error)) from error

    def _lost(self, node: int, why: str) -> SamestepError:
        first, end = self._ends[node : node + 2]
        ranks = ", ".join(map(str, range(first, end)))
        workers = "worker" if end - first == 1 else "workers"
        name = f"node {node} ({workers} {ranks})"
        if "imed out" in why:
            return WorkerLate.naming(
                name,
                "Every node must reach the exchange",
                self._timeout_seconds,
                "`--hang-timeout`",
                cause="cut off",
            )
        return PeerLost(f"The connection to {name} ended: {why.splitlines()[0]}")
