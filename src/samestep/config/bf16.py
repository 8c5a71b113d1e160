"""Support of processors for `precision = "bf16"`; no torch.

Products are then computed in bfloat16. Weights, gradients, the loss and the optimizer
stay float32.
"""

from samestep.config.recipe import Recipe
from samestep.errors import RecipeError
from samestep.system import machine


FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
"""Linux's names of the instructions on x86 and, the last, on arm64."""


def instructions() -> list[str]:
    """Return which of these instructions this processor has, in alphabetic order."""
    return sorted(FLAGS & machine.cpu_features())


def check(recipe: Recipe) -> None:
    """Raise RecipeError if bf16 would be emulated here, which is slow."""
    if recipe.precision == "bf16" and not instructions():
        raise RecipeError(
            "`precision` `bf16` needs a processor with instructions for it "
            f"({', '.join(sorted(FLAGS))}), and this one has none. Use `float32`."
        )


def conditions(recipe: Recipe) -> dict[str, str]:
    """Return the instructions that a resumed run must find again, if it uses bf16."""
    uses_bf16 = recipe.precision == "bf16" or recipe.optimizer.name == "muon"
    return {"bf16": " ".join(instructions())} if uses_bf16 else {}
