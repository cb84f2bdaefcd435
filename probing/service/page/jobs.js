// Jobs with their progress, asked for every second.

import { ask, has } from "./api.js";
import { el, muted, table } from "./dom.js";

const pause = (ms, signal) => new Promise((resolve) => {
  const timer = setTimeout(resolve, ms);
  signal.addEventListener("abort", () => (clearTimeout(timer), resolve()), { once: true });
});

function progress(job) {
  const total = job.total || 0, done = (job.done || 0) + (job.failed || 0);
  const words = `${job.done ?? 0} of ${total}${job.failed ? `, ${job.failed} failed` : ""}`;
  return [el("progress", { max: Math.max(total, 1), value: done, "aria-label": `job ${job.id}` }), ` ${words}`];
}

// Seconds since 1970, or a time as text.
function time(created) {
  if (created === null || created === undefined) return "";
  const at = new Date(typeof created === "number" ? created * 1000 : created);
  return Number.isNaN(at.getTime()) ? String(created) : at.toLocaleString();
}

export async function showJobs(main, _, signal) {
  const list = el("div", {});
  main.replaceChildren(el("h1", {}, "Jobs"), list);
  if (!(await has("/v1/jobs"))) return list.replaceChildren(muted("This server computes nothing: it has no jobs."));
  let drawn = "";
  while (!signal.aborted) {
    const { jobs } = await ask(["v1", "jobs"], {}, signal);
    // Drawn anew only when something has changed: who reads or selects is not disturbed.
    if (JSON.stringify(jobs) !== drawn) {
      drawn = JSON.stringify(jobs);
      list.replaceChildren(jobs.length
        ? table("What is computed for requests, the newest first", [
            ["job", (job) => el("code", {}, job.id)],
            ["state", (job) => job.state],
            ["progress", progress],
            ["asked for", (job) => time(job.created)],
            ["why answers failed", (job) => (job.causes ?? []).join("; "), "long"],
          ], jobs)
        : muted("Nothing was asked for that had to be computed."));
    }
    await pause(1000, signal);
  }
}
