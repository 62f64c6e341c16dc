"""Draws docs/images/overview.svg, the picture of what dni_seq does: python docs/images/overview.py"""

from __future__ import annotations

import sys
from pathlib import Path

OUTPUT = Path(__file__).with_name("overview.svg")

WIDTH, HEIGHT = 920, 322
LEFT, WINDOW, GAP, STEP = 60, 210, 60, 62
INK, FORWARD, BACKWARD, SYNTHETIC, PAPER = "#24292f", "#0969da", "#cf222e", "#8250df", "#f6f8fa"

SYNTHETIC_MEANS = "synthetic gradient, predicted by the synthesizer M"


def text(x: float, y: float, words: str, *, size: int = 14, color: str = INK, anchor: str = "middle") -> str:
    """Returns a line of text as SVG."""
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{color}" text-anchor="{anchor}">{words}</text>'


def arrow(x1: float, y1: float, x2: float, y2: float, color: str, *, dashed: bool = False) -> str:
    """Returns a straight arrow as SVG."""
    dashes = ' stroke-dasharray="5 4"' if dashed else ""
    style = f'stroke="{color}" stroke-width="2"{dashes} marker-end="url(#{color[1:]})"'
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" {style}/>'


def window(x: float, y: float, name: str) -> list[str]:
    """Returns a window of three steps as SVG, with arrows forwards for states and backwards for gradients."""
    parts = [f'<rect x="{x}" y="{y}" width="{WINDOW}" height="74" rx="8" fill="{PAPER}" stroke="{INK}"/>']
    for step in range(3):
        center = x + 43 + step * STEP
        parts.append(f'<circle cx="{center}" cy="{y + 30}" r="13" fill="white" stroke="{INK}"/>')
        if step:
            parts.append(arrow(center - STEP + 14, y + 26, center - 17, y + 26, FORWARD))
            parts.append(arrow(center - 14, y + 35, center - STEP + 17, y + 35, BACKWARD))
    parts.append(text(x + WINDOW / 2, y + 66, name, size=13))
    return parts


def row(y: float, title: str, *, synthetic: bool) -> list[str]:
    """Returns three windows of a stream as SVG. With `synthetic`, a synthesizer sends gradients across the windows' ends."""
    parts = [text(LEFT, y - 18, title, size=16, anchor="start")]
    starts = [LEFT + index * (WINDOW + GAP) for index in range(3)]
    for x, name in zip(starts, ("window k", "window k + 1", "window k + 2"), strict=True):
        parts += window(x, y, name)
    for index, x in enumerate(starts):
        if index == 2:
            parts += [arrow(x + WINDOW - 28, y + 26, x + WINDOW + 44, y + 26, FORWARD)]
            continue
        boundary = x + WINDOW + GAP / 2
        parts.append(arrow(x + WINDOW - 28, y + 26, x + WINDOW + GAP + 26, y + 26, FORWARD))
        if synthetic:
            parts.append(f'<rect x="{boundary - 22}" y="{y + 66}" width="44" height="30" rx="6" fill="{SYNTHETIC}"/>')
            parts.append(text(boundary, y + 86, "M", size=15, color="white"))
            parts.append(arrow(boundary - 8, y + 64, x + WINDOW - 30, y + 38, SYNTHETIC))
        else:
            parts.append(arrow(x + WINDOW + GAP + 26, y + 36, boundary + 8, y + 36, BACKWARD))
            parts.append(text(boundary - 3, y + 43, "✕", size=18, color=BACKWARD))
    return parts


def draw() -> str:
    """Returns the picture as SVG."""
    marker = (
        '<marker id="{0}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 z" fill="#{0}"/></marker>'
    )
    markers = "".join(marker.format(color[1:]) for color in (FORWARD, BACKWARD, SYNTHETIC))
    y = 298
    legend = [
        *(arrow(LEFT, y, LEFT + 34, y, FORWARD), text(LEFT + 42, y + 5, "hidden state", anchor="start")),
        *(arrow(LEFT + 190, y, LEFT + 156, y, BACKWARD), text(LEFT + 198, y + 5, "gradient", anchor="start")),
        *(arrow(LEFT + 320, y, LEFT + 286, y, SYNTHETIC), text(LEFT + 328, y + 5, SYNTHETIC_MEANS, anchor="start")),
    ]
    parts = [
        *row(44, "Truncated BPTT: the gradient is cut at every window's end", synthetic=False),
        *row(176, "dni_seq: a synthesizer predicts the gradient of the next windows", synthetic=True),
        *legend,
    ]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="sans-serif">'
    )
    background = f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>'
    return "\n".join([head, f"<defs>{markers}</defs>", background, *parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    OUTPUT.write_text(draw(), encoding="utf-8")
    sys.exit(0)
