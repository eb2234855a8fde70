"use strict";
// The data of the page: the open graph, and features and labels of all graphs.

const PAGE = JSON.parse(byId("data").textContent);
const NUM_GRAPHS = PAGE.prompts.length;
const FIXED = new Set(["token", "target"]);
// Tokens and targets are boxes at the borders. Tokens without a position, in a union of prompts, are points.
const isBox = (node) => node.kind === "target" || (node.kind === "token" && node.position >= 0);
const byStrength = (a, b) => Math.abs(b.weight) - Math.abs(a.weight);
// "dictionary/feature" -> label.
const labels = new Map();
const graphs = [];
// Values of the open graph.
let DATA, NODES, EDGES, NUM_POSITIONS, BY_ID, TOTAL_INFLUENCE;

// Makes one of the graphs the open one. A graph is parsed when it is first opened.
function openData(number) {
  graphs[number] ??= readGraph(number);
  ({ DATA, NODES, EDGES, NUM_POSITIONS, BY_ID, TOTAL_INFLUENCE } = graphs[number]);
}

function readGraph(number) {
  const data = JSON.parse(byId(`graph-${number}`).textContent);
  const nodes = data.nodes;
  const edges = data.edges.source.map((source, i) => ({
    source, target: data.edges.target[i], weight: data.edges.weight[i], flow: data.edges.flow[i],
  }));
  nodes.forEach((node, i) => {
    node.number = i;
    node.dictionaryName = data.dictionaries[node.dictionary]?.name ?? "";
    node.key = node.kind === "feature" ? `${node.dictionaryName}/${node.index}` : null;
    node.details = PAGE.features[node.key];
    node.incoming = [];
    node.outgoing = [];
  });
  for (const edge of edges) {
    nodes[edge.target].incoming.push(edge);
    nodes[edge.source].outgoing.push(edge);
  }
  for (const node of nodes) {
    node.incoming.sort(byStrength);
    node.outgoing.sort(byStrength);
    describe(node);
  }
  return {
    DATA: data, NODES: nodes, EDGES: edges,
    NUM_POSITIONS: nodes.reduce((most, node) => Math.max(most, node.position + 1), data.tokens.length),
    BY_ID: new Map(nodes.map((node) => [node.id, node.number])),
    TOTAL_INFLUENCE: nodes.reduce((sum, node) => sum + node.influence, 0),
  };
}

// Sets or removes the label of a feature, at all of its nodes in all graphs.
function setLabel(key, text) {
  if (text) labels.set(key, text);
  else labels.delete(key);
  for (const graph of graphs) {
    for (const node of graph?.NODES ?? []) if (node.key === key) describe(node);
  }
}

// A short label.
function briefly(node) {
  if (node.position < 0 || node.kind === "target" || !DATA.tokens.length) return visible(node.label);
  const token = visible(DATA.tokens[node.position], true).trim();
  if (node.kind === "feature") return `L${node.layer} #${node.index} at ${token}`;
  if (node.kind === "error" || node.kind === "mlp") return `L${node.layer} ${node.kind} at ${token}`;
  return `${token} (${node.position})`;
}

// The description of a node in one line, and the text that the search reads.
function describe(node) {
  node.about = aboutLines(node).join(" ");
  const words = [node.label, node.id, node.kind, node.dictionaryName, labels.get(node.key) ?? ""];
  if (node.details) {
    words.push(...node.details.top_tokens.map(([token]) => token));
    words.push(...node.details.contexts.map((context) => context.tokens[context.peak]));
  }
  node.haystack = words.join(" \n").toLowerCase();
}

// The description of a feature: its label, the tokens with its largest activations, and its promoted tokens.
function aboutLines(node) {
  const lines = labels.has(node.key) ? [labels.get(node.key)] : [];
  if (!node.details) return lines;
  const peaks = [...new Set(node.details.contexts.slice(0, 3).map((context) => visible(context.tokens[context.peak], true).trim()))];
  const raised = node.details.top_tokens.slice(0, 3).map(([token]) => visible(token, true).trim());
  if (peaks.length) lines.push(`“${peaks.slice(0, 2).join("”, “")}”`);
  if (raised.length) lines.push(`direct path → ${raised.join(", ")}`);
  return lines;
}

// A token as a label in which white space can be seen, as `visible` of hf_transcoders/text/visible.py.
function visible(text, inText = false) {
  const signs = { "\n": "⏎", "\r": "␍", "\t": "⇥" };
  const escaped = (code) => (code < 256 ? `\\x${code.toString(16).padStart(2, "0")}` : `\\u${code.toString(16).padStart(4, "0")}`);
  return text
    .replace(/[\u0000-\u001f\u007f-\u00a0\u00ad\u1680\u2000-\u200f\u2028-\u202f\u205f-\u206f\u3000\ufeff]/g,
      (character) => signs[character] ?? escaped(character.charCodeAt(0)))
    .replace(inText ? /^ +$| {2,}/g : /^ +| +$/g, (spaces) => "␣".repeat(spaces.length)) || "∅";
}

function number3(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  const text = size !== 0 && (size < 0.001 || size >= 100000) ? size.toExponential(1) : Number(size.toPrecision(3)).toString();
  return value < 0 ? `−${text}` : text;
}

function signed(value) {
  return value > 0 ? `+${number3(value)}` : number3(value);
}

function percent(share) {
  const value = 100 * share;
  if (value >= 9.95 || value === 0) return `${value.toFixed(0)}%`;
  return value >= 0.001 ? `${Number(value.toPrecision(2))}%` : "<0.001%";
}

// An element. Text is inserted as text, never as markup.
function element(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

function svgElement(name, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}

function fill(made, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== ""));
  return made;
}

function byId(id) {
  return document.getElementById(id);
}
