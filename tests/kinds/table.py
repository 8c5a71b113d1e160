"""Every kind: its parts, and what a training makes of it."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Kind:
    """Names below `kinds`, or the plain part where there is none."""

    model: str = "plain:Net"
    data: str = "plain:load"
    loss: str = ""
    reason: str = ""
    """A pattern for what a training says of it; empty: its result is exact."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Fields of the recipe."""
    is_given: bool = False
    """Whether the model is called here, and the trainings get what it returns."""


DRAWS = {"evaluation_batch": 5}
EARLY = {"evaluation_batch": 5, "early_stopping": {"patience": 1}, "epochs": 5}
LATE = {"epochs": 4}
"""A worker that is killed forgets; by the end of a fourth epoch it counts enough."""
HIDDEN = "same micro-batch gave another result"
"""What the probe says of a memory, and of what depends on the process."""
OTHERS = f"{HIDDEN}|`load` must return the same"
"""What workers say to each other of their data, or the probe if it is first."""

KINDS: dict[str, Kind] = {
    # Exact, however they look.
    "plain": Kind(),
    "gradient of one's own": Kind("sound:OwnGradient"),
    "buffer in place": Kind("sound:BufferInPlace"),
    "buffer that is replaced": Kind("sound:BufferReassigned", reason="replaced `mean`"),
    "old spectral norm": Kind("sound:old_spectral_norm"),
    "new spectral norm": Kind("sound:new_spectral_norm"),
    "weight norm": Kind("sound:weight_norm"),
    "orthogonal weights": Kind("sound:orthogonal"),
    "parametrization": Kind("sound:Parametrized"),
    "tied": Kind("sound:Tied"),
    "tied by a hook": Kind("sound:TiedByHook"),
    "cumulative norm": Kind("sound:cumulative_norm"),
    "shared norm": Kind("sound:SharedNorm"),
    "frozen norm": Kind("sound:FrozenNorm"),
    "norm in eval": Kind("sound:norm_in_eval"),
    "body in eval": Kind("sound:body_in_eval"),
    "dropout in eval": Kind("sound:dropout_in_eval"),
    "modes in forward": Kind("sound:ModesInForward"),
    "stochastic depth": Kind("sound:StochasticDepth"),
    "checkpointed dropout": Kind("sound:Checkpointed"),
    "autocast": Kind("sound:Autocast"),
    "variational": Kind("sound:Variational", fields=DRAWS),
    "variational, stops early": Kind("sound:Variational", fields=EARLY),
    "branch without a parameter": Kind("sound:Branch"),
    "guarded cuda": Kind("sound:GuardedCuda"),
    "recurrent": Kind("sound:NewParts"),
    "weights drawn at import": Kind("sound:drawn_at_import"),
    "threads in build": Kind("sound:threads_in_build"),
    "switches in build": Kind("sound:switches_in_build"),
    "default type in build": Kind("sound:default_type_in_build"),
    "weights from random": Kind("sound:drawn_from_random"),
    "hook": Kind("sound:with_hook"),
    "hook of an instance": Kind("sound:with_hook", is_given=True),
    # Models with a memory, or that depend on the process.
    "numpy in forward": Kind("memories:NumpyNoise"),
    "fresh generator in forward": Kind("memories:FreshNoise", reason=HIDDEN),
    "generator of the module": Kind("memories:ImportedGenerator", reason=HIDDEN),
    "generator as an attribute": Kind("memories:OwnGenerator", reason=HIDDEN),
    "counter": Kind("memories:Counter", reason=HIDDEN),
    "late counter": Kind("memories:LateCounter", reason=HIDDEN, fields=LATE),
    "counter of the class": Kind("memories:ClassCounter", reason=HIDDEN, fields=LATE),
    "annealing": Kind("memories:Annealed", reason=HIDDEN),
    "memory bank": Kind("memories:MemoryBank", reason=HIDDEN),
    "deque": Kind("memories:Recent", reason=HIDDEN),
    "mutable default": Kind("memories:Defaults", reason=HIDDEN),
    "global tensor": Kind("memories:GlobalTensor", reason=HIDDEN),
    "lru_cache": Kind("memories:CachedBySize", reason=HIDDEN),
    "cache by shape": Kind("memories:CompiledByShape", reason=HIDDEN),
    "lazy": Kind("memories:Lazy", reason=HIDDEN),
    "momentum encoder": Kind(
        "memories:MomentumEncoder", reason="frozen parameter `teacher"
    ),
    "teacher in a hook": Kind(
        "memories:TeacherInHook", reason="frozen parameter `teacher"
    ),
    "swapped layers": Kind("memories:Swapped", reason=f"{HIDDEN}|`one.weight`"),
    "late buffer": Kind("memories:LateBuffer", reason="longest"),
    "date": Kind("memories:Dated", reason=HIDDEN),
    "time": Kind("memories:Timed", reason=HIDDEN),
    "rank": Kind("memories:ByRank", reason=HIDDEN),
    "id": Kind("memories:ById", reason=HIDDEN),
    "order of a set": Kind("memories:SetOrder"),
    "file": Kind("memories:FileMemory", reason=HIDDEN),
    "race": Kind("memories:Racing", reason=HIDDEN),
    "pool": Kind("memories:Pool", reason=HIDDEN),
    "process id": Kind("memories:DropsByProcess", reason=HIDDEN),
    # Data.
    "data that draw": Kind(data="data:drawing"),
    "data by threads": Kind(data="data:threaded"),
    "data with a generator": Kind(data="data:own_generator", reason=HIDDEN),
    "data in place": Kind(data="data:in_place", reason=HIDDEN),
    "data with a cache": Kind(data="data:cache", reason=HIDDEN),
    "data with a cached function": Kind(data="data:cached_function", reason=HIDDEN),
    "data that count": Kind(data="data:epoch_by_calls", reason=HIDDEN, fields=LATE),
    "data that pop": Kind(data="data:popping", reason=HIDDEN),
    "data with hash": Kind(data="data:hashed"),
    "stream": Kind(data="data:generator", reason="used up after one"),
    "python's shuffle": Kind(data="data:python_shuffle"),
    "numpy's permutation": Kind(data="data:numpy_permutation"),
    "torch's permutation": Kind(data="data:torch_permutation"),
    "fresh permutation": Kind(data="data:fresh_permutation", reason=OTHERS),
    "vocabulary of a set": Kind(data="data:vocabulary"),
    "length by process": Kind(data="data:length_by_process", reason=OTHERS),
    "length by rank": Kind(data="data:length_by_rank", reason=OTHERS),
    "samples by rank": Kind(data="data:samples_by_rank", reason=OTHERS),
    "mask beside the input": Kind("sound:Masked", data="data:with_mask"),
    "complex numbers": Kind(data="data:complex_numbers", reason="complex"),
    "bools": Kind("sound:Bools", data="data:bools"),
    "ragged": Kind(data="data:ragged", reason="All samples have one shape"),
    # Losses.
    "mean loss": Kind(loss="losses:mean", reason="mean"),
    "loss of a class": Kind(loss="losses:class_loss", reason="mean"),
    "loss with dropout": Kind(loss="losses:with_dropout"),
    "loss with numpy": Kind(loss="losses:with_numpy"),
    "loss with an average": Kind(loss="losses:with_average", reason=HIDDEN),
    "loss by rank": Kind(loss="losses:by_rank", reason=HIDDEN),
    "loss that counts": Kind(loss="losses:counting", reason=HIDDEN, fields=LATE),
}
