// Curves on uPlot: colours from the style sheet, zoom by dragging, wheel-free, and a text for those who cannot see them.
import uPlot from "./vendor/uPlot.esm.js";

export const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

const dark = matchMedia("(prefers-color-scheme: dark)");

export class Chart {
  // series: [{label, colour (a CSS variable or a colour), dash, points, value: number -> text}]
  constructor(place, { series, xLabel, yText, logX = false, logY = false, isTime = false, legend = true, onZoom }) {
    this.place = place;
    this.options = { series, xLabel, yText, logX, logY, isTime, legend, onZoom };
    this.data = [[], ...series.map(() => [])];
    this.plot = null;
    this.sizes = new ResizeObserver(() => this.fit());
    this.sizes.observe(place);
    this.recolour = () => this.draw();
    dark.addEventListener("change", this.recolour);
  }

  show(data, summary) {
    this.data = data;
    this.place.setAttribute("role", "img");
    this.place.setAttribute("aria-label", summary);
    if (this.plot && data.length === this.plot.series.length) this.plot.setData(data);
    else this.draw();
    if (this.plot.height !== this.height()) this.fit(); // the legend has grown by a line
  }

  draw() {
    this.plot?.destroy();
    const { series, xLabel, logX, logY, isTime, legend, onZoom } = this.options;
    const paint = (name) => (name.startsWith("--") ? colour(name) : name);
    const axis = (extra) => ({
      stroke: colour("--soft"), font: "12px system-ui, sans-serif", labelFont: "12px system-ui, sans-serif",
      grid: { stroke: colour("--line"), width: 1 }, ticks: { show: false }, ...extra,
    });
    this.plot = new uPlot({
      width: this.place.clientWidth || 300,
      height: this.height(),
      legend: { show: legend, live: true },
      cursor: { y: false, drag: { x: true, y: false, setScale: !onZoom }, points: { size: 7 } },
      scales: {
        x: { time: isTime, distr: logX ? 3 : 1 },
        y: { distr: logY ? 3 : 1, range: logY ? undefined : (_, low, high) => padded(low, high) },
      },
      axes: [axis({ label: isTime ? undefined : xLabel, labelSize: 18, size: 28, values: isTime ? times : short, space: 70 }),
        axis({ size: 48, values: short })],
      series: [{ label: xLabel, value: (plot, v) => told(v ?? newest(plot.data[0]), (x) => (isTime ? new Date(x * 1000).toLocaleString() : short(null, [x])[0])) },
        ...series.map((one) => ({
          label: one.label, stroke: paint(one.colour), width: one.width ?? 2, dash: one.dash, spanGaps: true,
          points: { show: one.points ?? false, size: 6, fill: paint(one.colour) },
          value: (plot, v, index, at) => told(at === null ? newest(plot.data[index]) : v, one.value ?? ((y) => y.toPrecision(4))),
        }))],
      hooks: onZoom ? { setSelect: [(plot) => {
        if (plot.select.width > 4) onZoom(plot.posToVal(plot.select.left, "x"), plot.posToVal(plot.select.left + plot.select.width, "x"));
        plot.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
      }] } : {},
    }, this.data, this.place);
    if (onZoom) this.plot.over.addEventListener("dblclick", () => onZoom(null, null));
  }

  height() {
    const legend = this.place.querySelector(".u-legend");
    const rows = this.options.legend ? (legend?.offsetHeight || 30) : 0;
    return Math.max(120, this.place.clientHeight - rows);
  }

  fit() {
    if (this.plot && this.place.clientWidth) this.plot.setSize({ width: this.place.clientWidth, height: this.height() });
  }

  destroy() {
    dark.removeEventListener("change", this.recolour);
    this.sizes.disconnect();
    this.plot?.destroy();
    this.plot = null;
  }
}

// Without a pointer the legend tells the newest values.
const newest = (values) => values.findLast((value) => value !== null && value !== undefined);
const told = (value, text) => (value === null || value === undefined ? "" : text(value));

// Times of day, with the date where a day begins or lines are days apart.
function times(_, splits) {
  const apart = splits.length > 1 ? splits[1] - splits[0] : 60;
  let shown = "";
  return splits.map((at) => {
    const moment = new Date(1000 * at);
    const date = moment.toLocaleDateString([], { month: "short", day: "numeric" });
    if (apart >= 86400) return date;
    const isNewDay = shown && shown !== date;
    shown = date;
    const format = { hour: "2-digit", minute: "2-digit", second: apart < 60 ? "2-digit" : undefined, hourCycle: "h23" };
    return isNewDay ? date : moment.toLocaleTimeString([], format);
  });
}

function padded(low, high) {
  if (low === null || low === undefined || !isFinite(low)) return [0, 1];
  const room = (high - low || Math.abs(high) || 1) * 0.06;
  return [low >= 0 && low - room < 0 ? 0 : low - room, high + room];
}

export function short(_, values) {
  return values.map((value) => {
    if (value === null || value === undefined) return "";
    const size = Math.abs(value);
    if (size >= 1e12) return +(value / 1e12).toPrecision(4) + "T";
    if (size >= 1e9) return +(value / 1e9).toPrecision(4) + "B";
    if (size >= 1e6) return +(value / 1e6).toPrecision(4) + "M";
    if (size >= 1e4) return +(value / 1e3).toPrecision(4) + "k";
    return String(+value.toPrecision(4));
  });
}

export const join = (tables) => uPlot.join(tables);
