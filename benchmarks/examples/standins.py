"""Data, models and tokenizers that are made in place of what scripts download.

The first line of the copy of a script imports this. At the end of a process, what must
be equal is written to the directory $EXAMPLE_OUT.
"""

import atexit
import builtins
import functools
import json
import os
from pathlib import Path

import numpy as np
import torch


SENTENCES, WORDS = 118, [f"word{i}" for i in range(40)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
OUT = Path(os.environ["EXAMPLE_OUT"])
found = {"accelerators": [], "trainers": [], "metrics": [], "printed": []}


def texts(count, seed):
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(WORDS, draw.integers(3, 13))) for _ in range(count)]


def load_dataset(name, *_, **__):
    """Return pairs of sentences of different lengths, or texts."""
    from datasets import ClassLabel, Dataset, DatasetDict

    def pairs(count, seed):
        first, second = texts(count, seed), texts(count, seed + 1)
        longer = [int(len(a) > len(b)) for a, b in zip(first, second, strict=True)]
        columns = {"sentence1": first, "sentence2": second, "label": longer}
        made = Dataset.from_dict({**columns, "idx": list(range(count))})
        return made.cast_column("label", ClassLabel(names=["no", "yes"]))

    def lines(count, seed):
        return Dataset.from_dict({"text": texts(count, seed)})

    make = lines if "wikitext" in name else pairs
    sizes = {"train": 500 if make is lines else SENTENCES, "validation": 75}
    return DatasetDict({split: make(size, size) for split, size in sizes.items()})


def tokenizer(*_, **__):
    """Return a tokenizer of whole words that can pad."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    made = Tokenizer(models.WordLevel(ids, unk_token=SPECIAL[1]))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = ["pad_token", "unk_token", "cls_token", "sep_token", "eos_token"]
    special = dict(zip(names, [*SPECIAL, "[SEP]"], strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


def classifier(*_, **__):
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
    size = len(SPECIAL) + len(WORDS)
    config = BertConfig(vocab_size=size, num_attention_heads=2, **sizes)
    return BertForSequenceClassification(config)


def language_model(*_, **__):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
    size = len(SPECIAL) + len(WORDS)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=size, num_attention_heads=2, **sizes)
    )


class Metric:
    """Accuracy and F1, as those of `evaluate.load("glue", "mrpc")`."""

    def __init__(self, *_, **__):
        self._pairs = []

    def add_batch(self, predictions, references):
        self._pairs += zip(predictions.tolist(), references.tolist(), strict=True)

    def compute(self):
        right = sum(p == r for p, r in self._pairs) / len(self._pairs)
        hits = sum(p == r == 1 for p, r in self._pairs)
        said = sum(p + r for p, r in self._pairs)
        value = {"accuracy": right, "f1": 2 * hits / max(said, 1)}
        found["metrics"].append([value, self._pairs])
        self._pairs = []
        return value


class Digits(torch.utils.data.Dataset):
    """Images that are drawn from their index."""

    def __init__(self, *_, train=True, **__):
        self._first, self._count = (0, 60_000) if train else (60_000, 10_000)

    def __len__(self):
        return self._count

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(self._first + index)
        label = index % 10
        return torch.rand(1, 28, 28, generator=generator) * label / 9, label


def wikitext(destination):
    destination.parent.mkdir(exist_ok=True, parents=True)
    part = destination.with_suffix(f".{os.getpid()}")
    part.write_text("\n".join(texts(22_000, 0)))
    part.replace(destination)


def noting(kind, of, method):
    """Note every object whose method is called."""
    function = getattr(of, method)

    @functools.wraps(function)
    def noted(self, *arguments, **options):
        found[kind].append(self)
        return function(self, *arguments, **options)

    setattr(of, method, noted)


def print_noted(*values, **options):
    found["printed"].append(" ".join(map(str, values)))
    printed(*values, **options)


def write():
    """Write fingerprints, metrics and lines of this process."""
    from samestep.state.fingerprint import fingerprint

    rank, weights, metrics = 0, [], found["metrics"]
    for accelerator in found["accelerators"]:
        rank = int(os.environ.get("RANK", "0"))
        weights += [fingerprint(m.state_dict()) for m in accelerator._models]
    for trainer in found["trainers"]:
        rank = trainer.global_rank
        weights.append(fingerprint(trainer.lightning_module.state_dict()))
        metrics.append({k: float(v) for k, v in trainer.callback_metrics.items()})
    lines = [line for line in found["printed"] if not line.startswith("=====")]
    result = {"weights": weights, "metrics": metrics, "printed": lines}
    (OUT / f"{rank}.json").write_text(json.dumps(result))


def define_operations():
    """Let torchvision be imported beside a torch that its operations are not for."""
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor a, Tensor b) -> Tensor")


def install():
    """Put the stand-ins in place."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    define_operations()
    import accelerate
    import datasets
    import evaluate
    import timm
    import transformers

    noting("accelerators", accelerate.Accelerator, "__init__")
    datasets.load_dataset = load_dataset
    evaluate.load = Metric
    transformers.AutoTokenizer.from_pretrained = tokenizer
    transformers.AutoModelForSequenceClassification.from_pretrained = classifier
    transformers.AutoModelForCausalLM.from_pretrained = language_model
    create = timm.create_model
    timm.create_model = lambda _, pretrained, **more: create("resnet10t", **more)


def install_for_lightning():
    """Put the stand-ins of Lightning's examples in place."""
    define_operations()
    import lightning.pytorch as pl
    from lightning.pytorch.demos import mnist_datamodule, transformer

    noting("trainers", pl.Trainer, "fit")
    mnist_datamodule.MNIST = Digits
    given = mnist_datamodule.MNISTDataModule.__init__
    given.__defaults__ = tuple(1 if v == 16 else v for v in given.__defaults__)
    transformer.WikiText2.download = staticmethod(wikitext)


printed, builtins.print = builtins.print, print_noted
atexit.register(write)
if os.environ["EXAMPLE_LIBRARY"] == "lightning":
    install_for_lightning()
else:
    install()
