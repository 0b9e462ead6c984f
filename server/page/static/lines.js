// Two lines over time with a readout. The history is this tab's: the gateway sends only new samples.

import { el, fill, svg } from "./dom.js";

const HEIGHT = 130, LEFT = 52, BOTTOM = 18, NARROW = 200;
export const SHOWN_S = 600;

/** A round number that is not below the value. */
function ceiling(value) {
  if (!(value > 0)) return 1;
  const size = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 2.5, 5, 10].map((step) => step * size).find((step) => step >= value * 0.999);
}

/** Marks at zero, the middle and the top; `height` is a value's share of the plot. */
function halves(values) {
  const top = ceiling(Math.max(0, ...values));
  return { marks: [0, top / 2, top], height: (value) => value / top };
}

/** Marks at powers of ten around the values, two at least. */
function decades(values) {
  const positive = values.filter((value) => value > 0);
  const low = positive.length ? Math.floor(Math.log10(Math.min(...positive))) : -3;
  const high = Math.max(low + 1, positive.length ? Math.ceil(Math.log10(Math.max(...positive))) : 0);
  const marks = Array.from({ length: high - low + 1 }, (_, index) => 10 ** (low + index));
  return { marks, height: (value) => (Math.log10(Math.max(value, marks[0])) - low) / (high - low) };
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
  /** `series`: for the lines a and b their names and the field of a sample. Latencies are drawn
   *  on a logarithmic scale: a fault lasts a thousand times what a token does. */
  constructor(parent, series, format, logarithmic = false) {
    this.series = series;
    this.format = format;
    this.logarithmic = logarithmic;
    this.readout = el("div", "readout");
    this.plot = svg("svg", { height: HEIGHT, class: "plot", role: "img" });
    this.pointer = null;
    this.plot.addEventListener("pointermove", (event) => {
      this.pointer = event.clientX - this.plot.getBoundingClientRect().left;
      this.tell();
    });
    this.plot.addEventListener("pointerleave", () => { this.pointer = null; this.tell(); });
    fill(parent, [this.readout, this.plot]);
  }

  draw(samples, now, everyS) {
    const shown = samples.filter((sample) => now - sample.at <= SHOWN_S);
    const span = Math.max(60, Math.min(SHOWN_S, shown.length ? now - shown[0].at : 0));
    const values = this.series.flatMap(({ field }) => shown.map((sample) => sample[field] ?? 0));
    const { marks, height } = this.logarithmic ? decades(values) : halves(values);
    const width = Math.max(NARROW, this.plot.clientWidth); // as drawn, so that text keeps its size
    const x = (at) => LEFT + (width - LEFT - 4) * (1 - (now - at) / span);
    const y = (value) => 6 + (HEIGHT - BOTTOM - 6) * (1 - height(value));
    this.shown = shown;
    this.x = x;
    const drawn = [];
    for (const mark of marks) {
      const at = y(mark);
      drawn.push(svg("line", { x1: LEFT, x2: width - 4, y1: at, y2: at, class: "grid" }));
      drawn.push(svg("text", { x: LEFT - 6, y: at + 4, "text-anchor": "end" }, this.format(mark)));
    }
    drawn.push(svg("text", { x: LEFT, y: HEIGHT - 2 }, `${Math.round(span / 60)} min ago`));
    drawn.push(svg("text", { x: width - 4, y: HEIGHT - 2, "text-anchor": "end" }, "now"));
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
