"""A drawing whose shapes come and go.

Motion is CSS alone, within `prefers-reduced-motion: no-preference`; without it the
drawing stands still.
"""

from language import Drawing


class Film(Drawing):
    """All times in seconds."""

    def __init__(
        self,
        size: tuple[int, int],
        title: str,
        seconds: float,
        still: float,
        fade: float = 0.3,
    ) -> None:
        """Without motion, the moment `still` is seen."""
        super().__init__(size[1], title, width=size[0])
        self._seconds, self._still, self._fade = seconds, still, fade
        self._moves: dict[str, str] = {}

    def shown(self, *spans: tuple[float, float]) -> str:
        """The class of what is seen in these spans."""
        is_still = any(start < self._still <= end for start, end in spans)
        marks = "0%{opacity:0}"
        for start, end in spans:
            marks += self._at(start, 0) + self._at(start + self._fade, 1)
            marks += self._at(end, 1) + self._at(end + self._fade, 0)
        return self._move(marks, "" if is_still else "opacity:0")

    def travels(self, start: float, end: float) -> str:
        """The class of what goes by (--x, --y) in between, and is seen only then."""
        here, there = "transform:none", "transform:translate(var(--x),var(--y))"
        marks = (
            f"0%,{self._percent(start)}{{opacity:0;{here}}}"
            f"{self._percent(start + 0.05)}{{opacity:1;{here}}}"
            f"{self._percent(end - 0.05)}{{opacity:1;{there}}}"
            f"{self._percent(end)},to{{opacity:0;{there}}}"
        )
        return self._move(marks, "opacity:0")

    def arrives(self, start: float, end: float, by: float) -> str:
        """The class of what comes to its place from `by` pixels to the right of it."""
        marks = (
            f"0%,{self._percent(start)}{{transform:translateX({by:g}px)}}"
            f"{self._percent(end)},to{{transform:none}}"
        )
        return self._move(marks, "")

    def _at(self, seconds: float, opacity: int) -> str:
        return f"{self._percent(seconds)}{{opacity:{opacity}}}"

    def _percent(self, seconds: float) -> str:
        return f"{100 * min(seconds / self._seconds, 1):.4g}%"

    def _move(self, marks: str, still: str) -> str:
        if marks not in self._moves:
            name = f"m{len(self._moves)}"
            self._moves[marks] = name
            self.style += f".{name}{{{still}}}" if still else ""
        return self._moves[marks]

    def svg(self) -> str:
        """With the motion, for those who want it."""
        running = "".join(
            f"@keyframes {name}{{{marks}}}"
            f".{name}{{animation:{name} {self._seconds:g}s ease-in-out infinite}}"
            for marks, name in self._moves.items()
        )
        self.style += f"@media(prefers-reduced-motion:no-preference){{{running}}}"
        return super().svg()
