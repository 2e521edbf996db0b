"""Makes the two pictures of the README again: python docs/pictures.py [FOLDER]

`terminal.svg` is what `keye ask` and `keye ground` print about the bundled video, `page.png` the page of `keye serve`
after a question about it. Needs the extra dev, and for the page an installed chromium.
"""

from __future__ import annotations

import io
import os
import pty
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright
from rich.console import Console
from rich.text import Text

from keye.hub import asset

FOLDER = Path(__file__).parent / "images"
COLUMNS, PORT = 88, 18500
COMMANDS = (
    ["keye", "ask", "demo.mp4", "when is the cyan triangle visible?"],
    ["keye", "ground", "demo.mp4", "the red circle"],
)
QUESTION = "the red circle"


def main(folder: Path) -> None:
    """Writes both pictures to `folder`."""
    (folder / "terminal.svg").write_text(draw_terminal(), encoding="utf-8")
    (folder / "page.png").write_bytes(draw_page())


def draw_terminal() -> str:
    """The commands and what they print on a terminal, as SVG."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, legacy_windows=False)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(asset("demo.mp4"), folder)
        for command in COMMANDS:
            text = " ".join(f'"{word}"' if " " in word else word for word in command)
            console.print(Text(f"$ {text}", style="bold"))
            console.print(Text.from_ansi(run_on_terminal(command, Path(folder))))
    svg = console.export_svg(title="keye")
    # Without the fonts that rich refers to on the web: a viewer's own monospace font serves.
    return re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)


def run_on_terminal(command: list[str], folder: Path) -> str:
    """What a command leaves on a terminal: colours are kept, progress bars that were erased again are not."""
    main_end, command_end = pty.openpty()
    words = ["env", f"COLUMNS={COLUMNS}", "LINES=30", "TERM=xterm-256color", *command]
    with subprocess.Popen(words, cwd=folder, stdout=command_end, stderr=command_end):
        os.close(command_end)
        printed = b""
        while piece := read_piece(main_end):
            printed += piece
    os.close(main_end)
    lines, row = [""], 0
    for part in re.split(r"(\n|\x1b\[2K|\x1b\[1A)", re.sub(r"\r|\x1b\[\?25[hl]", "", printed.decode())):
        if part == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif part == "\x1b[1A":
            row -= 1
        else:
            lines[row] = "" if part == "\x1b[2K" else lines[row] + part
    return "\n".join(lines)


def read_piece(descriptor: int) -> bytes:
    """The next bytes; none once the command has closed its end, which Linux reports as an error."""
    try:
        return os.read(descriptor, 1 << 16)
    except OSError:
        return b""


def draw_page() -> bytes:
    """The page of `keye serve` with the sample video and an answer, as PNG of 1280 x 800 pixels."""
    chromium = shutil.which("chromium")
    assert chromium is not None, "install chromium"
    address = f"http://127.0.0.1:{PORT}"
    server = subprocess.Popen(["keye", "serve", "nano", "--port", str(PORT)], stderr=subprocess.PIPE)
    try:
        wait_for(server, address)
        with sync_playwright() as play:
            browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1280, "height": 800}, color_scheme="light")
            ask_on_page(page, address)
            picture = page.screenshot()
            browser.close()
    finally:
        server.terminate()
        server.wait()
    with Image.open(io.BytesIO(picture)) as shot:
        small = io.BytesIO()
        shot.convert("RGB").quantize(192, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return small.getvalue()


def wait_for(server: subprocess.Popen[bytes], address: str) -> None:
    """Returns when the server answers."""
    while server.poll() is None:
        try:
            urllib.request.urlopen(f"{address}/health").close()
            return
        except OSError:
            time.sleep(0.2)
    raise SystemExit("keye serve did not start; needs the extra dev")


def ask_on_page(page: Page, address: str) -> None:
    """Asks about the sample video and waits until the answer stands there."""
    page.goto(address)
    page.click("#sample")
    page.wait_for_selector("#pictures[data-drawn=yes]")
    page.fill("#question", QUESTION)
    page.press("#question", "Enter")
    page.locator(".answer[aria-busy=false] .card canvas[data-drawn]").wait_for()
    page.wait_for_timeout(1000)  # the player seeks to the first moment


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
