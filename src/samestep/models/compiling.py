"""torch.compile of the model's passes in training, and the cache of its products.

Every worker compiles the same code for each size of a micro-batch, before its first
step: a failure is then an early one, and no step is late. Later workers and trainings
find the products in torch's cache on disk. By default that is a directory below the
temporary one, under a name that any user of the machine can take first; torch makes it
when DistributedDataParallel is imported.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import nn

from samestep.core.plan import Plan
from samestep.data.dataset import Dataset
from samestep.errors import RecipeError
from samestep.files import cache
from samestep.models.objective import Objective
from samestep.state import dtypes
from samestep.state.flat import Flat


VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
DISABLING = ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE")
"""Variables with which torch.compile does nothing, if they are 1."""


@contextmanager
def own_directory() -> Iterator[None]:
    """Use a directory in our cache, in this process and those that it starts.

    One that the user has named stays. Without a writable cache it is temporary, and is
    removed at the end.
    """
    if VARIABLE in os.environ:
        yield
        return
    path = _lasting()
    temporary = tempfile.TemporaryDirectory
    with nullcontext(path) if path else temporary(prefix="samestep-") as directory:
        os.environ[VARIABLE] = str(directory)
        try:
            yield
        finally:
            del os.environ[VARIABLE]


def _lasting() -> Path | None:
    """Return a directory in this user's cache; None if it cannot be written."""
    try:
        path = cache.directory() / "compiled"
        path.mkdir(parents=True, exist_ok=True)
    except cache.UNWRITABLE:
        return None
    return path if os.access(path, os.W_OK) else None


def prepare(objective: Objective, data: Dataset, plan: Plan, flat: Flat) -> None:
    """Compile the model for all sizes of micro-batches; keep its tensors as they are.

    Raises RecipeError.
    """
    objective.model = compiled(objective.model)
    steps = {0, max(0, plan.steps_per_epoch - 1)}
    sizes = {size for step in steps for size in plan.micro_batch_sizes(step) if size}
    for size in sorted(sizes):
        samples = torch.zeros(size, dtype=torch.int64)
        drawn = data.splits["train"].gather(samples)
        with dtypes.default(flat.dtype):
            loss, _ = objective(*drawn)
            torch.autograd.grad(loss, flat.parameters, allow_unused=True)
        flat.restore_buffers()


def compiled(model: nn.Module) -> nn.Module:
    """Return the model to call; it compiles at its first call. Raises RecipeError."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise RecipeError(
            f"`compile` needs a C++ compiler, and there is no `{compiler}`: install "
            "one, or name it in the environment variable CXX, or leave out `compile`."
        )
    for name in DISABLING:
        if os.environ.get(name) == "1":
            raise RecipeError(
                "With `compile` in the recipe, compiled code decides the result, and "
                f"`{name}` in the environment turns it off: unset it, or leave out "
                "`compile`."
            )
    import torch._dynamo.config as dynamo
    import torch._inductor.config as inductor

    # One micro-batch never runs eagerly because others have been compiled before it:
    # ownership of micro-batches would then decide bits.
    dynamo.recompile_limit = dynamo.accumulated_recompile_limit = 1_000
    dynamo.fail_on_recompile_limit_hit = True
    dynamo.suppress_errors = False  # TORCHDYNAMO_SUPPRESS_ERRORS runs it eagerly, too
    inductor.fallback_random = True  # torch's own generator, as without compiling
    inductor.compile_threads = 1  # no pool of processes in every worker
    to_call: nn.Module = torch.compile(model, dynamic=False)  # type: ignore[assignment]
    return to_call
