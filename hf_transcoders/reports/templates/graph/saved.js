// Labels, pins and groups as a file, as circuits/graphs/page_labels.py reads it.

const FORMAT = "hf_transcoders graph labels";
const LONGEST = 200;
const LARGEST_FILE = 20_000_000;

// Labels, and pins and groups of each graph, with which the page was made.
function* madeLabels() {
  yield* flatLabels(PAGE.saved.labels);
}

function* flatLabels(byDictionary) {
  for (const [dictionary, ofFeatures] of Object.entries(byDictionary)) {
    for (const [feature, label] of Object.entries(ofFeatures)) yield [`${dictionary}/${feature}`, label];
  }
}

function madeWith() {
  return matched(PAGE.saved.graphs).map((saved) => saved ?? { pins: [], groups: [] });
}

// The entry of each graph of the page: the first of its prompt that no graph before it has.
function matched(entries) {
  const left = [...entries];
  return PAGE.prompts.map((prompt) => {
    const found = left.findIndex((entry) => entry.prompt === prompt);
    return found < 0 ? null : left.splice(found, 1)[0];
  });
}

// Labels that differ from those with which the page was made; an empty text for those that were removed.
function changedLabels() {
  const made = new Map(madeLabels());
  const removed = [...made.keys()].filter((key) => !labels.has(key)).map((key) => [key, ""]);
  return [...[...labels].filter(([key, label]) => made.get(key) !== label), ...removed];
}

function savedText() {
  keep();
  const byDictionary = {};
  for (const [key, label] of labels) {
    const slash = key.lastIndexOf("/");
    const name = key.slice(0, slash);
    if (!Object.hasOwn(byDictionary, name)) Object.defineProperty(byDictionary, name, { value: {}, enumerable: true });
    byDictionary[name][key.slice(slash + 1)] = label;
  }
  const ofGraphs = kept.map(({ pins, groups }, number) => ({ prompt: PAGE.prompts[number], pins, groups }));
  return JSON.stringify({ format: FORMAT, version: 1, labels: byDictionary, graphs: ofGraphs }, null, 1);
}

function save() {
  const link = element("a", { href: URL.createObjectURL(new Blob([savedText()], { type: "application/json" })), download: "graph_labels.json" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  tell(`Saved ${counted(labels.size, "label")}, ${counted(sum(kept, (each) => each.pins.length), "pin")} and ` +
    `${counted(sum(kept, (each) => each.groups.length), "group")} as graph_labels.json.`);
}

// Reads a file that the user chose. What is wrong with it is told in one sentence, and nothing changes.
async function load(file) {
  try {
    if (file.size > LARGEST_FILE) throw new Error(`it has ${Math.round(file.size / 1e6)} MB, and labels take up to ${LARGEST_FILE / 1e6} MB`);
    const { newLabels, ofGraphs } = readSaved(await file.text());
    const entries = matched(ofGraphs);
    act(() => {
      for (const [key, label] of newLabels) setLabel(key, label);
      keep();
      entries.forEach((entry, number) => {
        if (entry) Object.assign(kept[number], { pins: entry.pins, groups: entry.groups });
      });
      takeKept();
    });
    const taken = entries.filter(Boolean);
    const unknown = sum(entries.map((entry, number) => [entry, number]).filter(([entry]) => entry), ([entry, number]) => {
      graphs[number] ??= readGraph(number);
      return entry.pins.filter((id) => !graphs[number].BY_ID.has(id)).length;
    });
    const others = ofGraphs.length - taken.length;
    tell(`Loaded ${counted(newLabels.length, "label")}, ${counted(sum(taken, (each) => each.pins.length) - unknown, "pin")} and ` +
      `${counted(sum(taken, (each) => each.groups.length), "group")} from ${file.name}.` +
      (unknown ? ` ${counted(unknown, "pinned node is", "pinned nodes are")} not on this page.` : "") +
      (others ? ` Pins of ${counted(others, "other prompt")} were left out.` : ""));
  } catch (error) {
    tell(`${file.name} could not be loaded: ${error.message}. Choose a file that this page saved.`);
  }
}

function readSaved(text) {
  let data;
  try {
    data = JSON.parse(text);
  } catch {
    throw new Error("it is not JSON");
  }
  if (data === null || typeof data !== "object" || data.format !== FORMAT) throw new Error("it holds no labels of a graph page");
  const object = (value, what) => {
    if (value === null || typeof value !== "object" || Array.isArray(value)) throw new Error(`its ${what} are damaged`);
    return value;
  };
  const list = (value, what) => {
    if (!Array.isArray(value)) throw new Error(`its ${what} are damaged`);
    return value;
  };
  const string = (value, what, most = Infinity) => {
    if (typeof value !== "string" || value.length > most) throw new Error(`its ${what} are not texts of up to ${LONGEST} characters`);
    return value;
  };
  Object.values(object(data.labels, "labels")).forEach((ofFeatures) => object(ofFeatures, "labels"));
  const newLabels = [...flatLabels(data.labels)];
  for (const [key, label] of newLabels) {
    if (!/\/\d+$/.test(key)) throw new Error("its labels are not of numbered features");
    string(label, "labels", LONGEST);
  }
  const ofGraphs = list(data.graphs, "pins").map((entry) => ({
    prompt: string(object(entry, "pins").prompt, "prompts"),
    pins: list(entry.pins, "pins").map((id) => string(id, "pins")),
    groups: list(entry.groups, "groups").map((group) => ({
      name: string(object(group, "groups").name, "names of groups", LONGEST),
      members: list(group.members, "groups").map((id) => string(id, "members of groups")),
    })),
  }));
  return { newLabels, ofGraphs };
}

function counted(count, word, several = `${word}s`) {
  return `${count.toLocaleString("en")} ${count === 1 ? word : several}`;
}

function sum(list, size) {
  return list.reduce((total, each) => total + size(each), 0);
}
