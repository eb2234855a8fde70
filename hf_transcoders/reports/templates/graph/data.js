"use strict";
// The data of the page, and constants derived from it.

const DATA = JSON.parse(document.getElementById("data").textContent);
const NODES = DATA.nodes;
const EDGES = DATA.edges.source.map((source, i) => ({
  source, target: DATA.edges.target[i], weight: DATA.edges.weight[i], flow: DATA.edges.flow[i],
}));
const FIXED = new Set(["token", "target"]);
// Tokens and targets are boxes at the borders. Tokens without a position, in a union of prompts, are points.
const isBox = (node) => node.kind === "target" || (node.kind === "token" && node.position >= 0);
const NUM_POSITIONS = NODES.reduce((most, node) => Math.max(most, node.position + 1), DATA.tokens.length);
const BY_ID = new Map(NODES.map((node, number) => [node.id, number]));
const TOTAL_INFLUENCE = NODES.reduce((sum, node) => sum + node.influence, 0);

NODES.forEach((node, number) => {
  node.number = number;
  node.details = node.kind === "feature" ? DATA.features[`${node.dictionary}/${node.index}`] : undefined;
  node.incoming = [];
  node.outgoing = [];
});
for (const edge of EDGES) {
  NODES[edge.target].incoming.push(edge);
  NODES[edge.source].outgoing.push(edge);
}
const byStrength = (a, b) => Math.abs(b.weight) - Math.abs(a.weight);
for (const node of NODES) {
  node.incoming.sort(byStrength);
  node.outgoing.sort(byStrength);
  node.about = aboutNode(node);
  node.haystack = haystack(node);
}

// A short label.
function briefly(node) {
  if (node.position < 0 || node.kind === "target" || !DATA.tokens.length) return visible(node.label);
  const token = visible(DATA.tokens[node.position]).trim();
  if (node.kind === "feature") return `L${node.layer} #${node.index} at ${token}`;
  if (node.kind === "error" || node.kind === "mlp") return `L${node.layer} ${node.kind} at ${token}`;
  return `${token} (${node.position})`;
}

// A short description of a feature: the tokens with its largest activations, and those that its direct path promotes.
function aboutNode(node) {
  const details = node.details;
  if (!details) return "";
  const peaks = [...new Set(details.contexts.slice(0, 3).map((context) => visible(context.tokens[context.peak]).trim()))];
  const raised = details.top_tokens.slice(0, 3).map(([token]) => visible(token).trim());
  return [peaks.length ? `“${peaks.slice(0, 2).join("”, “")}”` : "", raised.length ? `direct path → ${raised.join(", ")}` : ""]
    .filter(Boolean).join(" ");
}

function haystack(node) {
  const words = [node.label, node.id, node.kind, DATA.dictionaries[node.dictionary]?.name ?? ""];
  if (node.details) {
    words.push(...node.details.top_tokens.map(([token]) => token));
    words.push(...node.details.contexts.map((context) => context.tokens[context.peak]));
  }
  return words.join(" \n").toLowerCase();
}

// A token with visible line breaks and tabs.
function visible(token) {
  return token.replaceAll("\n", "⏎").replaceAll("\t", "⇥") || "∅";
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
  return `${value >= 10 || value === 0 ? value.toFixed(0) : value >= 0.1 ? value.toFixed(1) : "<0.1"}%`;
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
