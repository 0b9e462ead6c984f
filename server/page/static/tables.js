// Workers, links, events and the figures on top.

import { $, bytes, clock, count, el, fill, known, seconds } from "./dom.js";

const BLOCKS = ["active", "granted", "cached", "quarantined"];
const CONDITIONS = { linked: "good", draining: "warn", "no link": "bad" };
const SEVERITIES = { info: "quiet", warning: "warn", error: "bad" };

const look = (table, word) => (Object.hasOwn(table, word) ? table[word] : "");
const share = (part, whole) => (whole > 0 ? Math.round((100 * part) / whole) + " %" : "–");

function rows(table, heads, body, empty) {
  if (!body.length) {
    fill(table, [el("caption", "quiet left", empty)]);
    return;
  }
  const head = el("tr", "", heads.map(([name, className]) => el("th", className, name)));
  fill(table, [el("thead", "", [head]), el("tbody", "", body)]);
}

export function figures(status, samples) {
  const gateway = status.gateway;
  const last = samples[samples.length - 1] ?? {};
  const shown = [
    ["output tokens/s", count(last.output_tokens_per_s)],
    ["prompt tokens/s", count(last.prompt_tokens_per_s)],
    ["requests open", count(gateway.open_requests)],
    ["waiting", count(gateway.waiting)],
    ["TTFT p50", seconds(last.ttft_p50_s)],
    ["TTFT p99", seconds(last.ttft_p99_s)],
    ["ITL p50", seconds(last.itl_p50_s)],
    ["ITL p99", seconds(last.itl_p99_s)],
    ["migrations", count(gateway.migrations)],
  ];
  fill($("figures"), shown.map(([name, value]) => el("div", "", [el("b", "", value), el("span", "", name)])));
}

function blocks(worker) {
  const bar = el("span", "stack");
  for (const state of BLOCKS) {
    const part = el("i", state);
    part.style.width = `${(100 * worker[state + "_blocks"]) / Math.max(1, worker.blocks)}%`;
    bar.append(part);
  }
  const used = worker.active_blocks + worker.granted_blocks;
  bar.title = BLOCKS.map((state) => `${state} ${worker[state + "_blocks"]}`).join(", ") + ` of ${worker.blocks}`;
  return el("td", "left", [bar, share(used, worker.blocks)]);
}

export function workers(status) {
  const body = status.workers.map((worker) => {
    const prefill = worker.role === "prefill";
    const condition = el("td", "left " + look(CONDITIONS, worker.condition), worker.condition);
    return el("tr", "", [
      el("td", "name", worker.worker), el("td", "left", worker.role), condition,
      el("td", "", worker.running), el("td", "", worker.queued), blocks(worker),
      el("td", "", prefill ? share(worker.prefix_hit_tokens, worker.prompt_tokens) : ""),
      el("td", "", prefill ? seconds(worker.transfer_hidden_s) : ""), el("td", "", prefill ? seconds(worker.transfer_exposed_s) : ""),
      el("td", "", seconds(worker.step_s)), el("td", "", count(worker.tokens_per_s)),
      el("td", "", count(prefill ? worker.prompt_tokens : worker.generated_tokens)),
      el("td", "left quiet", worker.host),
    ]);
  });
  const heads = [["worker"], ["role", "left"], ["state", "left"], ["batch"], ["queue"], ["KV in use", "left"],
    ["prefix hits"], ["KV hidden"], ["KV exposed"], ["step"], ["tokens/s"], ["tokens"], ["host", "left"]];
  rows($("workers"), heads, body, "No worker has joined.");
  const standing = status.groups.map((group) => {
    const ranks = `${group.present} of ${group.ranks} ranks, epoch ${group.epoch}`;
    return el("span", group.serving ? "" : "bad", `${group.group}: ${ranks}${group.serving ? "" : ", does not serve"}  `);
  });
  fill($("groups"), standing);
}

export function links(status) {
  const body = status.links.map((link) => el("tr", "", [
    el("td", "name", link.prefill), el("td", "left name", link.decode), el("td", "", count(link.requests)),
    el("td", "", bytes(link.bytes)), el("td", "", seconds(link.hand_over_s)),
  ]));
  const heads = [["from"], ["to", "left"], ["prompts"], ["KV"], ["mean hand-over"]];
  rows($("links"), heads, body, "Nothing has been sent yet.");
}

export function events(status) {
  const body = status.events.map((event) => {
    const often = event.times > 1 ? ` (${event.times} times)` : "";
    const when = el("span", "quiet", clock(event.last_s));
    const severity = look(SEVERITIES, event.severity);
    return el("li", "", [when, el("span", "quiet", event.kind), el("span", known(severity, ["warn", "bad"]), event.text + often)]);
  });
  fill($("events"), body.length ? body : [el("li", "", [el("span", "quiet", "none yet")])]);
}
