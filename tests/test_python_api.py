"""Training from Python: what is defined right there reaches the workers."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import samestep
from samestep import CheckpointError, Interrupted, OwnCodeError
from samestep.output.console import SilentView
from samestep.state.fingerprint import fingerprint
from samestep.supervisor.forkserver_client import ForkServer
from samestep.user_code import transport


NOTEBOOK = Path(__file__).parents[1] / "examples" / "notebook.ipynb"
DEADLINE = 120.0

Go = Callable[..., samestep.Run]


@pytest.fixture
def go(server: ForkServer, tmp_path: Path) -> Go:
    """Call `samestep.train` with a small recipe for what is given."""

    def run(**given: Any) -> samestep.Run:
        out = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        plain: dict[str, Any] = {"epochs": 1, "global_batch": 24, "micro_batches": 6}
        quiet: dict[str, Any] = {"view": SilentView(), "server": server}
        return samestep.train(**{**plain, "out": out, **quiet, **given})

    return run


def samples(size: int = 90) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(size) % 3
    inputs = torch.randn(size, 5, generator=generator)
    inputs[torch.arange(size), targets] += 2
    return inputs, targets


class Pairs(Dataset[Any]):
    """A map-style data set, defined in a test."""

    def __init__(self) -> None:
        self.inputs, self.targets = samples()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.inputs[index], int(self.targets[index])


class Net(nn.Module):
    """The contract in a class: it names what it wants to know."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(5, outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        found: Tensor = self.layer(inputs)
        return found


DATA: dict[str, Callable[[], Any]] = {
    "tensors": samples,
    "arrays": lambda: tuple(each.numpy() for each in samples()),
    "splits": lambda: {"train": samples(), "test": samples(30)},
    "data-set": Pairs,
    "function": lambda: samples,
}


@pytest.mark.parametrize("kind", DATA)
def test_data_of_every_kind_give_one_fingerprint_at_any_number_of_workers(
    go: Go, kind: str
) -> None:
    given = {"model": Net, "data": DATA[kind]()}
    alone = go(workers=1, **given)
    together = go(workers=3, exchange="gloo", **given)
    assert together.weights_sha256 == alone.weights_sha256
    assert together.recipe == alone.recipe


def test_all_kinds_of_data_with_the_same_samples_give_the_same_weights(go: Go) -> None:
    found = {
        go(model=Net, data=DATA[kind](), workers=2).weights_sha256
        for kind in ("tensors", "arrays", "data-set", "function")
    }
    assert len(found) == 1


def test_functions_lambdas_and_modules_are_models(go: Go) -> None:
    classes, data = 3, samples()
    first = go(model=lambda: nn.Linear(5, classes), data=data, workers=2)
    torch.manual_seed(0)
    module = nn.Linear(5, classes)
    second = go(model=module, data=data, workers=2)
    for run, given in ((first, lambda: nn.Linear(5, classes)), (second, module)):
        loaded = run.load_model(given)
        assert fingerprint(loaded.state_dict()) == run.weights_sha256
    with pytest.raises(OwnCodeError, match="Give it again: `model="):
        first.load_model()


def test_a_loss_is_a_function_and_a_built_in_model_takes_own_data(go: Go) -> None:
    run = go(
        data=samples(),
        model="mlp",
        model__hidden=[4],
        loss=lambda outputs, targets: nn.functional.cross_entropy(
            outputs, targets, reduction="sum"
        ),
        lr=0.01,
        workers=2,
    )
    assert run.recipe.to_dict()["model"]["hidden"] == [4]
    assert run.recipe.optimizer.lr == 0.01
    assert run.recipe.name == "own"


def test_large_arrays_lie_in_memory_once(go: Go) -> None:
    packed = transport.pack((np.zeros((1000, 1000), np.float32), samples()[1]), "data")
    code, *arrays = packed.parts
    assert code.raw().nbytes < 2_000
    assert [array.raw().nbytes for array in arrays] == [4_000_000, 720]


def test_what_is_given_has_the_same_identity_wherever_it_is_defined() -> None:
    def define(filler: str, number: int) -> Any:
        code = f"{filler}class Net:\n    size = {number}\n    def f(self): return 1\n"
        space: dict[str, Any] = {"__name__": "__main__"}
        exec(compile(code, f"<cell {len(filler)}>", "exec"), space)  # noqa: S102
        return space["Net"]

    once, moved = define("", 1), define("\n\n# elsewhere\n", 1)
    assert transport.identity(once) == transport.identity(moved)
    assert transport.identity(once) != transport.identity(define("", 2))
    one, other = torch.zeros(3), torch.tensor([0.0, 0.0, 1.0])
    assert transport.identity(one) == transport.identity(one.clone())
    assert transport.identity(one) != transport.identity(other)


def test_a_generic_class_has_the_same_identity_in_every_process() -> None:
    code = (
        "from typing import Generic, TypeVar\n"
        "T = TypeVar('T')\n"
        "class Net(Generic[T]):\n"
        "    size: T\n"
    )

    def define() -> Any:
        space: dict[str, Any] = {"__name__": "__main__"}
        exec(code, space)  # noqa: S102
        return space["Net"]

    assert transport.identity(define()) == transport.identity(define())


def test_a_checksum_in_the_code_belongs_to_its_identity() -> None:
    one, other = (lambda: "0" * 32), (lambda: "1" * 32)
    assert one.__code__.co_consts != other.__code__.co_consts
    assert transport.identity(one) != transport.identity(other)


def test_what_cannot_be_sent_is_refused(go: Go) -> None:
    with pytest.raises(OwnCodeError, match=r"lock cannot be: .*Name it as"):
        go(model=Net, data=threading.Lock())


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"epoch": 3}, "has a field `epoch`. Did you mean `epochs`"),
        ({"epochs": 0}, "`epochs`: input should be greater than or equal to 1"),
        ({"workers": 0}, "`workers`: input should be greater"),
    ],
)
def test_a_wrong_keyword_is_a_usage_error(
    go: Go, field: dict[str, Any], message: str
) -> None:
    with pytest.raises(samestep.UsageError, match=message):
        go(model=Net, data=samples(), **field)


def test_resume_asks_for_what_was_given(go: Go, server: ForkServer) -> None:
    given: dict[str, Any] = {"model": Net, "data": samples()}
    whole = go(epochs=2, **given)
    run = go(**given)
    again: dict[str, Any] = {"epochs": 2, "server": server, "view": SilentView()}
    with pytest.raises(OwnCodeError, match=r"never stored\. Give it again"):
        samestep.resume(run, **again)
    with pytest.raises(CheckpointError, match=r"recipe data.load: sha256:"):
        samestep.resume(run, model=Net, data=samples(120), **again)
    resumed = samestep.resume(run, **given, **again, workers=3)
    assert resumed.weights_sha256 == whole.weights_sha256
    found = samestep.evaluate(resumed, **given, server=server)
    assert found.loss == resumed.result["test_loss"]


def test_an_interrupt_leaves_a_run_that_goes_on(
    go: Go, server: ForkServer, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"model": Net, "data": samples()}
    quiet: dict[str, Any] = {"server": server, "view": SilentView()}
    sent: list[Any] = []

    def interrupt(record: dict[str, Any]) -> None:
        if record["type"] == "epoch" and not sent:
            sent.append(record)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted) as caught:
        go(**given, epochs=3000, trackers=[interrupt], out=tmp_path / "stopped")
    assert caught.value.exit_code == 130
    epochs = len(samestep.Run.open(tmp_path / "stopped").history) + 2
    resumed = samestep.resume(tmp_path / "stopped", epochs=epochs, **given, **quiet)
    assert resumed.weights_sha256 == go(**given, epochs=epochs).weights_sha256


def test_a_run_shows_itself(go: Go) -> None:
    run = go(model=Net, data=samples(), name="a..b", epochs=2)
    table = pd.DataFrame(run.history)
    assert list(table.epoch) == [1, 2]
    assert table.validation_loss.dtype == float
    html = run._repr_html_()
    assert run.weights_sha256 in html
    assert "test accuracy" in html
    evil = samestep.Run(Path("<script>"), run.result)
    assert "<script>" not in evil._repr_html_()
    assert "&lt;script&gt;" in evil._repr_html_()


SCRIPT = """
import torch
from torch import nn
import samestep

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)
    def forward(self, x):
        return self.layer(x)

x = torch.randn(80, 4, generator=torch.Generator().manual_seed(0))
run = samestep.train(
    model=Net, data=(x, (x[:, 0] > 0).long()), epochs=1, workers=2, out="run"
)
print(run.recipe.model.build, run.weights_sha256)
print(sum(p.numel() for p in run.load_model(Net).parameters()))
"""


def test_a_script_can_be_run_again_with_the_same_identity(tmp_path: Path) -> None:
    outputs = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "script.py").write_text(SCRIPT)
        ended = subprocess.run(
            [sys.executable, "script.py"],
            cwd=tmp_path / name,
            capture_output=True,
            text=True,
            timeout=DEADLINE,
            check=False,
        )
        assert ended.returncode == 0, ended.stderr
        outputs.append(ended.stdout)
    assert outputs[0] == outputs[1]
    assert outputs[0].endswith("\n10\n")


@pytest.mark.filterwarnings("ignore")  # of Jupyter's libraries
def test_the_notebook_runs(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=DEADLINE, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    cells = [str(cell.get("outputs", "")) for cell in notebook.cells]
    assert any("epoch 2/2" in cell for cell in cells)
    assert any("<table>" in cell for cell in cells)
    assert any("'True'" in cell for cell in cells)


def masked(form: str) -> nn.Module:
    """The first two columns of the weight are not to change."""
    torch.manual_seed(3)
    model = nn.Linear(5, 3)
    mask = torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0])
    weight = model.weight
    if form == "of the gradient":  # it refers to its tensor
        weight.register_hook(  # type: ignore[no-untyped-call]
            lambda gradient: gradient * mask.expand_as(weight)
        )
    elif form == "of the sum":

        def mask_sum(parameter: Tensor) -> None:
            assert parameter.grad is not None
            parameter.grad.mul_(mask)

        weight.register_post_accumulate_grad_hook(mask_sum)  # type: ignore[no-untyped-call]
    else:
        model.register_forward_pre_hook(lambda _, given: (given[0] * mask,))
    return model


@pytest.mark.parametrize(
    ("form", "exchange"),
    [("of the gradient", "shared"), ("of the sum", "gloo"), ("of a pass", "shared")],
)
def test_hooks_of_a_model_that_is_given_as_an_instance_are_called(
    go: Go, form: str, exchange: str
) -> None:
    settings: dict[str, Any] = {"data": samples(), "workers": 2, "exchange": exchange}
    run = go(model=masked(form), **settings)
    before, after = masked(form).state_dict(), run.load_model(masked(form)).state_dict()
    changed = (before["weight"] != after["weight"]).any(dim=0)
    assert changed.tolist() == [False, False, True, True, True]
    same = go(model=lambda: masked(form), **settings)
    assert same.weights_sha256 == run.weights_sha256


def test_what_cannot_be_handed_over_says_to_give_a_function(go: Go) -> None:
    half = nn.Linear(5, 3).bfloat16()
    half.weight.register_hook(lambda g: g)  # type: ignore[no-untyped-call]
    with_parametrization = nn.utils.parametrizations.weight_norm(nn.Linear(5, 3))
    for model, why in ((half, "hooks"), (with_parametrization, "parametrized")):
        with pytest.raises(
            OwnCodeError, match=f"(?s){why}.*build it inside a function"
        ):
            go(model=model, data=samples())
