// A capture's samples: filtered, page by page.

import { ask } from "./api.js";
import { choice, el, muted, table } from "./dom.js";
import { change, href } from "./place.js";

const PAGE = 10;
let shown = null;

const cut = (text, most = 160) => text.length > most ? `${text.slice(0, most)} ...` : text;

export async function showSamples(place, name, about, params, signal) {
  const text = params.get("text") ?? "", correct = params.get("correct") ?? "", from = Number(params.get("from") ?? 0);
  const cell = ["grid", "layer", "position", "C"].map((key) => [key, params.get(key)]);
  const wanted = JSON.stringify([name, text, correct, from, cell]);
  if (shown === wanted && place.childElementCount) return;
  const label = correct ? { label: "correct", value: correct } : {};
  const found = await ask(["v1", "captures", name, "samples"], { text, ...label, offset: from, limit: PAGE }, signal);
  shown = wanted;
  const open = params.get("layer") === null ? {} : Object.fromEntries(params.get("of") ? [["grid", params.get("of")], ...cell.slice(1)] : cell);
  const search = el("form", { class: "controls", role: "search", onsubmit: (event) => {
    event.preventDefault();
    change({ text: new FormData(event.target).get("text"), from: null });
  } },
  el("label", { class: "choice" }, el("span", {}, "prompt or answer contains"), el("input", { name: "text", type: "search", value: text, maxlength: 1000 })),
  choice("correct", [["", "any"], ["true", "right"], ["false", "wrong"], ["null", "not judged"]], correct, (value) => change({ correct: value || null, from: null })),
  el("button", { type: "submit" }, "Search"));
  const turn = (to, words, there) => el("button", { type: "button", disabled: !there, onclick: () => change({ from: to || null }) }, words);
  const last = Math.min(from + PAGE, found.total);
  const focused = place.contains(document.activeElement) ? document.activeElement.textContent : null;
  place.replaceChildren(el("h2", { id: "samples" }, "Samples"), search,
    found.samples.length ? table(`${from + 1} to ${last} of ${found.total}, in the task's order`, [
      ["sample", (s) => el("a", { href: href(["captures", name, "samples", s.key], open) }, `${s.index}${s.sample_index ? `, draw ${s.sample_index}` : ""}`)],
      ["correct", (s) => s.correct === null ? "not judged" : s.correct ? "right" : "wrong"],
      ["exact answer", (s) => s.exact_answer_valid ? s.exact_answer : "none", "long"],
      ["gold", (s) => cut((s.answers ?? []).slice(0, 3).join(", "), 60), "long"],
      ["answer", (s) => cut(s.answer), "text"],
    ], found.samples) : muted("No sample is like that."),
    el("p", { class: "controls" }, turn(Math.max(0, from - PAGE), "Earlier", from > 0), turn(from + PAGE, "Later", last < found.total)));
  // The button that was pressed has been made anew.
  if (focused) [...place.querySelectorAll("button")].find((one) => one.textContent === focused && !one.disabled)?.focus();
}
