"""Texts, images, tokenizers and models that are made in place of what is downloaded."""

import csv
import functools
import json

import numpy as np
import torch


WORDS = [f"word{i}" for i in range(40)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def texts(count, seed):
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(WORDS, draw.integers(3, 13))) for _ in range(count)]


def tokenizer(*_, **__):
    """Return a tokenizer of whole words that can pad and mask."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    made = Tokenizer(models.WordLevel(ids, unk_token=SPECIAL[1]))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = "pad_token", "unk_token", "cls_token", "sep_token", "mask_token"
    special = dict(zip(names, SPECIAL, strict=True)) | {"eos_token": SPECIAL[3]}
    return PreTrainedTokenizerFast(
        tokenizer_object=made, model_max_length=64, **special
    )


def image(generator):
    from PIL import Image

    pixels = torch.randint(0, 256, (64, 64, 3), generator=generator)
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def make_pets(place):
    """Make images of two kinds of animals, named as those of the Oxford pets."""
    place.mkdir()
    generator = torch.Generator().manual_seed(0)
    for index in range(90):
        image(generator).save(place / f"{('cat', 'dog')[index % 2]}_{index}.jpg")


def make_folders(place, count):
    """Make images in a folder for each kind."""
    generator = torch.Generator().manual_seed(count)
    for index in range(count):
        folder = place / ("cat", "dog")[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        image(generator).save(folder / f"{index}.jpg")


def make_files(place):
    """Make data for the scripts of Transformers, 118 samples to train with."""
    for name, count in {"train": 118, "valid": 43, "test": 21}.items():
        make_folders(place / "images" / name, count)
        first, second = texts(count, count), texts(count, count + 1)
        (place / f"{name}.txt").write_text("\n".join(first))
        longer = [int(len(a) > len(b)) for a, b in zip(first, second, strict=True)]
        rows = {
            "sentences": {"sentence": first, "label": longer},
            "pairs": {"sentence1": first, "sentence2": second, "label": longer},
            "endings": {
                "sent1": first,
                "sent2": second,
                **{f"ending{i}": texts(count, count + 2 + i) for i in range(4)},
                "label": [len(text) % 4 for text in first],
            },
        }
        for kind, columns in rows.items():
            write_csv(place / f"{kind}-{name}.csv", columns)
        write_lines(place / f"tags-{name}.json", map(tagged, first))
        pairs = zip(first, second, strict=True)
        write_lines(place / f"translated-{name}.json", map(translated, pairs))
        questions = list(map(question, range(count), first, second))
        (place / f"questions-{name}.json").write_text(json.dumps({"data": questions}))


def write_csv(path, columns):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


def write_lines(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))


def tagged(text):
    words = text.split()
    kinds = ("O", "B-X", "I-X")
    return {"tokens": words, "ner_tags": [kinds[len(word) % 3] for word in words]}


def translated(pair):
    return {"translation": {"en": pair[0], "de": pair[1]}}


def question(index, asked, context):
    """Return a question whose answer is the second word of the context."""
    before, answer, *_ = context.split()
    answers = {"text": [answer], "answer_start": [len(before) + 1]}
    given = {"context": context, "question": asked, "answers": answers}
    return {"id": str(index), "title": "made", **given}


@functools.cache
def define_operations():
    """Let torchvision be imported beside a torch that its operations are not for."""
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor a, Tensor b) -> Tensor")


def make_models(place):
    """Make a small model of each kind that the scripts train, with a tokenizer."""
    define_operations()
    import transformers

    torch.manual_seed(0)
    size, wide = len(SPECIAL) + len(WORDS), {"intermediate_size": 64}
    ends = {"pad_token_id": 0, "eos_token_id": 3}
    bert = transformers.BertConfig(vocab_size=size, **SIZES, **wide)
    llama = transformers.LlamaConfig(vocab_size=size, **SIZES, **wide, **ends)
    vit = transformers.ViTConfig(image_size=32, patch_size=8, **SIZES, **wide)
    t5 = transformers.T5Config(
        vocab_size=size,
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        **ends,
    )
    for name, made in {
        "bert": transformers.BertForMaskedLM(bert),
        "llama": transformers.LlamaForCausalLM(llama),
        "t5": transformers.T5ForConditionalGeneration(t5),
        "vit": transformers.ViTForImageClassification(vit),
    }.items():
        made.save_pretrained(place / name)
        tokenizer().save_pretrained(place / name)
    shape = {"height": 32, "width": 32}
    transformers.ViTImageProcessor(size=shape).save_pretrained(place / "vit")
