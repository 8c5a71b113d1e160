"""A run for Python callers: its result, its model and its report."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from samestep.output.run import RunResult


if TYPE_CHECKING:
    from torch import nn


class Run(RunResult):
    """A finished or failed training."""

    def load_model(self, model: Any = None) -> "nn.Module":
        """Return the network with the final weights, in evaluation mode.

        If `samestep.train` was given an object as `model`, give it again. Raises
        RunError, OwnCodeError.
        """
        from samestep.api.load import load_model

        return load_model(self, model)

    def export(
        self,
        form: str = "safetensors",
        out: str | Path | None = None,
        *,
        model: Any = None,
        data: Any = None,
    ) -> Path:
        """Write the model as `safetensors`, `state_dict` or `onnx`; return the path.

        The file is read back and must predict the same on up to 256 test samples. If
        `samestep.train` was given objects as `model` or `data`, give them again. Raises
        RunError if the file exists already, and ExportError.
        """
        from samestep.api.export import export

        return export(self, form, Path(out) if out else None, model, data).path

    def report(self) -> Path:
        """Write report.html into the run directory; return its path."""
        from samestep.report import write

        return write(self.path)
