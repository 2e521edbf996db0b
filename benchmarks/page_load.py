"""How soon the page of `keye serve` can be used, and how smoothly the timeline of a two-hour video is dragged.

Needs a running server, an installed chromium and playwright. Prints JSON: seconds from the request of a fresh browser
context until the controls work (median and extremes), requests and bytes of a load, the requests that left the host
(there must be none); and of a timeline of two hours with 1,000 candidates, 7,200 frames of evidence and 214 cuts that
is dragged, the milliseconds of script and drawing a step (median, 99 of 100, most) and its elements. Run:
    python benchmarks/page_load.py http://127.0.0.1:8000/ [--repeats 9] [--chromium /usr/bin/chromium]
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

from playwright.sync_api import sync_playwright

READY = "body[data-ready]"
#: A timeline of the page's own module, shown with scripted data; drags its window back and forth, a step a frame.
DRAG = """async () => {
    const { Timeline } = await import(new URL("static/timeline.js", location.href).href);
    const [hours, many] = [7200, 1000];
    document.body.classList.remove("empty");
    const timeline = new Timeline();
    timeline.reset(hours, null);
    const moment = (rank) => ({
        id: `m${rank}`, rank, start: rank * 7.1, end: rank * 7.1 + 2, probability: 0.5, label: "",
        checked: rank < 6 ? "twice" : "failed", refined: true, state: rank < 6 ? "solid" : "dot",
    });
    const all = Array.from({ length: many }, (_, i) => moment(i + 1));
    const evidence = Array.from({ length: hours }, (_, i) => ({ time: i, share: ((i * 37) % 101) / 101, lift: 1 }));
    const close = all.slice(0, 12).map(({ start, end }) => ({ start, end, spacing: 0.2, close: true }));
    const coverage = { seen: [{ start: 0, end: hours, spacing: 1, close: false }, ...close], unseen: [] };
    timeline.show({ moments: all.slice(0, 5), weaker: all.slice(5), evidence, coverage });
    timeline.setCuts(Array.from({ length: 214 }, (_, i) => i * 33.6));
    timeline.see(0, 600);
    await new Promise((done) => setTimeout(done, 300));
    const spent = [], between = [];
    let last = null;
    for (let i = 0; i < 240; i++) {
        const shift = (i % 120 < 60 ? i % 60 : 60 - (i % 60)) * 100;
        const now = await new Promise(requestAnimationFrame);
        if (last !== null) between.push(now - last);
        last = now;
        const began = performance.now();
        timeline.see(shift, shift + 600);
        timeline.drawNow();
        document.getElementById("timeline").getBoundingClientRect();
        spent.push(performance.now() - began);
    }
    return { spent, between, elements: document.querySelectorAll("#timeline *").length };
}"""


def load(browser: Any, address: str) -> tuple[float, list[Any]]:
    """Seconds until the page's script has connected every control, and the requests that it took; nothing is cached."""
    context = browser.new_context()
    page = context.new_page()
    requests: list[Any] = []
    page.on("requestfinished", lambda request: requests.append(request))
    page.goto(address)
    page.wait_for_selector(READY)
    # The page's clock starts with the request for it; the module that sets READY runs before this event.
    milliseconds = page.evaluate("performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd")
    page.wait_for_load_state("networkidle")
    sizes = [(request.url, request.sizes()["responseBodySize"]) for request in requests]
    context.close()
    return milliseconds / 1000, sizes


def drag(browser: Any, address: str) -> dict[str, Any]:
    """Milliseconds of script and layout at each step of a drag, and how far apart the frames were."""
    page = browser.new_context(viewport={"width": 1440, "height": 900}).new_page()
    page.goto(address)
    page.wait_for_selector(READY)
    result = page.evaluate(DRAG)
    page.context.close()
    spent, between = sorted(result["spent"]), sorted(result["between"])
    return {
        "milliseconds_of_a_step": {
            "median": round(statistics.median(spent), 2),
            "99_of_100": round(spent[int(len(spent) * 0.99)], 2),
            "most": round(spent[-1], 2),
        },
        "frames_a_second": round(1000 / statistics.median(between), 1),
        "elements": result["elements"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("address", help="where the page is, with a slash at its end")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    args = parser.parse_args()
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=args.chromium, args=flags)
        load(browser, args.address)  # starts the browser's processes
        loads = [load(browser, args.address) for _ in range(args.repeats)]
        dragged = drag(browser, args.address)
        browser.close()
    seconds = [second for second, _ in loads]
    requests = loads[-1][1]
    result = {
        "seconds_until_usable": {
            "median": round(statistics.median(seconds), 3),
            "min": round(min(seconds), 3),
            "max": round(max(seconds), 3),
        },
        "requests": len(requests),
        "bytes": sum(size for _, size in requests),
        "left_the_host": [url for url, _ in requests if not url.startswith((args.address, "blob:", "data:"))],
        "dragging_two_hours": dragged,
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
