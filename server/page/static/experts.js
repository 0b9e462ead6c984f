// A heat map for each decode group: ranks down, layers across, colour by the rank's tokens against
// the layer's mean; under it each layer's balancedness.

import { $, count, el, fill, svg } from "./dom.js";

const LEFT = 62, STRIP = 34;
let drawn = ""; // the data, as text, that is on the page

function cells(group) {
  const width = Math.max(11, Math.min(34, Math.floor(980 / Math.max(1, group.layers.length))));
  const height = group.ranks > 24 ? 11 : 18;
  return { width, height };
}

function map(group) {
  const { width, height } = cells(group);
  const right = LEFT + width * group.layers.length, bottom = height * group.ranks;
  const plot = svg("svg", { width: right + 4, height: bottom + STRIP + 20, role: "img",
    "aria-label": `tokens of ${group.ranks} ranks in ${group.layers.length} layers` });
  const every = Math.ceil(28 / width), everyRank = height < 14 ? 4 : 1;
  for (let rank = 0; rank < group.ranks; rank += everyRank) {
    plot.append(svg("text", { x: LEFT - 8, y: height * (rank + 0.5) + 4, "text-anchor": "end" }, `rank ${group.rank_numbers[rank]}`));
  }
  plot.append(svg("text", { x: LEFT - 8, y: bottom + STRIP - 4, "text-anchor": "end" }, "balance"));
  group.layers.forEach((layer, column) => {
    const x = LEFT + width * column;
    const mean = layer.rank_tokens.reduce((sum, tokens) => sum + tokens, 0) / Math.max(1, group.ranks);
    layer.rank_tokens.forEach((tokens, rank) => {
      const ratio = mean > 0 ? tokens / mean : 1;
      const at = { x, y: height * rank, width, height };
      const cell = svg("g", {});
      cell.append(svg("rect", { ...at, class: "cell" }));
      const colour = svg("rect", { ...at, class: ratio >= 1 ? "hot" : "cold",
        "fill-opacity": Math.min(1, Math.abs(ratio - 1)).toFixed(2) });
      colour.append(svg("title", {}, `layer ${layer.layer}, rank ${group.rank_numbers[rank]}: ${count(tokens)} tokens, ${ratio.toFixed(2)} of the mean`));
      cell.append(colour);
      plot.append(cell);
    });
    const tall = (STRIP - 8) * layer.balancedness;
    const bar = svg("rect", { x: x + 1, y: bottom + STRIP - tall, width: width - 2, height: tall, class: "balance" });
    bar.append(svg("title", {}, `layer ${layer.layer}: balancedness ${layer.balancedness.toFixed(3)}; expert ${layer.hottest_expert} ` +
      `has ${(100 * layer.hottest_share).toFixed(1)} % of the tokens; at most ${layer.most_replicas} replicas of an expert`));
    plot.append(bar);
    if (column % every === 0) {
      plot.append(svg("text", { x: x + width / 2, y: bottom + STRIP + 15, "text-anchor": "middle" }, layer.layer));
    }
  });
  return plot;
}

function show(group) {
  const worst = group.layers.reduce((low, layer) => (layer.balancedness < low.balancedness ? layer : low));
  const mean = group.layers.reduce((sum, layer) => sum + layer.balancedness, 0) / group.layers.length;
  const words = `${group.group}: ${group.experts} experts in ${group.slots} slots a layer on ${group.ranks} ranks. ` +
    `Balancedness ${mean.toFixed(2)} on average, ${worst.balancedness.toFixed(2)} in layer ${worst.layer}. ` +
    `Placement epoch ${group.placement_epoch}, ${group.migrations} experts moved.`;
  const scale = el("p", "legend", "Red: more tokens than the layer's mean. Blue: fewer. Grey: even. Layers from left to right, last window.");
  return el("div", "group", [el("p", "quiet", words), el("div", "scroll heat", [map(group)]), scale]);
}

export function experts(status) {
  const groups = status.experts.filter((group) => group.layers.length);
  const now = JSON.stringify(groups);
  if (drawn === now) return; // keeps what is hovered or scrolled
  drawn = now;
  const none = "No decode worker has reported experts: a dense model has none, and others report after decode.experts.rebalance_window steps.";
  fill($("experts"), groups.length ? groups.map(show) : [el("p", "quiet", none)]);
}
