// User input, and redrawing after it.

function redraw() {
  // The node under the pointer may move away without the pointer leaving it.
  hovered = null;
  hideTooltip();
  byId("graph").hidden = state.view !== "graph";
  byId("pinned").hidden = state.view !== "pinned";
  byId("view-graph").setAttribute("aria-pressed", state.view === "graph");
  byId("view-pinned").setAttribute("aria-pressed", state.view === "pinned");
  for (const name of ["nodes", "edges"]) {
    byId(name).value = state[name];
    byId(`${name}-value`).textContent = `${state[name]}%`;
  }
  if (byId("search").value !== state.search) byId("search").value = state.search;
  byId("lines").value = String(state.lines);
  prune();
  byId("edge-count").textContent = `of ${shown.edges.length.toLocaleString("en")}`;
  const found = state.search.trim() ? NODES.filter((node) => matches(node) && shown.nodes[node.number]).length : null;
  byId("search-count").textContent = found === null ? "" : `${found} found`;
  if (state.view === "graph") {
    drawNodes();
    drawStates();
    drawEdges();
    drawZoom();
  }
  drawPinned();
}

// Applies a change, redraws, and writes it to the address. The element of the panel with the focus keeps it by its id.
function act(change, focusId) {
  change();
  writeHash();
  redraw();
  drawPanel();
  if (focusId) byId(focusId)?.focus();
}

function select(number, { focusPanel = false } = {}) {
  act(() => {
    state.selected = number;
    openGroup = null;
  });
  if (number === null) {
    announce("Selection cleared");
    return;
  }
  setCurrent(number);
  reveal(number);
  announce(`${NODES[number].label} selected`);
  if (focusPanel) panel.focus();
}

function hover(number) {
  hovered = number;
  drawEdges();
}

function changeView(view) {
  act(() => { state.view = view; });
}

byId("view-graph").addEventListener("click", () => changeView("graph"));
byId("view-pinned").addEventListener("click", () => changeView("pinned"));
byId("overview").addEventListener("click", () => { select(null); panel.focus(); });
byId("reset").addEventListener("click", (event) => {
  event.preventDefault();
  history.replaceState(null, "", location.pathname + location.search);
  restore();
});
byId("group").addEventListener("click", () => act(() => {
  openGroup = makeGroup(marked);
  state.selected = null;
  marked.clear();
}, "rename"));
byId("lines").append(...LINES.map((count) => element("option", { value: count }, count === Infinity ? "all" : String(count))));
byId("lines").addEventListener("change", (event) => act(() => { state.lines = Number(event.target.value); }));
byId("prompt")?.addEventListener("change", (event) => changeGraph(Number(event.target.value)));
byId("save").addEventListener("click", save);
byId("load").addEventListener("click", () => byId("file").click());
byId("file").addEventListener("change", async (event) => {
  const [file] = event.target.files;
  if (file) await load(file);
  // The same file can be chosen again.
  event.target.value = "";
});
byId("close-message").addEventListener("click", () => tell(""));
for (const name of ["nodes", "edges"]) {
  byId(name).addEventListener("input", (event) => act(() => { state[name] = Number(event.target.value); }));
}
byId("search").addEventListener("input", (event) => {
  state.search = event.target.value;
  writeHash();
  redraw();
});
byId("search").addEventListener("keydown", (event) => {
  if (event.key === "Escape") {
    act(() => { state.search = ""; });
    event.stopPropagation();
  }
  if (event.key !== "Enter" || !state.search.trim()) return;
  const found = [...BY_INFLUENCE, ...NODES.filter((node) => FIXED.has(node.kind))]
    .filter((node) => matches(node) && shown.nodes[node.number]);
  if (!found.length) return;
  const next = found[(found.findIndex((node) => node.number === state.selected) + 1) % found.length];
  select(next.number);
  byId("search").focus();
});

const numberOf = (event) => {
  const mark = event.target.closest?.("[data-number]");
  return mark ? Number(mark.dataset.number) : null;
};
svg.addEventListener("click", (event) => {
  const number = numberOf(event);
  select(number);
  if (number !== null) focusNode(number);
});
svg.addEventListener("mouseover", (event) => {
  const number = numberOf(event);
  if (number === null) return;
  hover(number);
  showTooltip(number);
});
svg.addEventListener("mouseout", () => {
  hideTooltip();
  hover(null);
});
svg.addEventListener("focusin", (event) => {
  const number = numberOf(event);
  if (number === null) return;
  setCurrent(number);
  if (marks[number].matches(":focus-visible")) {
    hover(number);
    showTooltip(number);
  }
});
svg.addEventListener("focusout", () => {
  hideTooltip();
  hover(null);
});
svg.addEventListener("keydown", (event) => {
  const number = numberOf(event);
  if (number === null || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key.startsWith("Arrow") && !event.shiftKey) {
    const next = nodeTowards(number, event.key);
    if (next !== null) focusNode(next);
  } else if (event.key === "Enter" || event.key === " ") {
    select(number);
  } else return;
  event.preventDefault();
});
document.addEventListener("keydown", (event) => {
  if (event.target.matches?.("input:not([type=checkbox]):not([type=range]), select") || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape") {
    const focused = svg.contains(document.activeElement) ? current : null;
    act(() => {
      state.selected = null;
      state.search = "";
      openGroup = null;
      marked.clear();
    });
    if (focused !== null && shown.nodes[focused]) focusNode(focused);
  } else if (event.key === "p") {
    const number = (svg.contains(document.activeElement) ? current : null) ?? state.selected;
    if (number !== null) act(() => togglePin(number));
  } else if (event.key === "g") {
    changeView(state.view === "graph" ? "pinned" : "graph");
  } else if (event.key === "e") {
    byId("label")?.focus();
    event.preventDefault();
  } else if (event.key === "+" || event.key === "=") {
    zoomBy(1.25);
  } else if (event.key === "-") {
    zoomBy(0.8);
  } else if (event.key === "0") {
    zoomTo(leastZoom());
  } else if (event.shiftKey && event.key.startsWith("Arrow")) {
    panBy(event.key);
    event.preventDefault();
  } else if ((event.key === "[" || event.key === "]") && NUM_GRAPHS > 1) {
    changeGraph((state.graph + (event.key === "]" ? 1 : NUM_GRAPHS - 1)) % NUM_GRAPHS);
  } else if (event.key === "/") {
    byId("search").focus();
    event.preventDefault();
  }
});

let waiting = false;
function soon(draw) {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    draw();
  });
}
stage.addEventListener("scroll", () => soon(() => {
  stick();
  drawEdges();
}));
window.addEventListener("resize", () => {
  describeSplitter();
  soon(redraw);
});
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawEdges);
window.addEventListener("hashchange", () => {
  if (location.hash !== ownHash) restore();
});

// Opens the graph of another prompt. The one that was open keeps its pins.
function changeGraph(number) {
  keep();
  state.graph = number;
  openGraph();
  act(() => {});
  showStart();
  announce(`prompt ${number + 1} of ${NUM_GRAPHS}: ${DATA.prompt}`);
}

function openGraph() {
  openData(state.graph);
  grid.zoom = 1;
  openPruning();
  openLayout();
  openNodes();
  openEdges();
  takeKept();
  if (byId("prompt")) byId("prompt").value = state.graph;
  if (byId("warning")) {
    byId("warning-text").textContent = DATA.warning ?? "";
    byId("warning").hidden = !DATA.warning;
  }
  byId("notes").replaceChildren(...DATA.notes.map((note) => element("p", {}, note)));
  byId("notes").hidden = !DATA.notes.length;
  setCurrent(firstNode());
}

function restore() {
  readHash();
  openGraph();
  redraw();
  drawPanel();
  showStart();
}

function showStart() {
  // Targets are mostly at the last token.
  if (state.selected === null) stage.scrollLeft = stage.scrollWidth;
  else if (state.view === "graph") reveal(state.selected);
}
restore();
restorePane();
