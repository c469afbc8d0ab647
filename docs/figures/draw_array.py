"""Draw array-light.svg and array-dark.svg: the array, and one PE that squeezes a collision.

`python docs/figures/draw_array.py` writes both beside this file. The numbers of the slot are
not typed in: they come from `sysmt.hw.pe.work_slot`, and the script gives the same bytes every time.
"""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

import sysmt
from sysmt.hw.pe import reduce, work_slot

HERE = Path(__file__).parent
WIDTH, HEIGHT = 960, 404
COLOURS = {
    "light": {
        "ink": "#1f2328", "faint": "#6e7781", "paper": "#ffffff", "pe": "#f3f5f8", "line": "#8c959f",
        "threads": ("#0b62c4", "#b54708"), "hot": "#c11d2f", "box": "#ffffff",
    },
    "dark": {
        "ink": "#e6edf3", "faint": "#9da7b3", "paper": "#0d1117", "pe": "#1c2430", "line": "#6e7681",
        "threads": ("#6cb6ff", "#f5a35c"), "hot": "#ff7b72", "box": "#0d1117",
    },
}  # fmt: skip
PAIRS = ((37, -93), (200, 54))
"""The two threads' activation and weight in the slot that is drawn."""


class Drawing:
    """SVG elements in one colour scheme, in the order they are drawn."""

    def __init__(self, scheme: str) -> None:
        self.colour = COLOURS[scheme]
        self.parts: list[str] = []

    def text(
        self, x: float, y: float, words: str, *, size: float = 13, fill: str = "ink", anchor: str = "start",
        weight: str = "normal", mono: bool = False,
    ) -> None:  # fmt: skip
        family = "ui-monospace, DejaVu Sans Mono, monospace" if mono else "DejaVu Sans, Segoe UI, sans-serif"
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{self._of(fill)}" text-anchor="{anchor}" '
            f'font-weight="{weight}" font-family="{family}" xml:space="preserve">{escape(words)}</text>'
        )

    def rect(
        self,
        x: float,
        y: float,
        w: float,
        h: float,
        *,
        fill: str = "pe",
        line: str = "line",
        width: float = 1,
    ) -> None:
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="5" fill="{self._of(fill)}" '
            f'stroke="{self._of(line)}" stroke-width="{width:g}"/>'
        )

    def arrow(self, x: float, y: float, dx: float, dy: float, colour: str, width: float = 1.6) -> None:
        """Draw a straight arrow, level or upright, from (x, y)."""
        length = abs(dx) + abs(dy)
        ux, uy = dx / length, dy / length
        end_x, end_y = x + dx, y + dy
        head = " ".join(
            f"{end_x - 7 * ux + side * 3.5 * uy:g},{end_y - 7 * uy + side * 3.5 * ux:g}" for side in (-1, 1)
        )
        self.line(x, y, end_x - 5 * ux, end_y - 5 * uy, colour, width)
        self.parts.append(f'<polygon points="{end_x:g},{end_y:g} {head}" fill="{self._of(colour)}"/>')

    def line(
        self, x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1.6, dash: str = ""
    ) -> None:
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(
            f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{self._of(colour)}" '
            f'stroke-width="{width:g}"{dashes}/>'
        )

    def _of(self, name: str) -> str:
        if name.startswith("thread"):
            return self.colour["threads"][int(name[6:])]
        return self.colour[name]

    def svg(self, title: str) -> str:
        """Return the file."""
        return "\n".join(
            (
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
                f'height="{HEIGHT}" role="img">',
                f"<title>{escape(title)}</title>",
                f'<rect width="{WIDTH}" height="{HEIGHT}" fill="{self.colour["paper"]}"/>',
                *self.parts,
                "</svg>\n",
            )
        )


def draw_grid(d: Drawing) -> None:
    """Draw the array: activations from the left, weights from above, each thread with a stream of its own."""
    left, top, size, gap, count = 128, 112, 46, 18, 4
    d.text(24, 30, "The array", size=16, weight="bold")
    d.text(24, 50, "Outputs stay in their PE; operands pass by.", fill="faint")
    pitch = size + gap
    for j in range(count):
        x = left + j * pitch + size / 2
        for thread in (0, 1):
            d.arrow(x + 10 * thread - 5, top - 22, 0, 20, f"thread{thread}")
    for i in range(count):
        y = top + i * pitch + size / 2
        for thread in (0, 1):
            d.arrow(left - 22, y + 10 * thread - 5, 20, 0, f"thread{thread}")
        for j in range(count):
            x = left + j * pitch
            chosen = (i, j) == (1, 3)
            if j + 1 < count:
                d.arrow(x + size, top + i * pitch + size / 2, gap, 0, "line", 1.2)
            if i + 1 < count:
                d.arrow(x + size / 2, top + i * pitch + size, 0, gap, "line", 1.2)
            d.rect(
                x, top + i * pitch, size, size, line="hot" if chosen else "line", width=2.2 if chosen else 1
            )
            d.text(x + size / 2, y + 5, "PE", anchor="middle", fill="hot" if chosen else "ink")
    d.text(left + (count * pitch - gap) / 2, top - 30, "weights, skewed", anchor="middle", fill="faint")
    middle = top + (count * pitch - gap) / 2
    d.text(24, middle - 6, "activations,", fill="faint")
    d.text(24, middle + 10, "skewed", fill="faint")
    bottom = top + count * pitch - gap
    for thread, words in enumerate(("thread 0: first half of K", "thread 1: second half of K")):
        y = bottom + 27 + 19 * thread
        d.line(left, y - 4, left + 22, y - 4, f"thread{thread}", 2.4)
        d.text(left + 30, y, words)
    # The PE that the right-hand side shows.
    d.line(left + 3 * pitch + size, top + pitch, 436, 16, "hot", 1, "4 4")
    d.line(left + 3 * pitch + size, top + pitch + size, 436, HEIGHT - 16, "hot", 1, "4 4")


def draw_pe(d: Drawing) -> None:
    """Draw one slot of one PE: both pairs are active, so each activation keeps its four high bits."""
    config = sysmt.ArrayConfig(threads=2, policy="S+A")
    slot = work_slot([a for a, _ in PAIRS], [w for _, w in PAIRS], config)
    assert slot.active == 2
    assert slot.reduced_activations == 2
    left = 436
    d.rect(left, 16, WIDTH - left - 16, HEIGHT - 32, fill="box", line="hot", width=1.4)
    x = left + 22
    d.text(x, 44, "One PE, one cycle: a collision of two threads", size=16, weight="bold")
    d.text(x, 64, "Both pairs are non-zero, but there is one 8-bit multiplier.", fill="faint")
    columns = (x, x + 96, x + 282, x + 402)
    for column, words in zip(columns, ("", "activation", "weight", "product"), strict=True):
        d.text(column, 94, words, fill="faint", size=12)
    total = 0
    for thread, (a, w) in enumerate(PAIRS):
        y, kept = 118 + 62 * thread, reduce(a, False, config)
        total += kept * w
        d.text(columns[0], y, f"thread {thread}", fill=f"thread{thread}", weight="bold")
        d.text(columns[1], y, f"{a:>3} = {a >> 4:04b} {a & 15:04b}", mono=True)
        d.text(columns[2], y, f"{w:>3}", mono=True)
        d.text(columns[1], y + 22, f"{kept:>3} = {kept >> 4:04b} 0000", mono=True, fill="hot", weight="bold")
        d.text(columns[2], y + 22, f"{w:>3}", mono=True)
        d.text(columns[3], y + 22, f"{kept * w:>6,}", mono=True, weight="bold")
        d.text(columns[0], y + 22, "squeezed", fill="hot")
    assert total == slot.value
    exact = sum(a * w for a, w in PAIRS)
    y = 246
    d.line(x, y - 20, WIDTH - 38, y - 20, "line", 1)
    d.text(x, y, "The accumulator gets")
    d.text(columns[3], y, f"{slot.value:>6,}", mono=True, weight="bold")
    d.text(x, y + 21, "Exact, in two cycles, it would be", fill="faint")
    d.text(columns[3], y + 21, f"{exact:>6,}", mono=True, fill="faint")
    d.text(x, y + 42, "The noise of this slot is")
    d.text(columns[3], y + 42, f"{slot.value - exact:>+6,}", mono=True, fill="hot", weight="bold")
    d.line(x, y + 56, WIDTH - 38, y + 56, "line", 1)
    d.text(x, y + 78, "If either thread had a zero, the other would have the whole")
    d.text(x, y + 96, "multiplier, and the slot would be exact.")


def main() -> None:
    """Write both files."""
    for scheme in COLOURS:
        drawing = Drawing(scheme)
        draw_grid(drawing)
        draw_pe(drawing)
        title = "A systolic array with two threads, and one PE that squeezes a collision"
        (HERE / f"array-{scheme}.svg").write_text(drawing.svg(title), encoding="utf-8")


if __name__ == "__main__":
    main()
