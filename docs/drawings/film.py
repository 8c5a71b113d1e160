"""A drawing whose shapes come and go.

Motion is CSS alone, within `prefers-reduced-motion: no-preference`; without it the
drawing stands still at its end, and with it begins there, so that an empty card is
never seen.
"""

from language import Drawing


class Film(Drawing):
    """An animated drawing; all times are in seconds."""

    def __init__(
        self,
        size: tuple[int, int],
        title: str,
        seconds: float,
        before: float,
        fade: float = 0.3,
    ) -> None:
        """Run from 0 to `seconds`; show the last frame for `before` seconds first."""
        super().__init__(size[1], title, width=size[0])
        self._seconds, self._before, self._fade = seconds, before, fade
        self._moves: dict[str, str] = {}

    def shown(self, *spans: tuple[float, float]) -> str:
        """Return the class of shapes visible in these spans.

        A span to the end is also visible before 0.
        """
        is_last = any(end >= self._seconds for _, end in spans)
        marks = f"0%{{opacity:{is_last:d}}}"
        if is_last:
            marks += self._at(-self._fade, 1) + self._at(0, 0)
        for start, end in spans:
            marks += self._at(start, 0) + self._at(start + self._fade, 1)
            if end < self._seconds:
                marks += self._at(end, 1) + self._at(end + self._fade, 0)
        return self._move(marks, "" if is_last else "opacity:0")

    def travels(self, start: float, end: float) -> str:
        """Return the class of shapes that move by (--x, --y) and vanish afterwards."""
        here, there = "transform:none", "transform:translate(var(--x),var(--y))"
        marks = (
            f"0%,{self._percent(start)}{{opacity:0;{here}}}"
            f"{self._percent(start + 0.05)}{{opacity:1;{here}}}"
            f"{self._percent(end - 0.05)}{{opacity:1;{there}}}"
            f"{self._percent(end)},to{{opacity:0;{there}}}"
        )
        return self._move(marks, "opacity:0")

    def arrives(self, start: float, end: float, by: float) -> str:
        """Return the class of shapes that arrive from `by` pixels to the right."""
        there = f"{{transform:translateX({by:g}px)}}"
        marks = (
            f"0%,{self._percent(-self._fade)}{{transform:none}}"
            f"{self._percent(0)},{self._percent(start)}{there}"
            f"{self._percent(end)},to{{transform:none}}"
        )
        return self._move(marks, "")

    def _at(self, seconds: float, opacity: int) -> str:
        return f"{self._percent(seconds)}{{opacity:{opacity}}}"

    def _percent(self, seconds: float) -> str:
        share = (seconds + self._before) / (self._seconds + self._before)
        return f"{100 * min(share, 1):.4g}%"

    def _move(self, marks: str, still: str) -> str:
        if marks not in self._moves:
            name = f"m{len(self._moves)}"
            self._moves[marks] = name
            self.style += f".{name}{{{still}}}" if still else ""
        return self._moves[marks]

    def svg(self) -> str:
        """Return the file, animated for readers who allow motion."""
        pace = f"{self._seconds + self._before:g}s ease-in-out infinite"
        running = "".join(
            f"@keyframes {name}{{{marks}}}.{name}{{animation:{name} {pace}}}"
            for marks, name in self._moves.items()
        )
        self.style += f"@media(prefers-reduced-motion:no-preference){{{running}}}"
        return super().svg()
