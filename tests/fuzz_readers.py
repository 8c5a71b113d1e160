"""Every reader of bytes that others may have made, with a valid sample of each."""

import contextlib
import hashlib
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import data_samples
import kernel_trainings
import safetensors.torch
import test_checkpoint
import torch
from conftest import small_recipe
from report_samples import write_run, write_scaling

from samestep import Placement, Recipe, Run, models, report
from samestep.api import sample
from samestep.config.training import InitRecipe
from samestep.data import dataset
from samestep.data.sources import checksums, source_of
from samestep.doctor import check_link, check_peer, observe, peer
from samestep.doctor.peer import Link, Session
from samestep.elastic import node_state
from samestep.elastic.node_state import StateInfo
from samestep.errors import SamestepError
from samestep.kernels.program_file import ProgramFile
from samestep.output.run import MODEL_FILE, Settings, first_difference, read_recipe
from samestep.output.run_writer import RunWriter
from samestep.report import load
from samestep.scaling import study as scaling_files
from samestep.scaling.grid import from_options
from samestep.scaling.study import Study
from samestep.state import checkpoint
from samestep.state.snapshot import Snapshots
from samestep.supervisor.resume import find_start
from samestep.training import init_weights
from samestep.user_code.references import UserCode
from samestep.verification import replicas


RECIPE = small_recipe()
Read = Callable[[], object]


@dataclass(frozen=True)
class Reader:
    """What reads, and what it may say of damaged bytes."""

    make: Callable[[Path], Read]
    """Writes valid files into a directory; what it returns reads them."""
    allowed: tuple[type[BaseException], ...] = (SamestepError,)
    repair: Callable[[Path], object] = lambda _: None
    """Makes checksums right again, as an attacker can."""
    share: float = 1.0
    """Share of the inputs: less for readers that take long."""


def _run(topology: Path, **fields: Any) -> Path:
    run = write_run(topology / "run", **fields)
    (run / "generation").write_text('{"number": 3, "writer": "h.1"}')
    (run / "recipe.toml").write_text(RECIPE.to_toml())
    return run


def compared(topology: Path) -> Read:
    path = _run(topology)

    def read() -> None:
        run = Run.open(path)
        run._repr_html_()
        first_difference(run, run)

    return read


def resumed(topology: Path) -> Read:
    path = _run(topology)
    (path / "result.json").unlink()

    def read() -> None:
        start = find_start(path, None)
        where = path, Settings.of(start.recipe, Placement(workers=1)), 0.0
        with RunWriter.reopen(*where) as writer:
            writer.rewind(100, [])

    return read


def reported(topology: Path) -> Read:
    path = _run(topology)
    return lambda: report.write(path)


def read_for_report(topology: Path) -> Read:
    path = _run(topology)
    return lambda: load.read_run(path)


def checkpointed(topology: Path) -> Read:
    path = test_checkpoint.write(topology, 1, [{"epoch": 1, "validation_loss": 0.5}])
    return lambda: checkpoint.load(path)


def vouch(topology: Path) -> None:
    """Put the right sums into the manifest of a checkpoint."""
    path = topology / "step-1"
    file = path / checkpoint.MANIFEST
    with contextlib.suppress(Exception):
        fields = json.loads(file.read_bytes())
        for name in (checkpoint.MODEL, checkpoint.OPTIMIZER):
            content = (path / name).read_bytes()
            sha256 = hashlib.sha256(content).hexdigest()
            fields["files"][name] = {"bytes": len(content), "sha256": sha256}
        with contextlib.suppress(SamestepError):
            fields["recipe_digest"] = Recipe.from_dict(fields["recipe"]).digest
        fields.pop("digest", None)
        fields["digest"] = checkpoint.digest_of(fields)
        file.write_text(json.dumps(fields))


def held_in_memory(topology: Path) -> Read:
    """Return the reader of a memory that killed workers have left."""
    shelf = node_state.make_directory(topology / "run", "h1", 1)
    layout = test_checkpoint.LAYOUT
    fd = node_state.open_memory(shelf)
    Snapshots(fd, layout, 1).fill(test_checkpoint.state_of(7))
    os.close(fd)
    node_state.describe(
        shelf,
        StateInfo(
            recipe=RECIPE.to_dict(),
            build=test_checkpoint.BUILD,
            layout=layout,
            workers=1,
        ),
    )
    return lambda: node_state.newest(topology / "run")


def _network() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))


def model_file(topology: Path) -> Read:
    path = topology / "model.safetensors"
    recipe = {"recipe": json.dumps(RECIPE.to_dict())}
    safetensors.torch.save_file(_network().state_dict(), path, recipe)

    def read() -> None:
        read_recipe(path)
        replicas.load_into(_network(), path)

    return read


def program_file(topology: Path) -> Read:
    path = topology / "training.program"
    kernel_trainings.training(steps=1).write(path)
    return lambda: ProgramFile.read(path)


def loaded_model(topology: Path) -> Read:
    """Read a run as `export`, `sample` and `Run.load_model` do."""
    facts = {"inputs": [784], "outputs": 10, "task": "classification"}
    path = _run(topology, data=facts)
    model = models.build(RECIPE.model, dataset.Dataset.from_facts(facts), UserCode())
    safetensors.torch.save_file(model.state_dict(), path / MODEL_FILE)
    return lambda: Run.open(path).load_model()


def start_weights(topology: Path) -> Read:
    path = topology / "w.pt"
    torch.save({"state_dict": _network().state_dict()}, path)
    return lambda: init_weights.load(_network(), InitRecipe(weights=str(path)))


def recipe_file(topology: Path) -> Read:
    path = topology / "r.toml"
    fields = {
        "data.augment": {"shift": 2},
        "freeze": ["a"],
        "early_stopping.patience": 2,
    }
    path.write_text(RECIPE.changed(fields).to_toml())

    def read() -> None:
        recipe = Recipe.load(path)
        assert Recipe.from_dict(recipe.to_dict()) == recipe
        assert recipe.digest
        recipe.to_toml()

    return read


def vocabulary(topology: Path) -> Read:
    path = topology / "environment.json"
    path.write_text(json.dumps({"data": {"vocabulary": "\n abc"}}))
    return lambda: sample.vocabulary(path)


def scaling_report(topology: Path) -> Read:
    path = write_scaling(topology / "scaling")
    return lambda: report.write(path)


def scaling(topology: Path) -> Read:
    path = write_scaling(topology / "scaling")
    return lambda: load.read_scaling(path)


def study(topology: Path) -> Read:
    """Return the reader of measurements that `samestep scale` continues."""
    path = topology / scaling_files.FILE
    Study(topology, RECIPE, {}, from_options(RECIPE, 2), 9, {}).save()
    return lambda: scaling_files.read(path)


def _text(topology: Path) -> dict[str, Any]:
    topology.mkdir()
    (topology / "a.txt").write_text("größe: 模型, to be or not to be.\n" * 40)
    return {"source": "text", "path": str(topology), "pattern": "*.txt", "context": 8}


def _images(topology: Path) -> dict[str, Any]:
    return data_samples.images(topology, 4)


def data(make: Callable[[Path], dict[str, Any]]) -> Callable[[Path], Read]:
    """Return the reader of a source of data, for the supervisor and the workers."""

    def written(topology: Path) -> Read:
        recipe = data_samples.recipe_of(make(topology / "data")).data

        def read() -> None:
            source_of(recipe).prepare()
            checksums(source_of(recipe).describe())
            for split in dataset.load(recipe).splits.values():
                split.gather(torch.arange(min(3, len(split))))

        return read

    return written


@contextlib.contextmanager
def _talk(said: bytes) -> Iterator[Session]:
    """Yield a connection on which the other side says this, and hears everything."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        theirs, _ = server.accept()
    with ours, theirs:
        ours.sendall(said)
        ours.shutdown(socket.SHUT_WR)
        hears = threading.Thread(target=_drain, args=(ours,))
        hears.start()
        try:
            yield Session(theirs)
        finally:
            theirs.close()
            hears.join()


def _drain(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while connection.recv(1 << 20):
            pass


def doctors_answer(topology: Path) -> Read:
    """Return the reader of an answer to `samestep doctor --peer`."""
    path, own = topology / "facts.json", observe.observe(port=0)
    said = {"facts": own.model_dump(), "seen_address": "127.0.0.1"}
    path.write_text(json.dumps(said))

    def read() -> None:
        content = path.read_bytes()[: 60 << 10]
        with _talk(len(content).to_bytes(4, "big") + content) as wire:
            link = Link(peer="h", port=1)
            peer._facts(wire, link)
        check_link.check(link)
        if link.facts:
            check_peer.compare(own, link.facts)

    return read


def doctors_questions(topology: Path) -> Read:
    """Return the reader of questions to `samestep doctor --serve`."""
    path, own = topology / "said", observe.observe(port=0)
    asked: list[dict[str, Any]] = [
        {"ask": "facts"},
        {"ask": "echo", "times": 1},
        {"ask": "give", "size": 4096},
        {"ask": "connect", "port": 1024},
        {"ask": "listen"},
        {"ask": "end"},
    ]
    parts = []
    for message in asked:
        raw = json.dumps(message).encode()
        clock = bytes(8) if "times" in message else b""
        parts.append(len(raw).to_bytes(4, "big") + raw + clock)
    path.write_bytes(b"".join(parts))
    setattr(peer, "CONNECT_SECONDS", 0.01)  # noqa: B010  not one of its names

    def read() -> None:
        with _talk(path.read_bytes()[: 60 << 10]) as wire:
            peer._answer(wire, lambda: own)

    return read


SAID = (OSError, ValueError)
"""What both doctors take for a peer that does not keep to the language."""
READERS = {
    "compare": Reader(compared),
    "resume": Reader(resumed, share=0.3),
    "report": Reader(read_for_report),
    "report-page": Reader(reported, share=0.01),
    "checkpoint": Reader(checkpointed, repair=vouch, share=2),
    "state": Reader(held_in_memory),
    "model": Reader(model_file, share=2),
    "load-model": Reader(loaded_model),
    "program": Reader(program_file),
    "start": Reader(start_weights),
    "recipe": Reader(recipe_file, share=2),
    "vocabulary": Reader(vocabulary, share=0.3),
    "scaling": Reader(scaling),
    "study": Reader(study),
    "scaling-page": Reader(scaling_report, share=0.01),
    "idx": Reader(data(data_samples.idx)),
    "packed-idx": Reader(data(data_samples.fashion)),
    "npy": Reader(data(data_samples.npy), share=2),
    "npz": Reader(data(data_samples.npz)),
    "packed-npz": Reader(data(data_samples.packed_npz)),
    "csv": Reader(data(data_samples.csv_file)),
    "parquet": Reader(data(data_samples.parquet_file)),
    "images": Reader(data(_images)),
    "text": Reader(data(_text)),
    "doctors-answer": Reader(doctors_answer, SAID),
    "doctors-questions": Reader(doctors_questions, SAID),
}
