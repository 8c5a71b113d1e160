"""transformers_plain.py with `SamestepTrainer`: the same at any number of processes.

torchrun --nproc-per-node 2 transformers_exact.py
"""

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    TrainingArguments,
    set_seed,
)

from samestep.transformers import SamestepTrainer


def count_up(length):
    """A sentence of numbers; what is filled up is no target, -100."""
    first = int(torch.randint(0, 40, ()))
    words = torch.arange(first, first + 12) % 40
    is_filled = torch.arange(12) >= length
    return {
        "input_ids": words.masked_fill(is_filled, 0),
        "attention_mask": (~is_filled).long(),
        "labels": words.masked_fill(is_filled, -100),
    }


set_seed(0)
sentences = [count_up(int(torch.randint(4, 13, ()))) for _ in range(550)]
args = TrainingArguments(
    output_dir="transformers_example",
    per_device_train_batch_size=32,
    num_train_epochs=3,
    learning_rate=0.01,
    eval_strategy="epoch",
    save_strategy="no",
    report_to=[],
    disable_tqdm=True,
    use_cpu=True,
)
model = GPT2LMHeadModel(
    GPT2Config(vocab_size=40, n_positions=12, n_embd=32, n_layer=1, n_head=2)
)
trainer = SamestepTrainer(
    micro_batches=8,
    model=model,
    args=args,
    train_dataset=sentences[:500],
    eval_dataset=sentences[500:],
)
trainer.train()
if trainer.is_world_process_zero():
    print(trainer.state.log_history[-2]["eval_loss"])
    print(sum(float(p.detach().double().sum()) for p in model.parameters()))
