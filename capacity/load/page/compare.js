"use strict";
{
  const data = JSON.parse(document.getElementById("data").textContent);
  verdict(data.worse ? "missed" : "", data.verdict, data.warnings);
  const percent = (value) => `${Math.round(value * 100)} %`;
  for (const stage of data.stages) {
    if (stage.rows.length) forest(section(`${stage.label}: B against A`, "Ratio with its 95 % interval; grey where no difference is shown", true), stage.rows, "B / A (log)");
    for (const [name, [a, b]] of Object.entries(stage.cdfs))
      if (a.length && b.length && name !== "E2E") chart(section(`${name}, ${stage.label}`), {
        title: name, series: [{ name: "A", points: a, kind: "step" }, { name: "B", points: b, kind: "step" }],
        x: { label: `${name}, ms`, log: true, latency: true }, y: { label: "of requests", low: 0, high: 1, format: percent },
      });
  }
  const kinds = { better: "better", worse: "worse" };
  table(section("All measures", "By the bootstrap over requests, for throughput over seconds", true), ["stage", "measure", "A", "B", "B / A", "95 % interval", ""],
    data.table.map((row) => [...row.slice(0, 6), { text: row[6], kind: kinds[row[6]] || "" }]));
}
