// A heatmap: a table of layers and positions whose cells are coloured. Pointer, or arrows, Home, End and Enter.

import { el } from "./dom.js";
import { hideTip, showTip } from "./tip.js";

const STOPS = 4; // between five colours, which the style sheet has

// Where a value lies between two colours of the scale; the style sheet mixes them, in light and in dark.
export function shade(value, low, high) {
  const at = high > low ? Math.min(1, Math.max(0, (value - low) / (high - low))) * STOPS : 0;
  const step = Math.min(STOPS - 1, Math.floor(at));
  return { "--from": `var(--heat-${step})`, "--to": `var(--heat-${step + 1})`, "--share": `${((at - step) * 100).toFixed(1)}%` };
}

// Of a difference: the further from nothing, the stronger one of two colours.
export function difference(value, most) {
  const share = most > 0 ? Math.min(1, Math.abs(value) / most) * 100 : 0;
  return { "--from": "var(--page)", "--to": value < 0 ? "var(--less)" : "var(--more)", "--share": `${share.toFixed(1)}%` };
}

// name : of the table.  lines(row, column) : what is said of a cell, the first its name.  colour(row, column) : its style, or
// null where there is no number.  best : [row, column] that gets a box.  chosen : the open one.  open(row, column) : on click.
export function heatmap({ name, layers, positions, lines, colour, best, chosen, open }) {
  const cells = layers.map((layer, row) => positions.map((position, column) => {
    const style = colour(row, column);
    return el("td", {
      role: "gridcell", tabindex: -1, style: style ?? {}, class: style ? null : "empty",
      "aria-label": lines(row, column).join(", "), "data-row": row, "data-column": column,
    });
  }));
  const table = el("table", { class: "heat", role: "grid", "aria-label": name, "aria-readonly": "true" },
    el("thead", {}, el("tr", { role: "row" }, el("th", { role: "columnheader", class: "corner", scope: "col" }, "layer"),
      positions.map((position) => el("th", { role: "columnheader", scope: "col" }, el("span", {}, position))))),
    el("tbody", {}, layers.map((layer, row) => el("tr", { role: "row" },
      el("th", { role: "rowheader", scope: "row" }, String(layer)), cells[row]))));
  let at = chosen ?? best ?? [0, 0];
  const cell = ([row, column]) => cells[row]?.[column];
  const mark = (where, kind) => where && cell(where)?.classList.add(kind);
  mark(best, "best");
  mark(chosen, "chosen");
  if (chosen) cell(chosen)?.setAttribute("aria-selected", "true");
  cell(at)?.setAttribute("tabindex", "0");

  const move = (where) => {
    cell(at)?.setAttribute("tabindex", "-1");
    at = where;
    cell(at).setAttribute("tabindex", "0");
    cell(at).focus();
  };
  const keys = {
    ArrowUp: ([r, c]) => [Math.max(0, r - 1), c], ArrowDown: ([r, c]) => [Math.min(layers.length - 1, r + 1), c],
    ArrowLeft: ([r, c]) => [r, Math.max(0, c - 1)], ArrowRight: ([r, c]) => [r, Math.min(positions.length - 1, c + 1)],
    Home: ([r]) => [r, 0], End: ([r]) => [r, positions.length - 1],
    PageUp: ([, c]) => [0, c], PageDown: ([, c]) => [layers.length - 1, c],
  };
  const where = (event) => {
    const found = event.target.closest?.("td");
    return found ? [Number(found.dataset.row), Number(found.dataset.column)] : null;
  };
  table.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    if (keys[event.key]) move(keys[event.key](at));
    else if (event.key === "Enter" || event.key === " ") open(...at);
    else return;
    event.preventDefault();
  });
  table.addEventListener("click", (event) => {
    const found = where(event);
    if (found) move(found), open(...found);
  });
  for (const kind of ["pointerover", "focusin"]) {
    table.addEventListener(kind, (event) => {
      const found = where(event);
      if (found) showTip(lines(...found), cell(found));
    });
  }
  for (const kind of ["pointerleave", "focusout"]) table.addEventListener(kind, hideTip);
  // Another cell is open now.
  const choose = (next) => {
    for (const old of table.querySelectorAll(".chosen")) old.classList.remove("chosen"), old.removeAttribute("aria-selected");
    mark(next, "chosen");
    if (next) cell(next)?.setAttribute("aria-selected", "true");
  };
  return { table, choose };
}

// What the colours mean.
export function legend(low, high, kind = "scale") {
  return el("div", { class: "legend" }, el("span", {}, low), el("div", { class: kind, "aria-hidden": "true" }), el("span", {}, high));
}
