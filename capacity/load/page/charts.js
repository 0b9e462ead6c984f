"use strict";
// Charts of our own, drawn at the real width of their place, so that text stays legible on a phone.
const SVG = "http://www.w3.org/2000/svg";
const LEFT = 52, RIGHT = 14, TOP = 10, BOTTOM = 36;

function make(name, attributes = {}, text) {
  const html = ["div", "span", "b", "i", "small", "p", "h2", "section", "table", "tr", "td", "th", "li", "ul", "dl", "dt", "dd", "strong", "details", "summary"];
  const node = html.includes(name) ? document.createElement(name) : document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

function color(index, count) {
  if (count <= 6) return `var(--s${index})`;
  return `hsl(${Math.round(255 - 225 * index / (count - 1))} 60% 52%)`; // a ramp: stages are in order
}

function short(value) {
  const size = Math.abs(value);
  if (size >= 1e6) return `${+(value / 1e6).toPrecision(3)}M`;
  if (size >= 1e4) return `${+(value / 1e3).toPrecision(3)}k`;
  if (size >= 100) return `${Math.round(value)}`;
  return `${+value.toPrecision(3)}`;
}

function ticks(low, high, count) {
  const rough = (high - low) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(rough || 1));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough) || power;
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-6; at += step) found.push(+at.toPrecision(12));
  return found;
}

function logTicks(low, high) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
    for (const m of [1, 2, 5]) {
      const at = m * 10 ** power;
      if (at >= low * 0.999 && at <= high * 1.001) found.push(at);
    }
  return found;
}

function scale(low, high, from, to, log) {
  if (log) {
    const a = Math.log(low), b = Math.log(high);
    return (value) => from + (Math.log(Math.max(value, low)) - a) / (b - a || 1) * (to - from);
  }
  return (value) => from + (value - low) / (high - low || 1) * (to - from);
}

function legend(place, series) {
  if (series.length < 2) return;
  const row = make("div", { class: "legend" });
  series.forEach((one, index) => {
    const entry = make("span");
    const mark = make("i");
    mark.style.background = one.color || color(index, series.length);
    entry.append(mark, one.name);
    row.append(entry);
  });
  place.append(row);
}

// Draws now and whenever the width of the place has changed.
function drawnAtWidth(holder, draw) {
  let drawn = 0;
  new ResizeObserver(() => requestAnimationFrame(() => {
    if (holder.clientWidth === drawn) return;
    drawn = holder.clientWidth;
    draw();
  })).observe(holder);
}

// chart(place, {series: [{name, points: [[x, y]...], kind: line|step|area|dots|labels, color}],
//   x: {label, log, low, high}, y: {label, low, high, format}, lines: [{x|y, text}], bands, tall})
function chart(place, options) {
  legend(place, options.legend === false ? [] : options.series);
  const holder = make("div", { class: "chart" });
  const tip = make("div", { class: "tip" });
  place.append(holder);
  const draw = () => {
    const width = holder.clientWidth, height = options.tall || 220;
    holder.replaceChildren();
    if (width < 40) return;
    const svg = make("svg", { height, viewBox: `0 0 ${width} ${height}`, role: "img" });
    svg.append(make("title", {}, options.title || ""));
    const all = options.series.flatMap((one) => one.points);
    const xs = all.map((p) => p[0]), ys = all.map((p) => p[1]);
    const widest = (values, given, side) => given !== undefined ? given : side(...values, ...(values.length ? [] : [0, 1]));
    let xLow = widest(xs.slice(0, 20000), options.x.low, Math.min), xHigh = widest(xs.slice(0, 20000), options.x.high, Math.max);
    let yLow = widest(ys.slice(0, 20000), options.y.low, Math.min), yHigh = widest(ys.slice(0, 20000), options.y.high, Math.max);
    for (const line of options.lines || []) {
      // A limit far beyond all points would squeeze them: it is left out.
      if (line.x !== undefined && line.x < 2 * xHigh) xHigh = Math.max(xHigh, line.x * 1.02);
      if (line.y !== undefined && line.y < 4 * yHigh) yHigh = Math.max(yHigh, line.y * 1.05);
    }
    if (options.headroom) yHigh *= 1.15;
    if (options.x.latency && xLow > 0 && xHigh / xLow <= 20) xLow = xLow < 0.5 * xHigh ? 0 : 0.8 * xLow;
    const log = options.x.log && xLow > 0 && xHigh / xLow > 20;
    const yLog = options.y.log && yLow > 0 && yHigh / yLow > 20;
    if (options.y.log && !yLog) yLow = 0;
    if (options.pad) { xHigh += (xHigh - xLow || xHigh || 1) * 0.12; yHigh += (yHigh - yLow || yHigh || 1) * 0.15; }
    if (xLow === xHigh) xHigh = xLow + (xLow || 1) * 0.1;
    if (yLow === yHigh) yHigh = yLow + (yLow || 1) * 0.1;
    const x = scale(xLow, xHigh, LEFT, width - RIGHT, log), y = scale(yLow, yHigh, height - BOTTOM, TOP, yLog);
    for (const at of yLog ? logTicks(yLow, yHigh) : ticks(yLow, yHigh, 4)) {
      svg.append(make("line", { class: "gridline", x1: LEFT, x2: width - RIGHT, y1: y(at), y2: y(at) }));
      svg.append(make("text", { x: LEFT - 7, y: y(at) + 4, "text-anchor": "end" }, (options.y.format || short)(at)));
    }
    let marks = log ? logTicks(xLow, xHigh) : ticks(xLow, xHigh, width / 90);
    if (log && marks.length > width / 42) marks = marks.filter((at) => /^1/.test(at.toExponential()));
    for (const at of marks) {
      svg.append(make("line", { class: "axis", x1: x(at), x2: x(at), y1: height - BOTTOM, y2: height - BOTTOM + 4 }));
      svg.append(make("text", { x: x(at), y: height - BOTTOM + 17, "text-anchor": "middle" }, (options.x.format || short)(at)));
    }
    svg.append(make("line", { class: "axis", x1: LEFT, x2: width - RIGHT, y1: height - BOTTOM, y2: height - BOTTOM }));
    svg.append(make("text", { x: width - RIGHT, y: height - 2, "text-anchor": "end" }, options.x.label + (log ? " (log)" : "")));
    svg.append(make("text", { x: 0, y: height - 2 }, options.y.label));
    for (const band of options.bands || []) {
      const from = x(band.from), to = x(band.to);
      if (band.shade) svg.append(make("rect", { x: from, y: TOP, width: Math.max(0, to - from), height: height - TOP - BOTTOM, fill: "var(--grid)", opacity: 0.7 }));
      if (band.text && to - from > 7 * band.text.length) svg.append(make("text", { x: (from + to) / 2, y: TOP + 10, "text-anchor": "middle" }, band.text));
      if (band.edge) svg.append(make("line", { x1: from, x2: from, y1: TOP, y2: height - BOTTOM, stroke: "var(--line)" }));
    }
    options.series.forEach((one, index) => {
      const paint = one.color || color(index, options.series.length);
      const points = one.points;
      if (one.kind === "dots" || one.kind === "labels" || one.kind === "crosses") {
        const labelled = [];
        for (const [px, py, text] of points) {
          const cx = x(px), cy = y(Math.max(py, yLow)); // what failed at once stands on the axis
          if (one.kind === "crosses") svg.append(make("path", { d: `M${cx - 4} ${cy - 4}l8 8m0-8l-8 8`, stroke: paint, "stroke-width": 1.8 }));
          else svg.append(make("circle", { cx, cy, r: one.kind === "labels" ? 5 : points.length < 300 ? 3.4 : 2.4, fill: paint, "fill-opacity": one.kind === "labels" ? 1 : 0.55 }));
          if (one.kind !== "labels" || !text || labelled.some(([lx, ly]) => Math.abs(lx - cx) < 7 * text.length && Math.abs(ly - cy) < 14)) continue;
          labelled.push([cx, cy]);
          const flip = cx + 9 + 7 * text.length > width; // then below, where the path does not come from
          svg.append(make("text", { class: "label", x: flip ? width : cx + 9, y: flip ? cy + 20 : cy - 8, "text-anchor": flip ? "end" : "start" }, text));
        }
        return;
      }
      let path = "";
      points.forEach(([px, py], n) => {
        if (py === null) return;
        const begin = n === 0 || points[n - 1][1] === null;
        if (one.kind === "step" && !begin) path += `H${x(px).toFixed(1)}V${y(py).toFixed(1)}`;
        else path += `${begin ? "M" : "L"}${x(px).toFixed(1)} ${y(py).toFixed(1)}`;
      });
      if (one.kind === "area" && points.length) {
        const base = y(Math.max(yLow, 0));
        svg.append(make("path", { d: `${path}L${x(points.at(-1)[0])} ${base}L${x(points[0][0])} ${base}Z`, fill: paint, opacity: 0.14 }));
      }
      svg.append(make("path", { d: path, fill: "none", stroke: paint, "stroke-width": 2, "stroke-linejoin": "round" }));
    });
    for (const line of options.lines || []) {
      const vertical = line.x !== undefined, at = vertical ? x(line.x) : y(line.y);
      if (vertical ? line.x < xLow || line.x > xHigh : line.y < yLow || line.y > yHigh) continue;
      const ends = vertical ? { x1: at, x2: at, y1: TOP, y2: height - BOTTOM } : { x1: LEFT, x2: width - RIGHT, y1: at, y2: at };
      svg.append(make("line", { ...ends, stroke: line.color || "var(--soft)", "stroke-dasharray": "5 4", "stroke-width": 1.4 }));
      if (line.text) {
        const flip = vertical && at > width - 120;
        svg.append(make("text", { x: vertical ? at + (flip ? -6 : 6) : width - RIGHT, y: vertical ? (line.low ? height - BOTTOM - 8 : TOP + 24) : at - 5, "text-anchor": flip || !vertical ? "end" : "start", style: `fill:${line.color || "var(--soft)"}` }, line.text));
      }
    }
    holder.append(svg, tip);
    svg.onpointermove = (event) => {
      const box = svg.getBoundingClientRect();
      let best = null, near = 40 * 40;
      options.series.forEach((one) => one.points.forEach((p) => {
        if (p[1] === null) return;
        const far = (x(p[0]) - event.clientX + box.left) ** 2 + (y(p[1]) - event.clientY + box.top) ** 2;
        if (far < near) { near = far; best = [one, p]; }
      }));
      tip.style.display = best ? "block" : "none";
      if (!best) return;
      const [one, p] = best, fx = options.x.format || short, fy = options.y.format || short;
      tip.textContent = `${p[2] || one.name}\n${options.x.label}: ${fx(p[0])}\n${options.y.label}: ${fy(p[1])}`;
      const left = x(p[0]) + 12;
      tip.style.left = `${left + tip.offsetWidth > width ? x(p[0]) - tip.offsetWidth - 12 : left}px`;
      tip.style.top = `${Math.max(0, y(p[1]) - 30)}px`;
    };
    svg.onpointerleave = () => { tip.style.display = "none"; };
  };
  drawnAtWidth(holder, draw);
}

// Horizontal bars, each of parts: rows [{name, parts: [{name, value}]}].
function bars(place, rows, unit) {
  const names = [...new Set(rows.flatMap((row) => row.parts.map((part) => part.name)))];
  legend(place, names.map((name) => ({ name })));
  const holder = make("div", { class: "chart" });
  place.append(holder);
  const most = Math.max(...rows.map((row) => row.parts.reduce((sum, part) => sum + part.value, 0)), 1e-9);
  const draw = () => {
    const width = holder.clientWidth, height = rows.length * 46 + 4;
    holder.replaceChildren();
    const svg = make("svg", { height, viewBox: `0 0 ${width} ${height}`, role: "img" });
    rows.forEach((row, line) => {
      let at = 0;
      svg.append(make("text", { class: "label", x: 0, y: line * 46 + 14 }, row.name));
      for (const part of row.parts) {
        const wide = part.value / most * width;
        const block = make("rect", { x: at, y: line * 46 + 20, width: Math.max(0, wide - 1), height: 16, rx: 2, fill: color(names.indexOf(part.name), names.length) });
        block.append(make("title", {}, `${part.name}: ${short(part.value)} ${unit}`));
        svg.append(block);
        const text = `${short(part.value)} ${unit}`;
        if (wide > 8 * text.length) svg.append(make("text", { x: at + 6, y: line * 46 + 32, style: "fill:var(--paper)" }, text));
        at += wide;
      }
    });
    holder.append(svg);
  };
  drawnAtWidth(holder, draw);
}

// Intervals around 1: rows [{name, low, middle, high, better}].
function forest(place, rows, labels) {
  const holder = make("div", { class: "chart" });
  place.append(holder);
  const far = Math.max(...rows.flatMap((row) => [row.high, 1 / row.low]).filter(Number.isFinite), 1.05) * 1.03;
  const draw = () => {
    const width = holder.clientWidth, name = Math.min(150, width * 0.36), height = rows.length * 30 + 40;
    holder.replaceChildren();
    const svg = make("svg", { height, viewBox: `0 0 ${width} ${height}`, role: "img" });
    const x = scale(1 / far, far, name + 6, width - 14, true);
    const step = far < 1.15 ? 1.05 : far < 1.6 ? 1.25 : 2;
    for (let at = 1; at < far; at *= step)
      for (const mark of at === 1 ? [1] : [at, 1 / at]) {
        svg.append(make("line", { class: mark === 1 ? "axis" : "gridline", x1: x(mark), x2: x(mark), y1: 4, y2: height - 32 }));
        svg.append(make("text", { x: x(mark), y: height - 18, "text-anchor": "middle" }, mark === 1 ? "equal" : `×${+mark.toFixed(2)}`));
      }
    svg.append(make("text", { x: width - 14, y: height - 2, "text-anchor": "end" }, labels));
    rows.forEach((row, line) => {
      const y = line * 30 + 20;
      const paint = row.better === null ? "var(--faint)" : row.better ? "var(--good)" : "var(--bad)";
      svg.append(make("text", { class: "label", x: 0, y: y + 4 }, row.name));
      svg.append(make("line", { x1: x(row.low), x2: x(row.high), y1: y, y2: y, stroke: paint, "stroke-width": 3, "stroke-linecap": "round" }));
      svg.append(make("circle", { cx: x(row.middle), cy: y, r: 5, fill: paint }));
    });
    holder.append(svg);
  };
  drawnAtWidth(holder, draw);
}

function section(title, note, wide) {
  const node = make("section", wide ? { class: "wide" } : {});
  node.append(make("h2", {}, title));
  if (note) node.append(make("p", { class: "note" }, note));
  document.getElementById("charts").append(node);
  return node;
}

function table(place, head, rows) {
  const scroll = make("div", { class: "scroll" }), node = make("table"), top = make("tr");
  head.forEach((text) => top.append(make("th", {}, text)));
  node.append(top);
  for (const cells of rows) {
    const line = make("tr");
    cells.forEach((cell) => line.append(make("td", cell.kind ? { class: cell.kind } : {}, cell.text ?? cell)));
    node.append(line);
  }
  scroll.append(node);
  place.append(scroll);
}

// A table that opens when it is asked for.
function folded(place, what, head, rows) {
  const details = make("details");
  details.append(make("summary", {}, what));
  place.append(details);
  table(details, head, rows);
}

function facts(place, pairs) {
  const list = make("dl");
  for (const [name, value] of pairs) list.append(make("dt", {}, name), make("dd", {}, value));
  place.append(list);
}

function cards(numbers) {
  const row = document.getElementById("cards");
  for (const [value, unit, what] of numbers) {
    const card = make("div", { class: "number" }), big = make("b", {}, value);
    if (unit) big.append(make("small", {}, ` ${unit}`));
    card.append(big, make("span", {}, what));
    row.append(card);
  }
}

function verdict(kind, headline, points) {
  const box = document.getElementById("verdict");
  if (kind) box.classList.add(kind);
  box.append(make("strong", {}, headline));
  if (!points.length) return;
  const list = make("ul");
  points.forEach((point) => list.append(make("li", {}, point)));
  box.append(list);
}
