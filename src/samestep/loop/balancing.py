"""Which micro-batches of a loop each worker computes: evenly, or by measured speed."""

from collections.abc import Sequence
from typing import Literal

from samestep.core.balancer import Balancer, random_ownership
from samestep.core.ownership import Share, contiguous, lengths, shares
from samestep.core.speeds import StepWindow
from samestep.errors import PlacementError
from samestep.exchange import gather_cells
from samestep.loop.connection import LoopExchange
from samestep.messages.training import Rebalanced
from samestep.output.sentences import sentence
from samestep.system import log
from samestep.training.cadence import SECONDS_BETWEEN
from samestep.training.timing import PHASES, Clock


Balance = Literal["auto", "off", "random"] | Sequence[int]
LEAST_OWNED = 1
"""The loop over the micro-batches of a step is never empty: scripts go on with the
`loss` of its last one."""


class Ownership:
    """Each worker's micro-batches, and how that changes between two steps."""

    def __init__(
        self, balance: Balance, micro_batches: int, place: tuple[int, int]
    ) -> None:
        """Begin at `place`, the rank and the number of workers. Raises PlacementError.

        `balance` as in a Loop.
        """
        self._rank, self._workers = place
        self._is_random = balance == "random"
        self._balancer = Balancer(
            micro_batches,
            _first(balance, micro_batches, self._workers),
            is_live=balance == "auto" and self._workers > 1,
            least_owned=LEAST_OWNED,
        )
        self._step = self._observed = 0
        self._due = 1
        self.clock = Clock()
        """Measures the phases `data`, `forward` (all from samples to gradients) and
        `exchange` of a step."""

    @property
    def shares(self) -> list[Share]:
        """The micro-batches of each worker, from the first to before the last."""
        return self._balancer.owned

    def after_step(self, exchange: LoopExchange) -> None:
        """All workers: let ownership follow the speeds, if it is time to measure."""
        self._step += 1
        if self._is_random:
            given = self._balancer.micro_batches, self._workers, self._step
            self._balancer.owned = random_ownership(*given, LEAST_OWNED)
            exchange.assign(self.shares)
        elif self._balancer.is_live and self._step >= self._due:
            self._merge(exchange)

    def _merge(self, exchange: LoopExchange) -> None:
        """All workers: tell each other their times, and do as rank 0 has decided."""
        steps, self._observed = self._step - self._observed, self._step
        change = self._balancer.proposal
        after = lengths(change.after) if change else [0] * self._workers
        cells = [*self.clock.take(), *after]
        every = gather_cells(exchange, self._rank, cells)
        window = _window(steps, every)
        self._balancer.observe(window)
        # One division of the same numbers: all workers find the same.
        per_step = max(window.seconds / steps, 1e-9)
        self._due = self._step + max(1, int(SECONDS_BETWEEN / per_step))
        if any(decided := every[0][len(PHASES) :]):
            self._adopt(contiguous(list(map(int, decided))))
            exchange.assign(self.shares)

    def _adopt(self, after: list[Share]) -> None:
        change = self._balancer.adopt(after)
        if self._rank == 0:
            counts = {"before": lengths(change.before), "after": lengths(change.after)}
            message = Rebalanced(step=self._step, **{**vars(change), **counts})
            log.logger.info(sentence(message))


def _first(balance: Balance, micro_batches: int, workers: int) -> list[Share]:
    if isinstance(balance, str):
        if balance not in ("auto", "off", "random"):
            raise PlacementError(
                "The balance is `auto`, `off`, or a number of micro-batches for each "
                f"worker, such as `(5, 3)`; received `{balance}`."
            )
        return shares(micro_batches, workers)
    counts = list(balance)
    is_fit = len(counts) == workers and sum(counts) == micro_batches
    if not is_fit or min(counts) < LEAST_OWNED:
        raise PlacementError(
            f"A fixed balance gives each worker's number of micro-batches: {workers} "
            f"positive numbers that add up to {micro_batches}; received "
            f'`{",".join(map(str, counts))}`. Change them, or use `balance="auto"`.'
        )
    return contiguous(counts)


def _window(steps: int, every: list[list[float]]) -> StepWindow:
    """Return what the workers measured, from rows of the seconds of their phases."""
    seconds = dict(zip(PHASES, zip(*every, strict=True), strict=False))
    compute = [a + b for a, b in zip(seconds["data"], seconds["forward"], strict=True)]
    # All leave an exchange together, and the last to arrive has not waited.
    last = min(seconds["exchange"])
    waiting = [exchange - last for exchange in seconds["exchange"]]
    total = compute[0] + seconds["exchange"][0]
    nothing = [0.0] * len(every)
    return StepWindow(steps, total, compute, seconds["data"], waiting, nothing)
