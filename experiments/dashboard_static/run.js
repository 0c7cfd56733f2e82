// The run page: everything but its curves comes from the snapshot.
import { byId, element, setText, getJson, say } from "./dom.js";
import { count, bytes, seconds, duration, percent, loss, clock, day } from "./format.js";
import { Curves } from "./curves.js";
import { showLanes } from "./lanes.js";
import { SortedTable } from "./tables.js";

let workers, board, curves, info;
let received = 0; // performance.now() of the newest snapshot
let latest = null;

export function startRun(about) {
  info = about;
  curves = new Curves();
  workers = new SortedTable(byId("workers"), {
    caption: "Workers, sortable by every column",
    key: (row) => row.id,
    order: ["name", false],
    columns: [
      { key: "name", title: "Name", isText: true, value: (w) => w.name, fill: fillName },
      { key: "state", title: "State", isText: true, value: (w) => w.state, fill: fillState },
      { key: "round", title: "Round", value: (w) => w.round, text: (w) => String(w.round) + (w.lag ? ` (−${w.lag})` : "") },
      { key: "speed", title: "Tokens/s", value: (w) => w.tokens_per_s, text: (w) => (w.tokens_per_s ? count(w.tokens_per_s) : "–") },
      { key: "share", title: "Share", value: (w) => w.share, text: (w) => (w.share ? percent(w.share) : "–") },
      { key: "tokens", title: "Tokens", value: (w) => w.tokens, text: (w) => count(w.tokens), minor: true },
      { key: "up", title: "Up", value: (w) => w.up_bytes, text: (w) => bytes(w.up_bytes), minor: true },
      { key: "down", title: "Down", value: (w) => w.down_bytes, text: (w) => bytes(w.down_bytes), minor: true },
      { key: "reach", title: "Reached", isText: true, value: (w) => w.reach, text: (w) => REACH[w.reach] ?? w.reach, minor: true },
      { key: "device", title: "Device", isText: true, value: (w) => w.device, text: (w) => w.device, minor: true },
      { key: "age", title: "Heard", value: (w) => w.age_s, text: (w) => duration(w.age_s) + " ago", minor: true },
    ],
    decorate: (line, w) => { line.className = w.state === "gone" || w.state === "left" ? "gone" : ""; },
  });
  board = new SortedTable(byId("board"), {
    caption: "Contributors, sortable by every column",
    key: (row) => row.id,
    order: ["tokens", true],
    columns: [
      { key: "name", title: "Name", isText: true, value: (c) => c.name, fill: fillName },
      { key: "tokens", title: "Tokens", value: (c) => c.tokens, text: (c) => count(c.tokens) },
      { key: "rounds", title: "Rounds", value: (c) => c.contributions, text: (c) => String(c.contributions) },
      { key: "since", title: "First seen", value: (c) => c.first_seen, text: (c) => day(c.first_seen) + ", " + clock(c.first_seen).slice(0, 5) },
    ],
    decorate: (line, c) => { line.className = c.live ? "" : "gone"; },
  });
  setInterval(() => { if (latest) showAges(latest); }, 1000);
  showJoin();
}

const REACH = { direct: "direct", client: "outgoing only", relayed: "through a relay", "": "–" };

export function showRun(snapshot) {
  received = performance.now();
  const before = latest;
  latest = snapshot;
  const isEmpty = !snapshot.about.manifest_hash && !snapshot.tokens && !snapshot.board.length;
  byId("with-run").hidden = isEmpty;
  setText(byId("run-name"), snapshot.about.run_id);
  document.title = `${snapshot.health.round ? "round " + snapshot.health.round + " · " : ""}${snapshot.about.run_id} · dtrain`;
  showHealth(snapshot, isEmpty);
  if (info.invite === "" && snapshot.about.manifest_hash) refreshInfo();
  if (isEmpty) return;
  curves.show(snapshot);
  showFigures(snapshot);
  showSample(snapshot);
  showLanes(byId("lanes"), byId("lanes-legend"), snapshot.rounds);
  workers.show(snapshot.workers);
  board.show(snapshot.board);
  setText(byId("workers-note"), snapshot.workers.length ? "" : "Nobody is here now. Join below, or start one: dtrain worker --run-id " + snapshot.about.run_id);
  showBytes(snapshot);
  showEvents(snapshot.events, before?.events[0]?.id);
  showAges(snapshot);
}

function showHealth(snapshot, isEmpty) {
  const { health } = snapshot;
  byId("health").dataset.level = health.level;
  setText(byId("health-text"), health.text);
  if (isEmpty) {
    const id = snapshot.about.run_id;
    setText(byId("health-line"), `This page shows the run as soon as somebody trains it. Begin it: dtrain worker --run-id ${id}`);
  }
}

function showAges(snapshot) {
  const { health } = snapshot;
  if (byId("with-run").hidden) return;
  const passed = (performance.now() - received) / 1000;
  const target = snapshot.about.target_rounds;
  const facts = [["round", `${health.round}${target >= health.round ? " of " + target : ""}`]];
  if (health.phase) facts.push(["", health.phase]);
  facts.push([health.contributors === 1 ? "contributor" : "contributors", String(health.contributors)]);
  if (health.last_round_at) facts.push(["last exchange", `${seconds(health.last_exchange_s)}, ${duration(Math.max(0, snapshot.at - health.last_round_at + passed))} ago`]);
  if (health.round_s) facts.push(["per round", duration(health.round_s)]);
  facts.push(["weights", { agree: "all equal", differ: "DIFFER", "": "nothing to compare" }[health.digests]]);
  const text = facts.map(([label, value]) => (label ? `${label} ${value}` : value)).join(" · ");
  const line = byId("health-line");
  if (line.textContent === text) return;
  line.replaceChildren();
  facts.forEach(([label, value], index) => {
    line.append(index ? " · " : "", label ? label + " " : "", element("b", {}, value));
  });
}

function showFigures(snapshot) {
  const { eval_loss: evaluated, train_loss: trained } = snapshot;
  const figures = [
    ["Evaluation loss", evaluated ? loss(evaluated[1]) : "–", evaluated ? `round ${evaluated[0]}` : "none yet"],
    ["Training loss", trained ? loss(trained[1]) : "–", trained ? `round ${trained[0]}` : "none yet"],
    ["Tokens per second", count(snapshot.tokens_per_s), ""],
    ["Tokens", count(snapshot.tokens), ""],
    ["Left", snapshot.eta_s === null ? "–" : snapshot.eta_s ? duration(snapshot.eta_s) : "reached", `${snapshot.eta_s ? "to " : ""}round ${snapshot.about.target_rounds}`],
  ];
  const place = byId("figures");
  if (place.children.length !== figures.length) {
    place.replaceChildren(...figures.map(([label]) => element("div", {}, element("dt", {}, label), element("dd", {}, element("span"), " ", element("small")))));
  }
  figures.forEach(([, value, note], index) => {
    const cell = place.children[index].querySelector("dd");
    setText(cell.querySelector("span"), value);
    setText(cell.querySelector("small"), note);
  });
}

function showSample({ sample }) {
  const place = byId("sample");
  if (!sample) {
    setText(place, "Nothing yet. At evaluations one of the workers lets the model go on from a piece of text it has not seen.");
    return;
  }
  setText(byId("sample-note"), `after round ${sample.round}, at ${clock(sample.at)}, on ${sample.name}`);
  if (place.textContent === sample.prompt + sample.text) return;
  place.replaceChildren(element("span", { class: "prompt" }, sample.prompt), element("span", {}, sample.text));
}

function showBytes({ traffic, about }) {
  const place = byId("bytes");
  if (!place.children.length) {
    place.append(
      element("p", { class: "big" }), element("p", { class: "note" }),
      element("div", { class: "compare" },
        element("span", {}, "sent"), element("div", { class: "bar", "aria-hidden": "true" }, element("i")),
        element("span", {}, "all-reduce"), element("div", { class: "bar", "aria-hidden": "true" }, element("i"))),
      element("p", { class: "note" }), element("p", { class: "note" }));
  }
  const [big, against, compare, sums, log] = place.children;
  setText(big, traffic.ratio === null ? "–" : `${Math.round(traffic.ratio)}× less sent`);
  setText(against, traffic.ratio === null
    ? "Compared as soon as two workers have exchanged a round under this dashboard's eyes."
    : `than an fp32 ring all-reduce at each inner step: ${bytes(traffic.counted_up_bytes)} instead of ${bytes(traffic.allreduce_bytes)}`);
  compare.hidden = traffic.ratio === null;
  const bars = compare.querySelectorAll("i");
  const width = (value) => Math.max(0.2, 100 * value / Math.max(1, traffic.allreduce_bytes, traffic.counted_up_bytes)) + "%";
  bars[0].style.width = width(traffic.counted_up_bytes);
  bars[1].style.width = width(traffic.allreduce_bytes);
  setText(sums, `All workers together: ${bytes(traffic.up_bytes)} sent, ${bytes(traffic.down_bytes)} received, weights for newcomers and heartbeats included.`);
  setText(log, `Model: ${count(about.num_params)} parameters, ${about.preset}, trained on ${about.data}.`);
}

function showEvents(events, newestBefore) {
  const place = byId("events");
  if (!events.length) { setText(place, ""); place.append(element("li", { class: "empty" }, "", "Nothing has happened yet.")); return; }
  if (place.dataset.newest === String(events[0].id)) return;
  place.dataset.newest = String(events[0].id);
  place.replaceChildren(...events.map((event) =>
    element("li", {}, element("time", { datetime: new Date(1000 * event.at).toISOString() }, clock(event.at)),
      element("span", { class: event.kind === "gone" || event.kind === "problem" ? event.kind : undefined }, event.text))));
  if (newestBefore !== undefined) say(events.filter((event) => event.id > newestBefore).map((event) => event.text).join(". "));
}

function fillName(cell, row) {
  if (cell.dataset.name === row.name + row.mine) return;
  cell.dataset.name = row.name + row.mine;
  cell.title = `${row.name} (${row.id})`;
  cell.replaceChildren(element("span", {}, row.name), row.mine ? element("span", { class: "you" }, "yours") : "");
}

function fillState(cell, row) {
  if (!cell.firstChild) cell.append(element("span", { class: "state" }));
  cell.firstChild.dataset.state = row.state;
  setText(cell.firstChild, row.state);
}

let asking = false;

async function refreshInfo() {
  if (asking) return;
  asking = true;
  try { info = await getJson("/api/info"); showJoin(); } finally { setTimeout(() => { asking = false; }, 5000); }
}

function showJoin() {
  const place = byId("join-body");
  if (!info.join) {
    place.replaceChildren(element("p", { class: "empty" }, info.public
      ? "Ask somebody who trains this run for an invite."
      : "The invite is shown here once the run is found."));
    return;
  }
  const button = element("button", { type: "button", class: "main", id: "copy", onclick: () => copy(info.join, button) }, "Copy the command");
  place.replaceChildren(element("div", { class: "join" },
    element("div", {},
      element("p", {}, "On any computer with dtrain installed, type:"),
      element("code", { class: "command", tabindex: "0" }, info.join),
      button,
      element("p", { class: "note" }, "The invite holds the addresses of peers to join through, this machine's among them.")),
    element("img", { src: "/api/invite.svg", alt: "The invite as a QR code", width: 152, height: 152 })));
}

async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
    setText(button, "Copied");
    say("The command is copied");
  } catch {
    getSelection().selectAllChildren(button.parentElement.querySelector(".command"));
    setText(button, "Selected: press Ctrl-C");
  }
  setTimeout(() => setText(button, "Copy the command"), 3000);
}
