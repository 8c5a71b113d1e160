"""Model families, one file each; the loss, the device, torch.compile.

Imports `data` and below.
"""

import torch
from torch import nn

from samestep.config import model as section
from samestep.data.dataset import Dataset
from samestep.models import user_model
from samestep.models.cnn import Cnn
from samestep.models.mlp import Mlp
from samestep.models.resnet import Resnet
from samestep.models.rnn import Rnn
from samestep.models.transformer import Transformer
from samestep.models.vit import Vit
from samestep.state import dtypes
from samestep.user_code.references import UserCode, title


def build(
    recipe: section.ModelRecipe,
    data: Dataset,
    own: UserCode | None = None,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """Return a model for this data, its weights drawn from torch's default generator.

    They are drawn in float32, then converted to `dtype`. `own` finds the user's
    functions. Raises OwnCodeError.
    """
    model = dtypes.converted(_drawn(recipe, data, own or UserCode()), dtype)
    if isinstance(recipe, section.CustomModel):
        who = title(recipe.build, "model")
        user_model.check_types(model, who, dtype, user_model.TYPE)
    return model


def _drawn(recipe: section.ModelRecipe, data: Dataset, own: UserCode) -> nn.Module:
    match recipe:
        case section.MlpModel():
            return Mlp(recipe, data)
        case section.CnnModel():
            return Cnn(recipe, data)
        case section.ResnetModel():
            return Resnet(recipe, data)
        case section.RnnModel():
            return Rnn(recipe, data)
        case section.VitModel():
            return Vit(recipe, data)
        case section.TransformerModel():
            return Transformer(recipe, data)
        case section.CustomModel():
            return user_model.build(recipe, data.inputs, data.outputs, own)
