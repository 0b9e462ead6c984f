// Asks /status every two seconds while the page is looked at, and draws what comes.

import { $, count, el, fill, seconds } from "./dom.js";
import { experts } from "./experts.js";
import { Lines, SHOWN_S } from "./lines.js";
import { requests, stretch } from "./requests.js";
import { events, figures, links, workers } from "./tables.js";

const EVERY_MS = 2000, PATIENCE_MS = 8000, KEY = "headrace-api-key";

const charts = [
  new Lines($("chart-tokens"), [{ name: "output", field: "output_tokens_per_s" }, { name: "prompt", field: "prompt_tokens_per_s" }], count),
  new Lines($("chart-requests"), [{ name: "open", field: "running" }, { name: "waiting", field: "waiting" }], count),
  new Lines($("chart-ttft"), [{ name: "p50", field: "ttft_p50_s" }, { name: "p99", field: "ttft_p99_s" }], seconds, true),
  new Lines($("chart-itl"), [{ name: "p50", field: "itl_p50_s" }, { name: "p99", field: "itl_p99_s" }], seconds, true),
];
let samples = []; // oldest first; `at` is this browser's time in seconds
let paused = false, heardAt = 0, asking = false, latest = null;

class NeedsKey extends Error {}

async function ask() {
  const key = sessionStorage.getItem(KEY);
  const after = samples.length ? samples[samples.length - 1].number : 0;
  const answer = await fetch(`/status?after=${after}`, {
    headers: key ? { authorization: `Bearer ${key}` } : {},
    credentials: "omit", cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS),
  });
  if (answer.status === 401) throw new NeedsKey();
  if (!answer.ok) throw new Error(`the gateway answers ${answer.status}`);
  return answer.json();
}

function remember(status) {
  const now = Date.now() / 1000;
  const fresh = status.samples.map((sample) => ({ ...sample, at: now - sample.age_s }));
  samples = [...samples, ...fresh].filter((sample) => now - sample.at <= SHOWN_S);
}

function draw(status) {
  const gateway = status.gateway;
  state(gateway.ready ? "good" : "bad", (gateway.ready ? "ready" : "not ready") + (gateway.reason ? `: ${gateway.reason}` : ""));
  fill($("models"), [el("span", "", gateway.models.join(", "))]);
  figures(status, samples);
  for (const chart of charts) chart.draw(samples, Date.now() / 1000, status.sample_every_s);
  workers(status);
  links(status);
  experts(status);
  requests(status);
  events(status);
}

function state(look, words) {
  $("dot").className = `dot ${look}`;
  fill($("reason"), [el("span", "", words)]);
}

function show({ data, form, wrong }) {
  $("main").hidden = !data;
  $("key-form").hidden = !form;
  $("key-wrong").hidden = !wrong;
  $("forget").hidden = !sessionStorage.getItem(KEY);
}

async function turn() {
  if (asking) return;
  asking = true;
  try {
    const status = await ask();
    if (samples.length && status.samples.length && status.samples[0].number <= samples[samples.length - 1].number) samples = [];
    remember(status);
    heardAt = Date.now();
    latest = status;
    show({ data: true });
    draw(status);
  } catch (error) {
    if (error instanceof NeedsKey) {
      const wrong = sessionStorage.getItem(KEY) !== null;
      sessionStorage.removeItem(KEY);
      samples = [];
      state("warn", "locked");
      show({ form: true, wrong });
      if (document.activeElement === document.body) $("key").focus();
    } else {
      state("bad", `no answer: ${error.name === "TimeoutError" ? "it takes too long" : error.message}`);
      if (!heardAt) show({});
    }
  } finally {
    asking = false;
  }
}

function age() {
  $("age").textContent = heardAt ? `${paused ? "Paused. " : ""}Heard ${Math.round((Date.now() - heardAt) / 1000)} s ago.` : "";
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, $("key").value.trim());
  $("key").value = "";
  turn();
});
$("forget").addEventListener("click", () => {
  sessionStorage.removeItem(KEY);
  turn();
});
$("pause").addEventListener("click", () => {
  paused = !paused;
  $("pause").textContent = paused ? "Go on" : "Pause";
  $("pause").setAttribute("aria-pressed", String(paused));
  if (!paused) turn();
});
$("scale").addEventListener("click", () => {
  const stretched = stretch();
  $("scale").setAttribute("aria-pressed", String(stretched));
  if (latest) requests(latest);
});
document.addEventListener("visibilitychange", () => { if (!document.hidden && !paused) turn(); });
setInterval(() => {
  age();
  if (!paused && !document.hidden && $("key-form").hidden && Date.now() - heardAt >= EVERY_MS - 100) turn();
}, 1000);
turn();
