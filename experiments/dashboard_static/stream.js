// The live stream, and the banner that says when it is gone and how old what one sees is.
import { byId, setText } from "./dom.js";
import { duration } from "./format.js";

const SILENT_S = 15; // the server says something at least every 10 s

let heard = 0; // by this machine's clock
let connectionLost = "";

export function listen(onSnapshot) {
  const source = new EventSource("/api/stream");
  const alive = () => { heard = performance.now(); showBanner(); };
  source.addEventListener("snapshot", (event) => {
    const snapshot = JSON.parse(event.data);
    connectionLost = snapshot.connection;
    alive();
    onSnapshot(snapshot);
  });
  source.addEventListener("alive", alive);
  source.addEventListener("open", alive);
  source.addEventListener("error", () => {
    showBanner(source.readyState !== EventSource.OPEN);
    if (source.readyState === EventSource.CLOSED) setTimeout(() => { source.close(); listen(onSnapshot); }, 2000);
  });
  setInterval(() => showBanner(source.readyState !== EventSource.OPEN), 1000);
}

function showBanner(isClosed = false) {
  const silent = (performance.now() - heard) / 1000;
  let text = connectionLost;
  if (isClosed || silent > SILENT_S) {
    text = "No connection to the dashboard; trying again. " +
      (heard ? `What you see is ${duration(silent)} old.` : "Is `dtrain dashboard` still running?");
  }
  const banner = byId("banner");
  banner.hidden = !text;
  setText(banner, text);
}
