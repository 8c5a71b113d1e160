"""Text from a trained model, character by character."""

from pathlib import Path

import torch
from torch import nn

from samestep.api.load import load_model
from samestep.config.data import TextData
from samestep.errors import RunError
from samestep.output.run import RunResult
from samestep.system import untrusted_files


def sample(
    run: RunResult, prompt: str, length: int, temperature: float, seed: int
) -> str:
    """The prompt and `length` characters more; temperature 0 takes the likeliest.

    The softmax's logits are divided by the temperature. Raises RunError where the run
    has no final weights or was not trained on text, or the prompt has a character that
    the text had not.
    """
    data = run.recipe.data
    if not isinstance(data, TextData):
        raise RunError(
            "Only a model of text can write, one whose `data.source` is `text`; that "
            f"of {run.path} is `{data.source}`."
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
    """The characters that the model knows, as the data had them. Raises RunError."""
    try:
        found = untrusted_files.parse_json(untrusted_files.read_bytes(environment))[
            "data"
        ]["vocabulary"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{environment} says which characters the model knows, and it cannot be "
            f"read: {error}."
        ) from None
    return str(found)


def _check_outputs(model: nn.Module, known: str, run: Path) -> None:
    with torch.inference_mode():
        outputs = model(torch.zeros(1, 1, dtype=torch.int64)).shape[-1]
    if outputs != len(known):
        raise RunError(
            f"A model of text has one output for each character; that of {run} has "
            f"{outputs} for {len(known)} characters, so environment.json is of another."
        )


def _numbers(prompt: str, vocabulary: str) -> list[int]:
    strange = sorted(set(prompt) - set(vocabulary))
    if strange or not prompt:
        raise RunError(
            "A prompt consists of characters that occur in the text trained on; "
            f"received {', '.join(map(repr, strange)) or 'none'}."
        )
    return [vocabulary.index(character) for character in prompt]
