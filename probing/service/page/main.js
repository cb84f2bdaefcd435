// The page: which view the address names, drawn anew when that changes.

import { has } from "./api.js";
import { showCapture } from "./capture.js";
import { showCaptures } from "./captures.js";
import { el } from "./dom.js";
import { showJobs } from "./jobs.js";
import { here } from "./place.js";
import { showSample } from "./sample.js";
import { hideTip } from "./tip.js";

const main = document.getElementById("main");
let asked = new AbortController();
let last = null;

function view({ path }) {
  if (!path.length) return showCaptures;
  if (path[0] === "jobs" && path.length === 1) return showJobs;
  if (path[0] === "captures" && path.length === 2) return showCapture;
  if (path[0] === "captures" && path[2] === "samples" && path.length === 4) return showSample;
  return null;
}

async function draw() {
  // What an earlier view still waits for would be drawn over this one.
  asked.abort();
  asked = new AbortController();
  hideTip();
  const place = here(), { signal } = asked;
  const chosen = document.activeElement?.closest("[data-choice]")?.dataset.choice;
  const name = place.path.join("/"), moved = last !== null && last !== name;
  if (last !== name) main.replaceChildren(el("p", { class: "muted" }, "Loading ..."));
  last = name;
  document.title = [...place.path.slice(1).reverse(), "hiddenlake"].join(" · ");
  try {
    const show = view(place);
    if (!show) throw new Error("There is no such view: go back to the captures.");
    await show(main, place, signal);
    // The choice that was just made may have been drawn anew.
    if (chosen && !main.contains(document.activeElement)) main.querySelector(`[data-choice="${chosen}"] select`)?.focus({ preventScroll: true });
    if (moved && !signal.aborted) main.focus({ preventScroll: true }), scrollTo(0, 0);
  } catch (error) {
    if (signal.aborted) return;
    last = null;
    main.replaceChildren(el("h1", {}, "This cannot be shown"), el("p", { role: "alert" }, error.message));
  }
}

addEventListener("hashchange", draw);
document.querySelector(".skip").addEventListener("click", (event) => (event.preventDefault(), main.focus()));
draw();
has("/v1/jobs").then((there) => (document.getElementById("jobs-link").hidden = !there)).catch(() => {});
