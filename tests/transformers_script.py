"""A script of a Transformers user, without torchrun, which would take long to start:

transformers_script.py DIRECTORY PROCESSES [OPTION ...] [-- DIRECTORY PROCESSES ...]

Options: `accumulate=COUNT`, `stream`, `lora`, `grouped`, `labels`, `workers`,
`smooth`, `bf16`, `epochs`, `meet`, `exchange=gloo`, `balance=random`, `micro=COUNT`.
How it ends, by global batches: `kill=RANK:BATCH`, `kill-saving=BATCH` and `stop=BATCH`
(the first checkpoint from then on is left half written, or is the last one); then
`resume`. Writes what must be equal; with `plain`, which leaves out dropout, one process
also writes the loss of its first step, and that of the same samples in float64.
"""

import copy
import json
import multiprocessing
import os
import signal
import socket
import sys
import warnings
from itertools import groupby
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
from told_stream import Told
from torch.nn import functional
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    EarlyStoppingCallback,
    GPT2Config,
    GPT2LMHeadModel,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from samestep.state.fingerprint import fingerprint
from samestep.transformers import SamestepTrainer


WORDS, WIDTH, BATCH = 30, 16, 16
TIMES = "runtime", "per_second", "preparation_time"


class Lines(Dataset):  # type: ignore[type-arg]
    """Lines of numbers, of 3 to 14 words; some words are no targets."""

    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.samples = []
        for _ in range(count):
            length = int(torch.randint(3, 15, (), generator=generator))
            first = int(torch.randint(1, WORDS, (), generator=generator))
            words = [1 + (first + 3 * i) % (WORDS - 1) for i in range(length)]
            self.samples.append({"input_ids": words, "labels": words[:1] + words[1:]})

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.samples[index]


def padded(samples: list[Any]) -> dict[str, torch.Tensor]:
    """Pad on the right; what is padded is no target, nor is every seventh word."""
    longest = max(len(sample["input_ids"]) for sample in samples)
    ids = torch.zeros(len(samples), longest, dtype=torch.long)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, sample in enumerate(samples):
        size = len(sample["input_ids"])
        ids[row, :size] = torch.tensor(sample["input_ids"])
        labels[row, :size] = torch.tensor(sample["labels"])
        mask[row, :size] = 1
    labels[labels % 7 == 0] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def classified(samples: list[Any]) -> dict[str, torch.Tensor]:
    """One label for each line: its first word, in four classes."""
    batch = padded(samples)
    return batch | {"labels": batch["input_ids"][:, 0] % 4}


class End(TrainerCallback):  # type: ignore[misc]
    """Ends processes after so many global batches."""

    def __init__(self, options: list[str]) -> None:
        rank, _, batch = (value(options, "kill") or ":").partition(":")
        self._killed = int(rank or -1), int(batch or -1)
        self._saving = int(value(options, "kill-saving") or -1)
        self._stop = int(value(options, "stop") or -1)
        self._batches = 0

    def on_train_begin(self, *_: Any, optimizer: Any, **__: Any) -> None:
        optimizer.optimizer.register_state_dict_pre_hook(self._save)

    def on_substep_end(self, args: Any, *_: Any, **__: Any) -> None:
        self._batches += 1
        if (args.process_index, self._batches) == self._killed:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.on_substep_end(args)
        control.should_save |= 0 < self._stop <= self._batches

    def _save(self, _: object) -> None:
        if 0 < self._saving <= self._batches:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_save(self, *_: Any, **__: Any) -> None:
        if 0 < self._stop <= self._batches:
            sys.exit()


def accuracy(prediction: Any) -> dict[str, float]:
    found, labels = prediction.predictions, prediction.label_ids
    if found.ndim == 3:  # words
        found, labels = found[:, :-1], labels[:, 1:]
    found = found.argmax(-1)
    return {
        "accuracy": float((found == labels)[labels != -100].mean()),
        "order": float((labels.sum(-1) * np.arange(len(labels))).sum()),
    }


def language_model(options: list[str]) -> Any:
    dropout = 0.0 if "plain" in options else 0.1
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=WORDS,
            n_positions=16,
            n_embd=WIDTH,
            n_layer=2,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout),
        )
    )
    if "lora" not in options:
        return model
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=4, lora_dropout=dropout, target_modules=["c_attn"], task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)


def classifier(options: list[str]) -> Any:
    dropout = 0.0 if "plain" in options else 0.1
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=WORDS,
            hidden_size=WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
            num_labels=4,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
    )


def value(options: list[str], name: str) -> str | None:
    return next((o.split("=")[1] for o in options if o.startswith(f"{name}=")), None)


def arguments(out: Path, options: list[str]) -> TrainingArguments:
    accumulated = int(value(options, "accumulate") or 1)
    given: dict[str, Any] = {
        "output_dir": str(out / "checkpoints"),
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": 8,
        "gradient_accumulation_steps": accumulated,
        "num_train_epochs": 2,
        "learning_rate": 0.01,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "weight_decay": 0.01,
        "max_grad_norm": 0.5,
        "logging_steps": 2,
        "logging_first_step": True,
        "save_steps": 4 // min(accumulated, 4),
        "eval_steps": 4 // min(accumulated, 4),
        "eval_strategy": "steps",
        "load_best_model_at_end": True,
        "restore_callback_states_from_checkpoint": True,
        "include_num_input_tokens_seen": "all",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 7,
    }
    if "stream" in options:
        given |= {"max_steps": 15 // accumulated}
    if "epochs" in options:
        given |= {"logging_strategy": "epoch", "save_steps": 7, "eval_steps": 7}
    if "grouped" in options:
        given |= {"train_sampling_strategy": "group_by_length"}
    if "workers" in options:
        given |= {"dataloader_num_workers": 2}
    if "smooth" in options:
        given |= {"label_smoothing_factor": 0.1}
    if "bf16" in options:
        given |= {"bf16": True}
    return TrainingArguments(**given)


class Collator:
    """Pads, and remembers the samples of the first step."""

    def __init__(self, options: list[str]) -> None:
        self._pad = classified if "labels" in options else padded
        self._first = BATCH * int(value(options, "accumulate") or 1)
        self._samples: list[Any] = []

    def __call__(self, samples: list[Any]) -> dict[str, torch.Tensor]:
        if len(samples) < BATCH:  # not all of a stream's first batch, to compare it
            self._samples += samples[: self._first - len(self._samples)]
        return self._pad(samples)

    def loss(self, trainer: Any, model: Any) -> float:
        """Return that of all of them at once, in float64."""
        batch = self._pad(self._samples)
        items = trainer._get_num_items_in_batch([batch], trainer.args.device)
        labels = batch.pop("labels")
        logits = model.double()(**batch).logits
        if labels.ndim == 2:  # words
            logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        smoothing = trainer.args.label_smoothing_factor
        total = functional.cross_entropy(
            logits, labels, label_smoothing=smoothing, reduction="sum"
        )
        return float(total / (len(labels) if items is None else items))


def train(out: Path, options: list[str]) -> None:
    warnings.simplefilter("ignore")
    set_seed(3)
    model = (classifier if "labels" in options else language_model)(options)
    first = copy.deepcopy(model)
    lines, collator = Lines(102, 0), Collator(options)
    exchange: Any = value(options, "exchange") or "auto"
    balance: Any = value(options, "balance") or "auto"
    trainer = SamestepTrainer(
        model,
        arguments(out, options),
        data_collator=collator,
        train_dataset=Told(lines, out / "begun") if "stream" in options else lines,
        eval_dataset=Lines(29, 1),
        compute_metrics=accuracy,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=6), End(options)],
        micro_batches=int(value(options, "micro") or 6),
        exchange=exchange,
        balance=balance,
    )
    is_saved = any(out.glob("checkpoints/*/trainer_state.json"))
    trainer.train(resume_from_checkpoint="resume" in options and is_saved)
    if "meet" in options:
        meet(trainer.accelerator, out)
    predicted = trainer.predict(Lines(11, 2))
    if trainer.is_world_process_zero():
        sums = float(np.asarray(predicted.predictions, np.float64).sum())
        history = trainer.state.log_history
        found = [*map(without_times, history), sums]
        (out / "lines.json").write_text(json.dumps(found))
        (out / "sha256").write_text(fingerprint(trainer.model.state_dict()))
        if "plain" in options and trainer.loop.workers == 1:
            losses = history[0]["loss"], collator.loss(trainer, first)
            (out / "losses.json").write_text(json.dumps(losses))


def meet(accelerator: Any, out: Path) -> None:
    """Process 0 writes a file when process 1 is there, which waits to read it."""
    from test_launch import wait_until

    come, written = out / "come", out / "written"
    if accelerator.is_main_process:
        wait_until(come.exists)
        written.touch()
        accelerator.wait_for_everyone()
    else:
        come.touch()
        accelerator.wait_for_everyone()
        assert written.exists()


def without_times(entry: dict[str, object]) -> dict[str, object]:
    """What must be equal. The mean loss is over the steps since a resume."""
    timed = "runtime", "per_second", "preparation_time", "train_loss"
    return {name: entry[name] for name in entry if not name.endswith(timed)}


def work(rank: int, processes: int, port: int, out: Path, options: list[str]) -> None:
    """Do as a process that torchrun has started."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    train(out, options)


def launch(out: Path, processes: int, options: list[str]) -> None:
    """Fork the processes; if one fails, end the others."""
    out.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    given = processes, port, out, options
    started = [fork.Process(target=work, args=(r, *given)) for r in range(processes)]
    for process in started:
        process.start()
    running = list(started)
    while running:
        wait([process.sentinel for process in running])
        running = [process for process in running if process.exitcode is None]
        if any(process.exitcode for process in started):
            for process in running:
                process.kill()
    codes = [process.exitcode for process in started]
    is_killed = value(options, "kill") or value(options, "kill-saving")
    is_expected = is_killed and -signal.SIGKILL in codes
    assert is_expected or not any(codes), (out, processes, options, codes)


def main() -> None:
    for is_end, run in groupby(sys.argv[1:], lambda word: word == "--"):
        if not is_end:
            directory, processes, *options = run
            launch(Path(directory), int(processes), options)


if __name__ == "__main__":
    main()
