// Visible nodes and edges: the strongest that together have the chosen share of the influence.

// Visible edges are sorted, strongest first.
const shown = { nodes: [], edges: [] };
let BY_INFLUENCE, BY_FLOW;

function openPruning() {
  BY_INFLUENCE = NODES.filter((node) => !FIXED.has(node.kind)).sort((a, b) => b.influence - a.influence);
  BY_FLOW = [...EDGES].sort((a, b) => b.flow - a.flow);
}

// Edges that are drawn at rest: the strongest, as many of each pinned node, and all of the selected one.
function drawnEdges() {
  const left = new Map(state.pins.map((number) => [number, state.lines]));
  if (state.selected !== null) left.set(state.selected, Infinity);
  return shown.edges.filter((edge, rank) => {
    let drawn = rank < state.lines;
    for (const end of [edge.source, edge.target]) {
      if (!(left.get(end) > 0)) continue;
      left.set(end, left.get(end) - 1);
      drawn = true;
    }
    return drawn;
  });
}

function prune() {
  const nodes = new Array(NODES.length).fill(true);
  strongest(BY_INFLUENCE, (node) => node.influence, state.nodes / 100, (node, keep) => { nodes[node.number] = keep; });
  // Selected and pinned nodes stay visible.
  const chosen = [...state.pins, ...(state.selected === null ? [] : [state.selected])];
  chosen.forEach((number) => { nodes[number] = true; });
  const candidates = BY_FLOW.filter((edge) => nodes[edge.source] && nodes[edge.target]);
  let edges = [];
  strongest(candidates, (edge) => edge.flow, state.edges / 100, (edge, keep) => { if (keep) edges.push(edge); });
  if (state.nodes < 100 || state.edges < 100) {
    // Features without an edge in, and nodes without an edge out, are hidden.
    const fixed = new Set(chosen);
    for (let changed = true; changed;) {
      changed = false;
      const into = new Set(edges.map((edge) => edge.target));
      const outOf = new Set(edges.map((edge) => edge.source));
      for (const node of BY_INFLUENCE) {
        const alive = outOf.has(node.number) && (into.has(node.number) || node.kind !== "feature" || node.total === null);
        if (nodes[node.number] && !alive && !fixed.has(node.number)) {
          nodes[node.number] = false;
          changed = true;
        }
      }
      if (changed) edges = edges.filter((edge) => nodes[edge.source] && nodes[edge.target]);
    }
  }
  shown.nodes = nodes;
  shown.edges = edges;
}

function strongest(ordered, size, share, decide) {
  const total = ordered.reduce((sum, entry) => sum + size(entry), 0);
  let before = 0;
  for (const entry of ordered) {
    decide(entry, share >= 1 || before < share * total * (1 - 1e-9));
    before += size(entry);
  }
}

function matches(node) {
  return node.haystack.includes(state.search.trim().toLowerCase());
}
