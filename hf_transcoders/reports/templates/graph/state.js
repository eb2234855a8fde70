// The state of the page, which is kept in the address so that a link restores it.

// Numbers of edges that the page can draw at rest.
const LINES = [25, 50, 100, 200, 500, 1000, Infinity];
const state = { graph: 0, view: "graph", selected: null, pins: [], groups: [], nodes: 100, edges: 100, lines: 50, search: "" };
// Selected node, pins and groups of graphs that are not open, as ids.
const kept = [];
// Pinned items marked for grouping, and the open group. These are not in the address.
const marked = new Set();
let openGroup = null;
let ownHash = null;
// Longest address; more labels are only in files.
const MOST_IN_ADDRESS = 20000;

// Parameters of the first graph have plain names, those of the others end in its number.
const named = (name, number) => (number ? `${name}.${number + 1}` : name);

function readHash() {
  const parameters = new URLSearchParams(location.hash.slice(1));
  const share = (name) => {
    const value = Number.parseInt(parameters.get(name) ?? "100", 10);
    return value >= 0 && value <= 100 ? value : 100;
  };
  const graph = Number.parseInt(parameters.get("graph") ?? "1", 10) - 1;
  state.graph = graph >= 0 && graph < NUM_GRAPHS ? graph : 0;
  state.view = parameters.get("view") === "pinned" ? "pinned" : "graph";
  state.nodes = share("nodes");
  state.edges = share("edges");
  const lines = parameters.get("lines");
  state.lines = LINES.find((count) => String(count) === lines) ?? 50;
  state.search = parameters.get("search") ?? "";
  const made = madeWith();
  for (let number = 0; number < NUM_GRAPHS; number += 1) {
    const group = parameters.getAll(named("group", number)).map((text) => {
      const [members, ...name] = text.split(":");
      return { name: name.join(":"), members: members.split(",") };
    });
    const given = parameters.get(named("pins", number));
    kept[number] = {
      node: parameters.get(named("node", number)),
      // Pins with which the page was made count until the address has others.
      ...(given === null ? made[number] : { pins: given.split(","), groups: group }),
    };
  }
  labels.clear();
  for (const [key, label] of madeLabels()) labels.set(key, label);
  for (const text of parameters.getAll("label")) {
    const [, feature, dictionary, label] = /^(\d+):([^:]*):(.*)$/s.exec(text) ?? [];
    if (feature === undefined) continue;
    const key = `${dictionary}/${feature}`;
    if (label) labels.set(key, label.slice(0, LONGEST));
    else labels.delete(key);
  }
  graphs.forEach((graph) => graph?.NODES.forEach(describe));
}

// Selection, pins and groups of the open graph. A link or a file may be from another page: ids that this graph does not have are
// left out.
function takeKept() {
  const { node, pins, groups } = kept[state.graph];
  const numbers = (ids) => [...new Set(ids.map((id) => BY_ID.get(id)).filter((number) => number !== undefined))];
  state.selected = numbers([node])[0] ?? null;
  state.pins = numbers(pins);
  const grouped = new Set();
  state.groups = [];
  for (const group of groups) {
    const members = numbers(group.members).filter((number) => state.pins.includes(number) && !grouped.has(number));
    members.forEach((number) => grouped.add(number));
    if (members.length) state.groups.push({ name: group.name || "Group", members });
  }
  marked.clear();
  openGroup = null;
}

function keep() {
  const ids = (numbers) => numbers.map((number) => NODES[number].id);
  kept[state.graph] = {
    node: state.selected === null ? null : NODES[state.selected].id,
    pins: ids(state.pins),
    groups: state.groups.map((group) => ({ name: group.name, members: ids(group.members) })),
  };
}

function writeHash() {
  keep();
  const parameters = new URLSearchParams();
  if (state.graph) parameters.set("graph", state.graph + 1);
  if (state.view !== "graph") parameters.set("view", state.view);
  if (state.nodes < 100) parameters.set("nodes", state.nodes);
  if (state.edges < 100) parameters.set("edges", state.edges);
  if (state.lines !== 50) parameters.set("lines", state.lines);
  if (state.search) parameters.set("search", state.search);
  const made = madeWith();
  kept.forEach(({ node, pins, groups }, number) => {
    if (node) parameters.set(named("node", number), node);
    if (pins.length || made[number].pins.length) parameters.set(named("pins", number), pins.join(","));
    for (const group of groups) parameters.append(named("group", number), `${group.members.join(",")}:${group.name}`);
  });
  const before = parameters.toString().length;
  const changed = changedLabels();
  for (const [key, label] of changed) {
    const slash = key.lastIndexOf("/");
    parameters.append("label", `${key.slice(slash + 1)}:${key.slice(0, slash)}:${label}`);
  }
  if (parameters.toString().length > MOST_IN_ADDRESS && before < MOST_IN_ADDRESS) {
    parameters.delete("label");
    tell("There are too many labels for the address of this page: save them to a file.");
  }
  // Commas and colons are allowed in a fragment, and shorter unescaped.
  const text = parameters.toString().replaceAll("%2C", ",").replaceAll("%3A", ":");
  ownHash = text ? `#${text}` : "";
  if (location.hash !== ownHash) history.replaceState(null, "", ownHash || location.pathname + location.search);
}

function togglePin(number) {
  if (state.pins.includes(number)) {
    state.pins = state.pins.filter((other) => other !== number);
    leaveGroup(number);
    marked.delete(number);
  } else {
    state.pins.push(number);
  }
  announce(`${NODES[number].label} ${state.pins.includes(number) ? "pinned" : "unpinned"}`);
}

function leaveGroup(number) {
  for (const group of state.groups) group.members = group.members.filter((member) => member !== number);
  if (openGroup && !openGroup.members.length) openGroup = null;
  state.groups = state.groups.filter((group) => group.members.length);
}

function makeGroup(numbers) {
  numbers.forEach(leaveGroup);
  const names = new Set(state.groups.map((group) => group.name));
  let count = 1;
  while (names.has(`Group ${count}`)) count += 1;
  const group = { name: `Group ${count}`, members: [...numbers] };
  state.groups.push(group);
  return group;
}

function announce(text) {
  byId("announce").textContent = text;
}

// Shows a sentence below the toolbar until the next one.
function tell(text) {
  byId("message-text").textContent = text;
  byId("message").hidden = !text;
}
