// Positions of nodes: tokens from left to right, layers from bottom to top, the nodes of a cell side by side.

// Distances between the nodes of a cell, of which the largest that fits is used.
const STEPS = [15, 13, 11];
const EDGE_OF_PAGE = { left: 44, right: 14 };
const TOKEN_HEIGHT = 26;
const TARGET_HEIGHT = 26;
const MOST_PER_LINE = 24;
const LEAST_PER_LINE = 3;
// The zoom multiplies all lengths of the graph on the screen.
const grid = { width: 0, height: 0, rows: [], step: STEPS[0], zoom: 1 };
let place;

const measure = document.createElement("canvas").getContext("2d");
measure.font = "12px system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif";
const textWidth = (text) => measure.measureText(text).width;

function openLayout() {
  const most = NODES.reduce((found, node) => (isBox(node) ? found : Math.max(found, node.influence)), 1e-30);
  place = NODES.map((node) => ({ x: 0, y: 0, width: 0, height: 0, r: 3.2 + 3.8 * Math.sqrt(node.influence / most) }));
}

// Column -1 holds nodes without a position: biases, and all nodes of a union over positions.
function layOut(width, height) {
  const visibleNodes = NODES.filter((node) => shown.nodes[node.number]);
  const inner = visibleNodes.filter((node) => !isBox(node));
  const hasNowhere = visibleNodes.some((node) => node.position < 0);
  const cells = new Map();
  for (const node of inner) {
    const key = `${node.position}:${row(node)}`;
    if (!cells.has(key)) cells.set(key, []);
    cells.get(key).push(node);
  }
  const busiest = new Map();
  for (const cell of cells.values()) {
    busiest.set(cell[0].position, Math.max(busiest.get(cell[0].position) ?? 0, cell.length));
    const rank = (node) => ["feature", "mlp", "error", "position", "bias", "token"].indexOf(node.kind);
    cell.sort((a, b) => rank(a) - rank(b) || b.influence - a.influence);
  }

  const available = width - EDGE_OF_PAGE.left - EDGE_OF_PAGE.right;
  const columns = [...(hasNowhere ? [-1] : []), ...Array(NUM_POSITIONS).keys()].map((position) => ({
    position,
    most: busiest.get(position) ?? 0,
    least: position < 0 ? 34 : Math.min(58, Math.max(busiest.has(position) ? 30 : 24, textWidth(visible(DATA.tokens[position] ?? "")) + 12)),
  }));
  // As many nodes side by side as fit, the same number in all columns that need it.
  let perLine = MOST_PER_LINE;
  let step = STEPS[0];
  const widthOf = (column) => Math.max(column.least, Math.min(column.most, perLine) * step + 8);
  const needed = () => columns.reduce((sum, column) => sum + widthOf(column), 0);
  for (const some of STEPS) {
    step = some;
    perLine = MOST_PER_LINE;
    while (perLine > LEAST_PER_LINE && needed() > available) perLine -= 1;
    if (needed() <= available) break;
  }
  grid.step = step;
  const spare = Math.max(0, available - needed()) / columns.length;
  let x = EDGE_OF_PAGE.left;
  for (const column of columns) {
    column.width = widthOf(column) + spare;
    column.perLine = Math.max(1, Math.min(perLine, Math.floor((column.width - 6) / step)));
    column.left = x;
    x += column.width;
  }
  grid.width = x + EDGE_OF_PAGE.right;
  const columnOf = new Map(columns.map((column) => [column.position, column]));

  const lines = new Map();
  for (const cell of cells.values()) {
    const at = row(cell[0]);
    lines.set(at, Math.max(lines.get(at) ?? 0, Math.ceil(cell.length / columnOf.get(cell[0].position).perLine)));
  }
  const targetLines = placeTargets(visibleNodes.filter((node) => node.kind === "target"), columnOf);
  const targetsHeight = targetLines * (TARGET_HEIGHT + 5) + 10;
  // Empty layers are thin.
  const rows = [...Array(DATA.num_layers + 2).keys()].map((at) => ({ at: at - 1, lines: lines.get(at - 1) ?? 0 }));
  const heightOf = (entry) => (entry.lines ? entry.lines * Math.min(step, 14) + 3 : entry.at < 0 || entry.at === DATA.num_layers ? 6 : 5);
  const fixed = targetsHeight + TOKEN_HEIGHT + 18 + 14;
  const full = rows.filter((entry) => entry.lines).length || 1;
  const free = Math.max(0, height - fixed - rows.reduce((sum, entry) => sum + heightOf(entry), 0));
  grid.height = Math.max(height, fixed + rows.reduce((sum, entry) => sum + heightOf(entry), 0));
  let y = grid.height - TOKEN_HEIGHT - 18;
  for (const entry of rows) {
    entry.height = heightOf(entry) + (entry.lines ? free / full : 0);
    y -= entry.height;
    entry.top = y;
    entry.middle = y + entry.height / 2;
  }
  grid.rows = rows;
  grid.targetsHeight = targetsHeight;

  for (const cell of cells.values()) {
    const column = columnOf.get(cell[0].position);
    const count = Math.ceil(cell.length / column.perLine);
    const middle = rows[row(cell[0]) + 1].middle;
    cell.forEach((node, i) => {
      const line = Math.floor(i / column.perLine);
      const inLine = Math.min(column.perLine, cell.length - line * column.perLine);
      // Nodes are spread out where there is room.
      const apart = Math.min(step * 1.5, (column.width - 8) / inLine);
      place[node.number].x = column.left + column.width / 2 + ((i % column.perLine) - (inLine - 1) / 2) * apart;
      place[node.number].y = middle + (line - (count - 1) / 2) * Math.min(step, 14);
    });
  }
  for (const node of visibleNodes.filter((other) => other.kind === "token" && isBox(other))) {
    const column = columnOf.get(node.position);
    Object.assign(place[node.number], {
      x: column.left + column.width / 2, y: grid.height - 8 - TOKEN_HEIGHT / 2, width: column.width - 4, height: TOKEN_HEIGHT - 4,
    });
  }
}

// Layer of a node; -1 for embeddings.
function row(node) {
  return node.kind === "position" ? -1 : node.layer;
}

// Targets are above their tokens where they fit; they move aside where they overlap, and to another line where they do not fit.
function placeTargets(targets, columnOf) {
  const left = EDGE_OF_PAGE.left;
  const right = Math.max(left + 200, grid.width - EDGE_OF_PAGE.right);
  const lines = [];
  for (const node of targets) {
    const { label, probability } = DATA.targets[node.index];
    const at = place[node.number];
    at.width = Math.min(230, textWidth(visible(label)) + (probability === null ? 0 : 44) + 20);
    at.height = TARGET_HEIGHT;
    const used = (line) => line.reduce((sum, other) => sum + place[other.number].width + 6, 0);
    let line = lines.find((some) => used(some) + at.width <= right - left);
    if (!line) lines.push((line = []));
    line.push(node);
  }
  lines.forEach((line, number) => {
    line.sort((a, b) => a.position - b.position);
    let x = left;
    for (const node of line) {
      const column = columnOf.get(node.position);
      const at = place[node.number];
      at.left = Math.max(x, column.left + column.width / 2 - at.width / 2);
      x = at.left + at.width + 6;
    }
    let end = right;
    for (const node of [...line].reverse()) {
      const at = place[node.number];
      at.left = Math.min(at.left, end - at.width);
      end = at.left - 6;
      at.x = at.left + at.width / 2;
      at.y = 8 + (number + 0.5) * (TARGET_HEIGHT + 5);
    }
  });
  return Math.max(1, lines.length);
}
