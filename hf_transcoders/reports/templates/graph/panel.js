// The side panel: the selected node, a group, or the graph as a whole.

const panel = byId("panel");
const FIRST_ENDS = 12;

function drawPanel() {
  const group = openGroup;
  const parts = group ? groupParts(group) : state.selected !== null ? nodeParts(NODES[state.selected]) : overviewParts();
  panel.replaceChildren(...parts.filter(Boolean));
  panel.scrollTop = 0;
}

function nodeParts(node) {
  const kinds = {
    token: "token embedding", position: "position embedding", feature: "feature", target: "target",
    error: "error of the dictionary", mlp: "output of an MLP without a dictionary", bias: "biases of a layer",
  };
  const dictionary = node.dictionaryName;
  const isPinned = state.pins.includes(node.number);
  return [
    element("h2", {}, node.label),
    element("div", { class: "kind" }, kinds[node.kind], dictionary ? ` of ${dictionary}` : ""),
    element("div", { class: "actions" },
      element("button", { id: "pin", type: "button", "aria-pressed": isPinned, onclick: () => act(() => togglePin(node.number), "pin") },
        isPinned ? "Unpin" : "Pin"),
      element("button", { id: "clear", type: "button", onclick: () => select(null) }, "Clear")),
    node.kind === "feature" ? labelField(node) : null,
    element("dl", {}, factsOf(node).flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]), sumParts(node)),
    ...(node.details ? featureParts(node.details) : []),
    ...endsParts("Incoming edges", node.incoming, "source"),
    ...endsParts("Outgoing edges", node.outgoing, "target"),
  ];
}

// The label of a feature, which can be changed.
function labelField(node) {
  const field = element("input", {
    id: "label", class: "rename", maxlength: LONGEST, autocomplete: "off", value: labels.get(node.key) ?? "",
    placeholder: aboutLines(node).join(" ") || "no label", onfocus: (event) => event.target.select(), oninput: (event) => {
      setLabel(node.key, event.target.value.trim());
      writeHash();
      redraw();
    },
  });
  return element("label", { class: "label-field" }, element("span", { class: "soft" }, "label"), field);
}

// The sum of the row: its edges, and the effects that are not in the graph.
function sumParts(node) {
  if (node.total === null) return [];
  const edges = node.incoming.reduce((sum, edge) => sum + edge.weight, 0);
  return [
    element("dt", {}, node.kind === "feature" ? "pre-activation" : "value"),
    element("dd", {}, `${number3(node.total)} = ${number3(edges)} from edges ${node.rest < 0 ? "−" : "+"} ${number3(Math.abs(node.rest))} not in the graph`),
  ];
}

function endsParts(title, edges, side) {
  const known = shownEdges(edges);
  if (!known.length) return [];
  const most = Math.abs(known[0].weight);
  const list = element("ul", { class: "ends-list" }, known.slice(0, FIRST_ENDS).map((edge) => endItem(edge, side, most)));
  const sum = known.reduce((total, edge) => total + edge.weight, 0);
  const left = known.length - FIRST_ENDS;
  const more = left > 0 && element("button", { class: "more", type: "button", onclick: () => {
    const first = known.slice(FIRST_ENDS).map((edge) => endItem(edge, side, most));
    list.append(...first);
    more.remove();
    first[0].firstChild.focus();
  } }, `Show ${left} more`);
  return [
    element("h3", {}, title, element("span", { class: "soft small" }, `${known.length} edges, sum ${signed(sum)}`)), list, more,
  ];
}

function endItem(edge, side, most) {
  const node = NODES[edge[side]];
  const sign = edge.weight > 0 ? "up" : "down";
  const bar = element("span", { class: `bar-of ${sign}` });
  bar.style.width = `calc(${(100 * Math.abs(edge.weight)) / most}% - 12px)`;
  return element("li", {}, element("button", {
    class: "end", type: "button", "data-number": node.number, title: `${node.label} ${node.about}`,
    onclick: () => select(node.number, { focusPanel: true }),
    onmouseenter: () => hover(node.number), onmouseleave: () => hover(null),
  }, weightText(edge.weight), element("span", { class: "name" }, node.label, node.about ? element("i", {}, ` ${node.about}`) : ""), bar));
}

function featureParts(details) {
  const tokens = (name, kind, list) => list.length ? element("ul", { class: "tokens" }, element("li", { class: "name" }, name),
    list.map(([token, value]) => element("li", { class: kind, title: signed(value) }, visible(token)))) : null;
  return [
    element("h3", {}, "Feature",
      element("span", { class: "soft small" }, `active on ${number3(100 * details.density)}% of tokens, up to ${number3(details.max_activation)}`)),
    tokens("direct path promotes", "raised", details.top_tokens),
    tokens("direct path suppresses", "lowered", details.bottom_tokens),
    tokens("measured: raises", "raised", details.measured?.raised ?? []),
    tokens("measured: lowers", "lowered", details.measured?.lowered ?? []),
    details.contexts.length
      ? element("ul", { class: "contexts" }, listedContexts(details).map(([quantile, context]) => element("li", {},
        element("span", { class: "value", title: quantile ? "random activation in this quantile" : "top activation" },
          number3(context.activations[context.peak]), quantile ? element("span", { class: "soft small" }, ` ${quantile}`) : ""),
        element("span", { class: "text" }, context.tokens.map((token, i) => contextToken(token, context, i, details.max_activation))))))
      : element("p", { class: "soft" }, "Never active on the tokens searched."),
  ];
}

// Pairs of a quantile, or null for top activations, and a context.
function listedContexts(details) {
  const quantiles = Object.entries(details.quantile_contexts ?? {});
  return [...details.contexts.map((context) => [null, context]),
    ...quantiles.flatMap(([name, contexts]) => contexts.map((context) => [name, context]))];
}

function contextToken(token, context, i, most) {
  const value = context.activations[i];
  const title = number3(value);
  const text = visible(token, true);
  if (i === context.peak) return element("mark", { title }, text);
  if (value <= 0 || most <= 0) return text;
  // feature.css paints by the style attribute.
  return element("span", { title, style: `--a:${Math.min(1, value / most).toFixed(2)}` }, text);
}

function groupParts(group) {
  const name = element("input", { class: "rename", id: "rename", value: group.name, "aria-label": "Name of the group", maxlength: LONGEST, autocomplete: "off",
    onfocus: (event) => event.target.select(), oninput: (event) => {
    group.name = event.target.value.trim() || "Group";
    writeHash();
    drawPinned();
  } });
  return [
    element("h2", {}, "Group"),
    element("div", { class: "kind" }, "Its edges are the sums of its members' edges."),
    element("div", { class: "actions" }, name, element("button", { id: "ungroup", type: "button", onclick: () => act(() => {
      state.groups = state.groups.filter((other) => other !== group);
      openGroup = null;
    }) }, "Ungroup")),
    element("h3", {}, "Members"),
    element("ul", { class: "ends-list" }, group.members.map((number) => element("li", { class: "member" },
      element("button", { class: "end", type: "button", onclick: () => select(number, { focusPanel: true }) },
        element("span", { class: "soft" }, NODES[number].kind), element("span", { class: "name" }, NODES[number].label)),
      element("button", { type: "button", class: "small", "aria-label": `Remove ${NODES[number].label} from the group`,
        onclick: () => act(() => leaveGroup(number)) }, "Remove")))),
  ];
}

function overviewParts() {
  const { scores } = DATA;
  const count = (kind) => NODES.filter((node) => node.kind === kind).length;
  return [
    element("h2", {}, "Attribution graph"),
    element("p", { class: "soft" },
      "Each edge is the exact direct effect of one node on another, with frozen attention patterns and norm scales. " +
      "Select a node to see its incoming and outgoing edges."),
    element("h3", {}, "Verdict"),
    element("ul", { id: "verdicts" }, DATA.verdicts.map(({ level, text }) =>
      element("li", { class: level }, element("strong", {}, level), " ", text))),
    element("div", { class: "legend", role: "img", "aria-label": "Legend" }, legendItems()),
    element("h3", {}, "Targets"),
    element("ul", { class: "ends-list" }, NODES.filter((node) => node.kind === "target").map((node) => {
      const { probability, weight } = DATA.targets[node.index];
      return element("li", {}, element("button", { class: "end", type: "button", onclick: () => select(node.number, { focusPanel: true }) },
        element("span", { class: "weight" }, percent(probability ?? weight)), element("span", { class: "name" }, visible(node.label))));
    })),
    DATA.left_out ? element("h3", {}, "Left out") : null,
    DATA.left_out ? element("p", { id: "left-out" }, DATA.left_out) : null,
    element("h3", {}, "Scores"),
    element("dl", {}, rows([
      ["replacement", `${percent(scores.replacement)} of the influence comes from tokens, the rest from errors`],
      ["completeness", `${percent(scores.completeness)} of the inputs of nodes are not errors`],
      ["not in the graph", `${percent(scores.rest)} of the influence`],
    ])),
    ...validationParts(DATA.validation),
    element("h3", {}, "Contents"),
    element("dl", {}, rows([
      ["nodes", `${NODES.length.toLocaleString("en")}: ${["feature", "error", "mlp", "bias", "position", "token", "target"]
        .filter(count).map((kind) => `${count(kind)} ${count(kind) === 1 ? kind : kind === "bias" ? "biases" : `${kind}s`}`).join(", ")}`],
      ["edges", EDGES.length.toLocaleString("en")],
      ...Object.entries(DATA.facts).map(([name, value]) => [name.replaceAll("_", " "), factText(value)]),
    ])),
    element("details", {}, element("summary", {}, `${DATA.dictionaries.length} dictionaries`),
      element("dl", {}, rows(DATA.dictionaries.map(({ name, ...facts }) => [name, factText(facts)])))),
    element("h3", {}, "Keys"),
    element("dl", {}, rows([
      [keys("Tab"), "enter or leave the graph"], [keys("←", "↑", "→", "↓"), "move to the next node"], [keys("Enter"), "select"],
      [keys("p"), "pin or unpin"], [keys("e"), "edit the label of the selected feature"], [keys("g"), "switch between graph and pinned nodes"], [keys("/"), "search; Enter moves to the next match"],
      [keys("Esc"), "clear the selection"], [keys("+", "−", "0"), "zoom in, out, and to the whole graph, as the wheel does"],
      [keys("Shift", "←"), "move the graph, as dragging does"], [keys("[", "]"), "previous and next prompt"],
    ])),
  ];
}

function legendItems() {
  const item = (kind, text) => {
    const picture = svgElement("svg", { width: 14, height: 14, class: `node ${kind}`, "aria-hidden": true });
    picture.append(...pointParts({ kind }, { x: 7, y: 7, r: 5 }).slice(1, 2));
    return element("span", {}, picture, text);
  };
  const stroke = (name, text) => element("span", {}, svgElement("svg", { width: 18, height: 6 },
    svgElement("line", { x1: 0, x2: 18, y1: 3, y2: 3, "stroke-width": 3, stroke: `var(--${name})` })), text);
  const present = new Set(NODES.map((node) => node.kind));
  const names = { feature: "feature", error: "error", mlp: "MLP output", bias: "biases", position: "position" };
  return [
    ...Object.entries(names).filter(([kind]) => present.has(kind)).map(([kind, text]) => item(kind, text)),
    stroke("positive", "positive effect"), stroke("negative", "negative effect"),
  ];
}

function validationParts(validation) {
  if (!validation) return [];
  const { summary, edges } = validation;
  const modes = Object.keys(summary);
  const names = { direct: "all but the direct effect", frozen: "attention and norms", free: "nothing" };
  const parts = [
    element("h3", {}, "Validation", element("span", { class: "soft small" }, "predicted and measured effects")),
    element("p", { class: "soft" }, "Features were ablated in the model, and the measured changes compared with the predictions of their edges."),
    table("validation", ["held fixed", "edges", "correlation", "same sign", "error"], modes.map((mode) => [
      names[mode] ?? mode, summary[mode].edges, number3(summary[mode].pearson), percent(summary[mode].sign_agreement),
      number3(summary[mode].relative_error),
    ])),
  ];
  if (edges.length) {
    parts.push(element("details", {}, element("summary", {}, "Individual edges"),
      table("validated-edges", ["edge", "predicted", ...modes], edges.map((edge) => [
        `${edge.source_label} → ${edge.target_label}`, signed(edge.predicted), ...modes.map((mode) => signed(edge[mode])),
      ]))));
  }
  return parts;
}

function table(id, head, lines) {
  return element("table", { id }, element("thead", {}, element("tr", {}, head.map((text) => element("th", { scope: "col" }, text)))),
    element("tbody", {}, lines.map((cells) => element("tr", {}, cells.map((cell) => element("td", {}, String(cell)))))));
}

function rows(pairs) {
  return pairs.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]);
}

function keys(...names) {
  return names.map((name) => element("kbd", {}, name));
}

function factText(value) {
  if (typeof value === "number") return Number.isInteger(value) ? value.toLocaleString("en") : number3(value);
  if (Array.isArray(value)) return value.map(factText).join(", ");
  if (value !== null && typeof value === "object") {
    return Object.entries(value).map(([name, inner]) => `${name.replaceAll("_", " ")} ${factText(inner)}`).join(", ");
  }
  return value === null ? "–" : String(value);
}
