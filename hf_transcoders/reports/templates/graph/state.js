// The state of the page, which is kept in the address so that a link restores it.

const state = { view: "graph", selected: null, pins: [], groups: [], nodes: 100, edges: 100, search: "" };
// Pinned items marked for grouping, and the open group. These are not in the address.
const marked = new Set();
let openGroup = null;
let ownHash = null;

function readHash() {
  const parameters = new URLSearchParams(location.hash.slice(1));
  const share = (name) => {
    const value = Number.parseInt(parameters.get(name) ?? "100", 10);
    return value >= 0 && value <= 100 ? value : 100;
  };
  // A link may be from another page: ids that this graph does not have are left out.
  const numbers = (ids) => [...new Set(ids.map((id) => BY_ID.get(id)).filter((number) => number !== undefined))];
  state.view = parameters.get("view") === "pinned" ? "pinned" : "graph";
  state.nodes = share("nodes");
  state.edges = share("edges");
  state.search = parameters.get("search") ?? "";
  state.selected = numbers([parameters.get("node")])[0] ?? null;
  state.pins = numbers((parameters.get("pins") ?? "").split(","));
  const grouped = new Set();
  state.groups = [];
  for (const text of parameters.getAll("group")) {
    const [ids, ...name] = text.split(":");
    const members = numbers(ids.split(",")).filter((number) => state.pins.includes(number) && !grouped.has(number));
    members.forEach((number) => grouped.add(number));
    if (members.length) state.groups.push({ name: name.join(":") || "Group", members });
  }
  marked.clear();
  openGroup = null;
}

function writeHash() {
  const parameters = new URLSearchParams();
  const ids = (numbers) => numbers.map((number) => NODES[number].id).join(",");
  if (state.view !== "graph") parameters.set("view", state.view);
  if (state.nodes < 100) parameters.set("nodes", state.nodes);
  if (state.edges < 100) parameters.set("edges", state.edges);
  if (state.search) parameters.set("search", state.search);
  if (state.selected !== null) parameters.set("node", NODES[state.selected].id);
  if (state.pins.length) parameters.set("pins", ids(state.pins));
  for (const group of state.groups) parameters.append("group", `${ids(group.members)}:${group.name}`);
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
