"""Lightning's Trainer with `SamestepStrategy`: the same at any number of processes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import lightning_script
import pytest
import torch
import torch.distributed as dist
from lightning_gan import quiet_trainer
from test_loop import threads
from told_stream import begun
from torch import nn
from torch.multiprocessing.spawn import ProcessException
from torch.utils.data import DataLoader, TensorDataset
from user_scripts import changed_lines, found

from samestep import OwnCodeError
from samestep.lightning import SamestepStrategy


assert threads  # the fixture for every test here
LIGHTNINGS_OWN = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning"
)


def test_the_example_changes_two_lines() -> None:
    changed = changed_lines("lightning")
    assert len(changed) == 2, changed


@LIGHTNINGS_OWN
def test_weights_logs_and_metrics_are_the_same_after_a_stop_elsewhere(
    tmp_path: Path,
) -> None:
    """With 1 and 3 processes, and killed in an epoch that others go on with."""
    for processes in (1, 3):
        lightning_script.fit(tmp_path / str(processes), processes)
    undisturbed = found(tmp_path / "1")
    assert found(tmp_path / "3") == undisturbed
    with pytest.raises(ProcessException):
        lightning_script.fit(tmp_path / "stopped", 2, "kill=1:8")
    lightning_script.fit(tmp_path / "stopped", 3, "resume")
    assert found(tmp_path / "stopped") == undisturbed


@LIGHTNINGS_OWN
def test_a_stream_with_a_state_is_not_read_again(tmp_path: Path) -> None:
    lightning_script.fit(tmp_path / "1", 1, "stream")
    stopped = tmp_path / "stopped"
    with pytest.raises(ProcessException):
        lightning_script.fit(stopped, 2, "stream", "kill=1:7")
    assert begun(stopped / "begun") == [0] * 4
    lightning_script.fit(stopped, 3, "stream", "resume")
    # The third batch is read, to compare it; then comes the third epoch.
    assert begun(stopped / "begun") == [0] * 3 + [96] * 3
    assert found(stopped) == found(tmp_path / "1")


@pytest.mark.parametrize("option", ["accumulate=2", "float64"])
@LIGHTNINGS_OWN
def test_options_of_the_trainer_change_no_bit(tmp_path: Path, option: str) -> None:
    lightning_script.fit(tmp_path / "1", 1, option)
    with pytest.raises(ProcessException):
        lightning_script.fit(tmp_path / "2", 2, option, "kill=0:6")
    lightning_script.fit(tmp_path / "2", 2, option, "resume")
    assert found(tmp_path / "1") == found(tmp_path / "2")


@LIGHTNINGS_OWN
def test_a_process_told_to_end_ends_all_after_the_same_step(tmp_path: Path) -> None:
    with pytest.raises(ProcessException):
        lightning_script.fit(tmp_path, 2, "terminate=1:5")
    assert [(tmp_path / f"told-{rank}").read_text() for rank in (0, 1)] == ["6", "6"]


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    """Lightning leaves the process group to the end of the process."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


class Module(lightning.LightningModule):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class Transferring(Module):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch


class Silent(Module):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None


class Median(Module):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("median", batch[0].median(), reduce_fx="median")
        return super().training_step(batch, batch_idx)


class Logging(Module):
    """Logs as a script may: options by position, and what only processes have."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("first", batch[0][:, 0].mean(), True, False, True, sync_dist_group=1)
        return super().training_step(batch, batch_idx)


class Searching(Module):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(self.parameters())


def fit(module: Module, tmp_path: Path, loader: Any) -> None:
    strategy = SamestepStrategy(micro_batches=4)
    trainer = quiet_trainer(strategy, max_epochs=1, default_root_dir=tmp_path)
    trainer.fit(module, loader)


LOADER = DataLoader(TensorDataset(torch.randn(24, 4)), batch_size=8, shuffle=True)
UNEVEN = DataLoader(TensorDataset(torch.randn(24, 4)), batch_size=7)


@pytest.mark.parametrize(
    ("module", "loader", "message"),
    [
        (Transferring, LOADER, "`on_after_batch_transfer`"),
        (Silent, LOADER, "received NoneType"),
        (Median, LOADER, "with `reduce_fx=median`"),
        (Module, [torch.ones(8, 4)], "received Tensor"),
        (Module, {"a": LOADER, "b": UNEVEN}, "`drop_last=True`"),
    ],
)
@LIGHTNINGS_OWN
def test_what_cannot_be_exact_is_refused(
    tmp_path: Path, module: type[Module], loader: Any, message: str
) -> None:
    with pytest.raises(OwnCodeError, match=message):
        fit(module(), tmp_path, loader)


@LIGHTNINGS_OWN
def test_an_optimizer_that_computes_the_loss_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OwnCodeError, match="as LBFGS does"):
        fit(Searching(), tmp_path, LOADER)


@LIGHTNINGS_OWN
def test_options_of_log_may_be_given_by_position(tmp_path: Path) -> None:
    """Otherwise the value of the last micro-batch would be logged."""
    module, samples = Logging(), torch.arange(8.0).repeat(4, 1).T
    fit(module, tmp_path, DataLoader(TensorDataset(samples), batch_size=8))
    assert module.trainer.progress_bar_metrics == {"first": 3.5}
