// Two lines over time with a readout. The history is this tab's: the gateway sends only new samples.

import { el, fill, svg } from "./dom.js";

const WIDTH = 400, HEIGHT = 110, LEFT = 44, BOTTOM = 16;
export const SHOWN_S = 600;

/** A round number that is not below the value. */
function ceiling(value) {
  if (!(value > 0)) return 1;
  const size = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 2.5, 5, 10].map((step) => step * size).find((step) => step >= value * 0.999);
}

/** Runs of points without a gap: a missing value, or a pause in sampling. */
function runs(points, gapS) {
  const found = [];
  let run = [];
  for (const point of points) {
    const missing = point.value === null;
    const late = run.length && point.at - run[run.length - 1].at > gapS;
    if ((missing || late) && run.length) { found.push(run); run = []; }
    if (!missing) run.push(point);
  }
  if (run.length) found.push(run);
  return found;
}

export class Lines {
  /** `series`: for the lines a and b their names and the field of a sample. */
  constructor(parent, series, format) {
    this.series = series;
    this.format = format;
    this.readout = el("div", "readout");
    this.plot = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "plot", role: "img" });
    this.pointer = null;
    this.plot.addEventListener("pointermove", (event) => {
      const box = this.plot.getBoundingClientRect();
      this.pointer = ((event.clientX - box.left) / box.width) * WIDTH;
      this.tell();
    });
    this.plot.addEventListener("pointerleave", () => { this.pointer = null; this.tell(); });
    fill(parent, [this.readout, this.plot]);
  }

  draw(samples, now, everyS) {
    const shown = samples.filter((sample) => now - sample.at <= SHOWN_S);
    const span = Math.max(60, Math.min(SHOWN_S, shown.length ? now - shown[0].at : 0));
    const values = this.series.flatMap(({ field }) => shown.map((sample) => sample[field] ?? 0));
    const top = ceiling(Math.max(0, ...values));
    const x = (at) => LEFT + (WIDTH - LEFT - 4) * (1 - (now - at) / span);
    const y = (value) => 6 + (HEIGHT - BOTTOM - 6) * (1 - value / top);
    this.shown = shown;
    this.x = x;
    const drawn = [];
    for (const share of [0, 0.5, 1]) {
      const at = y(top * share);
      drawn.push(svg("line", { x1: LEFT, x2: WIDTH - 4, y1: at, y2: at, class: "grid" }));
      drawn.push(svg("text", { x: LEFT - 6, y: at + 4, "text-anchor": "end" }, this.format(top * share)));
    }
    drawn.push(svg("text", { x: LEFT, y: HEIGHT - 2 }, `${Math.round(span / 60)} min ago`));
    drawn.push(svg("text", { x: WIDTH - 4, y: HEIGHT - 2, "text-anchor": "end" }, "now"));
    this.series.forEach(({ field }, index) => {
      const className = index ? "b" : "a";
      const points = shown.map((sample) => ({ at: sample.at, value: sample[field] }));
      for (const run of runs(points, 3 * everyS)) {
        if (run.length === 1) {
          drawn.push(svg("circle", { cx: x(run[0].at), cy: y(run[0].value), r: 1.8, class: className }));
        } else {
          const path = run.map(({ at, value }) => `${x(at).toFixed(1)},${y(value).toFixed(1)}`);
          drawn.push(svg("polyline", { points: path.join(" "), class: className }));
        }
      }
    });
    fill(this.plot, drawn);
    this.tell();
  }

  /** The values under the pointer, or the newest ones. */
  tell() {
    const shown = this.shown ?? [];
    let sample = shown[shown.length - 1];
    if (sample && this.pointer !== null) {
      const near = (one) => Math.abs(this.x(one.at) - this.pointer);
      sample = shown.reduce((best, one) => (near(one) < near(best) ? one : best));
    }
    const parts = this.series.map(({ name, field }, index) =>
      el("span", index ? "b" : "a", `${name} ${sample ? this.format(sample[field]) : "–"}  `));
    if (sample && this.pointer !== null) {
      parts.push(el("span", "", "at " + new Date(sample.at * 1000).toLocaleTimeString([], { hour12: false })));
    }
    fill(this.readout, parts);
    this.plot.setAttribute("aria-label", this.readout.textContent);
  }
}
