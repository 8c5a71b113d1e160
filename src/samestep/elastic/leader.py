"""The first worker of a machine under torchrun, which keeps the run there.

It trains like all others. Before, it compares its machine with those of the other
leaders and prepares the memory that the workers of its machine share. It also writes
the run; where several machines share a run directory, the first of them does.
"""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from samestep import report
from samestep.api import train
from samestep.config.recipe import Recipe
from samestep.data.sources import source_of
from samestep.elastic import consensus, state_transfer
from samestep.elastic.attempt import Generation
from samestep.elastic.consensus import Agreement, NodeStatus
from samestep.elastic.gathering import Meeting
from samestep.elastic.node_state import Held, SnapshotDirectory, StateInfo
from samestep.elastic.preflight import Comparison, Prepared, Request
from samestep.elastic.watchdog import Watcher
from samestep.errors import Interrupted, SamestepError
from samestep.messages.job import TrainingJob
from samestep.output.console import PlainView, SilentView, View
from samestep.output.run_writer import RunWriter
from samestep.output.summary import summary
from samestep.state.snapshot import Snapshots
from samestep.supervisor.job import make_setup
from samestep.supervisor.resume import kept_for_workers
from samestep.supervisor.session import Session
from samestep.system import barrier, machine, network_interfaces, shared_memory
from samestep.system.heartbeat import Heartbeat
from samestep.system.terminal import echo


LOCK_SECONDS = 30.0
"""Seconds that an earlier writer of the run has to end, once it has noticed."""


@dataclass
class Leader:
    """One leader; its methods stand in the order in which they are called."""

    request: Request
    meeting: Meeting
    watcher: Watcher
    started: float

    def lead(self) -> None:
        """Run the leader. Raises SamestepError, and Interrupted if it was stopped."""
        comparison = Comparison(self.request, self.meeting)
        try:
            prepared, nodes = comparison.compare(comparison.recipe())
            agreed = consensus.agree(nodes)
        except SamestepError:
            self.meeting.part()
            raise
        assert prepared is not None
        variables = self._variables(nodes)
        os.environ.update(variables)
        held = self._catch_up(agreed, prepared.held)
        snapshots = SnapshotDirectory.create(
            self.request.run, self._directory_name(nodes), agreed.generation
        )
        generation = self._share(prepared, agreed.step, held, variables, snapshots)
        node = self.meeting.topology.node
        if consensus.is_writer(nodes, node):
            self._keep(prepared, nodes, agreed, generation)
            snapshots.remove_all()
        else:
            generation.run()
            if not generation.is_finished:
                raise Interrupted(
                    "stopped with the others", self.watcher.stop.exit_code
                )

    def _variables(self, nodes: Sequence[NodeStatus]) -> dict[str, str]:
        """Return the variables that tell Gloo and NCCL on which interface to listen.

        If none was named, all workers are on one machine.
        """
        name = nodes[self.meeting.topology.node].interface or machine.loopback()
        return {network_interfaces.GLOO_VARIABLE: name, "NCCL_SOCKET_IFNAME": name}

    def _catch_up(self, agreed: Agreement, own: Held | None) -> Held | None:
        """All leaders: return the newest state that any of them has."""
        topology = self.meeting.topology
        if agreed.step == 0 or not agreed.receivers:
            return own
        seconds = self.request.placement.hang_timeout
        courier = state_transfer.Courier(
            self.meeting.store, topology.node, topology.nodes, seconds
        )
        if topology.node == agreed.donor:
            assert own is not None
            courier.send(own, agreed.receivers)
        elif topology.node in agreed.receivers:
            return courier.receive(agreed.donor)
        return own

    def _directory_name(self, nodes: Sequence[NodeStatus]) -> str:
        """Return the host, numbered if several nodes of a host share the run."""
        status = nodes[self.meeting.topology.node]
        same = [node for node in status.sees if nodes[node].host == status.host]
        index = same.index(self.meeting.topology.node)
        return status.host if index == 0 else f"{status.host}-{index + 1}"

    def _share(
        self,
        prepared: Prepared,
        step: int,
        state: Held | None,
        variables: dict[str, str],
        snapshots: SnapshotDirectory,
    ) -> Generation:
        """Create what the workers of this machine share, and brief them."""
        topology, placement = self.meeting.topology, prepared.placement
        fds = {
            "snapshots": snapshots.open(),
            "constants": shared_memory.create(),
            "board": Heartbeat.create(topology.local_workers),
        }
        if placement.exchange == "shared":
            fds["memory"] = barrier.create(topology.local_workers)
        if state is not None:
            workers = topology.local_workers
            Snapshots(fds["snapshots"], state.layout, workers).fill(state.state)
        job = _job(prepared, topology.local_workers, step)
        if state is not None and not self.request.allow_different_numerics:
            job = replace(job, conditions=kept_for_workers(state.build))
        self.meeting.brief(job, variables, fds)
        return Generation(
            meeting=self.meeting,
            watcher=self.watcher,
            job=job,
            fds=fds,
            conditions=prepared.build,
            about=lambda layout, started: StateInfo(
                recipe=prepared.recipe.to_dict(),
                build={**prepared.build, **started.conditions},
                layout=layout,
                workers=topology.local_workers,
                steps_per_epoch=started.steps_per_epoch,
            ),
            directory=snapshots,
            held=state,
        )

    def _keep(
        self,
        prepared: Prepared,
        nodes: Sequence[NodeStatus],
        agreed: Agreement,
        generation: Generation,
    ) -> None:
        """Train, and write the run."""
        topology, request, recipe = self.meeting.topology, self.request, prepared.recipe
        trackers = train.loaded(request.trackers if topology.rank == 0 else ())
        with ExitStack() as stack:
            writer = stack.enter_context(
                RunWriter.reopen(
                    request.run,
                    recipe,
                    prepared.placement,
                    self.started,
                    (agreed.generation, machine.name_of_process(os.getppid())),
                    LOCK_SECONDS + prepared.placement.hang_timeout,
                )
            )
            view = stack.enter_context(_view(recipe, topology.rank))
            stack.enter_context(train.tracking(writer, view, trackers))
            _introduce(view, prepared, nodes, agreed, topology.port)
            _begin(writer, prepared, nodes, agreed, generation.held, topology.node)
            is_behind = topology.node in agreed.receivers and agreed.step > 0
            session = Session(writer, view, prepared.checksums, is_behind)
            generation.listen, generation.offer = session.listen, session.offer
            self.watcher.save = lambda: session.abandon(generation)
            run = session.run(generation, prepared.notice)
        if topology.rank == 0:
            echo(summary(run))
        if request.with_report:
            report.try_to_write(run.path)


def lead(request: Request, meeting: Meeting, watcher: Watcher, started: float) -> None:
    """Bring this machine up to date, train, and keep the run."""
    Leader(request, meeting, watcher, started).lead()


def _job(prepared: Prepared, local_workers: int, step: int) -> TrainingJob:
    """Return the job of every worker of this machine."""
    here = prepared.placement.model_copy(update={"workers": local_workers})
    setup = replace(
        make_setup(prepared.recipe, here),
        peer_timeout=here.hang_timeout,  # no supervisor names those that are late
        prefetch=False,  # it forks, which a process with threads must not
        faults=[],
    )
    return TrainingJob(setup=setup, step=step)


def _view(recipe: Recipe, rank: int) -> View:
    if rank == 0:
        return PlainView(recipe)
    return SilentView()


def _introduce(
    view: View,
    prepared: Prepared,
    nodes: Sequence[NodeStatus],
    agreed: Agreement,
    port: int,
) -> None:
    """Show who takes part, and the warnings."""
    hosts = ", ".join(f"{node.host}: {node.workers}" for node in nodes)
    machines = "1 machine" if len(nodes) == 1 else f"{len(nodes)} machines"
    view.note(
        f"{prepared.recipe.name}: {sum(node.workers for node in nodes)} workers on "
        f"{machines} ({hosts}), exchange {prepared.placement.exchange}"
    )
    if len({node.host for node in nodes}) > 1:
        view.warn(network_interfaces.warning(nodes[0].address, [port]))
    if _would_prefetch(prepared):
        view.note(
            "note: Under torchrun, `--prefetch auto` has no effect: samples are not "
            "drawn ahead of time. The result is the same."
        )
    for warning in prepared.warnings:
        view.warn(warning)
    if agreed.step:
        view.note(f"going on after step {agreed.step}")


def _would_prefetch(prepared: Prepared) -> bool:
    slow = source_of(prepared.recipe.data).may_be_slow
    return slow and prepared.placement.prefetch == "auto"


def _begin(
    writer: RunWriter,
    prepared: Prepared,
    nodes: Sequence[NodeStatus],
    agreed: Agreement,
    state: Held | None,
    node: int,
) -> None:
    """Write the files of a run as they are before the first step."""
    is_received = node in agreed.receivers and state is not None
    writer.rewind(
        agreed.step,
        state.epochs if state else [],
        state.metrics if state and is_received else None,
    )
    writer.restarts = agreed.generation - 1
    name = "resumed" if agreed.step else "started"
    writer.start(name, prepared.described, prepared.build.get("device", "cpu"))
    writer.event(
        "generation",
        number=agreed.generation,
        step=agreed.step,
        node=node,
        machines=[{"host": one.host, "workers": one.workers} for one in nodes],
        donor=agreed.donor if agreed.receivers and agreed.step else None,
        receivers=agreed.receivers if agreed.step else [],
    )
