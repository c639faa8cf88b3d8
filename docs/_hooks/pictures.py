"""The picture of the home page, drawn from the figures of a benchmark.

``python docs/_hooks/pictures.py`` writes it. It is a part of the page, which gives it the colours
of light and dark.
"""

import json
import math
from pathlib import Path

DOCS = Path(__file__).parents[1]
PICTURE = DOCS / "assets" / "bilevel.svg"
PROBLEM = "cleaning 50%"
OURS = "minimize_bilevel"
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 480, 280, 40, 12, 10, 44
SECONDS, DECADES = 29, 7
TITLE = (
    "Outer loss above the optimum against seconds: minimize_bilevel ends below 1e-6, "
    "seven stochastic solvers between 1e-3 and 1e-1"
)


def x(seconds: float) -> float:
    """Return where a time stands."""
    return LEFT + seconds / SECONDS * (WIDTH - LEFT - RIGHT)


def y(value: float) -> float:
    """Return where a loss stands."""
    return TOP - math.log10(max(value, 10.0**-DECADES)) / DECADES * (HEIGHT - TOP - BOTTOM)


def curves() -> dict[str, list[tuple[float, float]]]:
    """Return seconds and loss above the optimum by solver."""
    found = json.loads((DOCS / "benchmarks" / "bilevel.json").read_text(encoding="utf-8"))
    runs = {name.rsplit(", ", 1)[0]: run for name, run in found["runs"].items() if PROBLEM in name}
    optimum = found["optima"][PROBLEM]
    return {
        name: [
            (seconds, min(1.0, max(value - optimum, 10.0**-DECADES)))
            for seconds, value in zip(run["seconds"], run["values"], strict=True)
        ]
        for name, run in runs.items()
    }


def text(words: str, at_x: float, at_y: float, anchor: str = "start", kind: str = "") -> str:
    """Return words in their place."""
    place = f'x="{at_x:.1f}" y="{at_y:.1f}" text-anchor="{anchor}"'
    return f'<text class="{kind}" {place}>{words}</text>'


def line(name: str, points: list[tuple[float, float]], label_y: float) -> str:
    """Return the curve of a solver with its name at the end."""
    kind = "ours" if name == OURS else "theirs"
    path = " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in points)
    end_x, end_y = x(points[-1][0]), y(points[-1][1])
    return (
        f'<polyline class="{kind}" points="{path}"/>'
        f'<circle class="{kind}" cx="{end_x:.1f}" cy="{end_y:.1f}" r="3"/>'
        + (
            text(name, end_x - 10, end_y - 1, "end", kind)  # below the curve
            if name == OURS
            else text(name, end_x + 8, label_y + 4, kind=kind)
        )
    )


def draw() -> str:
    """Return the picture."""
    found = curves()
    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{TITLE}">']
    for decade in range(DECADES + 1):
        at = y(10.0**-decade)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        power = f'10<tspan dy="-5" font-size="9">−{decade}</tspan>' if decade else "1"
        parts.append(text(power, LEFT - 8, at + 4, "end"))
    parts += [text(f"{s}", x(s), HEIGHT - BOTTOM + 18, "middle") for s in range(0, SECONDS, 5)]
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(text("seconds", middle, HEIGHT - 6, "middle"))
    lowest = -math.inf
    for name, points in sorted(found.items(), key=lambda item: -item[1][-1][1]):
        lowest = max(y(points[-1][1]), lowest + 14)  # names do not cover each other
        parts.append(line(name, points, lowest))
    return "".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
