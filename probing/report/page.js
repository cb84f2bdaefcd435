"use strict";
// Draws the page's figures with Plotly, in the page's colours, and again when these change or it is printed.
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  // Low values look like the page, high ones stand out.
  const scales = {
    light: [[0, "#f7fbff"], [0.25, "#c6dbef"], [0.5, "#6baed6"], [0.75, "#2171b5"], [1, "#08306b"]],
    dark: [[0, "#1b2530"], [0.25, "#1f4468"], [0.5, "#2f78b4"], [0.75, "#7fb9e4"], [1, "#e8f4ff"]],
  };
  const drawn = [...document.querySelectorAll("[data-figure]")].map((place) => ({
    place, figure: JSON.parse(document.getElementById(place.dataset.figure).textContent),
  }));
  const draw = (isDark) => {
    const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
    const [ink, line, page] = isDark === dark.matches
      ? ["--ink", "--line", "--page"].map(colour) : ["#000", "#bbb", "#fff"];
    for (const { place, figure } of drawn) {
      const { data, layout } = structuredClone(figure);
      for (const trace of data) if (trace.type === "heatmap") trace.colorscale = scales[isDark ? "dark" : "light"];
      layout.font = { family: getComputedStyle(document.body).fontFamily, size: 12, color: ink };
      layout.hoverlabel = { bgcolor: page, bordercolor: line, font: { color: ink }, align: "left" };
      for (const axis of ["xaxis", "yaxis"]) Object.assign(layout[axis], { gridcolor: line, linecolor: line, tickcolor: line });
      layout.height = Number(place.dataset.height);
      if (!place.dataset.done) place.replaceChildren();
      place.dataset.done = "yes";
      Plotly.react(place, data, layout, { responsive: true, displayModeBar: false });
    }
  };
  draw(dark.matches);
  dark.addEventListener("change", () => draw(dark.matches));
  addEventListener("beforeprint", () => draw(false));
  addEventListener("afterprint", () => draw(dark.matches));
})();
