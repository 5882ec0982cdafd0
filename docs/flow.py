"""The picture of the flow in docs/source/internals.md: python docs/flow.py writes docs/source/imgs/flow.svg."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import Path

PICTURE = Path(__file__).parent / "source" / "imgs" / "flow.svg"
WIDTH, HEIGHT, MARGIN = 980, 300, 10
BOX, GAP = 174, 90
STEPS = (
    ("observe", "calibration/", ("text, chats, images", "routing as performed", "sums, sampled tokens")),
    ("decide", "stages/, algorithms/", ("tensors and sizes,", "never a model", "one stage after the other")),
    ("cut", "surgeons/, formats/, nn/", ("one row of data for most", "architectures", "knows no algorithm")),
    ("write", "checkpoint/, reporting/", ("shards, config, tokenizer", "report, card", "beside, then renamed")),
)
HANDED_ON = (("statistics", "for many runs"), ("plan", "frozen data"), ("model", "smaller"))
LOOP = "engine/: one pass over the decoder layers, of a model in memory or of shards on disk"
READERS = "the plan also serves loading (hf/), verification, report and tests"
STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #1f2328; text-anchor: middle }
  .step { font-size: 18px; font-weight: 600 } .code { font: 11px ui-monospace, monospace; fill: #57606a }
  .small { font-size: 12px; fill: #57606a } .data { font-weight: 600; fill: #0550ae }
  rect { fill: #f6f8fa; stroke: #57606a } .loop { fill: none; stroke-dasharray: 5 4 }
  path { stroke: #0550ae; fill: none }
  .back { fill: #ffffff; stroke: none }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .code, .small { fill: #9da7b3 } .data { fill: #79c0ff }
    rect { fill: #161b22; stroke: #9da7b3 } .loop { fill: none } path { stroke: #79c0ff } .back { fill: #0d1117 }
  }
"""


def _text(x: float, y: float, words: str, kind: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{escape(words)}</text>'


def _box(left: float, step: str, code: str, lines: tuple[str, ...]) -> Iterator[str]:
    middle = left + BOX / 2
    yield f'<rect x="{left:g}" y="70" width="{BOX}" height="130" rx="8"/>'
    yield _text(middle, 98, step, "step")
    yield _text(middle, 119, code, "code")
    for number, line in enumerate(lines):
        yield _text(middle, 145 + 19 * number, line, "small")


def _arrow(left: float, data: str, remark: str) -> Iterator[str]:
    middle = left + GAP / 2
    yield f'<path d="M {left + 6:g} 135 H {left + GAP - 8:g} m -7 -5 l 7 5 l -7 5" stroke-width="2"/>'
    yield _text(middle, 122, data, "data")
    yield _text(middle, 154, remark, "small")


def picture() -> str:
    """The picture as SVG."""
    parts = [
        f'<rect class="back" width="{WIDTH}" height="{HEIGHT}"/>',
        _text(MARGIN + 1.5 * BOX + GAP, 30, LOOP, "small"),
    ]
    parts.append(f'<rect class="loop" x="{MARGIN - 6}" y="44" width="{3 * BOX + 2 * GAP + 12}" height="176" rx="10"/>')
    for number, step in enumerate(STEPS):
        left = MARGIN + number * (BOX + GAP)
        parts += _box(left, *step)
        if number < len(HANDED_ON):
            parts += _arrow(left + BOX, *HANDED_ON[number])
    plan = MARGIN + 2 * BOX + 1.5 * GAP
    parts.append(f'<path d="M {plan:g} 162 V 252 m -5 -7 l 5 7 l 5 -7" stroke-width="2"/>')
    parts.append(_text(plan, 276, READERS, "small"))
    label = "Observe, decide, cut, write: statistics, a plan and a smaller model are handed on"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">\n'
        f"<style>{STYLE}</style>\n" + "\n".join(parts) + "\n</svg>\n"
    )


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
