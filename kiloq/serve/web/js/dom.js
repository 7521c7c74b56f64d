// Small helpers that make elements. Text goes in as text nodes only; no helper takes markup.

export function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "on") for (const [type, listener] of Object.entries(value)) node.addEventListener(type, listener);
    else if (name === "class") node.className = value;
    else if (name === "value" || name === "checked" || name === "disabled" || name === "open") node[name] = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== undefined && child !== null && child !== false));
  return node;
}

export const byId = (id) => document.getElementById(id);

// Paths of 20 x 20 drawings with a 1.5 px line.
const DRAWINGS = {
  plus: "M10 4v12M4 10h12",
  menu: "M3.5 6h13M3.5 10h13M3.5 14h13",
  close: "M5 5l10 10M15 5L5 15",
  send: "M10 16V4.5M5 9l5-5 5 5",
  stop: "M6 6h8v8H6z",
  sliders: "M3.5 6.5h7M14.5 6.5h2M3.5 13.5h2M9.5 13.5h7M12.5 4.5v4M7.5 11.5v4",
  copy: "M7.5 7.5h8v8h-8zM12.5 7.5v-3h-8v8h3",
  check: "M4.5 10.5l3.5 3.5 7.5-8",
  again: "M15.5 10a5.5 5.5 0 1 1-1.7-4M15.5 3.5V7H12",
  edit: "M4.5 15.5l.7-3 8-8 2.3 2.3-8 8-3 .7zM11.5 6.2l2.3 2.3",
  code: "M7 6l-4 4 4 4M13 6l4 4-4 4",
  more: "M5 10h.01M10 10h.01M15 10h.01",
  down: "M10 4v11.5M5 11l5 5 5-5",
  sun: "M10 6.8a3.2 3.2 0 1 0 0 6.4 3.2 3.2 0 0 0 0-6.4zM10 2.2v1.6M10 16.2v1.6M2.2 10h1.6M16.2 10h1.6M4.5 4.5l1.1 1.1M14.4 14.4l1.1 1.1M4.5 15.5l1.1-1.1M14.4 5.6l1.1-1.1",
  moon: "M15.8 11.9A6.4 6.4 0 0 1 8.1 4.2a6.4 6.4 0 1 0 7.7 7.7z",
  auto: "M3.5 4.5h13v9h-13zM7.5 16.5h5M10 13.5v3",
  export: "M10 12.5v-9M6.5 6.5L10 3l3.5 3.5M4 11.5v4.5h12v-4.5",
  import: "M10 3.5v9M6.5 9.5L10 13l3.5-3.5M4 11.5v4.5h12v-4.5",
  chevron: "M7.5 5l5 5-5 5",
};
const SVG = "http://www.w3.org/2000/svg";

export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  for (const [key, value] of Object.entries({ viewBox: "0 0 20 20", class: `icon icon-${name}`, "aria-hidden": "true" }))
    svg.setAttribute(key, value);
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", DRAWINGS[name]);
  svg.append(path);
  return svg;
}

// A button that shows only a drawing; its name is for screen readers and the tooltip.
export function iconButton(drawing, name, press, more = {}) {
  return el(
    "button",
    { type: "button", "aria-label": name, title: name, on: { click: press }, ...more, class: `quiet ${more.class ?? ""}` },
    icon(drawing),
  );
}

// navigator.clipboard exists only on https and localhost; the old way works elsewhere.
export async function copyText(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = el("textarea", { class: "visually-hidden", value: text, readonly: true });
  (document.querySelector("dialog[open]") ?? document.body).append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  if (!copied) throw new Error("The browser did not let the page copy.");
}

// Shows for a moment on the button itself that it worked.
export async function copyFrom(button, text) {
  try {
    await copyText(text);
  } catch {
    return;
  }
  button.replaceChildren(icon("check"));
  setTimeout(() => button.replaceChildren(icon("copy")), 1500);
}
