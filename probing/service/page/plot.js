// Plotly's figures, in the page's colours, drawn anew when these change.

const dark = matchMedia("(prefers-color-scheme: dark)");
const drawn = new Map();

export const COLOURS = ["#2f7fc8", "#cf6a12"]; // 3 to 1 at least on both pages
export const GREY = "#808080";
export const CHANCE = { x: [0, 1], y: [0, 1], mode: "lines", line: { color: GREY, width: 1, dash: "dot" }, hoverinfo: "skip", showlegend: false };

// place : an element that is in the page.  x, y : titles, or axes.  more : of Plotly's layout.
export function plot(place, data, x, y, more = {}) {
  if (!window.Plotly) return place.replaceChildren("Plotly is not installed on the server: pip install 'hiddenlake[serve]'");
  drawn.set(place, { data, x, y, more });
  draw(place);
}

function draw(place) {
  const { data, x, y, more } = drawn.get(place);
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const [ink, line, page] = ["--ink", "--line", "--page"].map(colour);
  const axis = (given) => ({
    title: { text: given.title }, automargin: true, zeroline: false, fixedrange: true, gridcolor: line, linecolor: line, tickcolor: line, ...given.axis,
  });
  Plotly.react(place, structuredClone(data), {
    template: "none", margin: { l: 50, r: 10, t: 8, b: 45 }, height: 320, dragmode: false, hovermode: "closest",
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: ink },
    hoverlabel: { bgcolor: page, bordercolor: line, font: { color: ink }, align: "left" },
    legend: { orientation: "h", y: -0.25, yanchor: "top" }, xaxis: axis(x), yaxis: axis(y), ...more,
  }, { responsive: true, displayModeBar: false });
}

dark.addEventListener("change", () => {
  for (const place of drawn.keys()) place.isConnected ? draw(place) : drawn.delete(place);
});

// Those of cells that are not shown any more.
export function forget() {
  for (const place of drawn.keys()) if (!place.isConnected) Plotly.purge(place), drawn.delete(place);
}
