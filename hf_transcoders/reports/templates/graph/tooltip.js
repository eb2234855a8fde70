// Tooltip of the node under the pointer or with the focus.

const tooltip = byId("tooltip");

function showTooltip(number) {
  const node = NODES[number];
  const ends = (edges, side) => edges.slice(0, 3).flatMap((edge) => [
    weightText(edge.weight), element("span", {}, `${side === "source" ? "from" : "to"} ${NODES[edge[side]].label}`),
  ]);
  tooltip.replaceChildren(
    element("strong", {}, node.label),
    node.about ? element("div", {}, node.about) : "",
    element("div", { class: "soft" }, factsOf(node).map(([name, value]) => `${name} ${value}`).join(" · ")),
    element("div", { class: "ends" }, ends(shownEdges(node.incoming), "source"), ends(shownEdges(node.outgoing), "target")),
  );
  tooltip.hidden = false;
  const box = marks[number].getBoundingClientRect();
  const { offsetWidth: width, offsetHeight: height } = tooltip;
  const fits = box.right + 12 + width < stage.getBoundingClientRect().right;
  const left = fits ? box.right + 12 : box.left - 12 - width;
  tooltip.style.left = `${Math.max(6, Math.min(left, window.innerWidth - width - 6))}px`;
  tooltip.style.top = `${Math.max(6, Math.min(box.top - 10, window.innerHeight - height - 6))}px`;
}

function hideTooltip() {
  tooltip.hidden = true;
}

function weightText(weight) {
  return element("span", { class: `weight ${weight > 0 ? "up" : "down"}` }, signed(weight));
}

function factsOf(node) {
  const facts = [];
  if (node.kind === "target") {
    const { probability, weight } = DATA.targets[node.index];
    if (probability !== null) facts.push(["probability", percent(probability)]);
    else facts.push(["weight", percent(weight)]);
  } else {
    facts.push([node.kind === "feature" ? "activation" : "norm", number3(node.value)]);
    facts.push(["influence", percent(node.influence / TOTAL_INFLUENCE)]);
  }
  return facts;
}

function shownEdges(edges) {
  return edges.filter((edge) => shown.nodes[edge.source] && shown.nodes[edge.target]);
}
