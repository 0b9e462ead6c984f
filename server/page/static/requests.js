// The last requests, a bar each: where its time went, and where it moved to other workers.

import { $, clock, count, el, fill, known, seconds, short } from "./dom.js";

const STAGES = ["wait", "reserve", "queue", "prefill", "hand-over", "decode"];
const NAMES = { wait: "wait for room", queue: "prefill queue" };
const SHOWN = 40;

let stretched = false;

/** All bars in one scale of time, or each in its own. */
export function stretch() {
  stretched = !stretched;
  return stretched;
}

function bar(request, longest) {
  const whole = Math.max(stretched ? request.seconds : longest, 1e-6);
  const fall = el("div", "fall");
  const told = [];
  request.attempts.forEach((attempt, index) => {
    for (const stage of attempt.stages) {
      const part = el("i", known(stage.stage, STAGES));
      part.style.left = `${(100 * stage.begin_s) / whole}%`;
      part.style.width = `${(100 * stage.seconds) / whole}%`;
      fall.append(part);
      told.push(`${NAMES[stage.stage] ?? stage.stage} ${seconds(stage.seconds)}`);
    }
    if (index) {
      const move = el("i", "move");
      move.style.left = `${(100 * attempt.begin_s) / whole}%`;
      fall.append(move);
    }
  });
  fall.title = told.join("\n");
  fall.setAttribute("role", "img");
  fall.setAttribute("aria-label", told.join(", "));
  return fall;
}

function route(request) {
  return request.attempts
    .map((attempt) => [attempt.prefill, attempt.decode].filter(Boolean).join(" → "))
    .filter(Boolean).join(" ⇒ ");
}

function moved(request) {
  const last = request.attempts[request.attempts.length - 1];
  if (request.outcome === "open" && !last.decode) return `waits for workers to go on: ${route(request)}`;
  return `migrated ${request.migrations === 1 ? "once" : request.migrations + " times"}: ${route(request)}`;
}

function row(request, longest) {
  const cached = request.cached_tokens ? ` (${count(request.cached_tokens)} cached)` : "";
  const facts = `${count(request.prompt_tokens)}${cached} + ${count(request.output_tokens)} tokens, ${seconds(request.seconds)}`;
  const id = el("span", "id", `${clock(request.age_s)} ${request.request.slice(0, 8)}`);
  id.title = `${request.request}\n${request.model}\n${route(request)}`;
  const parts = [id, bar(request, longest), el("span", "facts", facts)];
  const reasons = request.attempts.map((attempt) => attempt.failure).filter(Boolean);
  const notes = [];
  if (request.migrations) notes.push(moved(request));
  if (reasons.length) notes.push(reasons.join("; "));
  if (request.failure && !reasons.includes(request.failure)) notes.push(request.failure);
  const failed = request.outcome === "failed";
  if (failed || request.outcome === "cancelled") notes.unshift(request.outcome);
  if (notes.length) {
    const note = el("span", "note " + (failed ? "bad" : "warn"), short(notes.join(" – "), 200));
    note.title = notes.join("\n");
    parts.push(note);
  }
  return el("div", "request", parts);
}

export function requests(status) {
  const shown = status.requests.slice(0, SHOWN);
  const longest = Math.max(0, ...shown.map((request) => request.seconds));
  const rows = shown.map((request) => row(request, longest));
  fill($("requests"), rows.length ? rows : [el("p", "quiet", "none yet")]);
}
