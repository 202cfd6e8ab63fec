"""Draw a boot report's waterfall as SVG: ``python -m benchmarks.boot_picture REPORT.json PICTURE.svg``.

The report is what ``tandem serve --boot-report REPORT.json`` writes, the picture what a terminal shows.
"""

import io
import re
import sys
from pathlib import Path

import msgspec
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.terminal_theme import MONOKAI

from orchestrator.boot_report import BootReport
from orchestrator.waterfall import render

COLUMNS = 108
# A page that shows the picture shall fetch nothing: the reader's own monospaced font will do.
_CELL = 12.2
"""Width of a character in rich's format."""
_INDENTED = re.compile(
    r' x="([0-9.]+)" y="([0-9.]+)" textLength="([0-9.]+)" ([^>]*)>((?:&#160;)+)(?=[^<&])'
)
_FORMAT = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)


def draw(report: BootReport) -> str:
    """Return the picture."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(render(report, COLUMNS))
    svg = console.export_svg(
        title=f"tandem serve: {report.model}", theme=MONOKAI, code_format=_FORMAT, unique_id="boot"
    )
    return _INDENTED.sub(_moved, svg)


def _moved(found: re.Match[str]) -> str:
    """Turn leading spaces, which some viewers leave out, into a place further right."""
    indent = len(found[5]) // len("&#160;") * _CELL
    x, length = float(found[1]) + indent, float(found[3]) - indent
    return f' x="{x:.1f}" y="{found[2]}" textLength="{length:.1f}" {found[4]}>'


def main() -> None:
    """Read one file, write the other."""
    source, target = map(Path, sys.argv[1:])
    target.write_text(draw(msgspec.json.decode(source.read_bytes(), type=BootReport)))


if __name__ == "__main__":
    main()
