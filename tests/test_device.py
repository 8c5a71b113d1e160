"""What a training on GPUs needs, as far as a machine without one can tell.

The meta device stands in for a GPU: it refuses to mix its tensors with the CPU's.
"""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from conftest import Train, small_recipe
from torch import nn

import samestep
from samestep import CheckpointError, Placement, PlacementError, Recipe, models
from samestep.config.recipe import built_in_recipes
from samestep.core.topology import Topology
from samestep.data import dataset
from samestep.exchange.compression import Compression
from samestep.exchange.gloo import GlooExchange
from samestep.models import device as device_
from samestep.models.device import Device
from samestep.models.objective import Objective
from samestep.optim.optimizer import SliceOptimizer, state_names
from samestep.output.console import SilentView
from samestep.state.flat import Flat
from samestep.supervisor.forkserver_client import ForkServer
from samestep.supervisor.launch import _environment
from samestep.system.machine import Gpus
from samestep.training import forkserver
from samestep.training.timing import Tracer


A100 = "NVIDIA A100, compute capability 8.0"
FOUR = Gpus(names=(A100,) * 4, software="CUDA 12.8, cuDNN 91002")
NONE = Gpus(why="no driver")
META = Device(torch.device("meta"))
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def never() -> Gpus:
    raise AssertionError("nobody asked for a GPU")


def test_the_cpu_is_the_default_and_gpus_are_not_looked_for() -> None:
    placement, _ = Placement(workers=2).resolve(8, never)
    assert (placement.device, placement.exchange) == ("cpu", "shared")


@pytest.mark.parametrize(
    ("asked", "gpus", "chosen"),
    [
        ({"device": "cuda"}, FOUR, ("cuda", 4, "nccl")),
        ({"device": "cuda", "workers": 2}, FOUR, ("cuda", 2, "nccl")),
        ({"device": "cuda", "exchange": "nccl"}, FOUR, ("cuda", 4, "nccl")),
        ({"device": "auto"}, FOUR, ("cuda", 4, "nccl")),
        ({"device": "cuda", "exchange": "gloo"}, FOUR, ("cuda", 4, "gloo")),
        (
            {"device": "cuda", "exchange": "gloo", "workers": 6},
            FOUR,
            ("cuda", 6, "gloo"),
        ),
        ({"device": "auto", "workers": 3}, NONE, ("cpu", 3, "shared")),
    ],
)
def test_each_worker_has_a_gpu_unless_gloo_lets_them_share(
    asked: dict[str, Any], gpus: Gpus, chosen: tuple[str, int, str]
) -> None:
    found, _ = Placement(**asked).resolve(8, lambda: gpus)
    assert (found.device, found.workers, found.exchange) == chosen


def test_a_recipe_with_few_micro_batches_takes_few_gpus() -> None:
    assert Placement(device="cuda").resolve(3, lambda: FOUR)[0].workers == 3


@pytest.mark.parametrize(
    ("asked", "gpus", "message"),
    [
        (
            {"device": "cuda"},
            NONE,
            r"needs a GPU that PyTorch can use: no driver.*use `--device cpu`",
        ),
        (
            {"device": "cuda", "workers": 5},
            FOUR,
            r"there are 5 workers and 4 GPUs. Use `--workers 4`, or `--exchange gloo`",
        ),
        (
            {"device": "cuda", "workers": 2, "exchange": "nccl"},
            Gpus(names=(A100,)),
            r"each worker needs one of its own: there are 2 workers and 1 GPU\.",
        ),
        (
            {"device": "cuda", "exchange": "shared"},
            FOUR,
            r"or through the host with Gloo; received `--exchange shared`. Leave it",
        ),
        (
            {"exchange": "nccl"},
            FOUR,
            r"`nccl` is for GPUs, and the device is the CPU. Use `--device cuda`",
        ),
        (
            {"device": "auto"},
            Gpus(names=(A100, "NVIDIA T4, compute capability 7.5")),
            r"of one type.*A100.*; NVIDIA T4.*CUDA_VISIBLE_DEVICES",
        ),
    ],
)
def test_what_gpus_cannot_do_is_explained(
    asked: dict[str, Any], gpus: Gpus, message: str
) -> None:
    with pytest.raises(PlacementError, match=message):
        Placement(**asked).resolve(8, lambda: gpus)


@without_gpu
def test_without_a_gpu_cuda_is_refused_and_auto_is_the_cpu(
    train: Train, server: ForkServer
) -> None:
    assert not server.gpus().names
    assert server.gpus().why
    with pytest.raises(PlacementError, match=r"needs a GPU that PyTorch can use: .*"):
        train(small_recipe(), 2, device="cuda")
    run = train(small_recipe(), 2, device="auto")
    assert run.weights_sha256 == train(small_recipe(), 1).weights_sha256
    assert run.result["placement"]["device"] == "cpu"
    assert json.loads((run.path / "environment.json").read_text())["device"] == "cpu"


def test_a_driver_that_hangs_is_not_waited_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(forkserver, "GPU_SECONDS", 0.1)
    looking = os.posix_spawnp("sleep", ["sleep", "600"], os.environ)
    assert "CUDA does not answer" in forkserver._failure_of(looking)
    assert not psutil.pid_exists(looking)


def test_what_decides_the_bits_of_a_gpu_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    assert device_.gpus() == Gpus((A100,) * 4, "CUDA 12.8, cuDNN 91002")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch.cuda.is_available() is false" in device_.gpus().why
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "has no CUDA" in device_.gpus().why


def test_another_device_is_refused_like_another_instruction_set(
    train: Train, server: ForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(small_recipe(schedule={"name": "constant"}))
    monkeypatch.setattr(server, "gpus", lambda: FOUR)
    assert server.build("cuda")["device"] == f"cuda: {A100}, CUDA 12.8, cuDNN 91002"
    assert "device" not in server.build()
    with pytest.raises(CheckpointError, match=r"device: cpu then, cuda: NVIDIA A100"):
        samestep.resume(run, server=server, epochs=2, device="cuda")


def test_portable_arithmetic_is_refused_on_a_gpu(
    train: Train, server: ForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small_recipe(arithmetic="portable", schedule={"name": "constant"})
    run = train(recipe)
    monkeypatch.setattr(server, "gpus", lambda: FOUR)
    attempts = (
        lambda: train(recipe, device="auto"),
        lambda: samestep.resume(run, server=server, epochs=2, device="cuda"),
        lambda: samestep.evaluate(run, server=server, device="cuda"),
    )
    for attempt in attempts:
        with pytest.raises(PlacementError, match=r"not on `cuda`. Use `--device cpu`"):
            attempt()


def test_a_worker_prepares_its_gpu_before_it_uses_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[str, object]] = []
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    products = SimpleNamespace(allow_tf32=True)
    cudnn = SimpleNamespace(allow_tf32=True, benchmark=True)
    monkeypatch.setattr(torch.backends.cuda, "matmul", products)
    monkeypatch.setattr(torch.backends, "cudnn", cudnn)
    monkeypatch.setattr(
        torch, "use_deterministic_algorithms", lambda on: calls.append(("exact", on))
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    def start(index: int) -> None:
        calls.append((os.environ["CUBLAS_WORKSPACE_CONFIG"], index))

    monkeypatch.setattr(torch.cuda, "set_device", start)
    assert Device.prepare("cuda", 1).target == torch.device("cuda:1")
    assert calls == [("exact", True), (":4096:8", 1)]
    assert vars(products) == {"allow_tf32": False}
    assert vars(cudnn) == {"allow_tf32": False, "benchmark": False}
    with pytest.raises(PlacementError, match=r"Worker 2 needs a GPU.*shows 2"):
        Device.prepare("cuda", 2)
    assert Device.prepare("cuda", 2, is_shared=True).target == torch.device("cuda:0")
    assert calls[-1] == (":4096:8", 0)


def test_the_cpu_is_left_as_it_is() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    cpu = Device.prepare("cpu", 3)
    recipe = small_recipe()
    data = dataset.load(recipe.data)
    model = models.build(recipe.model, data)
    batch = data.splits["train"].gather(torch.arange(3))
    assert all(a is b for a, b in zip(cpu.to_device(*batch), batch, strict=True))
    assert cpu.move(model) is model
    assert torch.are_deterministic_algorithms_enabled() == before


def test_a_gpu_is_seeded_for_each_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed", seeds.append)
    for device in (torch.device("cuda:0"), torch.device("cpu")):
        Device(device).seed(17)
    assert seeds == [17]


STEPS: dict[str, tuple[str, dict[str, Any]]] = {
    name: (name, {}) for name in built_in_recipes()
} | {
    "compressed": ("mnist-mlp", {"arithmetic": "torch", "compression": "bf16"}),
    "batch-norm": ("mnist-mlp", {"arithmetic": "torch", "model.norm": "batch"}),
}


@pytest.mark.parametrize(("name", "changed"), STEPS.values(), ids=STEPS.keys())
def test_a_step_stays_on_its_device(name: str, changed: dict[str, Any]) -> None:
    recipe = Recipe.load(name, changed)
    if recipe.data.source == "fashion-mnist":
        recipe = Recipe.from_dict(recipe.to_dict() | {"data": {"source": "mnist"}})
    if recipe.data.source == "text":
        recipe = recipe.changed({"data.path": str(Path(__file__).parent)})
    data = dataset.load(recipe.data)
    model = models.build(recipe.model, data)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.num_batches_tracked = None  # no number can be read from meta
    model = META.move(model)
    flat = Flat(model, state_names(recipe.optimizer))
    exchange = GlooExchange(
        flat, [(0, 2)], Topology.on_one_node(0, 1), Compression.of(recipe.compression)
    )
    objective = exchange.attach(Objective(model, recipe.loss), overlap=False)
    optimizer = SliceOptimizer(recipe.optimizer, exchange.parameters, exchange.states)
    for leaf in range(2):
        inputs, targets = META.to_device(*data.draw(torch.arange(4 * leaf, 4), epoch=0))
        flat.restore_buffers()
        loss, _ = objective(inputs, targets)
        loss.backward(torch.tensor(1 / 8, device=META.target))
        exchange.after_backward(leaf)
    gradient, buffers = exchange.sum()
    flat.advance_buffers(buffers, 2, 2)
    optimizer.step(gradient, 1e-3)
    for tensor in (gradient, exchange.parameters, *exchange.states):
        assert tensor.device == META.target


def test_partials_go_through_another_memory_with_the_same_bits(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    recipe = small_recipe(model__norm="batch")
    with CarryingServer() as carrying:
        options: dict[str, Any] = {"view": SilentView(), "server": carrying}
        options |= {"workers": 3, "exchange": "gloo", "out": tmp_path / "carried"}
        carried = samestep.train(recipe, **options)
    assert carried.weights_sha256 == train(recipe).weights_sha256
    assert "partials are carried" in (carried.path / "logs/rank-2.log").read_text()


class CarryingServer(ForkServer):
    """A fork server whose workers import `other_memory`."""

    def spawn(
        self, env: dict[str, str], log: Path, fds: dict[str, int], preload: list[str]
    ) -> int:
        return super().spawn(env, log, fds, [*preload, "other_memory"])


def test_the_kept_steps_of_a_profile_wait_for_what_is_queued() -> None:
    waits: list[int] = []
    tracer = Tracer(2, lambda _: None, lambda: waits.append(1))
    for step in range(Tracer.WARM_UP + 4):
        tracer.begin(step)
        tracer.lap("forward")
        tracer.lap("backward")
    assert len(waits) == 4


def test_nccl_stays_on_the_loopback_interface() -> None:
    env = _environment(1, 2, 4711)
    assert env["NCCL_SOCKET_IFNAME"] == env["GLOO_SOCKET_IFNAME"] in ("lo", "lo0")
    assert env["LOCAL_RANK"] == "1"
