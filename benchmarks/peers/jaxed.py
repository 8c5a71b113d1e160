"""JAX, on all cores; optax for Adam. An epoch is one jitted scan over its steps.

Only with convolutions each step is a jitted call, since XLA's are many times slower in
a scan on CPUs. The last, short batch of an epoch is dropped (a scan has one shape), in
favour of JAX.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import Task, report, task
from jaxed_networks import network, shapes


def optimizer_of(work: Task) -> optax.GradientTransformation:
    """Return the recipe's optimizer, without the learning rate."""
    hyper = work.recipe.optimizer
    scale = optax.scale_by_adam(*hyper.betas, hyper.eps)
    decay = optax.add_decayed_weights(hyper.weight_decay)
    parts = [decay, scale] if hyper.name == "adam" else [scale, decay]
    if hyper.max_grad_norm is not None:
        parts.insert(0, optax.clip_by_global_norm(hyper.max_grad_norm))
    return optax.chain(*parts)


def main() -> None:
    work = task()
    recipe, epochs = work.recipe, work.epochs
    batch, steps = recipe.global_batch, len(work.train[1]) // recipe.global_batch
    inputs, targets = (jnp.asarray(part.numpy()) for part in work.train)
    every = map(work.learning_rate, range(epochs * work.steps_per_epoch))
    rates = np.fromiter(every, np.float32).reshape(epochs, -1)[:, :steps]
    (parameters, apply), optimizer = network(work), optimizer_of(work)

    def loss(parameters, inputs, targets, key):
        wanted = jax.nn.one_hot(targets, work.data.outputs)
        smooth = optax.smooth_labels(wanted, recipe.loss.label_smoothing)
        logits = apply(parameters, inputs, key)
        return optax.softmax_cross_entropy(logits, smooth).mean()

    def step(carry, now):
        parameters, state, key = carry
        samples, rate = now
        key, own = jax.random.split(key)
        gradient = jax.grad(loss)(parameters, inputs[samples], targets[samples], own)
        updates, state = optimizer.update(gradient, state, parameters)
        updates = jax.tree.map(lambda update: -rate * update, updates)
        return (optax.apply_updates(parameters, updates), state, key), None

    def drawn(key):
        order = jax.random.permutation(key, len(targets))[: steps * batch]
        return order.reshape(steps, batch)

    @jax.jit
    def scanned(parameters, state, key, rates):
        return jax.lax.scan(step, (parameters, state, key), (drawn(key), rates))[0]

    one_step, draw = jax.jit(step, donate_argnums=0), jax.jit(drawn)

    def stepwise(parameters, state, key, rates):
        carry = parameters, state, key
        for now in zip(draw(key), rates, strict=True):
            carry, _ = one_step(carry, now)
        return carry

    epoch = stepwise if recipe.model.family == "cnn" else scanned
    state, seconds = optimizer.init(parameters), []
    for index in range(epochs):
        start = time.perf_counter()
        now = epoch(parameters, state, jax.random.key(index), rates[index])
        parameters, state, _ = jax.block_until_ready(now)
        seconds.append(time.perf_counter() - start)

    @jax.jit
    def answers(inputs):
        return apply(parameters, inputs, None).argmax(-1)

    right = sum(
        int((answers(jnp.asarray(x.numpy())) == y.numpy()).sum())
        for x, y in zip(*(part.split(250) for part in work.test), strict=True)
    )
    report(seconds, right / work.test[1].numel(), shapes(parameters))


main()
