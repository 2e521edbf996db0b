"""What everybody must be able to read and operate, measured in the browser: each check returns its faults as texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

#: Colours of WCAG 2, what is drawn behind a node, and whether it can be seen and touched at its middle.
TOOLS = """
    const light = (color) => {
        const scale = color.startsWith("color(") ? 1 : 255;
        const parts = color.match(/[0-9.]+/g).slice(0, 3).map((n) => n / scale);
        const [r, g, b] = parts.map((c) => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
    };
    const ratio = (a, b) => Math.max(light(a), light(b)) / Math.min(light(a), light(b));
    const clear = (color) => color === "transparent" || /^rgba.*, 0\\)$|\\/ 0\\)$/.test(color);
    const ground = (node) => {
        for (let at = node; at; at = at.parentElement) {
            const color = getComputedStyle(at).backgroundColor;
            if (!clear(color)) return color;
        }
        return "rgb(255, 255, 255)";
    };
    const shown = (node) => node.checkVisibility() && node.getClientRects().length
        && !node.closest(".visually-hidden, .skip, option") && getComputedStyle(node).clipPath === "none";
    const reached = (node, x, y) => {
        const top = document.elementFromPoint(x, y);
        return top && (node.contains(top) || top.closest("label")?.contains(node) || top === node.parentElement);
    };
    const named = (node) => `${node.tagName}#${node.id}.${node.className} ${node.textContent.trim().slice(0, 40)}`;
    const texts = () => {
        const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
        const found = [];
        while (walker.nextNode()) {
            const node = walker.currentNode, owner = node.parentElement;
            if (!node.textContent.trim() || !shown(owner)) continue;
            const range = document.createRange();
            range.selectNodeContents(node);
            for (const box of range.getClientRects()) if (box.width > 1) found.push({ node, owner, box });
        }
        return found;
    };
"""

CONTRAST = """
    const faults = [];
    const all = "input, select, textarea, button, .button, .segments, .pin, .meter i";
    for (const node of document.querySelectorAll(all)) {
        if (!shown(node) || node.disabled || node.closest(".segments") && node.tagName === "INPUT") continue;
        const style = getComputedStyle(node);
        const edge = style.borderTopColor, own = style.backgroundColor, around = ground(node.parentElement);
        const bordered = !clear(edge) && parseFloat(style.borderTopWidth) > 0;
        const seen = Math.max(bordered ? ratio(edge, around) : 0, clear(own) ? 0 : ratio(own, around));
        const words = node.textContent.trim() || node.placeholder;
        const icon = node.querySelector("svg");
        const native = ["checkbox", "radio"].includes(node.type) || node.matches("select.quiet");
        const field = /^(INPUT|SELECT|TEXTAREA)$/.test(node.tagName);
        if ((field || !words && !icon && !node.querySelector("canvas")) && !native && seen < 2.99)
            faults.push(`${named(node)}: edge ${seen}`);
        if (icon && ratio(getComputedStyle(icon).color, ground(node)) < 3) faults.push(`${named(node)}: icon`);
        if (words && ratio(style.color, ground(node)) < 4.5) faults.push(`${named(node)}: text`);
    }
    return faults;
"""
OVERLAP = """
    const seen = texts().filter(({ owner, box }) => reached(owner, box.x + box.width / 2, box.y + box.height / 2));
    const faults = [];
    for (let i = 0; i < seen.length; i++) for (let j = i + 1; j < seen.length; j++) {
        const [a, b] = [seen[i], seen[j]];
        // What opens over the page hides parts of it.
        const layer = (text) => text.owner.closest(":popover-open, dialog");
        if (a.node === b.node || layer(a) !== layer(b)) continue;
        const wide = Math.min(a.box.right, b.box.right) - Math.max(a.box.left, b.box.left);
        const high = Math.min(a.box.bottom, b.box.bottom) - Math.max(a.box.top, b.box.top);
        if (wide > 2 && high > 4) faults.push(`${named(a.owner)} over ${named(b.owner)}`);
    }
    return faults;
"""
CUT = """
    const faults = [];
    const inner = (node) => node.clientWidth - parseFloat(getComputedStyle(node).paddingRight);
    for (const { owner, box } of texts()) {
        if (owner.closest("select, textarea, svg")) continue;
        for (let at = owner; at && at !== document.body; at = at.parentElement) {
            const style = getComputedStyle(at);
            const hides = style.overflowX !== "visible";
            if (!hides) continue;
            const edge = at.getBoundingClientRect();
            const isCut = box.right > edge.right + 1.5 || box.left < edge.left - 1.5;
            if (isCut && !(style.textOverflow === "ellipsis" && at.closest("[title]"))) faults.push(named(owner));
            break;
        }
    }
    if (document.documentElement.scrollWidth > window.innerWidth) faults.push("scrolls sideways");
    for (const { owner, box } of texts()) {
        const at = [window.innerWidth - 2, box.y + box.height / 2];
        if (box.right > window.innerWidth + 1 && shown(owner) && reached(owner, ...at))
            faults.push(`beyond the window: ${named(owner)}`);
    }
    return faults;
"""
TARGETS = """
    const faults = [];
    const all = "button, a[href], input, select, textarea, [role=slider], [role=switch], summary";
    for (const node of document.querySelectorAll(all)) {
        if (!shown(node) || node.closest("p") && node.tagName === "A" || node.type === "file") continue;
        const box = (node.closest("label") ?? node).getBoundingClientRect();
        const [x, y] = [box.x + box.width / 2, box.y + box.height / 2];
        if (x < 0 || y < 0 || x > window.innerWidth || y > window.innerHeight || !reached(node, x, y)) continue;
        const small = [];
        const half = LEAST / 2 - 1;
        if (box.height < LEAST - 0.5) small.push([x, y - half], [x, y + half]);
        if (box.width < LEAST - 0.5) small.push([x - half, y], [x + half, y]);
        const outside = ([px, py]) => px < 0 || py < 0 || px > window.innerWidth || py > window.innerHeight;
        // The slider is moved along all lanes, a link within a line of text has that line's height, and a weak mark
        // shares its room with those beside it.
        if (node.matches("[role=slider], .answer-text .time-link, .pin.dot")) continue;
        if (small.some((point) => !outside(point) && !reached(node, ...point)))
            faults.push(`${named(node)}: ${box.width} x ${box.height}`);
    }
    return faults;
"""


def faults_of(page: Any, *, least_target: int) -> list[str]:
    """Everything that is wrong with what the page shows now."""
    faults = run_axe(page)
    for name, code in (("contrast", CONTRAST), ("overlap", OVERLAP), ("cut", CUT), ("target", TARGETS)):
        script = f"() => {{ const LEAST = {least_target}; {TOOLS} {code} }}"
        faults += [f"{name}: {fault}" for fault in page.evaluate(script)]
    return faults


def run_axe(page: Any) -> list[str]:
    """What the rules of axe-core find."""
    axe = pytest.importorskip("axe_playwright_python", reason="needs the extra: pip install keye[dev]")
    page.evaluate((Path(axe.__file__).parent / "axe.min.js").read_text())
    return page.evaluate(
        "async () => (await axe.run()).violations.map((one) => `${one.id}: ${one.nodes.map((n) => n.html)}`)"
    )
