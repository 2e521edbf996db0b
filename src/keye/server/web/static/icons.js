/** The pictures on buttons, as lines in a square of 24. They say nothing by themselves: the text beside them does. */

const SVG = "http://www.w3.org/2000/svg";

const LINES = {
  desk: "M3 5h18v11H3zM8 20h8M10.5 8.2v4.6l4-2.3z",
  library: "M4 4h6v6H4zM14 4h6v6h-6zM4 14h6v6H4zM14 14h6v6h-6z",
  activity: "M3 12h4l3-8 4 16 3-8h4",
  settings: "M3 8h8M17 8h4M3 16h3M12 16h9M11 5h3v6h-3zM6 13h3v6H6z",
  search: "M10.5 4a6.5 6.5 0 1 0 0 13 6.5 6.5 0 0 0 0-13zM15.5 15.5 20.5 20.5",
  down: "M6 9l6 6 6-6", right: "M9 6l6 6-6 6", left: "M15 6l-6 6 6 6", up: "M12 19V5M6 11l6-6 6 6",
  check: "M5 12.5l4.5 4.5L19 7.5", close: "M6 6l12 12M18 6L6 18", plus: "M12 5v14M5 12h14", minus: "M5 12h14",
  upload: "M12 16V4M7 9l5-5 5 5M4 20h16", save: "M12 4v12M7 11l5 5 5-5M4 20h16",
  folder: "M3 6h6l2 2h10v11H3z",
  link: "M10 14a4 4 0 0 0 6 0l3-3a4 4 0 0 0-6-6l-1 1M14 10a4 4 0 0 0-6 0l-3 3a4 4 0 0 0 6 6l1-1",
  copy: "M9 9h11v11H9zM15 9V4H4v11h5", keys: "M3 6h18v12H3zM7 10h.01M12 10h.01M17 10h.01M8 14h8",
  mark: "M6 3h12v18l-6-5-6 5z", info: "M12 3a9 9 0 1 0 0 18 9 9 0 0 0 0-18zM12 11v5M12 8h.01",
  warning: "M12 4l9 16H3zM12 10v4M12 17h.01", eye: "M2 12s4-7 10-7 10 7 10 7-4 7-10 7-10-7-10-7zM12 9a3 3 0 1 0 0 6 3 3 0 0 0 0-6z",
  sound: "M4 9v6h4l5 4V5L8 9zM16 9a4 4 0 0 1 0 6M18.5 6.5a8 8 0 0 1 0 11", silent: "M4 9v6h4l5 4V5L8 9zM17 9.5l5 5M22 9.5l-5 5",
  full: "M4 9V4h5M15 4h5v5M20 15v5h-5M9 20H4v-5", lines: "M4 7h.01M8 7h12M4 12h.01M8 12h12M4 17h.01M8 17h12",
  again: "M19 12a7 7 0 1 1-2-5M19 3v5h-5", file: "M6 3h8l4 4v14H6zM14 3v4h4",
};
const SHAPES = {
  play: "M8 5v14l11-7z", pause: "M7 5h3.5v14H7zM13.5 5H17v14h-3.5z", stop: "M7 7h10v10H7z",
  more: "M5 10.2a1.8 1.8 0 1 0 .01 0zM12 10.2a1.8 1.8 0 1 0 .01 0zM19 10.2a1.8 1.8 0 1 0 .01 0z",
  before: "M6 5h2.5v14H6zM19 5v14L9 12z", after: "M15.5 5H18v14h-2.5zM5 5v14l10-7z",
};

/** The icon `name`, hidden from screen readers. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  const path = document.createElementNS(SVG, "path");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  svg.classList.add("icon");
  svg.classList.toggle("solid", name in SHAPES);
  path.setAttribute("d", SHAPES[name] ?? LINES[name]);
  svg.append(path);
  return svg;
}

/** Puts icons before the texts of elements that name one in `data-icon`. */
export function drawIcons(root) {
  for (const node of root.querySelectorAll("[data-icon]")) {
    if (!node.querySelector(":scope > svg")) node.prepend(icon(node.dataset.icon));
  }
}
