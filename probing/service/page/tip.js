// The tip beside a cell or a token: lines of text, near the pointer or what has the focus. It is aria-hidden: what it says
// stands in the label of what it is shown for.

const tip = document.getElementById("tip");

export function showTip(lines, at) {
  tip.replaceChildren(...lines.map((text, i) => {
    const line = document.createElement(i ? "div" : "strong");
    line.textContent = text;
    return line;
  }));
  tip.hidden = false;
  const box = at.getBoundingClientRect(), own = tip.getBoundingClientRect();
  const left = Math.min(Math.max(4, box.left + box.width / 2 - own.width / 2), document.documentElement.clientWidth - own.width - 4);
  const above = box.top - own.height - 6;
  tip.style.left = `${left}px`;
  tip.style.top = `${above > 4 ? above : box.bottom + 6}px`;
}

export function hideTip() {
  tip.hidden = true;
}

addEventListener("scroll", hideTip, { passive: true, capture: true });
addEventListener("keydown", (event) => event.key === "Escape" && hideTip());
