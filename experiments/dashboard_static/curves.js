// The run's curves: fetched once (thinned by the server), then grown by what the snapshots bring.
import { byId, element, getJson } from "./dom.js";
import { count, loss } from "./format.js";
import { Chart, join } from "./charts.js";

const MAX_POINTS = 800;
const AXES = { round: "Rounds", tokens: "Tokens", time: "Time" };
const REFETCH_POINTS = 400; // grown by so many points, a curve is fetched and thinned anew

export class Curves {
  constructor() {
    this.axis = "round";
    this.zoom = null;
    this.grown = 0;
    this.curves = { eval_loss: empty(), train_loss: empty(), tokens_per_s: empty() };
    this.loaded = false;
    const axes = byId("loss-axis");
    this.buttons = Object.entries(AXES).map(([axis, title]) =>
      element("button", { type: "button", onclick: () => this.choose(axis) }, title));
    this.reset = element("button", { type: "button", hidden: true, onclick: () => this.zoomTo(null, null) }, "Whole run");
    axes.append(...this.buttons, this.reset);
    this.speed = new Chart(byId("speed-chart"), {
      series: [{ label: "tokens/s", colour: "--blue", value: count }], xLabel: "Time", isTime: true });
    this.makeLoss();
  }

  makeLoss() {
    this.losses?.destroy();
    this.losses = new Chart(byId("loss-chart"), {
      series: [
        { label: "evaluation", colour: "--orange", points: true, value: loss, width: 2.5 },
        { label: "training", colour: "--blue", value: loss, width: 1.5 },
      ],
      xLabel: AXES[this.axis], isTime: this.axis === "time", onZoom: (start, end) => this.zoomTo(start, end) });
    Object.keys(AXES).forEach((axis, index) => this.buttons[index].setAttribute("aria-pressed", String(axis === this.axis)));
  }

  async choose(axis) {
    this.axis = axis;
    this.zoom = null;
    this.makeLoss();
    await this.load();
  }

  async zoomTo(start, end) {
    this.zoom = start === null ? null : [start, end];
    this.reset.hidden = this.zoom === null;
    await this.load();
  }

  async load() {
    this.loaded = true;
    this.grown = 0;
    const span = this.zoom ? `&start=${this.zoom[0]}&end=${this.zoom[1]}` : "";
    try {
      await Promise.all(Object.keys(this.curves).map(async (name) => {
        const range = name === "tokens_per_s" ? "" : `&axis=${this.axis}${span}`;
        this.curves[name] = await getJson(`/api/curves/${name}?max_points=${MAX_POINTS}${range}`);
      }));
    } catch {
      this.loaded = false; // with the next snapshot
      return;
    }
    this.draw();
  }

  show(snapshot) {
    if (!this.loaded || this.grown > REFETCH_POINTS) { this.load(); return; }
    const grew = [this.grow("eval_loss", snapshot, snapshot.eval_loss), this.grow("train_loss", snapshot, snapshot.train_loss),
      this.growSpeed(snapshot)];
    if (grew.some(Boolean)) this.draw();
  }

  grow(name, snapshot, newest) {
    const curve = this.curves[name];
    if (this.zoom || !newest || newest[0] <= (curve.round.at(-1) ?? -1)) return false;
    append(curve, snapshot.at, newest[0], snapshot.tokens, newest[1]);
    return ++this.grown;
  }

  growSpeed(snapshot) {
    const curve = this.curves.tokens_per_s;
    if (!snapshot.workers.length || snapshot.at - (curve.time.at(-1) ?? 0) < 5) return false;
    append(curve, snapshot.at, snapshot.health.round, snapshot.tokens, snapshot.tokens_per_s);
    return ++this.grown;
  }

  draw() {
    const { eval_loss: evaluated, train_loss: trained, tokens_per_s: speed } = this.curves;
    const tables = [evaluated, trained].map((curve) => [curve[this.axis], curve.value]);
    this.losses.show(join(tables), `Loss. ${told("Evaluation", evaluated)} ${told("Training", trained)}`);
    this.speed.show([speed.time, speed.value], `Tokens per second over time. Now ${count(speed.value.at(-1) ?? 0)}.`);
  }
}

const empty = () => ({ time: [], round: [], tokens: [], value: [] });

function append(curve, time, round, tokens, value) {
  curve.time.push(time); curve.round.push(round); curve.tokens.push(tokens); curve.value.push(value);
}

function told(what, curve) {
  if (!curve.value.length) return `${what}: none yet.`;
  return `${what} from ${loss(curve.value[0])} after round ${curve.round[0]} to ${loss(curve.value.at(-1))} after round ${curve.round.at(-1)}.`;
}
