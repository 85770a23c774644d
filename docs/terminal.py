"""Draw the end of a command's output as a picture of a terminal (SVG), as for the README's demo.

    pollard demo | tee demo.txt        in an environment with FORCE_COLOR=1 and COLUMNS=80
    python docs/terminal.py demo.txt docs/images/demo.svg --after "^Services:" --title "make demo"

The picture is what the command printed; only the lines before `--after` are left out.
"""

from __future__ import annotations

import argparse
import io
import re
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

COLUMNS = 80
THEME = TerminalTheme(
    (15, 21, 28),
    (221, 228, 236),
    [
        (15, 21, 28),
        (240, 113, 120),
        (126, 211, 150),
        (224, 180, 92),
        (110, 168, 254),
        (197, 148, 240),
        (79, 209, 181),
        (221, 228, 236),
    ],
)
# As rich's own, without the fonts that it would fetch from elsewhere: pictures in a page may not.
FORMAT = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">
<title>What a command printed</title>
<style>
.{unique_id}-matrix {{
  font: {char_height}px ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace;
  line-height: {line_height}px; }}
.{unique_id}-title {{ font: 16px system-ui, "DejaVu Sans", sans-serif; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" /></clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


def main() -> None:
    """Draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="what the command printed, with its colours")
    parser.add_argument("picture", type=Path, help="the SVG to write")
    parser.add_argument("--after", default="", help="begin with the line that matches this")
    parser.add_argument("--title", default="", help="what the window is called")
    options = parser.parse_args()
    lines = options.output.read_text().splitlines()
    first = next(
        number
        for number, line in enumerate(lines)
        if re.search(options.after, Text.from_ansi(line).plain)
    )
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    for line in lines[first:]:
        console.print(Text.from_ansi(line), soft_wrap=False)
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    console.save_svg(
        str(options.picture),
        title=options.title,
        theme=THEME,
        code_format=FORMAT,
        unique_id="terminal",
    )


if __name__ == "__main__":
    main()
