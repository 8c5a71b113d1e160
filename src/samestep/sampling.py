"""Text from a trained model, character by character."""

import json

import torch

from samestep.data_sections import TextData
from samestep.errors import RunError
from samestep.run import Run


def sample(run: Run, prompt: str, length: int, temperature: float, seed: int) -> str:
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
    model = run.load_model()
    environment = json.loads((run.path / "environment.json").read_text())
    vocabulary: str = environment["data"]["vocabulary"]
    tokens = _numbers(prompt, vocabulary)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(length):
        with torch.inference_mode():
            logits = model(torch.tensor([tokens[-data.context :]]))[0, -1]
        if temperature == 0:
            tokens.append(int(logits.argmax()))
        else:
            chances = (logits / temperature).softmax(dim=0)
            tokens.append(int(torch.multinomial(chances, 1, generator=generator)))
    return "".join(vocabulary[token] for token in tokens)


def _numbers(prompt: str, vocabulary: str) -> list[int]:
    strange = sorted(set(prompt) - set(vocabulary))
    if strange or not prompt:
        raise RunError(
            "A prompt consists of characters that occur in the text trained on; "
            f"received {', '.join(map(repr, strange)) or 'none'}."
        )
    return [vocabulary.index(character) for character in prompt]
