"""A run as Python callers see it: its record, its model and its report."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from samestep.output.run import RunResult


if TYPE_CHECKING:
    from torch import nn


class Run(RunResult):
    """A finished or failed training. Raises RunError where the directory is not one."""

    def load_model(self, model: Any = None) -> "nn.Module":
        """The network with the final weights, in evaluation mode.

        `model` is what `samestep.train` was given as such, if that was an object.
        Raises RunError, OwnCodeError.
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
        """Writes the model as `safetensors`, `state_dict` or `onnx`; the file's path.

        The file is read back and must predict the same on up to 256 test samples.
        `model` and `data` are what `samestep.train` was given as such, if those were
        objects. Raises RunError where the file exists already, ExportError.
        """
        from samestep.api.export import export

        return export(self, form, Path(out) if out else None, model, data).path

    def report(self) -> Path:
        """Writes report.html and its plots into the run directory; the file's path."""
        from samestep.report import write

        return write(self.path)
