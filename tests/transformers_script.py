"""A script of a Transformers user, without torchrun, which would take long to start:

transformers_script.py DIRECTORY PROCESSES [OPTION ...] [-- DIRECTORY PROCESSES ...]

Options: `accumulate`, `stream`, `lora`, `grouped`, `labels`, `workers`, `smooth`,
`bf16`, `exchange=gloo`, `micro=COUNT`, `kill=RANK:STEP`, `resume`. Writes what must be
equal.
"""

import json
import multiprocessing
import os
import signal
import socket
import sys
import warnings
from collections.abc import Iterator
from itertools import groupby
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset
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


WORDS, WIDTH = 30, 16
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


class Stream(IterableDataset):  # type: ignore[type-arg]
    """The same lines, without an index."""

    def __init__(self, lines: Lines) -> None:
        self.lines = lines

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        yield from self.lines.samples


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


class Kill(TrainerCallback):  # type: ignore[misc]
    """Kills one process before a step."""

    def __init__(self, rank: int, step: int) -> None:
        self._rank, self._step = rank, step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if (args.process_index, state.global_step) == (self._rank, self._step):
            os.kill(os.getpid(), signal.SIGKILL)


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
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=WORDS,
            n_positions=16,
            n_embd=WIDTH,
            n_layer=2,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    if "lora" not in options:
        return model
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=4, lora_dropout=0.1, target_modules=["c_attn"], task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)


def classifier() -> Any:
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=WORDS,
            hidden_size=WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
            num_labels=4,
        )
    )


def value(options: list[str], name: str) -> str | None:
    return next((o.split("=")[1] for o in options if o.startswith(f"{name}=")), None)


def callbacks(options: list[str]) -> list[TrainerCallback]:
    found = [EarlyStoppingCallback(early_stopping_patience=6)]
    if kill := value(options, "kill"):
        found.append(Kill(*map(int, kill.split(":"))))
    return found


def arguments(out: Path, options: list[str]) -> TrainingArguments:
    given: dict[str, Any] = {
        "output_dir": str(out / "checkpoints"),
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 8,
        "num_train_epochs": 3,
        "learning_rate": 0.01,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "weight_decay": 0.01,
        "max_grad_norm": 0.5,
        "logging_steps": 2,
        "save_steps": 4,
        "eval_steps": 4,
        "eval_strategy": "steps",
        "load_best_model_at_end": True,
        "restore_callback_states_from_checkpoint": True,
        "include_num_input_tokens_seen": "all",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 7,
    }
    if "accumulate" in options:
        given |= {"gradient_accumulation_steps": 3, "save_steps": 2, "eval_steps": 2}
    if "stream" in options:
        given |= {"max_steps": 15}
    if "grouped" in options:
        given |= {"train_sampling_strategy": "group_by_length"}
    if "workers" in options:
        given |= {"dataloader_num_workers": 2}
    if "smooth" in options:
        given |= {"label_smoothing_factor": 0.1}
    if "bf16" in options:
        given |= {"bf16": True}
    return TrainingArguments(**given)


def train(out: Path, options: list[str]) -> None:
    warnings.simplefilter("ignore")
    set_seed(3)
    model = classifier() if "labels" in options else language_model(options)
    lines = Lines(102, 0)
    exchange: Any = value(options, "exchange") or "auto"
    trainer = SamestepTrainer(
        model,
        arguments(out, options),
        data_collator=classified if "labels" in options else padded,
        train_dataset=Stream(lines) if "stream" in options else lines,
        eval_dataset=Lines(29, 1),
        compute_metrics=accuracy,
        callbacks=callbacks(options),
        micro_batches=int(value(options, "micro") or 6),
        exchange=exchange,
    )
    trainer.train(resume_from_checkpoint="resume" in options)
    predicted = trainer.predict(Lines(11, 2))
    if trainer.is_world_process_zero():
        sums = float(np.asarray(predicted.predictions, np.float64).sum())
        found = [*map(without_times, trainer.state.log_history), sums]
        (out / "lines.json").write_text(json.dumps(found))
        (out / "sha256").write_text(fingerprint(trainer.model.state_dict()))


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
    is_expected = value(options, "kill") and -signal.SIGKILL in codes
    assert is_expected or not any(codes), (out, processes, options, codes)


def main() -> None:
    for is_end, run in groupby(sys.argv[1:], lambda word: word == "--"):
        if not is_end:
            directory, processes, *options = run
            launch(Path(directory), int(processes), options)


if __name__ == "__main__":
    main()
