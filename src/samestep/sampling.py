"""Text from a trained model, character by character."""

import json

import torch

from samestep import dataset, models, weights
from samestep.data_sections import TextData
from samestep.errors import RunError
from samestep.run import Run


def sample(run: Run, prompt: str, length: int, temperature: float, seed: int) -> str:
    """The prompt and `length` characters more; temperature 0 takes the likeliest.

    The softmax's logits are divided by the temperature. Raises RunError where the run
    was not trained on text, or the prompt has a character that the text had not.
    """
    recipe = run.recipe
    if not isinstance(recipe.data, TextData):
        raise RunError(f"Only a model of text can write: {run.path} was not one.")
    data = dataset.load(recipe.data)
    known = {character: n for n, character in enumerate(_vocabulary(run))}
    strange = sorted(set(prompt) - set(known))
    if strange or not prompt:
        raise RunError(
            "A prompt consists of characters that occur in the text trained on; "
            f"received {', '.join(map(repr, strange)) or 'none'}."
        )
    model = models.build(recipe.model, data)
    model.load_state_dict(weights.load(run.model_file))
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    tokens = [known[character] for character in prompt]
    for _ in range(length):
        with torch.inference_mode():
            logits = model(torch.tensor([tokens[-recipe.data.context :]]))[0, -1]
        if temperature == 0:
            tokens.append(int(logits.argmax()))
        else:
            chances = (logits / temperature).softmax(dim=0)
            tokens.append(int(torch.multinomial(chances, 1, generator=generator)))
    return "".join(_vocabulary(run)[token] for token in tokens)


def _vocabulary(run: Run) -> str:
    environment = json.loads((run.path / "environment.json").read_text())
    return str(environment["data"]["vocabulary"])
