// The subgraph of pinned nodes: boxes, groups as one box each, and the direct edges between them.

const area = byId("pinned-area");
const pinnedSvg = byId("pinned-svg");
const ITEM = { width: 212, height: 80, gapX: 26, gapY: 40 };
const MOST_LABELS = 14;

function pinnedItems() {
  const grouped = new Set(state.groups.flatMap((group) => group.members));
  return [
    ...state.groups.map((group) => ({ key: group, group, members: group.members })),
    ...state.pins.filter((number) => !grouped.has(number)).map((number) => ({ key: number, node: NODES[number], members: [number] })),
  ];
}

function drawPinned() {
  const items = pinnedItems();
  byId("pinned-count").textContent = state.pins.length;
  byId("group").disabled = marked.size < 2;
  byId("group").textContent = marked.size ? `Group marked (${marked.size})` : "Group marked";
  byId("pinned-hint").textContent = items.length
    ? "Mark boxes to group them. Numbers are direct effects; the effects of a group are sums."
    : "No node is pinned: select a node in the graph and press p.";
  if (state.view !== "pinned") return;
  const focusedKey = document.activeElement?.closest?.(".pinned-item")?.dataset.key;
  const wasBox = document.activeElement?.matches?.("input");
  placeItems(items);
  const edges = itemEdges(items);
  const near = nearItems(items, edges);
  area.replaceChildren(pinnedSvg, ...items.map((item) => itemBox(item, near)));
  drawItemEdges(edges, near);
  const again = [...area.children].find((child) => focusedKey !== undefined && child.dataset.key === focusedKey);
  again?.querySelector(wasBox ? "input" : "button").focus();
}

// One row per layer that occurs, from bottom to top; within a row from left to right by token.
function placeItems(items) {
  const mean = (item, of) => item.members.reduce((sum, number) => sum + of(NODES[number]), 0) / item.members.length;
  const height = (node) => (node.kind === "target" ? DATA.num_layers : node.layer);
  for (const item of items) {
    item.layer = Math.round(mean(item, height));
    item.position = mean(item, (node) => node.position);
  }
  const width = Math.max(ITEM.width + 40, byId("pinned").clientWidth);
  const perLine = Math.max(1, Math.floor((width - 30 + ITEM.gapX) / (ITEM.width + ITEM.gapX)));
  const layers = [...new Set(items.map((item) => item.layer))].sort((a, b) => b - a);
  const lines = [];
  for (const layer of layers) {
    const row = items.filter((item) => item.layer === layer).sort((a, b) => a.position - b.position);
    for (let i = 0; i < row.length; i += perLine) lines.push(row.slice(i, i + perLine));
  }
  const room = byId("pinned").clientHeight - 60;
  const step = Math.max(ITEM.height + ITEM.gapY, Math.min(120, room / Math.max(1, lines.length)));
  lines.forEach((line, number) => {
    let x = 15;
    for (const item of line) {
      const wanted = 15 + ((item.position + 1) / (NUM_POSITIONS + 1)) * (width - 30) - ITEM.width / 2;
      item.x = Math.max(x, wanted);
      x = item.x + ITEM.width + ITEM.gapX;
    }
    let end = width - 15;
    for (const item of [...line].reverse()) {
      item.x = Math.min(item.x, end - ITEM.width);
      end = item.x - ITEM.gapX;
    }
    for (const item of line) item.y = number * step + 8;
  });
  area.style.height = `${Math.max(room, lines.length * step + 10)}px`;
  pinnedSvg.setAttribute("width", width);
  pinnedSvg.setAttribute("height", Math.max(room, lines.length * step + 10));
}

function itemEdges(items) {
  const itemOf = new Map(items.flatMap((item) => item.members.map((number) => [number, item])));
  const sums = new Map();
  for (const edge of EDGES) {
    const source = itemOf.get(edge.source);
    const target = itemOf.get(edge.target);
    if (!source || !target || source === target) continue;
    if (!sums.has(source)) sums.set(source, new Map());
    sums.get(source).set(target, (sums.get(source).get(target) ?? 0) + edge.weight);
  }
  return [...sums].flatMap(([source, targets]) => [...targets].map(([target, weight]) => ({ source, target, weight })));
}

function nearItems(items, edges) {
  const open = items.find((item) => (openGroup ? item.group === openGroup : item.members.includes(state.selected)));
  if (!open) return null;
  const near = new Set([open]);
  for (const edge of edges) {
    if (edge.source === open) near.add(edge.target);
    if (edge.target === open) near.add(edge.source);
  }
  return { open, near };
}

function itemBox(item, near) {
  const { group, node } = item;
  const [title, ...under] = group ? [group.name, `${group.members.length} nodes`] : itemLines(node);
  const isOpen = near?.open === item;
  const box = element("div", {
    class: `pinned-item ${group ? "group" : node.kind} ${isOpen ? "selected" : ""} ${near && !near.near.has(item) ? "faded" : ""}`,
    "data-key": group ? `g${state.groups.indexOf(group)}` : node.number,
  },
  element("input", { type: "checkbox", "aria-label": `Mark ${visible(title)} for grouping`, checked: isMarked(item), onchange: (event) => {
    for (const number of item.members) event.target.checked ? marked.add(number) : marked.delete(number);
    drawPinned();
  } }),
  element("button", { type: "button", title: group ? title : `${node.label} ${node.about}`, "aria-pressed": null, onclick: () => {
    if (group) {
      act(() => { openGroup = group; state.selected = null; });
    } else select(node.number);
  } }, element("b", {}, visible(title, true)), under.map((line) => element("small", {}, visible(line, true)))));
  Object.assign(box.style, { left: `${item.x}px`, top: `${item.y}px`, width: `${ITEM.width}px`, height: `${ITEM.height}px` });
  return box;
}

// Up to three lines: label or tokens of a feature, its other descriptions, and its place.
function itemLines(node) {
  if (node.kind === "target") {
    const { probability } = DATA.targets[node.index];
    return [briefly(node), probability === null ? "target" : `probability ${percent(probability)}`];
  }
  const [first, ...more] = aboutLines(node);
  if (first === undefined) return [briefly(node), node.kind === "feature" ? `activation ${number3(node.value)}` : node.kind];
  return [first, ...(more.length ? [more.join(" ")] : []), briefly(node)];
}

function isMarked(item) {
  return item.members.every((number) => marked.has(number));
}

function drawItemEdges(edges, near) {
  const most = Math.max(1e-30, ...edges.map((edge) => Math.abs(edge.weight)));
  const lines = [];
  const texts = [];
  const ranked = edges.sort(byStrength);
  // Weak edges first, so that strong ones are drawn on top.
  for (let rank = ranked.length - 1; rank >= 0; rank -= 1) {
    const edge = ranked[rank];
    const strength = Math.sqrt(Math.abs(edge.weight) / most);
    const isOwn = !near || edge.source === near.open || edge.target === near.open;
    const x1 = edge.source.x + ITEM.width / 2;
    const y1 = edge.source.y;
    const x2 = edge.target.x + ITEM.width / 2;
    const y2 = edge.target.y + ITEM.height;
    const middle = (y1 + y2) / 2;
    lines.push(svgElement("path", {
      class: "pinned-edge", d: `M${x1},${y1} C${x1},${middle} ${x2},${middle} ${x2},${y2}`, fill: "none",
      stroke: `var(--${edge.weight > 0 ? "positive" : "negative"})`, "stroke-width": 1 + 5 * strength,
      "stroke-opacity": isOwn ? 0.35 + 0.5 * strength : 0.08,
    }));
    if (near ? isOwn : rank < MOST_LABELS) {
      texts.push(svgElement("text", {
        class: "edge-weight", x: (x1 + x2) / 2, y: middle + 4, "text-anchor": "middle", fill: `var(--${edge.weight > 0 ? "positive" : "negative"})`,
      }, signed(edge.weight)));
    }
  }
  pinnedSvg.replaceChildren(...lines, ...texts);
}
