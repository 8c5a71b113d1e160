"""Transformers' Trainer, made exact: the same at any number of processes."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers_script as script
from test_loop import threads
from told_stream import begun
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)
from user_scripts import changed_lines, found

from samestep import OwnCodeError
from samestep.transformers import SamestepTrainer
from samestep.transformers.requirements import REFUSED


assert threads  # the fixture for every test here
pytestmark = pytest.mark.filterwarnings("ignore")  # those of Transformers


def test_the_example_changes_three_lines() -> None:
    changed = changed_lines("transformers")
    assert len(changed) <= 3, changed


def launch(out: Path, *runs: str) -> None:
    """Carry out `DIRECTORY PROCESSES [OPTION ...]`, one after the other."""
    for run in runs:
        directory, processes, *options = run.split()
        script.launch(out / directory, int(processes), options)


def test_weights_logs_and_metrics_are_the_same_after_a_kill_elsewhere(
    tmp_path: Path,
) -> None:
    """With 1 and 3 processes; killed among 2 in an epoch that 3 others go on with."""
    launch(
        tmp_path,
        "one 1",
        "three 3 exchange=gloo balance=random",
        "killed 2 kill=1:9",
        "killed 3 resume",
    )
    undisturbed = found(tmp_path / "one")
    assert found(tmp_path / "three") == undisturbed
    assert found(tmp_path / "killed") == undisturbed


def test_adapters_accumulation_and_smoothed_labels_change_no_bit(
    tmp_path: Path,
) -> None:
    options = "lora accumulate=3 smooth"
    launch(
        tmp_path,
        f"one 1 {options}",
        f"killed 3 {options} kill=0:12",
        f"killed 2 {options} resume",
    )
    assert found(tmp_path / "killed") == found(tmp_path / "one")


def test_a_stream_goes_on_in_its_second_pass_with_other_processes(
    tmp_path: Path,
) -> None:
    """Transformers itself would count this pass as the first."""
    options = "stream workers"
    launch(tmp_path, f"one 1 {options}", f"killed 2 {options} kill=1:14")
    assert set(begun(tmp_path / "killed" / "begun")) == {0}
    launch(tmp_path, f"killed 3 {options} resume")
    # The batch before step 12 is read, to compare it; then comes the third pass.
    assert begun(tmp_path / "killed" / "begun") == [0] * 3 + [64] * 3
    assert found(tmp_path / "killed") == found(tmp_path / "one")


def test_an_epoch_whose_last_step_was_saved_is_logged_elsewhere(
    tmp_path: Path,
) -> None:
    """As if it had not been stopped: with the norm and the rate of that step."""
    launch(tmp_path, "one 1 epochs", "two 2 epochs stop=7", "two 3 epochs resume")
    assert found(tmp_path / "two") == found(tmp_path / "one")


def test_a_training_goes_on_from_the_last_checkpoint_that_is_complete(
    tmp_path: Path,
) -> None:
    launch(tmp_path, "one 1", "two 2 kill-saving=8", "two 2 resume")
    assert found(tmp_path / "two") == found(tmp_path / "one")


def test_processes_wait_for_each_other_where_they_are_told_to(tmp_path: Path) -> None:
    launch(tmp_path, "two 2 meet")


def test_grouping_by_length_and_bfloat16_change_no_bit(tmp_path: Path) -> None:
    options = "grouped labels bf16"
    launch(tmp_path, f"one 1 {options}", f"two 2 {options}")
    assert found(tmp_path / "two") == found(tmp_path / "one")


LINES = script.Lines(24, 0)


def arguments(out: Path, **given: Any) -> TrainingArguments:
    basic = {"use_cpu": True, "report_to": [], "disable_tqdm": True}
    return TrainingArguments(str(out), **basic, **given)


def llama() -> nn.Module:
    """Without dropout, and so that Transformers counts shifted labels."""
    config = LlamaConfig(
        vocab_size=script.WORDS,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model


def one_step(out: Path, trainer: Any, model: nn.Module, **given: Any) -> list[Any]:
    """Return the gradient of all lines, from one step of SGD, in float64."""
    before = [p.detach().double() for p in model.parameters()]
    args = arguments(
        out,
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        max_steps=1,
        save_strategy="no",
        **given,
    )
    trainer(
        model, args, data_collator=script.padded, train_dataset=LINES, micro_batches=5
    ).train()
    after = [p.detach().double() for p in model.parameters()]
    return [a - b for a, b in zip(before, after, strict=True)]


WEIGHTS = torch.linspace(0.1, 2.0, script.WORDS)


class Weighted(SamestepTrainer):
    """A loss that is divided by the sum of the weights of its targets."""

    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
        labels = inputs.pop("labels")[:, 1:].flatten()
        logits = model(**inputs).logits[:, :-1].flatten(0, 1)
        return functional.cross_entropy(logits, labels, WEIGHTS.to(logits.dtype))

    def count_targets(self, inputs: Any) -> float:
        labels = inputs["labels"][:, 1:]
        return float(WEIGHTS[labels[labels != -100]].sum())


@pytest.mark.parametrize("trainer", [SamestepTrainer, Weighted])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_gradient_is_that_of_the_mean_over_all_targets(
    tmp_path: Path, trainer: type[SamestepTrainer], accumulated: int
) -> None:
    """Of both global batches, where two are accumulated."""
    torch.manual_seed(0)
    model = llama()
    reference = copy.deepcopy(model).double()
    found = one_step(
        tmp_path,
        trainer,
        model,
        per_device_train_batch_size=len(LINES) // accumulated,
        gradient_accumulation_steps=accumulated,
    )
    batch = script.padded([LINES[i] for i in range(len(LINES))])
    labels = batch.pop("labels")[:, 1:].flatten()
    logits = reference(**batch).logits[:, :-1].flatten(0, 1)
    weights = WEIGHTS.double() if trainer is Weighted else None
    loss = functional.cross_entropy(logits, labels, weights)
    loss.backward()  # type: ignore[no-untyped-call]
    for gradient, parameter in zip(found, reference.parameters(), strict=True):
        assert parameter.grad is not None
        assert (gradient - parameter.grad).abs().max() < 1e-6


def test_an_evaluation_gives_what_the_plain_trainer_gives_in_one_process(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = script.language_model([])
    given: dict[str, Any] = {
        "data_collator": script.padded,
        "compute_metrics": script.accuracy,
    }
    args = arguments(tmp_path, per_device_eval_batch_size=5)
    plain = Trainer(model, args, **given).predict(LINES)
    exact = SamestepTrainer(model, args, micro_batches=4, **given).predict(LINES)
    assert np.array_equal(plain.predictions, exact.predictions)
    assert np.array_equal(plain.label_ids, exact.label_ids)
    assert script.without_times(plain.metrics) == script.without_times(exact.metrics)


def test_a_model_that_is_made_again_is_trained(tmp_path: Path) -> None:
    trainer = SamestepTrainer(
        model_init=lambda: script.language_model([]),
        args=arguments(tmp_path, max_steps=2, save_strategy="no"),
        data_collator=script.padded,
        train_dataset=LINES,
        micro_batches=4,
    )
    first = trainer.train().training_loss
    assert trainer.train().training_loss == first


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_cannot_be_exact_is_refused(tmp_path: Path, name: str) -> None:
    args = arguments(tmp_path)
    setattr(args, name, True)
    with pytest.raises(OwnCodeError, match=REFUSED[name].split(".")[0]):
        SamestepTrainer(script.language_model([]), args, micro_batches=4)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("optim", "adalomo", "changes weights in a backward pass"),
        ("optim", "galore_adamw_layerwise", "changes weights in a backward pass"),
        ("train_sampling_strategy", "batch_rebalance", "Use `group_by_length`"),
    ],
)
def test_arguments_that_depend_on_processes_are_refused(
    tmp_path: Path, name: str, given: str, message: str
) -> None:
    args = arguments(tmp_path, **{name: given})
    with pytest.raises(OwnCodeError, match=message):
        SamestepTrainer(script.language_model([]), args, micro_batches=4)


class Listed(SamestepTrainer):
    def get_train_dataloader(self) -> Any:
        return [script.padded([LINES[0]])]


class Stacked(SamestepTrainer):
    def get_train_dataloader(self) -> Any:
        return DataLoader(LINES, batch_size=None, collate_fn=script.padded)


@pytest.mark.parametrize(
    ("trainer", "message"), [(Listed, "returned list"), (Stacked, "`batch_size=None`")]
)
def test_loaders_without_global_batches_are_refused(
    tmp_path: Path, trainer: type[SamestepTrainer], message: str
) -> None:
    args = arguments(tmp_path, max_steps=1)
    model = script.language_model([])
    with pytest.raises(OwnCodeError, match=message):
        trainer(model, args, train_dataset=LINES, micro_batches=4).train()


class Interrupted(SamestepTrainer):
    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        raise KeyboardInterrupt


def saving(
    out: Path, micro_batches: int = 4, kind: type[SamestepTrainer] = SamestepTrainer
) -> SamestepTrainer:
    return kind(
        script.language_model([]),
        arguments(out, max_steps=2, save_steps=1),
        data_collator=script.padded,
        train_dataset=LINES,
        micro_batches=micro_batches,
    )


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    saving(tmp_path).train()
    with pytest.raises(OwnCodeError, match="`micro_batches` that it was begun with, 4"):
        saving(tmp_path, 5).train(resume_from_checkpoint=True)


def test_a_checkpoint_that_was_written_halfway_over_another_is_refused(
    tmp_path: Path,
) -> None:
    saving(tmp_path).train()
    with pytest.raises(KeyboardInterrupt):
        saving(tmp_path, kind=Interrupted).train()
    half = str(tmp_path / "checkpoint-1")
    with pytest.raises(OwnCodeError, match=f"is complete; received {half}"):
        saving(tmp_path).train(resume_from_checkpoint=half)
