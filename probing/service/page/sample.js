// One sample: its texts, and its tokens coloured by a probe's score, where there is a row.

import { ask, wait } from "./api.js";
import { choice, el, facts, muted, number, table } from "./dom.js";
import { legend } from "./heatmap.js";
import { change, href } from "./place.js";
import { hideTip, showTip } from "./tip.js";

export async function showSample(main, { path, params }, signal) {
  const name = path[1], key = path[3];
  const [sample, text, { grids }, { probes }] = await Promise.all([
    ask(["v1", "captures", name, "samples", key], {}, signal), ask(["v1", "captures", name, "samples", key, "pieces"], {}, signal),
    ask(["v1", "captures", name, "grids"], {}, signal), ask(["v1", "probes"], {}, signal),
  ]);
  const scored = grids.filter((grid) => !grid.no_cells && grid.best);
  const probe = probes.find((one) => one.name === params.get("probe"));
  const grid = probe ? null : scored.find((one) => one.name === params.get("grid")) ?? scored[0];
  const judged = sample.correct === null ? "not judged" : sample.correct ? "right" : "wrong";
  const tokens = el("div", {});
  main.replaceChildren(
    el("p", {}, el("a", { href: href(["captures", name], grid ? { grid: grid.name, layer: params.get("layer"), position: params.get("position") } : {}) }, `Back to ${name}`)),
    el("h1", {}, `Sample ${sample.index}${sample.sample_index ? `, draw ${sample.sample_index}` : ""}`),
    facts([
      ["judged", judged],
      ["gold", (sample.answers ?? []).join(", ") || "not known"],
      ["exact answer", sample.exact_answer_valid ? sample.exact_answer : "none was found"],
      ["group", sample.group],
      ...Object.entries(sample.labels ?? {}).map(([label, value]) => [label, value === null ? "none" : String(value)]),
      ["tokens", `${sample.prompt_length} of the prompt, ${sample.total_length - sample.prompt_length} of the answer; ended by: ${sample.finish_reason}`],
      ["key", el("code", {}, sample.key)],
    ]),
    el("h2", {}, "Tokens, by a probe's score"),
    await chooser(name, grid, probe, scored, probes, params, signal),
    tokens,
    el("h2", {}, "Answer"), el("p", { class: "answer" }, sample.answer),
    el("details", {}, el("summary", {}, "prompt"), el("pre", { class: "prompt" }, sample.prompt)),
  );
  const cell = grid ? { grid: grid.name, layer: params.get("layer") ?? grid.best.layer, position: params.get("position") ?? grid.best.position, C: params.get("C") } : null;
  if (!cell && !probe) return draw(tokens, sample, text, null);
  draw(tokens, sample, text, null, "Loading ...");
  try {
    const asked = probe ? { probe: probe.name, force: params.get("force") } : cell;
    const scores = await wait(["v1", "captures", name, "samples", key, "scores"], asked, signal, (doing) => draw(tokens, sample, text, null, doing));
    draw(tokens, sample, text, scores);
  } catch (error) {
    if (!signal.aborted) draw(tokens, sample, text, null, error.message, "alert");
  }
}

async function chooser(name, grid, probe, grids, probes, params, signal) {
  if (!grid && !probe && !probes.length) return muted("No grid of this capture has cells that can be scored, and there is no stored probe: the tokens have no colour.");
  const options = [...grids.map((one) => [`grid ${one.name}`, `the probes of ${one.name}`]), ...probes.map((one) => [`probe ${one.name}`, `the stored probe ${one.name}`])];
  const none = grid || probe ? [] : [["", "none"]];
  const made = [choice("scored by", [...none, ...options], probe ? `probe ${probe.name}` : grid ? `grid ${grid.name}` : "", (value) => {
    const [kind, ...rest] = value.split(" ");
    change({ grid: null, probe: null, layer: null, position: null, C: null, [kind]: rest.join(" ") });
  })];
  if (grid) {
    const heat = await ask(["v1", "captures", name, "grids", grid.name], { C: params.get("C") }, signal);
    const layer = params.get("layer") ?? grid.best.layer, position = params.get("position") ?? grid.best.position;
    const auc = (l, p) => heat.values.auc[heat.layers.indexOf(Number(l))]?.[heat.positions.indexOf(p)];
    made.push(
      choice("layer", heat.layers.filter((l) => auc(l, position) !== null).map((l) => [l, `${l} (AUC ${number(auc(l, position))})`]), layer, (value) => change({ grid: grid.name, layer: value, position })),
      choice("fitted at", heat.positions.filter((p) => auc(layer, p) !== null).map((p) => [p, `${p} (AUC ${number(auc(layer, p))})`]), position, (value) => change({ grid: grid.name, layer, position: value })));
  }
  return el("div", { class: "controls" }, made);
}

function draw(place, sample, text, scores, waiting = null, role = "status") {
  const at = new Map((scores?.tokens ?? []).map((token) => [token.token_index, token]));
  const names = new Map(), elsewhere = [];
  for (const [name, token] of Object.entries(sample.positions)) {
    if (typeof token === "number") names.set(token, [...(names.get(token) ?? []), name]);
    else elsewhere.push([name, token]);
  }
  const piece = (i) => text.pieces ? text.pieces[i] : `${sample.token_ids[i]}`;
  const line = (part, from, to) => el("div", { class: "tokens", role: "group", "aria-label": `tokens of the ${part}` },
    Array.from({ length: to - from }, (_, i) => token(from + i)));
  const token = (i) => {
    const found = at.get(i), named = names.get(i) ?? [], lines = [`token ${i}: ${visible(piece(i))}`];
    if (named.length) lines.push(named.join(", "));
    if (found) lines.push(`probability of ${scores.positive_class} ${number(found.probability)}, log-odds ${number(found.score, 2)}`);
    else if (scores) lines.push("no row of this token");
    const marked = ["token", named.length && "named", found && "scored"].filter(Boolean).join(" ");
    const style = found ? { "--to": found.score < 0 ? "var(--less)" : "var(--more)", "--share": `${(Math.abs(found.probability - 0.5) * 120).toFixed(1)}%` } : {};
    const attributes = { class: marked, style, "aria-label": lines.join(", ") };
    // What has something to say can be reached by the keyboard; every token is more stops than anybody makes.
    const made = found || named.length ? el("button", { type: "button", ...attributes }, shown(piece(i))) : el("span", { class: marked }, shown(piece(i)));
    for (const kind of ["pointerenter", "focus", "click"]) made.addEventListener(kind, () => showTip(lines, made));
    for (const kind of ["pointerleave", "blur"]) made.addEventListener(kind, hideTip);
    return !text.pieces ? [made, " "] : made;
  };
  const rows = [...names].flatMap(([i, named]) => named.map((name) => [name, i])).sort((a, b) => a[1] - b[1]);
  const probability = scores ? [["probability", ([, i]) => number(at.get(i)?.probability), "figure"], ["log-odds", ([, i]) => number(at.get(i)?.score, 2), "figure"]] : [];
  place.replaceChildren(
    ...(waiting ? [el("p", { class: "muted working", role }, waiting)] : []),
    ...(scores?.marked ? [el("p", { class: "bad", role: "alert" }, scores.marked)] : []),
    el("h3", {}, "prompt"), line("prompt", 0, sample.prompt_length),
    el("h3", {}, "answer"), line("answer", sample.prompt_length, sample.total_length),
    scores ? legend(`not ${scores.positive_class}`, scores.positive_class, "scale tinted") : "",
    el("p", { class: "muted" }, [scores?.probe, scores?.rows, "Underlined: named positions. A token without a colour has no row: it has no score.",
      text.pieces ? "" : `Tokens are shown as ids: ${text.reason}.`].filter(Boolean).join(" ")),
    table(`Named positions of this sample${scores ? `, layer ${scores.layer} of ${scores.site}` : ""}`, [
      ["position", ([name]) => name], ["token", ([, i]) => i, "figure"], ["text", ([, i]) => el("code", {}, visible(piece(i)))], ...probability,
    ], rows),
    elsewhere.length ? muted(`Of no token: ${elsewhere.map(([name, what]) => `${name} (${what ?? "absent"})`).join(", ")}.`) : "",
  );
}

// White space as it can be seen.
const visible = (text) => text.replaceAll("\n", "\\n").replaceAll("\t", "\\t") || "(part of a character)";

function shown(text) {
  return text.includes("\n") ? [text.replaceAll("\n", "\u21b5"), ...Array.from(text.matchAll("\n"), () => el("br"))] : text || "\u00b7";
}
