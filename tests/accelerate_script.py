"""A script of an Accelerate user, in processes as torchrun would start them.

They are forked: to import torch and Accelerate in each takes longer than to train.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from accelerate.tracking import GeneralTracker, on_main_process
from accelerate.utils import set_seed
from processes import reserved_port
from told_stream import Told
from torch import nn
from torch.multiprocessing.spawn import start_processes
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from samestep.accelerate import Accelerator
from samestep.state.fingerprint import fingerprint


class Lines(GeneralTracker):  # type: ignore[misc]
    """Keeps what is logged."""

    name, requires_logging_directory, main_process_only = "lines", False, True

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[object] = []

    @property
    def tracker(self) -> "Lines":
        return self

    @on_main_process  # type: ignore[untyped-decorator]
    def log(self, values: dict[str, object], step: int | None = None) -> None:
        self.lines.append([step, values])


def samples(count: int, seed: int) -> TensorDataset:
    x = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, x[:, :3].argmax(1))


def network() -> nn.Module:
    hidden = nn.Linear(8, 16), nn.Unflatten(1, (4, 4)), nn.BatchNorm1d(4)
    last = nn.Flatten(), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3)
    return nn.Sequential(*hidden, *last)


def evaluate(accelerator: Accelerator, model: nn.Module, loader: Any) -> Any:
    """Return the rows that all processes have gathered."""
    model.eval()
    rows = []
    for x, y in loader:
        with torch.no_grad():
            outputs = model(x)
        gathered = accelerator.gather_for_metrics({"out": outputs, "y": y})
        names = accelerator.gather_for_metrics([f"{float(v):.3f}" for v in x[:, 0]])
        assert len(names) == len(gathered["y"])
        rows.append((gathered["out"], gathered["y"], names))
    outputs, labels = torch.cat([r[0] for r in rows]), torch.cat([r[1] for r in rows])
    accuracy = float((outputs.argmax(1) == labels).double().mean())
    losses = functional.cross_entropy(outputs, labels, reduction="none")
    return accuracy, float(losses.sum()), [name for r in rows for name in r[2]]


def run(out: Path, processes: int, *options: str, stop: int = -1) -> None:
    """Train with so many processes, which write what must be equal.

    Options: `accumulate`, `stream`, `resume`. After step `stop`, a state is saved and
    all end at once.
    """
    out.mkdir(exist_ok=True)
    with reserved_port() as port:
        arguments = (processes, port, out, options, stop)
        start_processes(  # type: ignore[no-untyped-call]
            _process, arguments, processes, start_method="fork"
        )


def _process(rank: int, processes: int, port: int, *arguments: Any) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": port}
    place |= {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    os.environ |= {name: str(value) for name, value in place.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    _train(*arguments)


def _train(out: Path, options: tuple[str, ...], stop: int) -> None:
    tracker = Lines()
    accelerator = Accelerator(
        micro_batches=6,
        log_with=tracker,
        gradient_accumulation_steps=2 if "accumulate" in options else 1,
    )
    accelerator.init_trackers("run")
    set_seed(7)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    data: Any = samples(100, 0)  # the last global batch has 4
    is_stream = "stream" in options
    data = Told(data, out / "begun") if is_stream else data
    train = DataLoader(data, 32, shuffle=not is_stream)
    test = DataLoader(samples(20, 1), 8)  # the last of 3 batches has 4
    steps_per_epoch = 4
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=9)
    model, optimizer, train, test, schedule = accelerator.prepare(
        model, optimizer, train, test, schedule
    )
    done = 0
    if "resume" in options:
        accelerator.load_state(out / "state")
        done = int((out / "done").read_text())
    start = done
    for epoch in range(done // steps_per_epoch, 2):
        model.train()
        first = start - epoch * steps_per_epoch if epoch == start // 4 else 0
        for x, y in accelerator.skip_first_batches(train, first) if first else train:
            with accelerator.accumulate(model):
                loss = functional.cross_entropy(model(x), y)
                accelerator.backward(loss)
                norm = accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            losses = accelerator.gather_for_metrics(loss)
            if accelerator.sync_gradients:
                done += 1
                values = {"loss": losses.tolist(), "norm": float(norm)}
                values["draw"] = float(torch.rand(()))
                accelerator.log({**values, "lr": schedule.get_last_lr()}, step=done)
                if done == stop:
                    accelerator.save_state(out / "state")
                    (out / "done").write_text(str(done))
                    accelerator.wait_for_everyone()
                    os._exit(0)  # as if all were killed
        accelerator.log({"test": evaluate(accelerator, model, test)}, step=done)
    every = accelerator.state.num_processes
    weights = fingerprint(accelerator.unwrap_model(model).state_dict())
    (out / f"sha256.{accelerator.process_index}.of.{every}").write_text(weights)
    if accelerator.is_main_process:
        (out / "lines.json").write_text(json.dumps(tracker.lines))
    accelerator.end_training()
