// Making and changing elements. Text from models and people only ever becomes text nodes, never markup.

export const byId = (id) => document.getElementById(id);

export function make(tag, attributes = {}, ...children) {
  return dress(document.createElement(tag), attributes, children);
}

export function draw(tag, attributes = {}, ...children) {
  return dress(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function dress(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

/** Say something new; nothing is touched where it is the same, so that selections and screen readers stay calm. */
export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** Make a parent's children those of the items, in order: kept by key, made where new, removed where gone. */
export function keyed(parent, items, key, create) {
  const old = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  const children = items.map((item) => {
    const name = String(key(item));
    const child = old.get(name) ?? create(item);
    child.dataset.key = name;
    old.delete(name);
    return child;
  });
  for (const gone of old.values()) gone.remove();
  children.forEach((child, index) => {
    if (parent.children[index] !== child) parent.insertBefore(child, parent.children[index] ?? null);
  });
  return children;
}

/** Let the pieces in a box tell about themselves to pointer, touch and keyboard: one tab stop, arrows go on from there. */
export function telling(box, why) {
  const pieces = () => [...box.querySelectorAll(".piece")];
  const tell = (event) => {
    const piece = event.target.closest?.(".piece");
    if (piece) say(why, piece.getAttribute("aria-label"));
  };
  for (const kind of ["mouseover", "focusin", "click"]) box.addEventListener(kind, tell);
  box.addEventListener("keydown", (event) => {
    const all = pieces();
    const at = all.indexOf(event.target);
    const steps = { ArrowLeft: at - 1, ArrowUp: at - 1, ArrowRight: at + 1, ArrowDown: at + 1, Home: 0, End: all.length - 1 };
    const next = all[steps[event.key]];
    if (at < 0 || !next) return;
    event.preventDefault();
    for (const piece of all) piece.tabIndex = piece === next ? 0 : -1;
    next.focus();
  });
}

/** See to it that one of a box's pieces can be reached with the Tab key. */
export function reachable(box) {
  const all = [...box.querySelectorAll(".piece")];
  if (all.length && !all.some((piece) => piece.tabIndex === 0)) all[0].tabIndex = 0;
}

export function piece(kind, label) {
  return make("button", { type: "button", class: `piece ${kind}`, tabindex: -1, "aria-label": label });
}

export const count = (number) => number.toLocaleString("en");
export const tokens = (number) => `${count(number)} token${number === 1 ? "" : "s"}`;
export const percent = (part, whole) => `${whole ? Math.round((100 * part) / whole) : 0} %`;
export const sum = (numbers) => numbers.reduce((all, one) => all + one, 0);

/** A time for people; milliseconds. */
export function time(ms) {
  if (ms < 10) return `${Number(ms.toFixed(1))} ms`;
  if (ms < 1000) return `${ms.toFixed(0)} ms`;
  if (ms < 60_000) return `${(ms / 1000).toFixed(ms < 10_000 ? 2 : 1)} s`;
  return `${Math.floor(ms / 60_000)} min ${Math.round((ms % 60_000) / 1000)} s`;
}

/** "a, b and c" */
export function listing(words) {
  return words.length < 2 ? words.join("") : `${words.slice(0, -1).join(", ")} and ${words.at(-1)}`;
}
