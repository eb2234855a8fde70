// The nodes of the graph as SVG: created once, then moved, shown and hidden.

const stage = byId("graph");
const svg = byId("node-svg");
const lanes = svgElement("g");
const innerLayer = svgElement("g");
const tokenLayer = svgElement("g");
const targetLayer = svgElement("g");
const tokenStrip = svgElement("rect", { class: "strip", x: 0 });
const targetStrip = svgElement("rect", { class: "strip", x: 0 });
tokenLayer.append(tokenStrip);
targetLayer.append(targetStrip);
svg.append(lanes, innerLayer, tokenLayer, targetLayer);

function layerOf(node) {
  if (!isBox(node)) return innerLayer;
  return node.kind === "token" ? tokenLayer : targetLayer;
}

let marks = [];
// The node that Tab focuses; arrow keys move on from there.
let current = null;

function openNodes() {
  marks.forEach((mark) => mark.remove());
  marks = NODES.map((node) => {
    const mark = svgElement("g", { class: `node ${node.kind}`, role: "button", tabindex: -1, "data-number": node.number });
    layerOf(node).append(mark);
    return mark;
  });
  current = null;
  drawn = { width: 0, height: 0, zoom: 0, nodes: [] };
}

function drawNode(node) {
  const mark = marks[node.number];
  const at = place[node.number];
  mark.replaceChildren(...(isBox(node) ? boxParts(node, at) : pointParts(node, at)));
}

function pointParts(node, { x, y, r }) {
  const shape = {
    feature: () => svgElement("circle", { cx: x, cy: y, r }),
    error: () => svgElement("path", { d: `M${x},${y - r - 1} L${x + r + 1},${y} L${x},${y + r + 1} L${x - r - 1},${y} Z` }),
    mlp: () => svgElement("rect", { x: x - r, y: y - r, width: 2 * r, height: 2 * r, rx: 1.5 }),
    token: () => svgElement("rect", { x: x - r, y: y - r, width: 2 * r, height: 2 * r, rx: 2 }),
    bias: () => svgElement("path", { d: `M${x - r},${y - r} L${x + r},${y - r} L${x},${y + r} Z` }),
    position: () => svgElement("path", { d: `M${x - r},${y + r} L${x + r},${y + r} L${x},${y - r} Z` }),
  }[node.kind]();
  shape.setAttribute("class", "shape");
  return [
    svgElement("circle", { class: "hit", cx: x, cy: y, r: Math.max(r, grid.step / 2) }), shape,
    svgElement("circle", { class: "ring", cx: x, cy: y, r: r + 3.5 }),
  ];
}

function boxParts(node, { x, y, width, height }) {
  const left = x - width / 2;
  const top = y - height / 2;
  const parts = [svgElement("rect", { class: "shape", x: left, y: top, width, height, rx: 5 })];
  if (node.kind === "target") {
    const { label, probability, weight } = DATA.targets[node.index];
    const share = Math.min(1, Math.max(0, probability ?? weight));
    parts.push(svgElement("rect", { class: "share", x: left, y: top, width: width * share, height, rx: 5 }));
    const room = width - (probability === null ? 16 : 54);
    parts.push(svgElement("text", { x: left + 8, y: y + 4 }, shortened(visible(label), room)));
    if (probability !== null) {
      parts.push(svgElement("text", { x: left + width - 7, y: y + 4, "text-anchor": "end" }, percent(probability)));
    }
  } else {
    parts.push(svgElement("text", { x, y: y + 4, "text-anchor": "middle" }, shortened(visible(DATA.tokens[node.position]), width - 4)));
  }
  parts.push(svgElement("rect", { class: "ring", x: left - 2, y: top - 2, width: width + 4, height: height + 4, rx: 6 }));
  return parts;
}

function shortened(text, room) {
  if (textWidth(text) <= room) return text;
  let end = text.length;
  while (end > 1 && textWidth(`${text.slice(0, end)}…`) > room) end -= 1;
  return `${text.slice(0, end)}…`;
}

// Lays out the graph again if the window or the visible nodes have changed.
let drawn;
function drawNodes() {
  const { clientWidth: width, clientHeight: height } = stage;
  const same = width === drawn.width && height === drawn.height && grid.zoom === drawn.zoom && shown.nodes.every((is, i) => is === drawn.nodes[i]);
  if (same && drawn.nodes.length) return;
  drawn = { width, height, zoom: grid.zoom, nodes: shown.nodes };
  layOut(width, height);
  svg.setAttribute("viewBox", `0 0 ${grid.width} ${grid.height}`);
  svg.setAttribute("width", grid.width * grid.zoom);
  svg.setAttribute("height", grid.height * grid.zoom);
  lanes.replaceChildren(
    ...grid.rows.filter((entry) => entry.lines && entry.at % 2 === 0)
      .map((entry) => svgElement("rect", { class: "lane", x: 0, y: entry.top, width: grid.width, height: entry.height })),
  );
  for (const node of NODES) {
    marks[node.number].style.display = shown.nodes[node.number] ? "" : "none";
    if (shown.nodes[node.number]) drawNode(node);
  }
  for (const [name, value] of [["y", grid.height - TOKEN_HEIGHT - 14], ["width", grid.width], ["height", TOKEN_HEIGHT + 14]]) {
    tokenStrip.setAttribute(name, value);
  }
  for (const [name, value] of [["y", 0], ["width", grid.width], ["height", grid.targetsHeight]]) targetStrip.setAttribute(name, value);
  if (current === null || !shown.nodes[current]) setCurrent(firstNode());
  drawLayerLabels();
  stick();
}

// Tokens and targets stay visible while the layers between them scroll.
function stick() {
  grid.tokenShift = Math.min(0, (stage.scrollTop + stage.clientHeight) / grid.zoom - grid.height);
  grid.targetShift = stage.scrollTop / grid.zoom;
  tokenLayer.setAttribute("transform", `translate(0 ${grid.tokenShift})`);
  targetLayer.setAttribute("transform", `translate(0 ${grid.targetShift})`);
  const layers = byId("layer-labels");
  layers.style.transform = `translateX(${stage.scrollLeft}px)`;
  const top = stage.scrollTop / grid.zoom + grid.targetsHeight;
  const bottom = (stage.scrollTop + stage.clientHeight) / grid.zoom - TOKEN_HEIGHT - 20;
  for (const label of layers.children) label.hidden = label.dataset.y < top || label.dataset.y > bottom;
}

function drawLayerLabels() {
  const named = grid.rows.filter((entry) => entry.lines || (entry.at < 0 && grid.rows[0].lines));
  byId("layer-labels").replaceChildren(...named.map((entry) => {
    const label = element("span", { "data-y": entry.middle }, entry.at < 0 ? "emb" : entry.at === DATA.num_layers ? "out" : `L${entry.at}`);
    label.style.top = `${entry.middle * grid.zoom}px`;
    return label;
  }));
}

// Highlights the selected node and its neighbors, or the nodes that match the search.
function drawStates() {
  const near = neighbours();
  for (const node of NODES) {
    const mark = marks[node.number];
    const isSelected = state.selected === node.number;
    mark.classList.toggle("selected", isSelected);
    mark.classList.toggle("pinned", state.pins.includes(node.number));
    mark.classList.toggle("faded", near !== null && !near.has(node.number));
    mark.setAttribute("aria-pressed", isSelected);
    mark.setAttribute("aria-label", spoken(node));
  }
}

function neighbours() {
  if (state.search.trim()) return new Set(NODES.filter(matches).map((node) => node.number));
  if (state.selected === null) return null;
  const near = new Set([state.selected]);
  for (const edge of shown.edges) {
    if (edge.source === state.selected) near.add(edge.target);
    if (edge.target === state.selected) near.add(edge.source);
  }
  return near;
}

function spoken(node) {
  const parts = [node.kind === "target" ? `target ${node.label}` : node.label];
  if (node.about) parts.push(node.about);
  if (node.kind === "target") {
    const { probability } = DATA.targets[node.index];
    if (probability !== null) parts.push(`probability ${percent(probability)}`);
  } else {
    parts.push(`influence ${percent(node.influence / TOTAL_INFLUENCE)}`);
  }
  if (state.pins.includes(node.number)) parts.push("pinned");
  return parts.join(", ");
}

function setCurrent(number) {
  if (current !== null) marks[current].setAttribute("tabindex", -1);
  current = number;
  if (number !== null) marks[number].setAttribute("tabindex", 0);
}

function firstNode() {
  if (state.selected !== null) return state.selected;
  const target = NODES.find((node) => node.kind === "target");
  return target ? target.number : NODES.length ? 0 : null;
}

function focusNode(number) {
  setCurrent(number);
  marks[number].focus({ preventScroll: true });
  reveal(number);
}

// Scrolls to a node.
function reveal(number) {
  const x = place[number].x * grid.zoom;
  const y = whereY(number) * grid.zoom;
  const margin = 50;
  const low = stage.scrollTop + grid.targetsHeight * grid.zoom;
  const high = stage.scrollTop + stage.clientHeight - (TOKEN_HEIGHT + 18) * grid.zoom;
  if (!isBox(NODES[number])) {
    if (y < low + 12) stage.scrollTop -= low + margin - y;
    if (y > high - 12) stage.scrollTop += y - high + margin;
  }
  if (x < stage.scrollLeft + margin) stage.scrollLeft = x - margin;
  if (x > stage.scrollLeft + stage.clientWidth - margin) stage.scrollLeft = x - stage.clientWidth + margin;
}

// Current height of a node.
function whereY(number) {
  const node = NODES[number];
  if (!isBox(node)) return place[number].y;
  return place[number].y + (node.kind === "token" ? grid.tokenShift : grid.targetShift);
}

// The nearest node in a direction, where steps to the side count double.
function nodeTowards(number, key) {
  const [dx, dy] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[key];
  const from = { x: place[number].x, y: place[number].y };
  let best = null;
  let least = Infinity;
  for (const node of NODES) {
    if (!shown.nodes[node.number] || node.number === number) continue;
    const away = { x: place[node.number].x - from.x, y: place[node.number].y - from.y };
    const along = away.x * dx + away.y * dy;
    const aside = Math.abs(away.x * dy) + Math.abs(away.y * dx);
    // Sideways only within the row.
    if (along <= 0.5 || (dx !== 0 && aside > grid.step * 1.5)) continue;
    const cost = along + 2 * aside;
    if (cost < least) {
      least = cost;
      best = node.number;
    }
  }
  return best;
}
