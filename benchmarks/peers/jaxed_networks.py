"""Networks in plain JAX, with the shapes of samestep's: parameters and a function.

Weights are laid out as in Flax: those of linear layers are [in, out], of convolutions
[h, w, in, out], with the channels of images last.
Each builder takes a Task and returns parameters, a tree of dicts, and the function
`apply(parameters, inputs, key)`; `key` is None in evaluation.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from common import Task
from jax import lax


LAYOUT = "NHWC", "HWIO", "NHWC"


def network(work: Task):
    """Build the network of the recipe's family."""
    builders = {"mlp": mlp, "cnn": cnn, "transformer": decoder}
    return builders[work.recipe.model.family](work)


def shapes(parameters) -> list[tuple[int, ...]]:
    """Return the shapes as torch has them, sorted."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(parameters)
    return sorted(
        (*leaf.shape[:-3:-1], *leaf.shape[:-2])
        if path[-1].key == "kernel"
        else leaf.shape
        for path, leaf in leaves
    )


def linear(fan_in: int, fan_out: int, rng: np.random.Generator):
    bound = math.sqrt(6 / (fan_in + fan_out))
    kernel = rng.uniform(-bound, bound, (fan_in, fan_out)).astype(np.float32)
    return {"kernel": jnp.asarray(kernel), "bias": jnp.zeros(fan_out)}


def apply_linear(layer, inputs):
    return inputs @ layer["kernel"] + layer["bias"]


def hidden_layers(layers, inputs, dropout: float, key):
    """ReLU and dropout after all linear layers but the last."""
    for layer in layers[:-1]:
        inputs = jax.nn.relu(apply_linear(layer, inputs))
        if key is not None and dropout:
            key, own = jax.random.split(key)
            kept = jax.random.bernoulli(own, 1 - dropout, inputs.shape)
            inputs = jnp.where(kept, inputs / (1 - dropout), 0)
    return apply_linear(layers[-1], inputs)


def mlp(work: Task):
    recipe, rng = work.recipe.model, np.random.default_rng(work.recipe.seed)
    widths = [work.train[0].shape[1], *recipe.hidden, work.data.outputs]
    layers = [linear(*ends, rng) for ends in itertools.pairwise(widths)]

    def apply(layers, images, key):
        return hidden_layers(layers, images, recipe.dropout, key)

    return layers, apply


def cnn(work: Task):
    recipe, rng = work.recipe.model, np.random.default_rng(work.recipe.seed)
    channels = [work.train[0].shape[1], *recipe.channels]
    ends = zip(channels, channels[1:], recipe.kernels, strict=False)
    stages = []
    for before, after, size in ends:
        bound = 1 / math.sqrt(before * size * size)
        shape = size, size, before, after
        kernel = rng.uniform(-bound, bound, shape).astype(np.float32)
        stages.append({"kernel": jnp.asarray(kernel), "bias": jnp.zeros(after)})

    def convolve(stages, images):
        images = images.transpose(0, 2, 3, 1)
        for stage in stages:
            images = lax.conv_general_dilated(
                images, stage["kernel"], (1, 1), "VALID", dimension_numbers=LAYOUT
            )
            images = jax.nn.relu(images + stage["bias"])
            window = 1, 2, 2, 1
            images = lax.reduce_window(
                images, -jnp.inf, lax.max, window, window, "VALID"
            )
        return images.reshape(len(images), -1)

    features = convolve(stages, jnp.asarray(work.train[0][:1].numpy())).shape[1]
    widths = [features, *recipe.hidden, work.data.outputs]
    layers = [linear(*ends, rng) for ends in itertools.pairwise(widths)]

    def apply(parameters, images, key):
        inputs = convolve(parameters["stages"], images)
        return hidden_layers(parameters["layers"], inputs, recipe.dropout, key)

    return {"stages": stages, "layers": layers}, apply


def decoder(work: Task):
    """A decoder: tokens [b, t] -> logits [b, t, tokens]."""
    assert not work.recipe.model.dropout, "the decoder in JAX has no dropout"
    recipe, rng = work.recipe.model, np.random.default_rng(work.recipe.seed)
    (context,), width = work.data.inputs, recipe.width

    def normal(*shape: int):
        return jnp.asarray(rng.normal(0, 0.02, shape).astype(np.float32))

    def norm():
        return {"scale": jnp.ones(width), "bias": jnp.zeros(width)}

    def block():
        return {
            "first_norm": norm(),
            "query_key_value": linear(width, 3 * width, rng),
            "project": linear(width, width, rng),
            "second_norm": norm(),
            "expand": linear(width, 4 * width, rng),
            "contract": linear(4 * width, width, rng),
        }

    parameters = {
        "embed": normal(work.data.outputs, width),
        "position": normal(context, width),
        "blocks": [block() for _ in range(recipe.depth)],
        "norm": norm(),
        "head": linear(width, work.data.outputs, rng),
    }

    def normalise(layer, inputs):
        return jax.nn.standardize(inputs) * layer["scale"] + layer["bias"]

    def attend(layer, inputs):
        split = apply_linear(layer["query_key_value"], inputs)
        split = split.reshape(*inputs.shape[:2], 3, recipe.heads, -1)
        query, key, value = (split[:, :, n] for n in range(3))
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        return apply_linear(layer["project"], mixed.reshape(inputs.shape))

    def apply(parameters, tokens, key):
        hidden = parameters["embed"][tokens] + parameters["position"]
        for layer in parameters["blocks"]:
            hidden += attend(layer, normalise(layer["first_norm"], hidden))
            inputs = normalise(layer["second_norm"], hidden)
            inputs = jax.nn.gelu(apply_linear(layer["expand"], inputs), False)
            hidden += apply_linear(layer["contract"], inputs)
        return apply_linear(parameters["head"], normalise(parameters["norm"], hidden))

    return parameters, apply
