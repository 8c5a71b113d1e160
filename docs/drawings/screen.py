"""A terminal that understands what `samestep` writes to one, and no more."""

import re
from dataclasses import dataclass, field


TOKENS = re.compile(r"\x1b\[([?0-9;]*)([A-Za-z])|([\r\n])|([^\x00-\x1f]+)")
Cell = tuple[str, str]
"""A letter and its classes."""
CLASSES = {
    "1": "b",
    "31": "red",
    "32": "green",
    "35": "pink",
    "36": "cyan",
    "90": "dim",
    "91": "pink",
}


@dataclass
class Screen:
    """Lines of cells, and a cursor. Never scrolls: it grows."""

    columns: int
    lines: list[list[Cell]] = field(default_factory=lambda: [[]])
    _row: int = 0
    _column: int = 0
    _style: str = ""

    def write(self, text: str) -> None:
        """Apply text and control sequences. Raises ValueError for unknown ones."""
        for match in TOKENS.finditer(text):
            parameters, command, control, letters = match.groups()
            if command:
                self._obey(command, parameters)
            elif control == "\r":
                self._column = 0
            elif control == "\n":
                self._down()
            else:
                for letter in letters:
                    self._put(letter)

    def _put(self, letter: str) -> None:
        if self._column == self.columns:
            self._down()
            self._column = 0
        line = self.lines[self._row]
        line += [(" ", "")] * (self._column + 1 - len(line))
        line[self._column] = letter, self._style
        self._column += 1

    def _down(self) -> None:
        self._row += 1
        if self._row == len(self.lines):
            self.lines.append([])

    def _obey(self, command: str, parameters: str) -> None:
        match command:
            case "A":
                self._row = max(0, self._row - int(parameters or 1))
            case "K" if parameters == "2":
                self.lines[self._row] = []
            case "m":
                self._dress(parameters)
            case "h" | "l" if parameters == "?25":
                """The cursor is not drawn."""
            case _:
                raise ValueError(f"unknown control sequence {parameters}{command}")

    def _dress(self, parameters: str) -> None:
        codes = [code for code in parameters.split(";") if code not in ("", "0")]
        styles = [CLASSES[code] for code in codes if code in CLASSES]
        self._style = " ".join(styles)
