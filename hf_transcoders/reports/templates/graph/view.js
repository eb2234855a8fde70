// Zoom and pan of the graph: wheel and buttons, dragging, and keys.

const MOST_ZOOM = 4;
const WHEEL_SPEED = 0.0015;

// The zoom at which the whole graph fits.
function leastZoom() {
  return Math.min(1, stage.clientWidth / grid.width, stage.clientHeight / grid.height);
}

// Sets the zoom. The point of the graph at (x, y) of the stage, its middle by default, stays in place.
function zoomTo(zoom, x = stage.clientWidth / 2, y = stage.clientHeight / 2) {
  const least = leastZoom();
  const next = Math.min(MOST_ZOOM, Math.max(least, zoom));
  const across = (stage.scrollLeft + x) / grid.zoom;
  const down = (stage.scrollTop + y) / grid.zoom;
  grid.zoom = next;
  drawNodes();
  stage.scrollLeft = across * next - x;
  stage.scrollTop = down * next - y;
  stick();
  drawEdges();
  drawZoom();
}

function drawZoom() {
  byId("zoom-value").textContent = `${Math.round(100 * grid.zoom)}%`;
  byId("zoom-in").disabled = grid.zoom >= MOST_ZOOM;
  byId("zoom-out").disabled = grid.zoom <= leastZoom() + 1e-6;
}

function zoomBy(factor) {
  zoomTo(grid.zoom * factor);
  announce(`zoom ${Math.round(100 * grid.zoom)}%`);
}

byId("zoom-in").addEventListener("click", () => zoomBy(1.25));
byId("zoom-out").addEventListener("click", () => zoomBy(0.8));
byId("zoom-fit").addEventListener("click", () => zoomTo(leastZoom()));

stage.addEventListener("wheel", (event) => {
  // With Shift, the wheel scrolls.
  if (event.shiftKey || !event.deltaY) return;
  event.preventDefault();
  hideTooltip();
  const { left, top } = stage.getBoundingClientRect();
  const pixels = event.deltaMode === 1 ? 16 * event.deltaY : event.deltaY;
  zoomTo(grid.zoom * Math.exp(-WHEEL_SPEED * pixels), event.clientX - left, event.clientY - top);
}, { passive: false });

// Dragging the background. Fingers scroll without this.
let drag = null;
stage.addEventListener("pointerdown", (event) => {
  if (event.button === 0 && event.pointerType === "mouse" && !event.target.closest(".node")) {
    drag = { x: event.clientX, y: event.clientY, left: stage.scrollLeft, top: stage.scrollTop, moved: false };
  }
});
window.addEventListener("pointermove", (event) => {
  if (!drag) return;
  const across = event.clientX - drag.x;
  const down = event.clientY - drag.y;
  if (!drag.moved && Math.hypot(across, down) < 4) return;
  drag.moved = true;
  stage.classList.add("dragged");
  stage.scrollLeft = drag.left - across;
  stage.scrollTop = drag.top - down;
});
window.addEventListener("pointerup", () => {
  if (!drag) return;
  const { moved } = drag;
  drag = null;
  stage.classList.remove("dragged");
  // The click at the end of a drag selects nothing.
  if (moved) {
    const stop = (event) => event.stopPropagation();
    window.addEventListener("click", stop, { capture: true, once: true });
    setTimeout(() => window.removeEventListener("click", stop, { capture: true }), 50);
  }
});

function panBy(key) {
  const step = 80;
  const [across, down] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[key];
  stage.scrollBy(across * step, down * step);
}
