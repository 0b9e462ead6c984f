// Elements and numbers. Text reaches the page through textContent only: names and ids come from
// other machines and from callers.

const SVG = "http://www.w3.org/2000/svg";

export const $ = (id) => document.getElementById(id);

// Control characters, and those that change the direction of the text around them.
const STEERING = /[\u0000-\u001f\u007f-\u009f\u200e\u200f\u202a-\u202e\u2066-\u2069]/g;

/** An element with text, or with children. Its class is chosen by this page, never by the data. */
export function el(tag, className, content) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (Array.isArray(content)) made.append(...content);
  else if (content !== undefined && content !== null) made.textContent = String(content).replace(STEERING, "\ufffd");
  return made;
}

export function svg(tag, attributes, text) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = String(text);
  return made;
}

export function fill(parent, children) {
  parent.replaceChildren(...children);
}

/** The class for a word of the data, if the style sheet knows that word. */
export const known = (word, words) => (words.includes(word) ? word : "");

export function count(value) {
  if (value === null || value === undefined) return "–";
  for (const [unit, size] of [["G", 1e9], ["M", 1e6], ["k", 1e4]]) {
    if (value >= size) return (value / (unit === "k" ? 1e3 : size)).toFixed(1) + unit;
  }
  return value >= 100 || Number.isInteger(value) ? value.toFixed(0) : value.toFixed(1);
}

export function seconds(value) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  if (value < 0.9995) return (value * 1000).toFixed(value < 0.00995 ? 1 : 0).replace(".0", "") + " ms";
  if (value < 60) return value.toFixed(value < 9.95 ? 2 : 1).replace(/\.0+$/, "") + " s";
  return (value / 60).toFixed(1) + " min";
}

export function bytes(value) {
  let unit = 0;
  while (value >= 1000 && unit < 5) { value /= 1000; unit += 1; }
  return value.toFixed(unit && value < 100 ? 1 : 0) + " " + ["B", "kB", "MB", "GB", "TB", "PB"][unit];
}

/** At most so many characters, the last of them an ellipsis where there were more. */
export const short = (text, length) => (text.length > length ? text.slice(0, length - 1) + "…" : text);

/** Local time of something that happened so long ago. */
export const clock = (ageS) => new Date(Date.now() - ageS * 1000).toLocaleTimeString([], { hour12: false });
