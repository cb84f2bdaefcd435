// One cell: ROC, calibration, the spread of its held-out scores, and the samples that it gets most wrong.

import { wait } from "./api.js";
import { el, interval, muted, number, say, short } from "./dom.js";
import { change, href } from "./place.js";
import { CHANCE, COLOURS, forget, GREY, plot } from "./plot.js";

let shown = null;

export async function showCell(place, name, grid, maps, params, signal) {
  const layer = params.get("layer"), position = params.get("position");
  const heat = maps.map((map) => map.heat).find((one) => one.name === grid.name);
  const wanted = JSON.stringify([name, grid.name, layer, position, params.get("C")]);
  if (layer === null || position === null) return (shown = null), place.replaceChildren();
  if (shown === wanted && place.childElementCount) return;
  shown = null;
  const head = el("div", { class: "cellhead" }, el("h2", {}, `Layer ${layer}, ${position}`),
    el("button", { type: "button", onclick: () => change({ layer: null, position: null, of: null }) }, "Close the cell"));
  const body = el("div", {}, muted(grid.no_cells ? `${grid.no_cells} So there is no ROC of this cell.` : "Loading ..."));
  place.replaceChildren(head, body);
  const nearest = matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth";
  place.scrollIntoView({ block: "nearest", behavior: nearest });
  if (grid.no_cells || !heat) return;
  let cell;
  try {
    cell = await wait(["v1", "captures", name, "grids", grid.name, "cell"], { layer, position, C: heat.C }, signal, (doing) => {
      body.replaceChildren(el("p", { class: "muted working", role: "status" }, doing));
    });
  } catch (error) {
    if (signal.aborted) return;
    return body.replaceChildren(el("p", { role: "alert" }, error.message));
  }
  shown = wanted;
  draw(body, name, heat, cell);
  say(`Layer ${layer}, ${position}: AUC ${number(cell.auc)}, n ${cell.n}`);
}

function draw(body, name, heat, cell) {
  const { positive, negative } = heat, row = heat.layers.indexOf(cell.layer), column = heat.positions.indexOf(cell.position);
  const at = (metric) => heat.values[metric]?.[row]?.[column];
  const alone = at("token_auc");
  const figures = el("div", { class: "pair" });
  const add = (alt, caption) => {
    const here = el("div", { class: "plot", role: "img", "aria-label": alt });
    figures.append(el("figure", {}, here, el("figcaption", {}, caption)));
    return here;
  };
  const roc = add(`ROC curve of ${cell.n} held-out scores, and of each fold`,
    `ROC: each sample is scored once, by the probe of the other ${cell.fold_auc.length - 1} folds. Grey: each fold by itself; the AUC is their mean.`);
  const calibration = add(`Calibration in ${cell.calibration.n.length} bins, ECE ${number(cell.calibration.ece)}`,
    `Calibration: ${cell.calibration.n.length} bins of equally many samples, 95 % intervals; ECE ${number(cell.calibration.ece)}. On the dotted line probabilities are what they say.`);
  const spread = add(`Histogram of the probabilities of ${positive} and ${negative} samples`,
    `Held-out probabilities: ${positive} samples above the line, ${negative} ones below it.`);
  body.replaceChildren(
    el("p", {}, `AUC ${interval(cell.auc, at("auc_lo"), at("auc_hi"))}, mean of ${cell.fold_auc.length} folds from ${number(Math.min(...cell.fold_auc))} to ` +
      `${number(Math.max(...cell.fold_auc))}. n ${cell.n}: ${cell.n_positive} ${positive}, ${cell.n - cell.n_positive} ${negative}. C = ${short(cell.C)}; groups kept together: ` +
      `${heat.groups}. ${typeof alone === "number" ? `The token alone gives AUC ${number(alone)}. ` : ""}` +
      `${cell.converged ? "Every probe is certified to be within its tolerance of the optimum." : "Not every probe has converged."}`),
    figures,
    el("h3", {}, "Samples that it gets most wrong"),
    el("div", { class: "pair" },
      examples(`${negative} samples, called ${positive}`, cell.alarms, name, heat, cell, positive),
      examples(`${positive} samples, not found`, cell.missed, name, heat, cell, positive)),
  );
  forget();
  const unit = { range: [-0.02, 1.02] };
  plot(roc, [CHANCE,
    ...cell.fold_roc.map((one, i) => ({ x: one.false, y: one.true, mode: "lines", line: { color: GREY, width: 1 }, opacity: 0.6, hoverinfo: "skip",
      name: "each fold", legendgroup: "fold", showlegend: i === 0 })),
    { x: cell.roc.false, y: cell.roc.true, customdata: cell.roc.threshold, mode: "lines", line: { color: COLOURS[0], width: 2.5 }, name: "all folds together",
      hovertemplate: `probability from %{customdata:.3f}<br>${positive} found %{y:.3f}<br>${negative} called so %{x:.3f}<extra></extra>` }],
  { title: `${negative} samples called ${positive}`, axis: unit }, { title: `${positive} samples found`, axis: unit });
  const { mean, share, lo, hi, n } = cell.calibration;
  plot(calibration, [CHANCE, {
    x: mean, y: share, mode: "lines+markers", line: { color: COLOURS[0] }, showlegend: false,
    text: mean.map((m, i) => `mean probability ${number(m)}<br>share ${number(share[i])}, 95 % ${number(lo[i])} to ${number(hi[i])}<br>n ${n[i]}`),
    hovertemplate: "%{text}<extra></extra>",
    error_y: { array: hi.map((h, i) => h - share[i]), arrayminus: lo.map((l, i) => share[i] - l), symmetric: false, thickness: 1.5 },
  }], { title: `probability of ${positive}`, axis: unit }, { title: `share that is ${positive}`, axis: unit });
  const { edges } = cell.histogram, middle = edges.slice(1).map((edge, i) => (edge + edges[i]) / 2);
  const bars = (counts, side, which, color) => ({
    type: "bar", x: middle, y: counts.map((count) => side * count), name: `${which}, ${side > 0 ? "above" : "below"}`, marker: { color },
    text: counts.map((count, i) => `${count} ${which} samples<br>probability ${number(edges[i], 2)} to ${number(edges[i + 1], 2)}`), textposition: "none",
    hovertemplate: "%{text}<extra></extra>",
  });
  const most = Math.max(...cell.histogram.positive, ...cell.histogram.negative, 1), step = Math.max(1, Math.round(most / 3));
  const ticks = [];
  for (let tick = -Math.ceil(most / step) * step; tick <= most; tick += step) ticks.push(tick);
  plot(spread, [bars(cell.histogram.positive, 1, positive, COLOURS[1]), bars(cell.histogram.negative, -1, negative, COLOURS[0])],
    { title: `probability of ${positive}`, axis: { range: [0, 1] } },
    { title: "samples", axis: { tickvals: ticks, ticktext: ticks.map((tick) => String(Math.abs(tick))) } }, { barmode: "relative", bargap: 0.05 });
}

function examples(title, found, name, heat, cell, positive) {
  const link = (one) => href(["captures", name, "samples", one.key], { grid: heat.name, layer: cell.layer, position: cell.position, C: cell.C });
  return el("div", {}, el("h4", {}, title), found.length ? el("ol", { class: "examples" }, found.map((one) => el("li", {},
    el("p", {}, el("strong", {}, number(one.probability)), ` probability of ${positive}, `, el("a", { href: link(one) }, `sample ${one.index}`),
      el("span", { class: "muted" }, ` · gold: ${one.gold.slice(0, 3).join(", ") || "not known"}${one.gold.length > 3 ? ", ..." : ""}`)),
    el("p", { class: "answer" }, one.before, one.exact ? el("mark", {}, el("span", { class: "hidden" }, "exact answer: "), one.exact) : null, one.after),
    el("details", {}, el("summary", {}, "prompt"), el("pre", { class: "prompt" }, one.prompt))))) : muted("None."));
}
