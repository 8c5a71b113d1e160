"""Generates text with a trained model, character by character."""

from pathlib import Path

import torch
from torch import nn

from samestep.api.load import load_model
from samestep.config.data import TextData
from samestep.errors import RunError
from samestep.files import untrusted
from samestep.output.run import RunResult


def sample(
    run: RunResult, prompt: str, length: int, temperature: float, seed: int
) -> str:
    """Return the prompt, continued by `length` characters.

    The logits are divided by the temperature before the softmax; temperature 0 takes
    the likeliest character. Raises RunError if the run has no final weights or was not
    trained on text, or the prompt has a character that the text did not have.
    """
    data = run.recipe.data
    if not isinstance(data, TextData):
        raise RunError(
            "Only a model trained on text (`data.source` is `text`) can generate some; "
            f"that of {run.path} is `{data.source}`."
        )
    model = load_model(run)
    known = vocabulary(run.path / "environment.json")
    _check_outputs(model, known, run.path)
    tokens = _numbers(prompt, known)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(length):
        with torch.inference_mode():
            logits = model(torch.tensor([tokens[-data.context :]]))[0, -1]
        if temperature == 0:
            tokens.append(int(logits.argmax()))
        else:
            chances = (logits / temperature).softmax(dim=0)
            tokens.append(int(torch.multinomial(chances, 1, generator=generator)))
    return "".join(known[token] for token in tokens)


def vocabulary(environment: Path) -> str:
    """Return the characters that the model knows, in order. Raises RunError."""
    try:
        content = untrusted.parse_json(untrusted.read_bytes(environment))
        return str(content["data"]["vocabulary"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{environment} holds the characters that the model knows, and cannot be "
            f"read: {error}."
        ) from None


def _check_outputs(model: nn.Module, known: str, run: Path) -> None:
    with torch.inference_mode():
        outputs = model(torch.zeros(1, 1, dtype=torch.int64)).shape[-1]
    if outputs != len(known):
        raise RunError(
            f"A model of text has one output per character; that of {run} has "
            f"{outputs} for the {len(known)} characters in environment.json, which "
            "belongs to another run. Restore the original."
        )


def _numbers(prompt: str, vocabulary: str) -> list[int]:
    unknown = sorted(set(prompt) - set(vocabulary))
    if unknown or not prompt:
        raise RunError(
            "A prompt consists of characters that occur in the text trained on; "
            f"received {', '.join(map(repr, unknown)) or 'none'}."
        )
    return [vocabulary.index(character) for character in prompt]
