"""What scripts find in place of what they download.

The first line of the copy of a script imports this. At the end of a process, what must
be equal is written to the directory $EXAMPLE_OUT.
"""

import atexit
import builtins
import functools
import json
import os
from pathlib import Path

import torch
from material import (
    SIZES,
    SPECIAL,
    WORDS,
    define_operations,
    texts,
    tokenizer,
)


SENTENCES = 118
OUT = Path(os.environ["EXAMPLE_OUT"])
KINDS = "accelerators", "trainers", "exact", "metrics", "printed"
found = {kind: [] for kind in KINDS}
NAMES = {
    "seqeval": [
        f"overall_{each}" for each in ("precision", "recall", "f1", "accuracy")
    ],
    "sacrebleu": ["score"],
    "squad": ["exact_match", "f1"],
}
"""What some metrics return. The others return a value of their name."""


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


def classifier(*_, **__):
    from transformers import BertConfig, BertForSequenceClassification

    size = len(SPECIAL) + len(WORDS)
    config = BertConfig(vocab_size=size, intermediate_size=64, **SIZES)
    return BertForSequenceClassification(config)


def language_model(*_, **__):
    from transformers import LlamaConfig, LlamaForCausalLM

    size = len(SPECIAL) + len(WORDS)
    return LlamaForCausalLM(LlamaConfig(vocab_size=size, intermediate_size=64, **SIZES))


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


class Agreement:
    """The part of predictions that are as they should be, by the names of a metric."""

    def __init__(self, name, *_, **__):
        self._names = NAMES.get(name, [name])

    def compute(self, *, predictions, references, **_):
        pairs = [json.dumps(each, default=plain) for each in (predictions, references)]
        same = [a == b for a, b in zip(*map(json.loads, pairs), strict=True)]
        found["metrics"].append(pairs)
        return dict.fromkeys(self._names, sum(same) / len(same))


def plain(value):
    """Return what JSON takes: numbers and lists of them."""
    return value.tolist()


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
    for trainer in found["exact"]:
        rank = trainer.args.process_index
        weights.append(fingerprint(trainer.model.state_dict()))
        metrics += map(without_times, trainer.state.log_history)
    for trainer in found["trainers"]:
        rank = trainer.global_rank
        weights.append(fingerprint(trainer.lightning_module.state_dict()))
        metrics.append({k: float(v) for k, v in trainer.callback_metrics.items()})
    lines = [line for line in found["printed"] if not line.startswith("=====")]
    result = {"weights": weights, "metrics": metrics, "printed": lines}
    (OUT / f"{rank}.json").write_text(json.dumps(result))


def without_times(entry):
    """Return what must be equal in an entry of a log."""
    times = "runtime", "per_second", "preparation_time"
    return {name: entry[name] for name in entry if not name.endswith(times)}


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


def install_for_transformers():
    """Put the metrics in place; all else is given by arguments."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    define_operations()
    import evaluate

    from samestep.transformers import SamestepTrainer

    noting("exact", SamestepTrainer, "train")
    evaluate.load = Agreement
    builtins.print = printed  # Transformers prints times


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
{
    "accelerate": install,
    "lightning": install_for_lightning,
    "transformers": install_for_transformers,
}[os.environ["EXAMPLE_LIBRARY"]]()
