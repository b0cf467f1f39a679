// Builds elements. Text from models and documents only ever becomes text nodes: there is no way here to write markup.

const SVG = "http://www.w3.org/2000/svg";
const ICONS = {
  up: "M7 10.5v8H4v-8zM7 10.5l4-7c1.6 0 2.4 1.2 2.1 2.7L12.5 9H18c1.2 0 2 1 1.7 2.2l-1.4 5.6c-.2 1-1 1.7-2 1.7H7",
  down: "M7 12.5v-8H4v8zM7 12.5l4 7c1.6 0 2.4-1.2 2.1-2.7L12.5 14H18c1.2 0 2-1 1.7-2.2l-1.4-5.6c-.2-1-1-1.7-2-1.7H7",
  copy: "M9 9h10v11H9zM5 15V4h10",
  close: "M6 6l12 12M18 6L6 18",
  edit: "M4 20h4L19 9l-4-4L4 16zM13.5 6.5l4 4",
};

/** An element: attributes (`class`, `text`, `on…` handlers, `hidden`, any other), then children. */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "text") node.textContent = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return node;
}

export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  for (const [key, value] of [["viewBox", "0 0 24 24"], ["aria-hidden", "true"], ["class", "glyph"]]) {
    svg.setAttribute(key, value);
  }
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

export const byId = (id) => document.getElementById(id);

/** A web address, or null for anything that a browser might run. */
export function webAddress(text) {
  try {
    const url = new URL(text);
    return url.protocol === "https:" || url.protocol === "http:" ? url.href : null;
  } catch {
    return null;
  }
}

/** Parts of `text` between offsets that count characters as the server does (code points, not UTF-16 units). */
export function cut(text, ...offsets) {
  const points = Array.from(text);
  const bounds = [0, ...offsets, points.length].map((at) => Math.min(Math.max(at, 0), points.length));
  return bounds.slice(1).map((end, i) => points.slice(bounds[i], end).join(""));
}
