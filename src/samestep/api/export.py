"""Writes a trained model for other programs, and checks that it predicts the same.

| format | read by |
|---|---|
| safetensors | `safetensors.torch.load_file` |
| state_dict | torch, with `weights_only=True` |
| onnx | any ONNX runtime; the first dimension of the inputs is free |
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from samestep.api import load
from samestep.data import pytree
from samestep.data.pytree import Nested
from samestep.errors import ExportError, RunError, did_you_mean
from samestep.models.compiling import own_directory
from samestep.output.run import RunResult
from samestep.state import dtypes


SUFFIXES = {"safetensors": ".safetensors", "state_dict": ".pt", "onnx": ".onnx"}
MOST_SAMPLES = 256
"""The number of test samples whose predictions are compared."""
TOLERANCE = 1e-4
"""For the outputs of ONNX models, relative to the largest, or to 1 if that is less."""
ONLY_FATAL = 4
"""The log level of onnxruntime; it raises errors anyway."""
LIBRARIES = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class Exported:
    """An exported file, and the outcome of its check."""

    path: Path
    samples: int
    """The number of samples whose predictions were compared."""
    difference: float
    """The largest difference of an output; 0: the same bits."""


def export(
    run: RunResult,
    form: str = "safetensors",
    out: Path | None = None,
    model: Any = None,
    data: Any = None,
) -> Exported:
    """Write the final weights, by default into the run directory.

    `model` and `data` are the objects that `samestep.train` was given, if any. Raises
    RunError if the file exists or the run has no final weights. Raises ExportError, and
    leaves no file, if the format cannot hold the model or it predicts differently.
    """
    suffix = _suffix(form)
    out = out or run.path / f"exported{suffix}"
    if out.exists():
        raise RunError(
            f"{out} exists already and is not overwritten: choose another file."
        )
    trained = load.load_model(run, model)
    inputs, size = _samples(run, data)
    expected = _predict(trained, inputs)
    content = _onnx(trained, inputs) if form == "onnx" else _weights(trained, form)
    try:
        with out.open("xb") as file:
            file.write(content)
    except OSError as error:
        raise ExportError(f"{out} cannot be written: {error.strerror}.") from None
    try:
        fresh = load.load_model(run, model)
        outputs = _read_and_predict(form, out, fresh, inputs)
        limit = TOLERANCE if form == "onnx" else 0.0
        difference = compare(expected, outputs, limit, out)
    except BaseException:
        out.unlink()
        raise
    return Exported(out, size, difference)


def compare(
    expected: Sequence[Tensor], outputs: Sequence[Tensor], limit: float, path: Path
) -> float:
    """Return the largest difference of an output.

    Raises ExportError if it exceeds `limit` times the largest expected output, or times
    1 if that is less, or if shapes differ.
    """
    wanted = [list(tensor.shape) for tensor in expected]
    shapes = [list(tensor.shape) for tensor in outputs]
    if shapes != wanted:
        raise ExportError(
            f"An exported model must predict the same; {path} gave outputs of the "
            f"shapes {shapes} instead of {wanted}, and was deleted."
        )
    pairs = list(zip(expected, outputs, strict=True))
    worst = max((a.double() - b.double()).abs().max().item() for a, b in pairs)
    scale = max(1.0, *(each.abs().max().item() for each in expected))
    if not worst <= limit * scale:  # not `>`, which is false for NaN
        raise ExportError(
            f"An exported model must predict the same; outputs of {path} differed by "
            f"up to {worst:.2g} (allowed: {limit * scale:.2g}), and it was deleted."
        )
    return worst


def _suffix(form: str) -> str:
    if form not in SUFFIXES:
        raise RunError(
            f"Formats are {', '.join(SUFFIXES)}; received `{form}`."
            f"{did_you_mean(form, SUFFIXES)}"
        )
    missing = [n for n in LIBRARIES if find_spec(n) is None] if form == "onnx" else []
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise RunError(
            f"ONNX needs {', '.join(missing)}, which {verb} not installed. Install "
            "`samestep[export]`."
        )
    return SUFFIXES[form]


def _samples(run: RunResult, data: Any) -> tuple[Nested, int]:
    """Return inputs from the first split that has samples, and their number."""
    splits = load.load_data(run, data).splits
    split = next(s for s in map(splits.get, ("test", "validation", "train")) if s)
    size = min(MOST_SAMPLES, len(split))
    return split.gather(torch.arange(size))[0], size


def _weights(model: nn.Module, form: str) -> bytes:
    state = {name: t.detach().clone() for name, t in model.state_dict().items()}
    if form == "safetensors":
        return safetensors.torch.save(state, {"format": "pt"})
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _onnx(model: nn.Module, inputs: Nested) -> bytes:
    example = pytree.apply(lambda tensor: tensor[[0, -1]], inputs)  # at least two
    batch = torch.export.Dim("batch")
    sizes = pytree.apply(lambda _: {0: batch}, example)
    by_name = isinstance(inputs, dict)
    one = isinstance(inputs, Tensor)
    try:
        with _quiet(), own_directory(), dtypes.default(_dtype(model)):
            program = torch.onnx.export(
                model,
                # The exporter takes a dictionary at the end for keyword arguments.
                () if by_name else (example,) if one else (*example, {}),
                kwargs=example if by_name else None,
                dynamo=True,
                verbose=False,
                input_names=list(_named(inputs)),
                dynamic_shapes=(sizes,) if one else sizes,
            )
        assert program is not None
        content: bytes = program.model_proto.SerializeToString()
        return content
    except Exception as error:  # of any library that takes part
        reason = (str(error.__cause__ or error).strip() or repr(error)).splitlines()[0]
        raise ExportError(
            f"ONNX has no form for this model: {reason} Use another format."
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter, which warns of deprecations in its own code."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logger.setLevel(level)


def _read_and_predict(
    form: str, path: Path, fresh: nn.Module, inputs: Nested
) -> list[Tensor]:
    """Predict with the file alone, and for other formats than ONNX a fresh network."""
    if form == "onnx":
        return _run_onnx(path, inputs)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    if form == "safetensors":
        fresh.load_state_dict(safetensors.torch.load_file(path))
    else:
        fresh.load_state_dict(torch.load(path, weights_only=True))
    return _predict(fresh, inputs)


def _named(inputs: Nested) -> dict[str, Tensor]:
    """Return the inputs by their names in ONNX: keys of a dictionary, or numbered."""
    if isinstance(inputs, Tensor):
        return {"inputs": inputs}
    if isinstance(inputs, dict) and all(isinstance(i, Tensor) for i in inputs.values()):
        return inputs
    leaves = enumerate(pytree.leaves(inputs))
    return {f"inputs_{number}": tensor for number, (_, tensor) in leaves}


def _run_onnx(path: Path, inputs: Nested) -> list[Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = ONLY_FATAL
    try:
        session = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"]
        )
        # The exporter leaves out inputs without effect.
        taken = {each.name for each in session.get_inputs()}
        given = {n: each.numpy() for n, each in _named(inputs).items() if n in taken}
        arrays = session.run(None, given)
    except Exception as error:  # onnxruntime's exceptions have no common base
        raise ExportError(
            "An exported model must predict the same, and onnxruntime cannot run this "
            f"one, which was deleted: {str(error).splitlines()[0]}. It lacks most "
            "layers in float64. Use another format."
        ) from error
    return [torch.from_numpy(array) for array in arrays]


def _predict(model: nn.Module, inputs: Nested) -> list[Tensor]:
    # Not inference_mode: a model may compute gradients in its forward pass.
    with torch.no_grad(), dtypes.default(_dtype(model)):
        outputs = pytree.call(model, inputs)
    return [each for each in tree_leaves(outputs) if isinstance(each, Tensor)]


def _dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype
