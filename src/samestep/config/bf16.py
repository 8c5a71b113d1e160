"""bf16: products in bfloat16 where the processor has instructions for them; no torch.

Weights, gradients, the loss and the optimizer stay float32.
"""

import re
from pathlib import Path

from samestep.config.recipe import Recipe
from samestep.errors import RecipeError


CPU = Path("/proc/cpuinfo")
FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
"""As Linux calls the instructions: those of x86, and that of arm64."""


def instructions() -> list[str]:
    """Which of them this processor has."""
    try:
        lines = re.search(
            r"^(?:flags|Features)\s*:(.*)$", CPU.read_text(), re.MULTILINE
        )
    except OSError:
        return []
    return sorted(FLAGS.intersection(lines[1].split())) if lines else []


def check(recipe: Recipe) -> None:
    """Raises RecipeError where bf16 would only be emulated: it would be slow."""
    if recipe.precision == "bf16" and not instructions():
        raise RecipeError(
            "`precision` `bf16` needs a processor with instructions for it "
            f"({', '.join(sorted(FLAGS))}), and this one has none. Use `float32`."
        )


def conditions(recipe: Recipe) -> dict[str, str]:
    """What decides the bits besides the recipe, for a run to go on under the same."""
    uses_bf16 = recipe.precision == "bf16" or recipe.optimizer.name == "muon"
    return {"bf16": " ".join(instructions())} if uses_bf16 else {}
