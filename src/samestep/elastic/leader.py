"""The first worker of a machine under torchrun, which keeps the run there.

It trains like all others. Before, it compares its machine with those of the other
leaders and prepares the memory that the workers of its machine share. It also writes
the run; where several machines share a run directory, the first of them does.
"""

import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from samestep import report
from samestep.api import train
from samestep.data.sources import source_of
from samestep.elastic import briefing, consensus, node_state, state_transfer
from samestep.elastic.attempt import Generation
from samestep.elastic.consensus import Agreement, NodeStatus
from samestep.elastic.gathering import Meeting
from samestep.elastic.node_state import Held
from samestep.elastic.preflight import Comparison, Prepared, Request
from samestep.elastic.watchdog import Watcher
from samestep.errors import Interrupted, SamestepError
from samestep.messages.job import Briefing, TrainingJob
from samestep.output import ledger
from samestep.output.console import PlainView, SilentView, View
from samestep.output.run import Settings
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
    _prepared: Prepared = field(init=False)
    _nodes: list[NodeStatus] = field(init=False)
    _agreed: Agreement = field(init=False)

    def lead(self) -> None:
        """Run the leader. Raises SamestepError, and Interrupted if it was stopped."""
        comparison = Comparison(self.request, self.meeting)
        try:
            prepared, self._nodes = comparison.compare(comparison.recipe())
            self._agreed = consensus.agree(self._nodes)
            assert prepared is not None
            self._prepared = self._with_ledger(prepared)
        except SamestepError:
            self.meeting.part()
            raise
        variables = self._variables()
        os.environ.update(variables)
        held = self._catch_up()
        snapshots = node_state.make_directory(
            self.request.run, self._directory_name(), self._agreed.generation
        )
        generation = self._share(held, variables, snapshots)
        if consensus.is_writer(self._nodes, self.meeting.topology.node):
            self._keep(generation)
            # The last state of the run is on disk.
            shutil.rmtree(snapshots.parent.parent, ignore_errors=True)
        else:
            generation.run()
            if not generation.is_finished:
                raise Interrupted(
                    "stopped with the others", self.watcher.stop.exit_code
                )

    def _with_ledger(self, prepared: Prepared) -> Prepared:
        """Return what was prepared, with the ledger of the run. Raises RunError."""
        step, has_one = self._agreed.step, ledger.MICRO_BATCHES in self._agreed.ledgers
        given = prepared.placement, self.request.run, step, has_one
        return replace(prepared, placement=train.with_ledger(*given))

    def _variables(self) -> dict[str, str]:
        """Return the variables that tell Gloo and NCCL on which interface to listen.

        If none was named, all workers are on one machine.
        """
        name = self._nodes[self.meeting.topology.node].interface or machine.loopback()
        return {network_interfaces.GLOO_VARIABLE: name, "NCCL_SOCKET_IFNAME": name}

    def _catch_up(self) -> Held | None:
        """All leaders: return the newest state that any of them has."""
        topology, agreed, own = self.meeting.topology, self._agreed, self._prepared.held
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

    def _directory_name(self) -> str:
        """Return the host, numbered if several nodes of a host share the run."""
        nodes = self._nodes
        status = nodes[self.meeting.topology.node]
        same = [node for node in status.sees if nodes[node].host == status.host]
        index = same.index(self.meeting.topology.node)
        return status.host if index == 0 else f"{status.host}-{index + 1}"

    def _share(
        self, state: Held | None, variables: dict[str, str], snapshots: Path
    ) -> Generation:
        """Create what the workers of this machine share, and brief them."""
        prepared, workers = self._prepared, self.meeting.topology.local_workers
        fds = {
            "snapshots": node_state.open_memory(snapshots),
            "constants": shared_memory.create(),
            "heartbeat": Heartbeat.create(workers),
        }
        if prepared.placement.exchange == "shared":
            fds["memory"] = barrier.create(workers)
        if state is not None:
            Snapshots(fds["snapshots"], state.layout, workers).fill(state.state)
        job = _job(prepared, workers, self._agreed.step, self.request.callbacks)
        hosts = [node.host for node in self._nodes for _ in range(node.workers)]
        job = replace(job, setup=replace(job.setup, hosts=hosts))
        if state is not None and not self.request.allow_different_numerics:
            job = replace(job, conditions=kept_for_workers(state.build))
        message = Briefing(job=job, environment=variables, names=list(fds))
        briefing.give(self.meeting, message, list(fds.values()))
        return Generation(
            meeting=self.meeting,
            watcher=self.watcher,
            job=job,
            fds=fds,
            conditions=prepared.build,
            directory=snapshots,
            held=state,
        )

    def _keep(self, generation: Generation) -> None:
        """Train, and write the run."""
        request, prepared, recipe = self.request, self._prepared, self._prepared.recipe
        is_first = self.meeting.topology.rank == 0
        trackers = train.loaded(request.trackers if is_first else ())
        with ExitStack() as stack:
            writer = stack.enter_context(
                RunWriter.reopen(
                    request.run,
                    Settings.of(recipe, prepared.placement),
                    self.started,
                    (self._agreed.generation, machine.name_of_process(os.getppid())),
                    LOCK_SECONDS + prepared.placement.hang_timeout,
                )
            )
            view = stack.enter_context(PlainView(recipe) if is_first else SilentView())
            stack.enter_context(train.tracking(writer, view, trackers))
            self._introduce(view)
            self._begin(writer, generation.held)
            session = Session(
                writer,
                recipe,
                prepared.placement,
                view,
                prepared.checksums,
                self._is_behind,
            )
            generation.listen, generation.offer = session.listen, session.offer
            self.watcher.save = lambda: session.abandon(generation)
            run = session.run(generation, prepared.notice)
        if is_first:
            echo(summary(run))
        if request.with_report:
            report.try_to_write(run.path)

    @property
    def _is_behind(self) -> bool:
        """Whether the state came from another machine."""
        agreed = self._agreed
        return agreed.step > 0 and self.meeting.topology.node in agreed.receivers

    def _introduce(self, view: View) -> None:
        """Show who takes part, and the warnings."""
        prepared, nodes = self._prepared, self._nodes
        hosts = ", ".join(f"{node.host}: {node.workers}" for node in nodes)
        machines = "1 machine" if len(nodes) == 1 else f"{len(nodes)} machines"
        view.note(
            f"{prepared.recipe.name}: {sum(node.workers for node in nodes)} workers on "
            f"{machines} ({hosts}), exchange {prepared.placement.exchange}"
        )
        if len({node.host for node in nodes}) > 1:
            ports = [self.meeting.topology.port]
            view.warn(network_interfaces.warning(nodes[0].address, ports))
        is_slow = source_of(prepared.recipe.data).may_be_slow
        if is_slow and prepared.placement.prefetch == "auto":
            view.note(
                "note: Under torchrun, `--prefetch auto` has no effect: samples are "
                "not drawn ahead of time. The result is the same."
            )
        for warning in prepared.warnings:
            view.warn(warning)
        if self._agreed.step:
            view.note(f"going on after step {self._agreed.step}")

    def _begin(self, writer: RunWriter, state: Held | None) -> None:
        """Write the files of a run as they are before the first step."""
        prepared, agreed = self._prepared, self._agreed
        received = (state.metrics, state.ledgers) if state and self._is_behind else None
        writer.rewind(agreed.step, state.epochs if state else [], received)
        writer.restarts = agreed.generation - 1
        name = "resumed" if agreed.step else "started"
        writer.start(name, prepared.described, prepared.build.get("device", "cpu"))
        writer.event(
            "generation",
            number=agreed.generation,
            step=agreed.step,
            node=self.meeting.topology.node,
            machines=[{"host": n.host, "workers": n.workers} for n in self._nodes],
            donor=agreed.donor if agreed.receivers and agreed.step else None,
            receivers=agreed.receivers if agreed.step else [],
        )


def _job(
    prepared: Prepared, local_workers: int, step: int, callbacks: Sequence[str]
) -> TrainingJob:
    """Return the job of every worker of this machine."""
    here = prepared.placement.model_copy(update={"workers": local_workers})
    setup = replace(
        make_setup(prepared.recipe, here, callbacks=callbacks),
        peer_timeout=here.hang_timeout,  # no supervisor names those that are late
        prefetch=False,  # it forks, which a process with threads must not
        faults=[],
    )
    return TrainingJob(setup=setup, step=step)
