"""A recurrent network: over the rows of an image, or over tokens.

[b, c, h, w] -> h rows [b, h, c * w] -> LSTM or GRU -> last state [b, hidden]
             -> linear -> [b, classes]
[b, t] -> embedding [b, t, hidden] -> LSTM or GRU -> all states [b, t, hidden]
       -> linear -> [b, t, tokens]
"""

from torch import Tensor, nn

from samestep.config.model import RnnModel
from samestep.data.dataset import Dataset
from samestep.models.layers import Linear


class Rnn(nn.Module):
    """torch's default initialisation, from its default generator."""

    def __init__(self, recipe: RnnModel, data: Dataset) -> None:
        super().__init__()
        self.embed: nn.Embedding | None = None
        if data.task == "next-token":
            self.embed, width = nn.Embedding(data.outputs, recipe.hidden), recipe.hidden
        else:
            channels, _, columns = data.input_shape
            width = channels * columns
        kind = nn.LSTM if recipe.cell == "lstm" else nn.GRU
        self.cells = kind(width, recipe.hidden, recipe.layers, batch_first=True)
        self.head = Linear(recipe.hidden, data.outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        """Compute logits [b, classes] of images [b, c, h, w], or [b, t, tokens] of
        tokens, int64 [b, t]."""
        if self.embed is not None:
            states, _ = self.cells(self.embed(inputs))
        else:
            states, _ = self.cells(inputs.transpose(1, 2).flatten(2))
            states = states[:, -1]
        logits: Tensor = self.head(states)
        return logits
