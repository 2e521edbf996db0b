"""Draws the pictures of docs/video.md: python examples/video_pictures.py [FOLDER]

Needs keye alone, no extra. Each number in the pictures is computed by the library, not copied.
"""

import sys
from pathlib import Path

from keye.config import ProcessorConfig
from keye.media import sampling, sizes

RELEASES = ("preview", "1.5", "2.0")
COLOURS = {"preview": "#8a63d2", "1.5": "#2f81f7", "2.0": "#1a7f64"}
FONT = 'font-family="sans-serif" font-size="12" fill="#57606a"'


def tokens_of(seconds: float, release: str, height: int = 720, width: int = 1280) -> tuple[int, int]:
    """(frames, tokens of a frame) of a 720p video at 30 frames per second; for 1.5 with every frame slow."""
    config = ProcessorConfig.of(release)
    frames = sampling.smart_nframes(int(seconds * 30), 30.0, config)
    h, w = sizes.compute_frame_sizes(height, width, frames, config).slow
    return frames, h * w // config.token_pixels


def lines_over_duration(title: str, pick: int, top: int) -> str:
    """A chart over durations from 10 s to 2 h, one line for each release; both axes are logarithmic."""
    import math

    durations = [10 * 720 ** (i / 60) for i in range(61)]

    def place(seconds: float, value: float) -> tuple[float, float]:
        x = 60 + 500 * math.log(seconds / 10) / math.log(720)
        return x, 220 - 190 * math.log(max(value, 1)) / math.log(top)

    parts = [f'<text x="60" y="16" {FONT} font-weight="bold">{title}</text>']
    for seconds, name in ((10, "10 s"), (60, "1 min"), (600, "10 min"), (3600, "1 h"), (7200, "2 h")):
        x, _ = place(seconds, 1)
        parts.append(f'<path d="M{x:.0f} 30V220" stroke="#d8dee4"/>')
        parts.append(f'<text x="{x - 14:.0f}" y="236" {FONT}>{name}</text>')
    for power in range(5):
        if 10**power <= top:
            _, y = place(10, 10**power)
            parts.append(f'<path d="M60 {y:.0f}H560" stroke="#d8dee4"/>')
            parts.append(f'<text x="8" y="{y + 4:.0f}" {FONT}>{10**power:,}</text>')
    for row, release in enumerate(RELEASES):
        places = (place(seconds, tokens_of(seconds, release)[pick]) for seconds in durations)
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        colour = COLOURS[release]
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2.5"/>')
        name = f'<tspan fill="{colour}">{release.capitalize()}</tspan>'
        parts.append(f'<text x="575" y="{60 + 20 * row}" {FONT}>{name}</text>')
    return svg(650, 245, parts)


def slow_and_fast() -> str:
    """Twelve frames of a 720p video of three scenes, at the sizes that 1.5 gives them."""
    types = [0, 1, 1, 1, 0, 1, 1, 1, 1, 0, 1, 1]
    fast = sum(types)
    result = sizes.compute_frame_sizes(720, 1280, len(types) - fast, ProcessorConfig.of("1.5"), fast=fast)
    parts, x = [], 10.0
    for i, kind in enumerate(types):
        height, width = (side / 12 for side in (result.fast if kind else result.slow))
        tokens = (result.fast if kind else result.slow)[0] * (result.fast if kind else result.slow)[1] // 784
        parts.append(
            f'<rect x="{x:.0f}" y="{90 - height:.0f}" width="{width:.0f}" height="{height:.0f}" rx="2" '
            f'fill="{"#b6d4fe" if kind else "#2f81f7"}"/>'
            f'<text x="{x:.0f}" y="106" {FONT} font-size="10">{i / 2:.1f} s</text>'
            f'<text x="{x:.0f}" y="120" {FONT} font-size="10">{tokens}</text>'
        )
        x += width + 6
    parts.append(f'<text x="10" y="140" {FONT}>dark: slow, light: fast; below, the time and the visual tokens</text>')
    return svg(int(x) + 10, 150, parts)


def svg(width: int, height: int, parts: list[str]) -> str:
    body = "\n".join(parts)
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}">\n{body}\n</svg>\n'


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "frames.svg").write_text(lines_over_duration("frames sampled from a 720p video, by duration", 0, 10_000))
    (folder / "tokens.svg").write_text(lines_over_duration("visual tokens of one frame, by duration", 1, 1_000))
    (folder / "slow-fast.svg").write_text(slow_and_fast())
    for release in RELEASES:
        for seconds in (10, 60, 600, 3600):
            frames, tokens = tokens_of(seconds, release)
            name, total = release.capitalize(), frames * tokens
            print(f"{name:8} {seconds:5} s: {frames:5} frames of {tokens:4} tokens = {total:7}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "docs" / "images")
