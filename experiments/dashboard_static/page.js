// Begins here: reads what this dashboard has, follows the stream, shows the page that the address names.
import { byId, getJson } from "./dom.js";
import { listen } from "./stream.js";
import { startRun, showRun } from "./run.js";
import { startMachine, showMachine } from "./machine.js";
import { startExperiments, showExperiments } from "./experiments.js";

const PAGES = ["run", "machine", "experiments"];

// The token is in the fragment of the printed address, which browsers do not send; here it leaves the address bar too.
const token = /[#&]token=([\w-]+)/.exec(location.hash);
if (token) {
  sessionStorage.setItem("dtrain-token", token[1]);
  history.replaceState(null, "", location.pathname + "#run");
}

const info = await known();
startMachine(info);
startExperiments(info);
startRun(info);
if (info.run_id) listen(showRun);
addEventListener("hashchange", route);
route();

async function known() {
  for (;;) {
    try { return await getJson("/api/info"); } catch { await new Promise((done) => setTimeout(done, 1000)); }
  }
}

function route() {
  const first = info.run_id ? "run" : "experiments";
  const named = location.hash.slice(1).split("?")[0];
  const page = PAGES.includes(named) ? named : first;
  for (const name of PAGES) {
    byId("page-" + name).hidden = name !== page;
    const link = document.querySelector(`nav a[data-page=${name}]`);
    if (name === page) link.setAttribute("aria-current", "page"); else link.removeAttribute("aria-current");
  }
  document.querySelector("nav a[data-page=machine]").hidden = info.public;
  document.querySelector("nav a[data-page=run]").hidden = !info.run_id;
  showMachine(page === "machine");
  showExperiments(page === "experiments");
}
