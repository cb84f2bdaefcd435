// Elements, made of texts that are never read as markup: prompts and answers are anybody's.

export function el(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") made.addEventListener(key.slice(2), value);
    else if (key === "style") for (const [property, to] of Object.entries(value)) made.style.setProperty(property, to);
    else made.setAttribute(key, value === true ? "" : String(value));
  }
  made.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

export const muted = (...text) => el("p", { class: "muted" }, ...text);

// A table whose columns are [title, row => cell, class].
export function table(caption, columns, rows) {
  return el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": caption },
    el("table", {}, el("caption", {}, caption),
      el("thead", {}, el("tr", {}, columns.map(([title, , kind]) => el("th", { scope: "col", class: kind }, title)))),
      el("tbody", {}, rows.map((row) => el("tr", {}, columns.map(([, cell, kind], i) =>
        i ? el("td", { class: kind }, cell(row)) : el("th", { scope: "row" }, cell(row))))))));
}

// A labelled choice. options : [value, text].
export function choice(label, options, chosen, change) {
  // Named here too: a label around a choice is read with all of its options.
  const select = el("select", { "aria-label": label, onchange: (event) => change(event.target.value) },
    options.map(([value, text]) => el("option", { value, selected: String(value) === String(chosen) }, text)));
  return el("label", { class: "choice", "data-choice": label }, el("span", {}, label), select);
}

export function facts(pairs) {
  return el("dl", {}, pairs.filter(([, value]) => value !== null && value !== undefined && value !== "")
    .map(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));
}

// For who listens to the page.
export function say(text) {
  document.getElementById("said").textContent = text;
}

export const number = (value, digits = 3) => value === null || value === undefined ? "none" : value.toFixed(digits);

export function interval(auc, low, high) {
  return low === null || low === undefined ? number(auc) : `${number(auc)} (95\u00a0% ${number(low)} to ${number(high)})`;
}

export const short = (value) => value === null || value === undefined ? "none"
  : Number.isInteger(value) ? String(value) : Math.abs(value) >= 1e-3 && Math.abs(value) < 1e5 ? String(Number(value.toPrecision(4))) : value.toExponential(2);

export function bytes(count) {
  const units = ["B", "KB", "MB", "GB", "TB", "PB"];
  const step = Math.min(units.length - 1, Math.max(0, Math.floor(Math.log10(Math.max(count, 1)) / 3)));
  return `${(count / 1000 ** step).toPrecision(3)} ${units[step]}`;
}
