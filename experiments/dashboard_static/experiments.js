// The Experiments page: runs of `dtrain simulate` laid over each other. What is shown is in the address, so that a link
// restores it.
import { byId, element, setText, getJson, say } from "./dom.js";
import { bytes, count, duration } from "./format.js";
import { Chart, join } from "./charts.js";
import { SortedTable } from "./tables.js";

const X = { tokens: "Tokens", bytes_up_per_worker: "Bytes sent per worker", time_s: "Virtual time (s)", round: "Rounds" };
const Y = { eval_loss: "Evaluation loss", loss: "Training loss", contributors: "Contributors", wait_s: "Waiting (s)",
  exchange_s: "Exchange (s)", compute_share: "Compute share", lost_sections: "Lost sections" };
// Okabe and Ito's, in the light and the dark page's shades; dashes tell further runs apart.
const COLOURS = ["--blue", "--orange", "--green", "--violet", "--red", "--grey"];
const DASHES = [undefined, [6, 4], [2, 3], [9, 3, 2, 3]];
const SHOWN_AT_FIRST = 8;

const state = { x: "tokens", y: "eval_loss", group: "", logx: false, logy: false, smooth: 0, find: "", picked: null, sort: "eval_loss", down: false };
const curves = new Map(); // run key -> columns
let place, runs = [], table, chart, controls, isShown = false, hasResults = false, isBuilt = false;

const keyOf = (run) => run.folder + "/" + run.id;

export function startExperiments(info) {
  place = byId("page-experiments");
  hasResults = info.has_results;
}

export async function showExperiments(shown) {
  isShown = shown;
  if (!shown) return;
  if (!hasResults) { empty("No results are loaded. Start the dashboard with a folder that dtrain simulate wrote: dtrain dashboard --results DIR"); return; }
  restore();
  await load();
  if (!runs.length) { empty("The folder holds no finished run yet. This page looks again when you come back to it."); return; }
  if (!isBuilt) build();
  update();
}

function empty(text) {
  isBuilt = false;
  place.replaceChildren(element("section", {}, element("h1", {}, "Experiments"), element("p", { class: "empty" }, text)));
}

async function load() {
  const folders = await getJson("/api/results");
  runs = folders.flatMap((folder) => folder.rows.map((row) => ({ ...row, folder: folder.folder, sweep: folder.name, varied: folder.varied })));
  state.picked ??= runs.slice(0, SHOWN_AT_FIRST).map(keyOf);
}

// ---------------------------------------------------------------- the address

function restore() {
  const wanted = new URLSearchParams(location.hash.split("?")[1] ?? "");
  for (const name of ["x", "y", "group", "find", "sort"]) if (wanted.has(name)) state[name] = wanted.get(name);
  for (const name of ["logx", "logy", "down"]) if (wanted.has(name)) state[name] = wanted.get(name) === "1";
  if (wanted.has("smooth")) state.smooth = Math.min(0.99, Math.max(0, Number(wanted.get("smooth")) || 0));
  if (wanted.has("runs")) state.picked = wanted.getAll("runs").filter(Boolean);
  if (!(state.x in X)) state.x = "tokens";
  if (!(state.y in Y)) state.y = "eval_loss";
}

function remember() {
  const kept = new URLSearchParams();
  for (const [name, value] of Object.entries(state)) {
    if (name === "picked") (value.length ? value : [""]).forEach((key) => kept.append("runs", key));
    else kept.set(name, typeof value === "boolean" ? String(Number(value)) : String(value));
  }
  history.replaceState(null, "", "#experiments?" + kept);
}

// ---------------------------------------------------------------- the page

function build() {
  isBuilt = true;
  controls = element("div", { class: "controls" },
    choice("x", "Against", X), choice("y", "Show", Y), choice("group", "Group by", { "": "nothing", ...Object.fromEntries(groupFields().map((key) => [key, key])) }),
    check("logx", "log x"), check("logy", "log y"),
    element("label", {}, "Smoothing", element("input", { type: "range", min: 0, max: 0.98, step: 0.02, value: state.smooth,
      oninput: (event) => { state.smooth = Number(event.target.value); update(); } })),
    element("button", { type: "button", onclick: exportCsv }, "Export CSV"),
    element("button", { type: "button", onclick: exportPng }, "Export PNG"),
    element("button", { type: "button", id: "copy-view", onclick: copyLink }, "Copy the link"));
  const columns = [
    { key: "label", title: "Run", isText: true, value: (r) => r.label ?? r.id, fill: fillRun },
    { key: "sweep", title: "Sweep", isText: true, value: (r) => r.sweep, text: (r) => r.sweep, minor: true },
    number("workers", "Workers", String), number("seed", "Seed", String, true), number("inner_steps", "H", String, true),
    number("rounds", "Rounds", String), number("tokens", "Tokens", count), number("eval_loss", "Eval. loss", (v) => v.toFixed(4)),
    number("bytes_up_per_worker", "Sent per worker", bytes), number("ratio_vs_fp32_allreduce", "Less than all-reduce", (v) => Math.round(v) + "×"),
    number("virtual_time_s", "Virtual time", duration, true), number("compute_share", "Compute", (v) => (100 * v).toFixed(0) + " %", true),
  ];
  const body = element("table", { id: "runs" });
  place.replaceChildren(
    element("section", {}, element("h1", {}, "Experiments"), controls, element("div", { class: "chart", id: "overlay" })),
    element("section", {},
      element("div", { class: "head" }, element("h2", {}, "Runs"),
        element("div", { class: "choices" },
          element("input", { type: "search", id: "find", placeholder: "Filter", "aria-label": "Filter the runs", value: state.find,
            oninput: (event) => { state.find = event.target.value; update(); } }),
          element("button", { type: "button", onclick: () => pick(found().map(keyOf)) }, "Show all"),
          element("button", { type: "button", onclick: () => pick([]) }, "Show none"))),
      element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Runs" }, body)));
  table = new SortedTable(body, {
    caption: "Runs, sortable by every column; ticked ones are in the chart", columns, key: keyOf, order: [state.sort, state.down],
    onOrder: ([key, down]) => { state.sort = key; state.down = down; remember(); } });
}

function choice(name, title, options) {
  return element("label", {}, title, element("select", { id: "choose-" + name, onchange: (event) => { state[name] = event.target.value; update(); } },
    ...Object.entries(options).map(([value, text]) => element("option", { value, selected: state[name] === value }, text))));
}

function check(name, title) {
  return element("label", { class: "check" }, element("input", { type: "checkbox", id: "check-" + name, checked: state[name],
    onchange: (event) => { state[name] = event.target.checked; update(); } }), title);
}

const number = (key, title, text, minor = false) => ({
  key, title, minor, value: (run) => run[key] ?? null, text: (run) => (run[key] === null || run[key] === undefined ? "–" : text(run[key])) });

function fillRun(cell, run) {
  const key = keyOf(run);
  if (!cell.firstChild) {
    const box = element("input", { type: "checkbox", onchange: (event) => pick(event.target.checked ? [...state.picked, key] : state.picked.filter((one) => one !== key)) });
    cell.append(element("label", {}, box, " ", element("span", { class: "swatch", hidden: true }), element("span")));
  }
  const [box, swatch, text] = [cell.querySelector("input"), cell.querySelector(".swatch"), cell.querySelector("span:last-child")];
  setText(text, run.label ?? run.id);
  box.checked = state.picked.includes(key);
  const look = looks().get(key);
  swatch.hidden = !look;
  if (look) {
    swatch.style.borderColor = `var(${look.colour})`;
    swatch.style.borderTopStyle = look.dash ? "dashed" : "solid";
  }
}

function pick(keys) {
  state.picked = [...new Set(keys)];
  update();
}

const found = () => runs.filter((run) => {
  const text = JSON.stringify(run).toLowerCase();
  return state.find.toLowerCase().split(/\s+/).every((word) => text.includes(word));
});

const picked = () => found().filter((run) => state.picked.includes(keyOf(run)));

function groupFields() {
  const fields = new Set(["label", "strategy", "workers", "seed", "profile", "overlap", "inner_steps", ...runs.flatMap((run) => run.varied)]);
  return [...fields].filter((field) => new Set(runs.map((run) => groupOf(run, field))).size > 1);
}

const groupOf = (run, field) => String(run[field] ?? run.settings?.[field] ?? "–");

// Colour and dash of every shown run; runs of a group share them.
function looks() {
  const found = new Map(), known = [];
  for (const run of picked()) {
    const group = state.group ? groupOf(run, state.group) : keyOf(run);
    if (!known.includes(group)) known.push(group);
    const index = known.indexOf(group);
    const dash = DASHES[Math.floor(index / COLOURS.length) % DASHES.length];
    found.set(keyOf(run), { colour: COLOURS[index % COLOURS.length], dash, name: legendOf(run, group) });
  }
  return found;
}

// Runs that share a label differ in their seed.
function legendOf(run, group) {
  const name = state.group ? `${state.group} ${group}` : run.label ?? run.id;
  const isAlone = picked().filter((other) => (state.group ? groupOf(other, state.group) === group : other.label === run.label)).length === 1;
  return isAlone || run.seed === undefined ? name : `${name}, seed ${run.seed}`;
}

// ---------------------------------------------------------------- the chart

async function update() {
  if (!isShown || !isBuilt) return;
  remember();
  table.show(found());
  const shown = picked();
  await Promise.all(shown.filter((run) => !curves.has(keyOf(run))).map(fetchCurve));
  draw(shown);
}

async function fetchCurve(run) {
  try {
    curves.set(keyOf(run), await getJson(`/api/results/curve?folder=${encodeURIComponent(run.folder)}&run=${encodeURIComponent(run.id)}`));
  } catch {
    say(`The rounds of ${run.label} cannot be read`);
  }
}

function points(run) {
  const columns = curves.get(keyOf(run));
  const xs = [], ys = [];
  let smooth = null;
  columns[state.x].forEach((x, index) => {
    const y = columns[state.y][index];
    if (x === null || y === null || (state.logx && x <= 0) || (state.logy && y <= 0) || (xs.length && x <= xs.at(-1))) return;
    smooth = smooth === null ? y : state.smooth * smooth + (1 - state.smooth) * y;
    xs.push(x); ys.push(smooth);
  });
  return [xs, ys];
}

function draw(shown) {
  chart?.destroy();
  const styles = looks();
  const drawn = shown.filter((run) => curves.has(keyOf(run)) && points(run)[0].length);
  byId("overlay").replaceChildren();
  if (!drawn.length) {
    chart = null;
    byId("overlay").append(element("p", { class: "empty" }, "Tick runs in the table to lay them over each other."));
    return;
  }
  chart = new Chart(byId("overlay"), {
    series: drawn.map((run) => ({ label: styles.get(keyOf(run)).name, ...styles.get(keyOf(run)) })),
    xLabel: X[state.x], logX: state.logx, logY: state.logy });
  const tables = drawn.map(points);
  const last = drawn.map((run, index) => `${run.label ?? run.id}: ${tables[index][1].at(-1).toPrecision(4)}`);
  chart.show(tables.length === 1 ? tables[0] : join(tables), `${Y[state.y]} against ${X[state.x]}, ${drawn.length} runs. At the end ${last.join("; ")}.`);
  byId("overlay").dataset.runs = String(drawn.length);
}

// ---------------------------------------------------------------- taking it away

function exportCsv() {
  const quote = (value) => (/[",\n]/.test(String(value)) ? `"${String(value).replaceAll('"', '""')}"` : String(value));
  const lines = [["folder", "run", "label", state.x, state.y].join(",")];
  for (const run of picked()) {
    const [xs, ys] = points(run);
    xs.forEach((x, index) => lines.push([run.folder, run.id, run.label, x, ys[index]].map(quote).join(",")));
  }
  save(new Blob([lines.join("\n") + "\n"], { type: "text/csv" }), "dtrain-runs.csv");
}

function exportPng() {
  const canvas = byId("overlay").querySelector("canvas");
  if (!canvas) return;
  const picture = element("canvas", { width: canvas.width, height: canvas.height });
  const pen = picture.getContext("2d");
  pen.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--card");
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.drawImage(canvas, 0, 0);
  const styles = [...new Map([...looks().values()].map((look) => [look.name, look])).values()];
  pen.font = `${12 * devicePixelRatio}px system-ui, sans-serif`;
  styles.forEach((look, index) => {
    pen.fillStyle = getComputedStyle(document.documentElement).getPropertyValue(look.colour);
    pen.fillText("— " + look.name, canvas.width * 0.6, (24 + 18 * index) * devicePixelRatio);
  });
  picture.toBlob((blob) => save(blob, "dtrain-runs.png"));
}

function save(blob, name) {
  const link = element("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  say(`${name} is saved`);
}

async function copyLink() {
  remember();
  const button = byId("copy-view");
  try {
    await navigator.clipboard.writeText(location.href);
    setText(button, "Copied");
  } catch {
    setText(button, "Copy it from the address bar");
  }
  setTimeout(() => setText(button, "Copy the link"), 3000);
}
