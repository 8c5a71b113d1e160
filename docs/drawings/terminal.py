"""Records a terminal in which a worker is killed, and draws docs/terminal.svg.

    python docs/drawings/terminal.py

The commands are run, what they write is shown as it came. Linux; takes some 15 s.
"""

import codecs
import contextlib
import fcntl
import os
import pty
import re
import struct
import tempfile
import termios
import time
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from film import Film
from screen import Cell, Screen


COMMANDS = (
    ("samestep train --out undisturbed",),
    (
        "samestep train --out killed &",
        "sleep 3; "
        "pkill -9 --newest --parent $(pgrep --full --parent $! forkserver); wait",
    ),
    ("samestep compare undisturbed killed",),
)
COLUMNS = 84
TICK = 0.25
"""Seconds between two pictures."""
HOLD = 5.0
"""Seconds for which the end is shown."""
LETTER, LINE, MARGIN = 8.4, 20, 20
TARGET = Path(__file__).parents[1] / "terminal.svg"
BEGUN = re.compile(r"(\x1b(\[[?0-9;]*)?)?$")
"""A control sequence of which the end has not come yet."""
Row = tuple[Cell, ...]


def record(screen: Screen) -> Iterator[tuple[float, list[Row]]]:
    """Yield pairs of seconds and the contents of the screen."""
    elapsed = 0.5
    with tempfile.TemporaryDirectory() as directory:
        for command in COMMANDS:
            for line in command:
                screen.write(f"\x1b[1m$ {line}\x1b[0m\r\n")
            yield elapsed, _rows(screen)
            began, before = time.monotonic(), elapsed
            for text in _run("\n".join(command), directory):
                screen.write(text)
                elapsed = before + time.monotonic() - began
                yield elapsed, _rows(screen)
            elapsed += 1.0


def _run(command: str, directory: str) -> Iterator[str]:
    """Yield the output of a command to a terminal, as it arrives."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(directory)
        os.environ["TERM"] = "xterm"
        os.execlp("bash", "bash", "-c", command)  # noqa: S606, S607
    size = struct.pack("HHHH", 60, COLUMNS, 0, 0)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, size)
    decode, rest = codecs.getincrementaldecoder("utf-8")().decode, ""
    with contextlib.suppress(OSError):  # Linux's way to say that it has ended
        while data := os.read(terminal, 1 << 16):
            text = rest + decode(data)
            begun = BEGUN.search(text)
            rest = begun[0] if begun else ""
            yield text.removesuffix(rest)
    os.waitpid(pid, 0)
    os.close(terminal)


def _rows(screen: Screen) -> list[Row]:
    return [tuple(line) for line in screen.lines]


def draw(frames: list[tuple[float, list[Row]]]) -> str:
    """Draw the rows of the frames, each for as long as it was visible."""
    end = frames[-1][0] + 1.0
    height = 2 * MARGIN + LINE * max(len(rows) for _, rows in frames)
    film = Film(
        (round(2 * MARGIN + COLUMNS * LETTER), height),
        "A terminal: a training, the same training with a worker killed, and their "
        "comparison, which says that they are identical.",
        seconds=end,
        before=HOLD,
        fade=0.01,
    )
    film.style += STYLE
    for at in range(max(len(rows) for _, rows in frames)):
        shown = [(t, rows[at] if at < len(rows) else ()) for t, rows in frames]
        runs = [(next(run)[0], row) for row, run in groupby(shown, lambda f: f[1])]
        ends = [*(start for start, _ in runs[1:]), end]
        for (start, row), gone in zip(runs, ends, strict=True):
            if row:
                film.add(f'<g class="{film.shown((start, gone))}">')
                _draw_row(film, row, MARGIN + LINE * at)
                film.add("</g>")
    return film.svg()


STYLE = (
    ".t{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',"
    "monospace;font-size:14px;white-space:pre}"
)
COLOURS = {"dim": "line", "red": "red", "green": "w2", "pink": "w1", "cyan": "w0"}


TINTS = {"failure": "tint1", "restart": "tint1", "weights": "tint2", "ident": "tint2"}


def _draw_row(film: Film, row: Row, y: float) -> None:
    """Draw runs of one style; fingerprints and verdicts are highlighted."""
    text = "".join(letter for letter, _ in row)
    for beginning, tint in TINTS.items():
        if text.startswith(beginning):
            film.box(MARGIN - 8, y, 16 + LETTER * len(text), LINE, tint, radius=4)
    at = 0
    for style, cells in groupby(row, lambda cell: cell[1]):
        letters = "".join(letter for letter, _ in cells)
        if letters.strip():
            names = [COLOURS.get(name, name) for name in style.split()]
            kind = " ".join(names if set(names) - {"b"} else ["ink", *names])
            film.add(_text(MARGIN + LETTER * at, y + 15, letters, kind))
        at += len(letters)


def _text(x: float, y: float, letters: str, kind: str) -> str:
    """Draw text with a fixed width, independent of the reader's font."""
    letters = letters.replace("&", "&amp;").replace("<", "&lt;")
    return (
        f'<text x="{x:g}" y="{y:g}" textLength="{LETTER * len(letters):g}" '
        f'class="t {kind}">{letters}</text>'
    )


def thin(
    frames: Iterator[tuple[float, list[Row]]],
) -> Iterator[tuple[float, list[Row]]]:
    """Keep the last frame of every tick."""
    for tick, group in groupby(frames, lambda frame: int(frame[0] / TICK)):
        *_, (_, rows) = group
        yield TICK * tick, rows


if __name__ == "__main__":
    screen = Screen(COLUMNS)
    frames = list(thin(record(screen)))
    shown = "\n".join("".join(letter for letter, _ in row) for row in frames[-1][1])
    if "restart 1" not in shown or not shown.rstrip().endswith("identical"):
        raise SystemExit(f"This run does not show what it should:\n{shown}")
    TARGET.write_text(draw(frames), encoding="utf-8")
