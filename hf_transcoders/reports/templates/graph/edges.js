// The edges as lines on a canvas of the size of the viewport, which stays in place while the graph scrolls.

const canvas = byId("edge-canvas");
let mostFlow;
let hovered = null;

function openEdges() {
  mostFlow = EDGES.reduce((most, edge) => Math.max(most, edge.flow), 1e-30);
  hovered = null;
}

function drawEdges() {
  const ratio = window.devicePixelRatio || 1;
  const { clientWidth: width, clientHeight: height } = stage;
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
  }
  const pen = canvas.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, width, height);
  const scale = ratio * grid.zoom;
  pen.setTransform(scale, 0, 0, scale, -stage.scrollLeft * ratio, -stage.scrollTop * ratio);
  const style = getComputedStyle(document.documentElement);
  const colours = { up: style.getPropertyValue("--positive"), down: style.getPropertyValue("--negative") };
  const chosen = hovered ?? state.selected;
  const isOwn = (edge) => chosen !== null && (edge.source === chosen || edge.target === chosen);
  // The edges of a node under the pointer are drawn, too.
  const own = shown.edges.filter(isOwn);
  const others = drawnEdges().filter((edge) => !isOwn(edge));
  // With more edges each is fainter.
  const density = Math.min(2.5, 0.3 + 1400 / others.length);
  // Weak edges first, so that strong ones are drawn on top.
  for (const edge of others.reverse()) {
    const strength = Math.sqrt(edge.flow / mostFlow);
    const alpha = chosen === null && !state.search.trim() ? 0.045 + 0.65 * strength : 0.02 + 0.06 * strength;
    pen.globalAlpha = Math.min(0.9, alpha * density);
    line(pen, edge, colours, 0.5 + 3.2 * strength);
  }
  if (chosen !== null) {
    for (const ends of [own.filter((edge) => edge.target === chosen), own.filter((edge) => edge.source === chosen)]) {
      const most = Math.max(1e-30, ...ends.map((edge) => Math.abs(edge.weight)));
      for (const edge of ends.sort((a, b) => Math.abs(a.weight) - Math.abs(b.weight))) {
        const strength = Math.sqrt(Math.abs(edge.weight) / most);
        pen.globalAlpha = 0.25 + 0.7 * strength;
        line(pen, edge, colours, 0.7 + 3.6 * strength);
      }
    }
  }
  pen.globalAlpha = 1;
}

function line(pen, edge, colours, width) {
  const from = place[edge.source];
  const to = place[edge.target];
  const y1 = whereY(edge.source) - (from.height / 2 || 0);
  const y2 = whereY(edge.target) + (to.height / 2 || 0);
  // Within a layer, from attention's dictionary to the MLP's: an arc, so that no other node lies on it.
  const middle = Math.abs(y1 - y2) < grid.step * 2 && !to.height ? Math.min(y1, y2) - 22 : (y1 + y2) / 2;
  pen.strokeStyle = edge.weight > 0 ? colours.up : colours.down;
  pen.lineWidth = width;
  pen.beginPath();
  pen.moveTo(from.x, y1);
  pen.bezierCurveTo(from.x, middle, to.x, middle, to.x, y2);
  pen.stroke();
}
