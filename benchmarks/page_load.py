"""How soon the page of `keye serve` can be used: from the request of a fresh browser context until its controls work.

Needs a running server, an installed chromium and playwright. Prints JSON: seconds (median and extremes), requests and
bytes of a load, and the requests that left the host (there must be none). Run:
    python benchmarks/page_load.py http://127.0.0.1:8000/ [--repeats 9] [--chromium /usr/bin/chromium]
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

from playwright.sync_api import sync_playwright

READY = "body[data-ready]"


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
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
