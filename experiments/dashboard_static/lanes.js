// The timeline of the last rounds. Lanes are laid against each other at the moment the group met, which is one and the
// same for all its members: no clocks are compared.
import { element, setText } from "./dom.js";
import { seconds } from "./format.js";

const PARTS = [["compute", "inner steps"], ["wait", "meeting the others"], ["exchange", "exchange"], ["apply", "outer step"]];

export function showLanes(place, legend, rounds) {
  if (!legend.children.length) {
    legend.append(...PARTS.map(([part, title]) => element("li", {}, element("i", { class: "i-" + part }), title)));
  }
  const drawn = JSON.stringify(rounds);
  if (place.dataset.drawn === drawn) return;
  place.dataset.drawn = drawn;
  if (!rounds.length) {
    place.replaceChildren(element("p", { class: "empty" }, "The first round is under way."));
    return;
  }
  const span = Math.max(...rounds.map(widest));
  place.replaceChildren(...rounds.map((round) => drawRound(round, span)));
}

const before = (lane) => lane.compute_s + lane.wait_s;
const after = (lane) => lane.exchange_s + lane.apply_s;

function widest({ lanes }) {
  return Math.max(...lanes.map(before)) + Math.max(...lanes.map(after)) || 1;
}

function drawRound({ round, lanes }, span) {
  const met = Math.max(...lanes.map(before));
  const head = element("p", {});
  setText(head, `Round ${round}`);
  return element("div", { class: "round" }, head, ...lanes.map((lane) => drawLane(lane, met, span)));
}

function drawLane(lane, met, span) {
  const bar = element("div", { class: "bar", "aria-hidden": "true" });
  let at = met - before(lane);
  for (const [part] of PARTS) {
    const length = lane[part + "_s"];
    const piece = element("i", { class: "i-" + part });
    piece.style.left = 100 * at / span + "%";
    piece.style.width = 100 * length / span + "%";
    bar.append(piece);
    at += length;
  }
  const told = PARTS.map(([part, title]) => `${title} ${seconds(lane[part + "_s"])}`).join(", ");
  return element("div", { class: "lane" + (lane.included ? "" : " out"), title: `${lane.name}: ${told}` },
    element("span", { class: "who" }, lane.name),
    bar,
    element("span", { class: "times", "aria-hidden": "true" }, `${seconds(lane.compute_s)} + ${seconds(lane.wait_s)} + ${seconds(lane.exchange_s)}`),
    element("span", { class: "hidden-text" }, told + (lane.included ? "" : "; not in the round")));
}
