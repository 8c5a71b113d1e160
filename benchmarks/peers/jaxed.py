"""JAX: one jitted scan over each epoch, on all cores; optax for Adam.

The last, short batch of an epoch is dropped (a scan has one shape), in favour of JAX.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import report, task


def main() -> None:
    work = task()
    recipe, epochs, hyper = work.recipe, work.epochs, work.recipe.optimizer
    batch, steps = recipe.global_batch, len(work.train[1]) // recipe.global_batch
    dropout, smoothing = recipe.model.dropout, recipe.loss.label_smoothing
    images, labels = (jnp.asarray(part.numpy()) for part in work.train)
    every = map(work.learning_rate, range(epochs * work.steps_per_epoch))
    rates = np.fromiter(every, np.float32).reshape(epochs, -1)[:, :steps]
    layers = [
        (jnp.asarray(p.weight.detach().numpy().T), jnp.zeros(p.out_features))
        for p in work.model()
        if hasattr(p, "weight")
    ]
    shapes = [shape for w, b in layers for shape in (w.T.shape, b.shape)]
    scale = optax.scale_by_adam(*hyper.betas, hyper.eps)
    decay = optax.add_decayed_weights(hyper.weight_decay)
    parts = [decay, scale] if hyper.name == "adam" else [scale, decay]
    optimizer, seconds = optax.chain(*parts), []

    def logits(layers, inputs, key):
        for i, (weight, bias) in enumerate(layers):
            inputs = inputs @ weight + bias
            if i < len(layers) - 1:
                inputs = jax.nn.relu(inputs)
                if key is not None and dropout:
                    key, own = jax.random.split(key)
                    kept = jax.random.bernoulli(own, 1 - dropout, inputs.shape)
                    inputs = jnp.where(kept, inputs / (1 - dropout), 0)
        return inputs

    def loss(layers, inputs, targets, key):
        smooth = optax.smooth_labels(jax.nn.one_hot(targets, 10), smoothing)
        return optax.softmax_cross_entropy(logits(layers, inputs, key), smooth).mean()

    @jax.jit
    def epoch(layers, state, key, rates):
        order = jax.random.permutation(key, len(labels))[: steps * batch]

        def step(carry, now):
            layers, state, key = carry
            samples, rate = now
            key, own = jax.random.split(key)
            gradient = jax.grad(loss)(layers, images[samples], labels[samples], own)
            updates, state = optimizer.update(gradient, state, layers)
            updates = jax.tree.map(lambda update: -rate * update, updates)
            return (optax.apply_updates(layers, updates), state, key), None

        batches = order.reshape(steps, batch), rates
        return jax.lax.scan(step, (layers, state, key), batches)[0][:2]

    state = optimizer.init(layers)
    for index in range(epochs):
        start = time.perf_counter()
        now = epoch(layers, state, jax.random.key(index), rates[index])
        layers, state = jax.block_until_ready(now)
        seconds.append(time.perf_counter() - start)
    inputs, targets = (part.numpy() for part in work.test)
    right = np.asarray(logits(layers, inputs, None).argmax(1) == targets).mean()
    report(seconds, float(right), sorted(shapes))


main()
