// The border between the graph and the details, which can be moved. Its place is remembered on this machine.

const splitter = byId("splitter");
const REMEMBERED = "hf_transcoders.graph.panes";
const narrow = window.matchMedia("(max-width: 900px)");
const LEAST_PANE = 180;

// Browsers may refuse to remember anything for files.
function remembered() {
  try {
    const found = JSON.parse(localStorage.getItem(REMEMBERED));
    return found !== null && typeof found === "object" ? found : {};
  } catch {
    return {};
  }
}

// Beside the graph the width of the details counts, below it the height of the graph.
const paneName = () => (narrow.matches ? "graph" : "panel");
const paneSize = () => (narrow.matches ? byId("stages").offsetHeight : panel.offsetWidth);
const mostPane = () => (narrow.matches ? window.innerHeight * 1.5 : window.innerWidth - 320);

function setPane(size) {
  const next = Math.round(Math.max(LEAST_PANE, Math.min(size, Math.max(LEAST_PANE, mostPane()))));
  document.documentElement.style.setProperty(`--${paneName()}-size`, `${next}px`);
  describeSplitter();
  soon(redraw);
  return next;
}

function movePane(size) {
  const next = setPane(size);
  try {
    localStorage.setItem(REMEMBERED, JSON.stringify({ ...remembered(), [paneName()]: next }));
  } catch {
    // It then lasts until the page is closed.
  }
}

function restorePane() {
  const size = remembered()[paneName()];
  if (typeof size === "number" && size > 0) setPane(size);
  describeSplitter();
}

function describeSplitter() {
  splitter.setAttribute("aria-orientation", narrow.matches ? "horizontal" : "vertical");
  splitter.setAttribute("aria-valuemin", LEAST_PANE);
  splitter.setAttribute("aria-valuemax", Math.round(Math.max(LEAST_PANE, mostPane())));
  splitter.setAttribute("aria-valuenow", paneSize());
}

splitter.addEventListener("pointerdown", (event) => {
  const start = { at: narrow.matches ? event.clientY : event.clientX, size: paneSize() };
  splitter.setPointerCapture(event.pointerId);
  const move = (moved) => movePane(narrow.matches ? start.size + moved.clientY - start.at : start.size - (moved.clientX - start.at));
  splitter.addEventListener("pointermove", move);
  splitter.addEventListener("lostpointercapture", () => splitter.removeEventListener("pointermove", move), { once: true });
});
splitter.addEventListener("keydown", (event) => {
  const wider = narrow.matches ? { ArrowDown: 24, ArrowUp: -24 } : { ArrowLeft: 24, ArrowRight: -24 };
  const size = { Home: LEAST_PANE, End: mostPane() }[event.key] ?? (event.key in wider ? paneSize() + wider[event.key] : null);
  if (size === null) return;
  movePane(size);
  event.preventDefault();
});
splitter.addEventListener("dblclick", () => {
  document.documentElement.style.removeProperty(`--${paneName()}-size`);
  movePane(paneSize());
});
narrow.addEventListener("change", restorePane);
