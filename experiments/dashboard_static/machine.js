// My machine: this computer's workers, through their own control services. Needs the token of the printed address.
import { byId, element, setText, say } from "./dom.js";
import { count, bytes, duration, percent, loss, clock } from "./format.js";

const PERIOD_MS = 2000;
const LIMITS = [
  ["compute_percent", "Share of the time it computes (%)", "number"], ["threads", "CPU threads", "number"],
  ["memory_gb", "Memory (GB)", "number"], ["up_mbps", "Upload (Mbit/s)", "number"], ["down_mbps", "Download (Mbit/s)", "number"],
  ["daily_gb", "Traffic a day (GB)", "number"], ["monthly_gb", "Traffic a month (GB)", "number"],
  ["hours", "Hours, such as 22:00-08:00", "text"],
  ["on_battery", "Train on battery too", "checkbox"], ["when_idle", "Only while the machine is idle", "checkbox"],
];

const cards = new Map();
let place, isShown = false, isPublic = false;

export function startMachine(info) {
  place = byId("page-machine");
  isPublic = info.public;
  setInterval(() => { if (isShown && !document.hidden) refresh(); }, PERIOD_MS);
}

export function showMachine(shown) {
  isShown = shown && !isPublic;
  if (isShown) refresh();
}

async function ask(path, body) {
  const headers = { "x-dtrain-token": sessionStorage.getItem("dtrain-token") ?? "" };
  const request = body === undefined ? { headers }
    : { method: "POST", headers: { ...headers, "content-type": "application/json" }, body: JSON.stringify(body) };
  const answer = await fetch(path, request);
  const told = await answer.json();
  if (!answer.ok) throw new Error(told.error ?? `the dashboard answered ${answer.status}`);
  return told;
}

async function refresh() {
  let workers;
  try {
    workers = await ask("/api/worker");
  } catch (error) {
    cards.clear();
    note(error.message);
    return;
  }
  if (!workers.length) {
    cards.clear();
    note("No worker runs on this machine. Start one in a terminal: dtrain worker --run-id NAME");
    return;
  }
  place.querySelector(".nothing")?.remove();
  const there = new Set(workers.map((worker) => worker.pid));
  for (const [pid, card] of cards) if (!there.has(pid)) { card.node.remove(); cards.delete(pid); }
  for (const worker of workers) {
    if (!cards.has(worker.pid)) {
      cards.set(worker.pid, new Card(worker));
      place.append(cards.get(worker.pid).node);
    }
    cards.get(worker.pid).show(worker);
  }
}

function note(text) {
  const shown = place.querySelector(".nothing p");
  if (shown && place.children.length === 1) setText(shown, text);
  else place.replaceChildren(element("section", { class: "nothing" }, element("h1", {}, "My machine"), element("p", { class: "empty" }, text)));
}

class Card {
  constructor(worker) {
    this.pid = worker.pid;
    this.title = element("h2", {});
    this.state = element("span", { class: "note" });
    this.held = element("p", {});
    this.facts = element("dl", { class: "facts" });
    this.progress = element("progress", { hidden: true, "aria-label": "Progress" });
    this.toggle = element("button", { type: "button", class: "main", onclick: () => this.act(this.isPaused ? "resume" : "pause") });
    this.finish = element("button", { type: "button", onclick: () => this.leave() }, "Finish this round and leave");
    this.problem = element("p", { role: "alert", hidden: true });
    this.limits = element("form", { class: "limits", onsubmit: (event) => { event.preventDefault(); this.limit(); } });
    this.fields = LIMITS.map(([name, title, type]) => this.field(name, title, type));
    this.limits.append(element("div", { class: "buttons" }, element("button", { type: "submit" }, "Set the limits")));
    this.log = element("pre", { class: "log", tabindex: "0", "aria-label": "Log" });
    this.node = element("section", {},
      element("div", { class: "head" }, this.title, this.state), this.held, this.progress,
      element("div", { class: "buttons" }, this.toggle, this.finish), this.problem, this.facts,
      element("h3", {}, "Limits"), element("p", { class: "note" }, "Empty or 0 means: no limit. They are kept over restarts."), this.limits,
      element("h3", {}, "Log"), this.log);
  }

  field(name, title, type) {
    const input = element("input", { type, name, min: type === "number" ? 0 : undefined, step: "any" });
    this.limits.append(type === "checkbox"
      ? element("label", { class: "check" }, input, title) : element("label", {}, title, input));
    return input;
  }

  show(worker) {
    setText(this.title, worker.name + (worker.run_id ? ` in ${worker.run_id}` : ""));
    if (worker.error) { this.fail(worker.error); return; }
    this.isPaused = worker.pausing || worker.state === "paused";
    setText(this.state, worker.finishing ? "leaves after this round" : worker.pausing && worker.state !== "paused" ? "pausing" : worker.state);
    setText(this.held, worker.held ? `Holding: ${worker.held}` : "");
    setText(this.toggle, this.isPaused ? "Resume" : "Pause");
    this.finish.disabled = worker.finishing;
    this.showProgress(worker);
    this.showFacts(worker);
    this.showLimits(worker.limits);
    this.showLog();
  }

  showProgress({ progress, step, inner_steps: steps }) {
    const [done, total, text] = progress.stage ? [progress.done, progress.total, progress.stage] : [step, steps, "inner steps of this round"];
    this.progress.hidden = !total;
    if (total) { this.progress.max = total; this.progress.value = done; }
    this.progress.setAttribute("aria-label", text);
    this.progress.title = text;
  }

  showFacts(worker) {
    const facts = [
      ["Round", String(worker.round)], ["Tokens of yours", count(worker.tokens)],
      ["Tokens per second", count(worker.tokens_per_s)], ["Your share of the last round", percent(worker.last_share_percent / 100)],
      ["Rounds contributed", String(worker.rounds_contributed)], ["Training loss", worker.loss ? loss(worker.loss) : "–"],
      ["Time spent computing", percent(worker.compute_share)], ["Device", worker.device],
      ["Sent / received", `${bytes(worker.bytes_up)} / ${bytes(worker.bytes_down)}`], ["Traffic today", bytes(worker.bytes_today)],
      ["Memory", worker.memory_gb.toFixed(2) + " GB"], ["Running for", duration(Date.now() / 1000 - worker.started)],
    ];
    if (this.facts.children.length !== facts.length) {
      this.facts.replaceChildren(...facts.map(([label]) => element("div", {}, element("dt", {}, label), element("dd"))));
    }
    facts.forEach(([, value], index) => setText(this.facts.children[index].lastChild, value));
  }

  // What the user is typing stays.
  showLimits(limits) {
    if (this.limits.contains(document.activeElement) || this.isDirty()) return;
    this.fields.forEach((input) => {
      const value = limits[input.name];
      if (input.type === "checkbox") input.checked = Boolean(value);
      else input.value = value || "";
      input.dataset.shown = this.said(input);
    });
  }

  said(input) { return input.type === "checkbox" ? String(input.checked) : input.value; }

  isDirty() { return this.fields.some((input) => input.dataset.shown !== undefined && this.said(input) !== input.dataset.shown); }

  async limit() {
    const limits = {};
    for (const input of this.fields) {
      if (this.said(input) === input.dataset.shown) continue;
      limits[input.name] = input.type === "checkbox" ? input.checked : input.type === "number" ? Number(input.value) : input.value;
    }
    await this.send("limits", { pid: this.pid, limits }, "The limits are set");
    this.fields.forEach((input) => { input.dataset.shown = this.said(input); });
  }

  async leave() {
    if (confirm("Leave the run after this round? The worker ends; its work is kept.")) await this.act("finish");
  }

  async act(action) {
    await this.send(action, { pid: this.pid }, { pause: "Pausing", resume: "Going on", finish: "Leaving after this round" }[action]);
    refresh();
  }

  async send(path, body, told) {
    this.toggle.disabled = true;
    try {
      await ask("/api/worker/" + path, body);
      this.problem.hidden = true;
      say(told);
    } catch (error) {
      this.fail(error.message);
    } finally {
      this.toggle.disabled = false;
    }
  }

  fail(text) { this.problem.hidden = false; setText(this.problem, text); }

  async showLog() {
    try {
      const lines = await ask(`/api/worker/log?pid=${this.pid}&lines=200`);
      const atEnd = this.log.scrollTop + this.log.clientHeight >= this.log.scrollHeight - 4;
      setText(this.log, lines.map((line) => `${clock(line.time)}  ${line.text}`).join("\n"));
      if (atEnd) this.log.scrollTop = this.log.scrollHeight;
    } catch { /* the worker is just leaving: the next refresh tells */ }
  }
}
