// A capture: what it holds, its grids as heatmaps, the open cell, and its samples.

import { ask } from "./api.js";
import { showCell } from "./cell.js";
import { bytes, choice, el, facts, interval, muted, number, short } from "./dom.js";
import { difference, heatmap, legend, shade } from "./heatmap.js";
import { change, here } from "./place.js";
import { showSamples } from "./samples.js";

// What is drawn on a fixed scale: chance to certainty.
const AUCS = /(^|_)auc$/;

let drawn = null; // what of the page stands, while its cell or its samples change

export async function showCapture(main, { path, params }, signal) {
  const name = path[1];
  const wanted = JSON.stringify(["grid", "with", "metric", "C"].map((key) => params.get(key)).concat(name));
  if (drawn?.wanted === wanted && main.contains(drawn.place)) return drawn.cell(params, signal);
  const [about, { grids }] = await Promise.all([
    ask(["v1", "captures", name], {}, signal), ask(["v1", "captures", name, "grids"], {}, signal),
  ]);
  const grid = grids.find((one) => one.name === params.get("grid")) ?? grids.find((one) => !one.no_cells) ?? grids[0];
  const other = grids.find((one) => one.name === params.get("with") && one !== grid);
  const place = el("section", { "aria-labelledby": "grids" }), cell = el("section", { id: "cell" });
  const samples = el("section", { "aria-labelledby": "samples" });
  let maps = [];
  if (grid) maps = await drawGrids(place, name, grids, grid, other, params, signal);
  else place.append(el("h2", { id: "grids" }, "Grids"), muted("No grid of this capture lies in LAKE/grids, or beside the lake: " +
    "`hiddenlake probe LAKE/NAME --site SITE --out grids/NAME.zarr` fits one."));
  if (signal.aborted) return;
  main.replaceChildren(el("h1", {}, name), about_(about), place, cell, samples);
  drawn = {
    wanted, place,
    cell: async (now, sign) => {
      for (const map of maps) map.follow(now);
      await Promise.all([
        grid ? showCell(cell, name, grids.find((one) => one.name === now.get("of")) ?? grid, maps, now, sign) : null,
        showSamples(samples, name, about, now, sign),
      ]);
    },
  };
  await drawn.cell(params, signal);
}

function about_(about) {
  const state = about.samples >= about.planned ? "complete" : `${about.samples} of ${about.planned} planned samples are there`;
  const verified = about.verified ? `verified ${about.verified.time ?? ""}` : "";
  return facts([
    ["model; task", `${about.model ?? "unknown"}; ${about.task ?? "unknown"}`],
    ["samples; size", `${about.samples}; ${bytes(about.bytes)}`],
    ["layers; positions", `${about.layers.length}; ${about.positions.length}${about.tokens ? `; tokens ${about.tokens}` : ""}`],
    ["sites; dtype", `${about.sites.join(", ")}; ${about.dtype}`],
    ["state", [state, about.failures ? `${about.failures} samples failed` : "", verified].filter(Boolean).join("; ")],
  ]);
}

const title = (grid) => {
  const compat = grid.attrs.compat && grid.attrs.compat !== "none" ? `, compat ${grid.attrs.compat}` : "";
  return `${grid.site}, ${grid.label}, groups: ${grid.groups}${compat}`;
};

const unique = (values) => [...new Set(values)];

async function drawGrids(place, name, grids, grid, other, params, signal) {
  const metric = params.get("metric") || "auc";
  const load = (one, C) => ask(["v1", "captures", name, "grids", one.name], { C, metric: metric === "auc" ? [] : [metric] }, signal);
  const first = await load(grid, params.get("C"));
  // Another grid may have other values of C: it is drawn at its own.
  const second = other ? await load(other, null) : null;
  const pick = (changes) => change({ C: null, layer: null, position: null, of: null, ...changes });
  const fitting = (site, label) => grids.find((g) => g.site === site && g.label === label && !g.no_cells) ??
    grids.find((g) => g.site === site && g.label === label) ?? grids.find((g) => g.site === site || g.label === label);
  const controls = el("div", { class: "controls" },
    choice("site", unique(grids.map((g) => g.site)).map((s) => [s, s]), grid.site, (site) => pick({ grid: fitting(site, grid.label).name, with: null })),
    choice("label", unique(grids.map((g) => g.label)).map((s) => [s, s]), grid.label, (label) => pick({ grid: fitting(grid.site, label).name, with: null })),
    choice("grid", grids.filter((g) => g.site === grid.site && g.label === grid.label).map((g) => [g.name, `${g.name} (groups: ${g.groups})`]),
      grid.name, (chosen) => pick({ grid: chosen, with: null })),
    choice("metric", first.metrics.map((one) => [one, one.replaceAll("_", " ")]), metric, (chosen) => change({ metric: chosen === "auc" ? null : chosen })),
    first.all_C.length > 1 ? choice("C", first.all_C.map((c) => [c, short(c)]), first.C, (C) => change({ C })) : null,
    choice("compare with", [["", "nothing"], ...grids.filter((g) => g !== grid).map((g) => [g.name, `${g.name} (${title(g)})`])],
      other?.name ?? "", (chosen) => change({ with: chosen || null, of: null })),
  );
  const both = second ? [first, second] : [first];
  const [low, high] = scale(both, metric);
  const maps = both.map((heat) => oneMap(name, heat, metric, low, high, heat === second));
  const parts = maps.map((map) => map.figure);
  if (second) parts.push(differenceMap(first, second, metric));
  const clipped = AUCS.test(metric) ? " Below 0.5 the colour is that of 0.5." : "";
  place.append(el("h2", { id: "grids" }, "Where a linear probe tells"), controls,
    el("p", { class: "headline" }, headline(first)),
    el("div", { class: second ? "maps several" : "maps" }, parts),
    legend(short(low), short(high)),
    el("p", { class: "muted" }, `${metric.replaceAll("_", " ")}, by layer (rows, 0-based) and token (columns).${clipped} The box is the cell of the ` +
      `highest AUC of all ${first.attrs.n_cells ?? ""} cells. Striped: no probe; the pointer says why. Choose a cell, or go with the arrows and press Enter, for ` +
      `its ROC, calibration and the samples that it gets most wrong.${second ? " Both grids have one colour scale." : ""}`));
  return maps;
}

function headline(heat) {
  if (!heat.best) return "No cell was fitted.";
  const { best } = heat, row = heat.layers.indexOf(best.layer), column = heat.positions.indexOf(best.position);
  const alone = heat.values.token_auc?.[row]?.[column];
  return `At layer ${best.layer} and the token ${best.position}, a linear probe of ${heat.site} tells ${heat.positive} from ${heat.negative} samples with AUC ${interval(best.auc, best.auc_lo, best.auc_hi)}. ` +
    (alone === null || alone === undefined ? "" : `Its token alone, before any layer, gives ${number(alone)}. `) +
    (heat.attrs.note ?? "");
}

function scale(heats, metric) {
  if (AUCS.test(metric)) return [0.5, 1];
  const values = heats.flatMap((heat) => heat.values[metric] ?? []).flat().filter((value) => value !== null);
  return values.length ? [Math.min(...values), Math.max(...values)] : [0, 1];
}

// What is said of a cell; the first line names it.
function words(heat, metric, row, column) {
  const { values } = heat, at = (name) => values[name]?.[row]?.[column];
  const lines = [`layer ${heat.layers[row]}, ${heat.positions[column]}`];
  if (at("auc") === null) lines.push(`no probe: ${heat.reasons[row][column]}`);
  else lines.push(`AUC ${interval(at("auc"), at("auc_lo"), at("auc_hi"))}`);
  const classes = [heat.positive, heat.negative].filter((one) => at(`n_${one}`) !== undefined).map((one) => `${at(`n_${one}`)} ${one}`);
  lines.push([`n ${at("n")}`, classes.join(", ")].filter(Boolean).join(": "));
  if (typeof at("token_auc") === "number") lines.push(`token alone: AUC ${number(at("token_auc"))}`);
  if (!["auc", "n", "token_auc"].includes(metric)) lines.push(`${metric.replaceAll("_", " ")}: ${short(at(metric))}`);
  return lines;
}

function find(heat, layer, position) {
  const found = [heat.layers.indexOf(Number(layer)), heat.positions.indexOf(position)];
  return layer === null || found.includes(-1) ? null : found;
}

function oneMap(name, heat, metric, low, high, isOther) {
  const own = (params) => (params.get("of") === heat.name || (!params.get("of") && !isOther));
  const open = (row, column) => change({ layer: heat.layers[row], position: heat.positions[column], of: isOther ? heat.name : null });
  const chosen = (params) => own(params) ? find(heat, params.get("layer"), params.get("position")) : null;
  const counts = heat.values.n.flat().filter((value) => value !== null);
  const n = [Math.min(...counts), Math.max(...counts)];
  const map = heatmap({
    name: `${metric} of ${heat.name}`, layers: heat.layers, positions: heat.positions,
    lines: (row, column) => words(heat, metric, row, column),
    colour: (row, column) => {
      const value = heat.values[metric]?.[row]?.[column];
      return value === null || value === undefined ? null : shade(value, low, high);
    },
    best: heat.best ? find(heat, heat.best.layer, heat.best.position) : null, chosen: chosen(here().params), open,
  });
  const caption = `${heat.name}: ${heat.site}, ${heat.positive_class} (label ${heat.label}); groups kept together: ${heat.groups}; C = ${short(heat.C)}; ` +
    `n ${n[0] === n[1] ? n[0] : `${n[0]} to ${n[1]}`} of ${heat.n_samples} samples; intervals: ${heat.attrs.interval ?? "none"}.`;
  const figure = el("figure", {}, el("div", { class: "scroll" }, map.table), el("figcaption", {}, caption));
  return { figure, heat, follow: (params) => map.choose(chosen(params)) };
}

function differenceMap(first, second, metric) {
  const layers = first.layers.filter((layer) => second.layers.includes(layer));
  const positions = first.positions.filter((position) => second.positions.includes(position));
  const both = layers.map((layer) => positions.map((position) => [first, second].map((heat) => {
    const [row, column] = find(heat, layer, position);
    return heat.values[metric]?.[row]?.[column] ?? null;
  })));
  const differ = ([one, two]) => one === null || two === null ? null : one - two;
  const most = Math.max(0, ...both.flat().map((pair) => Math.abs(differ(pair) ?? 0)));
  const { table } = heatmap({
    name: `difference of ${metric}`, layers, positions, best: null, chosen: null,
    lines: (row, column) => {
      const pair = both[row][column], found = differ(pair);
      return [`layer ${layers[row]}, ${positions[column]}`, `${short(pair[0])} minus ${short(pair[1])}: ${found === null ? "none" : `${found > 0 ? "+" : ""}${short(found)}`}`];
    },
    colour: (row, column) => {
      const found = differ(both[row][column]);
      return found === null ? null : difference(found, most);
    },
    open: (row, column) => change({ layer: layers[row], position: positions[column], of: null }),
  });
  return el("figure", {}, el("div", { class: "scroll" }, table), legend(`-${short(most)}`, `+${short(most)}`, "scale both"),
    el("figcaption", {}, `The difference: ${first.name} minus ${second.name}, where both have the cell. The two may rest on other samples, ` +
      `folds or groups; a difference within the intervals says little.`));
}
