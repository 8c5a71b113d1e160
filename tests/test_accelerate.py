"""`samestep.accelerate.Accelerator`: the same at any number of processes."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import DataLoaderConfiguration
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import set_seed
from accelerate_script import run
from test_loop import data, network, threads
from told_stream import begun
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader
from user_scripts import changed_lines

from samestep import Loop, OwnCodeError
from samestep.accelerate import Accelerator
from samestep.state.fingerprint import fingerprint


assert threads  # the fixture for every test here


def test_the_example_changes_two_lines() -> None:
    changed = changed_lines("accelerate")
    assert len(changed) == 2, changed


def found(out: Path, processes: int) -> tuple[set[str], Any]:
    """Return the fingerprints of all processes, and what was logged."""
    weights = [path.read_text() for path in out.glob(f"sha256.*.of.{processes}")]
    assert len(weights) == processes
    return set(weights), json.loads((out / "lines.json").read_text())


def test_weights_metrics_and_trackers_are_the_same_after_a_stop_elsewhere(
    tmp_path: Path,
) -> None:
    """With 1 and 3 processes, and stopped by 2 in an epoch that 3 others go on with.

    The last global batch of an epoch has fewer samples than micro-batches.
    """
    for processes in (1, 3):
        run(tmp_path / str(processes), processes)
    weights, lines = found(tmp_path / "1", 1)
    assert len(weights) == 1
    assert found(tmp_path / "3", 3) == (weights, lines)
    run(tmp_path / "stopped", 2, stop=6)
    run(tmp_path / "stopped", 3, "resume")
    assert found(tmp_path / "stopped", 3) == (weights, lines[-3:])


def test_a_stream_and_accumulation_change_no_bit(tmp_path: Path) -> None:
    for processes in (1, 2):
        run(tmp_path / str(processes), processes, "accumulate", "stream")
    assert found(tmp_path / "1", 1) == found(tmp_path / "2", 2)


def test_a_stream_with_a_state_is_not_read_again(tmp_path: Path) -> None:
    run(tmp_path / "1", 1, "stream")
    weights, lines = found(tmp_path / "1", 1)
    stopped = tmp_path / "stopped"
    run(stopped, 2, "stream", stop=6)
    assert begun(stopped / "begun") == [0] * 4
    run(stopped, 3, "stream", "resume")
    assert begun(stopped / "begun") == [32] * 3, "the batch before is read, to compare"
    assert found(stopped, 3) == (weights, lines[-3:])


@pytest.fixture(autouse=True)
def states() -> Iterator[None]:
    """Accelerate keeps its state to the end of the process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Script:
    """The objects of a script, in this process."""

    def __init__(self, **options: Any) -> None:
        self.accelerator = Accelerator(micro_batches=4, **options)
        set_seed(5)
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        loader = DataLoader(data(), 16, shuffle=True)
        prepared = self.accelerator.prepare(model, optimizer, loader)
        self.model, self.optimizer, self.loader = prepared

    def loss(self, batch: Any) -> torch.Tensor:
        x, y = batch
        return functional.cross_entropy(self.model(x), y)

    def train(self, batch: Any) -> None:
        """Make one iteration of a training."""
        self.accelerator.backward(self.loss(batch))
        self.optimizer.step()
        self.optimizer.zero_grad()


def test_a_script_is_trained_as_by_a_loop() -> None:
    """With weights of targets; the seed is that of `set_seed`."""
    script = Script(seed=5)
    for _ in range(2):
        for x, y in script.loader:
            counted = y > 0
            script.accelerator.weigh(counted.sum())
            outputs = script.model(x[counted]).sum(1)
            script.accelerator.backward(outputs.mean())
            script.optimizer.step()
            script.optimizer.zero_grad()
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    loop = Loop(model, 4, seed=5)
    for epoch in range(2):
        for step in loop.steps(data(), 16, epoch):
            for x, y in step:
                counted = y > 0
                loop.weigh(counted.sum())
                model(x[counted]).sum(1).mean().backward()
            optimizer.step()
    assert loop.fingerprint() == fingerprint(script.model.state_dict())


def test_a_clip_before_the_last_micro_batch_changes_nothing() -> None:
    fingerprints = []
    for is_everywhere in (False, True):
        script = Script()
        for batch in script.loader:
            script.accelerator.backward(script.loss(batch))
            if is_everywhere or script.accelerator.sync_gradients:
                nn.utils.clip_grad_norm_(script.model.parameters(), 0.01)
            script.optimizer.step()
        fingerprints.append(fingerprint(script.model.state_dict()))
        AcceleratorState._reset_state(reset_partial_state=True)
    assert fingerprints[0] == fingerprints[1]


def test_what_scripts_multiply_by_is_one() -> None:
    script = Script()
    assert script.accelerator.num_processes == 1
    assert len(script.loader) == 4  # 50 samples
    assert len(script.accelerator.skip_first_batches(script.loader, 3)) == 1


def without_backward(script: Script) -> None:
    for batch in script.loader:
        script.loss(batch)


def backward_twice(script: Script) -> None:
    for batch in script.loader:
        script.train(batch)
        script.train(batch)


def backward_in_an_evaluation(script: Script) -> None:
    script.model.eval()
    for batch in script.loader:
        script.train(batch)


def another_pass(script: Script) -> None:
    script.model.register_buffer("passes", torch.zeros(()))
    for batch in script.loader:
        script.train(batch)
        script.model.passes += 1


def own_backward(script: Script) -> None:
    for batch in script.loader:
        script.loss(batch).backward()  # type: ignore[no-untyped-call]
        script.accelerator.sync_gradients = True
        script.optimizer.step()


def own_accumulation(script: Script) -> None:
    for number, batch in enumerate(script.loader):
        script.accelerator.backward(script.loss(batch))
        if number % 3 == 0:
            script.optimizer.step()


def own_count(script: Script) -> None:
    for number, batch in enumerate(script.loader):
        script.train(batch)
        if number == 5:
            script.accelerator.save_state("never")


def leaving_early(script: Script) -> None:
    for number, batch in enumerate(script.loader):
        script.train(batch)
        if number == 5:
            break
    script.accelerator.save_model(script.model, "never")


def evaluation_within_a_step(script: Script) -> None:
    for batch in script.loader:
        script.train(batch)
        script.model.eval()
        list(script.loader)


def reducing(script: Script) -> None:
    script.accelerator.reduce(torch.ones(1))


def checking_a_trigger(script: Script) -> None:
    for batch in script.loader:
        script.train(batch)
        script.accelerator.check_trigger()


def setting_a_trigger(script: Script) -> None:
    script.accelerator.set_trigger()


def gathering_elsewhere(script: Script) -> None:
    script.accelerator.gather_for_metrics(torch.ones(1))


def gathering_in_a_training(script: Script) -> None:
    for batch in script.loader:
        script.accelerator.gather(script.loss(batch))


def two_networks(script: Script) -> None:
    script.accelerator.prepare(network())


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (without_backward, "one has not"),
        (backward_twice, "called once in each iteration"),
        (backward_in_an_evaluation, "with the model in training mode"),
        (another_pass, "a script has changed them"),
        (own_backward, "an optimizer made a step"),
        (own_accumulation, "use `gradient_accumulation_steps`"),
        (own_count, "`save_state` has its place between two steps"),
        (leaving_early, "Saving the model has its place"),
        (evaluation_within_a_step, "A loop over a loader has its place"),
        (reducing, "Sum up what `gather_for_metrics` returns"),
        (checking_a_trigger, "Decide by what `gather_for_metrics` returns"),
        (setting_a_trigger, "Decide by what `gather_for_metrics` returns"),
        (gathering_elsewhere, "in the loop over a loader"),
        (gathering_in_a_training, "returns all rows of a global batch"),
        (two_networks, "trains one model"),
    ],
)
def test_what_cannot_be_exact_is_refused(
    use: Callable[[Script], None], message: str
) -> None:
    with pytest.raises(OwnCodeError, match=message):
        use(Script())


def test_a_loader_with_states_of_its_own_is_refused() -> None:
    config = DataLoaderConfiguration()
    config.use_stateful_dataloader = True
    with pytest.raises(OwnCodeError, match="go on with `skip_first_batches`"):
        Accelerator(micro_batches=4, dataloader_config=config)


def test_a_state_goes_on_where_it_was_saved_or_not_at_all(tmp_path: Path) -> None:
    """`load_state` knows the epoch; the script says which global batches to skip."""
    script = Script()
    taken = 0
    for batch in script.loader:
        script.train(batch)
        taken += script.accelerator.sync_gradients
        if taken == 2:
            break
    script.accelerator.save_state(tmp_path / "state")
    for batch in script.accelerator.skip_first_batches(script.loader, 2):
        script.train(batch)
    undisturbed = fingerprint(script.model.state_dict())
    script.accelerator.load_state(tmp_path / "state")
    with pytest.raises(OwnCodeError, match=r"skip_first_batches\(loader, 2\)"):
        list(script.loader)
    script.accelerator.load_state(tmp_path / "state")
    for batch in script.accelerator.skip_first_batches(script.loader, 2):
        script.train(batch)
    assert fingerprint(script.model.state_dict()) == undisturbed
