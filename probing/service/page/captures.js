// All captures, with their size and state.

import { ask } from "./api.js";
import { bytes, el, muted, table } from "./dom.js";
import { href } from "./place.js";

function state(capture) {
  if (capture.error) return el("span", { class: "bad" }, `cannot be opened: ${capture.error}`);
  const parts = [capture.samples >= capture.planned ? "complete" : `${capture.samples} of ${capture.planned} planned`];
  if (capture.failures) parts.push(`${capture.failures} failed`);
  return parts.join(", ");
}

export async function showCaptures(main, _, signal) {
  const { captures } = await ask(["v1", "captures"], {}, signal);
  const link = (capture) => capture.error ? capture.name : el("a", { href: href(["captures", capture.name]) }, capture.name);
  main.replaceChildren(
    el("h1", {}, "Captures"),
    captures.length
      ? table("Activations by layer and token, as they were computed when the answers were generated", [
          ["capture", link, "long"],
          ["model", (c) => c.model ?? "", "long"],
          ["task", (c) => c.task ?? ""],
          ["samples", (c) => c.samples, "figure"],
          ["size", (c) => bytes(c.bytes), "figure"],
          ["layers x positions", (c) => c.error ? "" : `${c.layers} x ${c.positions}${c.tokens ? ` and tokens ${c.tokens}` : ""}`],
          ["sites", (c) => c.sites.join(", ")],
          ["dtype", (c) => `${c.dtype}${c.codec && c.codec !== "none" ? `, ${c.codec}` : ""}`],
          ["state", state],
        ], captures)
      : muted("This lake holds no capture yet: `hiddenlake capture --out LAKE/NAME` makes one."),
  );
}
