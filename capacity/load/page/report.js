"use strict";
{
  const data = JSON.parse(document.getElementById("data").textContent);
  verdict(data.verdict.kind, data.verdict.text, data.verdict.points);
  cards(data.cards);
  const stageBands = data.stages.map((stage) => ({ from: stage.begin_s, to: stage.end_s, text: stage.label, edge: true }));
  const faults = data.faults.map((fault) => ({ x: fault.at_s, text: fault.text, color: "var(--fault)" }));
  const limit = (name) => data.limits[name] ? [{ x: data.limits[name], text: "objective" }] : [];
  const percent = (value) => `${Math.round(value * 100)} %`;
  const cdf = (key, title, label, note) => {
    const series = data.stages.map((stage) => ({ name: stage.label, points: stage[key], kind: "step" })).filter((one) => one.points.length);
    if (series.length) chart(section(title, note), { title, series, x: { label, log: true, latency: true }, y: { label: "of requests", low: 0, high: 1, format: percent }, lines: limit(key).map((line) => ({ ...line, low: true })) });
  };
  cdf("ttft", "Time to first token", "TTFT, ms", "Share of requests whose first token came within, from the intended time");
  cdf("tpot", "Time per output token", "TPOT, ms", "Share of requests whose mean time per token was within");
  if (!data.stages.some((stage) => stage.ttft.length)) cdf("e2e", "End to end", "E2E, ms", "Share of requests that were complete within");
  if (data.throughput.length > 1)
    chart(section("Output over time", "Output tokens per second as they arrived; the shaded part of a stage is not measured", true), {
      title: "Output over time", legend: false, headroom: true, series: [{ name: "tokens/s", points: data.throughput, kind: "area" }],
      x: { label: "s", low: 0 }, y: { label: "tokens/s", low: 0 }, lines: faults,
      bands: [...data.unmeasured.map((span) => ({ from: span[0], to: span[1], shade: true })), ...stageBands],
    });
  const latency = [{ name: data.latency_name, points: data.latency, kind: "dots", color: "var(--s0)" }];
  if (data.failures.length) latency.push({ name: "failed", points: data.failures, kind: "crosses", color: "var(--fault)" });
  if (data.latency.length || data.failures.length)
    chart(section("Every request", `${data.latency_name} by the time at which the request was due`, true), {
      title: "Every request", series: latency, x: { label: "s", low: 0, high: data.end_s }, y: { label: "ms", log: true, low: data.latency.length ? Math.min(...data.latency.map((p) => p[1])) : undefined }, lines: [...faults, ...(data.limits.ttft ? [{ y: data.limits.ttft, text: "objective" }] : [])],
      bands: stageBands.map((band) => ({ ...band, text: "" })),
    });
  if (data.pareto.length > 1) {
    const points = data.pareto.map((p) => [p.user, p.total, p.label]);
    chart(section("Throughput against interactivity", "Right is faster for each user, up is more for all"), {
      title: "Pareto", legend: false, pad: true, series: [{ name: "path", points, kind: "line", color: "var(--faint)" }, { name: "stages", points, kind: "labels", color: "var(--s0)" }],
      x: { label: "tokens/s per user", low: 0 }, y: { label: data.gpus ? "tokens/s per GPU" : "tokens/s", low: 0 },
    });
  }
  if (data.probes.length) {
    const held = data.probes.filter((p) => p.held).map((p) => [p.rate, p.share]);
    const failed = data.probes.filter((p) => !p.held).map((p) => [p.rate, p.share]);
    chart(section("Search for the highest rate", data.search), {
      title: "Search", series: [{ name: "holds", points: held, kind: "labels", color: "var(--good)" }, { name: "does not hold", points: failed, kind: "crosses", color: "var(--bad)" }],
      x: { label: "requests/s", log: true }, y: { label: "good", low: 0, high: 1, format: percent }, lines: [{ y: data.share, text: "wanted" }],
    });
  }
  if (data.server.length) bars(section("Where the server spent the time", "Mean of each stage in its server-timing header, before the first token"), data.server, "ms");
  for (const fault of data.faults) facts(section(`Fault: ${fault.text}`, fault.process), fault.facts);
  table(section("All stages", "Latencies in ms from the intended time; – where the sample is too small", true), data.table[0], data.table.slice(1));
  if (data.counters.length) folded(section("What the server counted", "By how much counters of its /metrics rose over the whole test", true), `${data.counters.length} counters`, ["counter", "rose by"], data.counters);
  facts(section("Settings"), data.settings);
  facts(section("Client and machine"), data.environment);
}
