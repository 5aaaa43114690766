// The graph: a card a visit, in columns where they fit side by side, else one below the other with rails beside them.
import { draw, keyed, make, percent, piece, reachable, say, telling, time, tokens } from "./dom.js";
import { MARKS, WORDS } from "./run.js";

const CARD = 168; // the least width of a card in columns, with room for the labels of its edges before it
const GAP = 158;
const RAIL = 14;

/** Visit → how many come before it on its longest way in. Visits stand in an order in which they can run. */
function depths(visits) {
  const found = new Map();
  for (const visit of visits) found.set(visit.key, Math.max(-1, ...visit.needs.map((key) => found.get(key) ?? -1)) + 1);
  return found;
}

/** Lanes for stretches, so that stretches in one lane do not meet; each stretch gets its `lane`. */
function lanes(stretches) {
  const ends = [];
  for (const one of stretches.sort((a, b) => a.from - b.from)) {
    const free = ends.findIndex((end) => end < one.from);
    one.lane = free < 0 ? ends.length : free;
    ends[one.lane] = one.to;
  }
  return ends.length;
}

export class Graph {
  grows = true;
  #run = null;
  #size = "";
  #width = 0;

  constructor(box, why) {
    [this.box, this.why] = [box, why];
    this.edges = box.querySelector(".edges");
    this.layers = box.querySelector(".layers");
    telling(box, why);
    for (const kind of ["mouseover", "focusin", "mouseout", "focusout"]) box.addEventListener(kind, (event) => this.#light(event));
    new ResizeObserver(([{ contentRect }]) => {
      if (!this.#run) return;
      if (contentRect.width === this.#width) this.#wires();
      else this.update();
      this.#width = contentRect.width;
    }).observe(box);
  }

  show(run) {
    this.#run = run;
    this.#size = "";
    say(this.why, "");
    this.layers.replaceChildren();
    this.update();
  }

  update() {
    const visits = [...this.#run.visits.values()];
    const deep = (this.deep = depths(visits));
    const columns = [...Map.groupBy(visits, (visit) => deep.get(visit.key)).entries()].sort(([a], [b]) => a - b);
    this.wide = columns.length * CARD + (columns.length - 1) * GAP <= this.box.clientWidth;
    this.box.classList.toggle("wide", this.wide);
    keyed(this.layers, columns, ([depth]) => depth, () => make("li", { class: "layer" })).forEach((layer, index) => {
      keyed(layer, columns[index][1], (visit) => visit.key, card).forEach((node, at) => this.#fill(node, columns[index][1][at]));
    });
    this.order = new Map(columns.flatMap(([, found]) => found).map((visit, index) => [visit.key, index]));
    this.#wires();
    reachable(this.box);
  }

  #fill(node, visit) {
    const run = this.#run;
    node.className = `node ${visit.state}`;
    const part = (name) => node.querySelector(`.${name}`);
    say(part("mark"), MARKS[visit.state]);
    const tags = [run.rounds > 1 ? `round ${visit.round}` : "", visit.node === run.output ? "answers" : ""].filter(Boolean);
    say(part("tag"), tags.join(", "));
    say(part("role"), visit.role && visit.role !== visit.node ? visit.role : "");
    say(part("state"), stateOf(run, visit));
    say(part("tail"), visit.text.replace(/\s+/g, " ").trim().slice(-160));
    part("tail").scrollTop = 1e6;
    strip(part("strip"), visit);
    node.style.minHeight = this.wide ? `${visit.needs.length * 40 + 8}px` : "";
    const sources = this.#sources(visit);
    keyed(part("reads"), sources, (source) => source.key, () => piece("pill", "")).forEach((pill, index) => {
      label(pill, run, visit, sources[index]);
    });
  }

  /** Those a visit reads, in the order in which their edges come in: from the column before, then along rails. */
  #sources(visit) {
    const far = (source) => this.deep.get(visit.key) - this.deep.get(source.key) > 1;
    const sources = visit.needs.map((key) => this.#run.visits.get(key)).filter(Boolean);
    return this.wide ? [...sources.filter((one) => !far(one)), ...sources.filter(far)] : sources;
  }

  #light(event) {
    const node = event.target.closest?.(".node");
    const on = event.type === "mouseover" || event.type === "focusin";
    for (const wire of this.edges.querySelectorAll(".wire")) {
      const mine = node && [wire.dataset.from, wire.dataset.to].includes(node.dataset.key);
      wire.classList.toggle("lit", Boolean(on && mine));
    }
  }

  /** Draw the edges between the cards as they stand; nothing happens where neither cards nor edges have changed. */
  #wires() {
    const run = this.#run;
    const links = [...run.visits.values()].flatMap((visit) =>
      visit.needs.filter((key) => run.visits.has(key)).map((key) => ({ from: key, to: visit.key, visit })));
    const rails = this.#rails(links);
    const wires = links.map((link) => ({ ...link, state: wireState(run, link), rail: rails.get(link.from) }));
    const places = new Map([...this.layers.querySelectorAll(".node")].map((node) => [node.dataset.key, this.#place(node)]));
    const lines = wires.map((wire) => ({ ...wire, d: this.wide ? this.#across(wire, places) : this.#beside(wire, places) }));
    const size = lines.map((line) => line.d + line.state).join();
    if (size === this.#size) return;
    this.#size = size;
    this.edges.replaceChildren(...lines.map(({ from, to, state, d }) =>
      draw("path", { class: `wire ${state}`, d, "data-from": from, "data-to": to })));
  }

  /** The rails that edges need to get past other cards, by source; room for them is made beside the cards. */
  #rails(links) {
    const place = this.wide ? this.deep : this.order;
    const far = links.filter(({ from, to }) => !this.wide || place.get(to) - place.get(from) > 1);
    const stretches = [...Map.groupBy(far, (link) => link.from).entries()].map(([from, all]) => ({
      key: from, from: place.get(from), to: Math.max(...all.map(({ to }) => place.get(to))) - (this.wide ? 1 : 0),
    }));
    const count = lanes(stretches);
    this.box.style.setProperty("--rails", `${count ? count * RAIL + 14 : 0}px`);
    return new Map(stretches.map((one) => [one.key, one.lane]));
  }

  #place(node) {
    const box = this.box.getBoundingClientRect();
    const own = node.getBoundingClientRect();
    const [left, top] = [own.left - box.left, own.top - box.top];
    const pills = [...node.querySelectorAll(".pill")].map((pill) => {
      const one = pill.getBoundingClientRect();
      return { left: one.left - box.left, y: one.top - box.top + one.height / 2 };
    });
    return { left, top, right: left + own.width, bottom: top + own.height, middle: top + own.height / 2, pills };
  }

  #port({ to, from, visit }, places) {
    const all = this.#sources(visit).map((source) => source.key);
    return { index: all.indexOf(from), of: all.length, place: places.get(to) };
  }

  /** From left to right: straight to the next column, or along a rail below the columns between. */
  #across(wire, places) {
    const source = places.get(wire.from);
    const { index, place } = this.#port(wire, places);
    const { left: x, y } = place.pills[index];
    const tip = `H ${place.left - 2} M ${place.left - 8} ${y - 4} L ${place.left - 2} ${y} L ${place.left - 8} ${y + 4}`;
    if (this.deep.get(wire.to) - this.deep.get(wire.from) === 1) {
      const half = (source.right + x) / 2;
      return `M ${source.right} ${source.middle} C ${half} ${source.middle} ${half} ${y} ${x} ${y} ${tip}`;
    }
    const rail = Math.max(...[...places.values()].map((one) => one.bottom)) + 16 + RAIL * wire.rail;
    const [out, into] = [source.right + 44, x - 36];
    return `M ${source.right} ${source.middle} C ${out} ${source.middle} ${source.right} ${rail} ${out + 8} ${rail} H ${into} C ${x} ${rail} ${into} ${y} ${x} ${y} ${tip}`;
  }

  /** From top to bottom: along a rail to the left of the cards. */
  #beside(wire, places) {
    const source = places.get(wire.from);
    const { index, of, place } = this.#port(wire, places);
    const x = place.left - 12 - RAIL * wire.rail;
    const [from, to] = [source.bottom - 12, place.top + ((index + 1) * (place.bottom - place.top - 20)) / (of + 1)];
    const tip = `M ${place.left - 7} ${to - 4} L ${place.left - 1} ${to} L ${place.left - 7} ${to + 4}`;
    return `M ${source.left} ${from} H ${x + 7} Q ${x} ${from} ${x} ${from + 7} V ${to - 7} Q ${x} ${to} ${x + 7} ${to} H ${place.left - 1} ${tip}`;
  }
}

function card(visit) {
  const link = make("a", { class: "who", href: `#text-${visit.key}` }, make("span", { class: "mark", "aria-hidden": "true" }), " ", make("b", {}, visit.node));
  link.addEventListener("click", (event) => {
    event.preventDefault();
    document.getElementById(`text-${visit.key}`)?.focus();
  });
  const parts = ["role", "reads", "state", "strip", "tail"].map((name) => make("div", { class: name }));
  return make("article", { class: "node" }, make("p", { class: "title" }, link, make("span", { class: "tag" })), ...parts);
}

function stateOf(run, visit) {
  const { state } = visit;
  if (state === "waiting") return `waits for ${run.awaited(visit).map((one) => run.named(one)).join(", ") || "its turn"}`;
  if (state === "prefilling") return `prefilling ${tokens(visit.prompt)}`;
  if (state === "failed" || state === "skipped") return `${WORDS[state]}: ${visit.error}`;
  if (state === "done") return `wrote ${tokens(visit.message.tokens)} in ${time(1000 * (visit.finished - visit.started))}`;
  return WORDS[state] + (visit.attempt ? `, attempt ${visit.attempt + 1}` : "");
}

/** A prompt's treatments as one thin bar, with the share that was reused. */
function strip(node, visit) {
  const { first } = visit;
  node.hidden = !first;
  if (!first) return;
  const parts = [["placed-exact", first.placed_exact], ["placed-realigned", first.placed_realigned], ["computed", first.computed]];
  const bar = node.firstElementChild ?? make("span", { class: "bar", "aria-hidden": "true" });
  keyed(bar, parts.filter(([, size]) => size), ([kind]) => kind, ([kind]) => make("i", { class: kind })).forEach((part, index) => {
    part.style.flexGrow = parts.filter(([, size]) => size)[index][1];
  });
  const words = node.lastElementChild?.matches("small") ? node.lastElementChild : make("small");
  say(words, `${percent(first.prompt_tokens - first.computed, first.prompt_tokens)} of ${tokens(first.prompt_tokens)} reused`);
  if (!bar.parentNode) node.append(bar, words);
}

function wireState(run, { from, visit }) {
  if (visit.kept.has(from)) return "kept";
  return visit.started ? "taken" : run.visits.get(from).message ? "there" : "pending";
}

/** What a reader's prompt holds of another's message, and how much of that was reused. */
function label(pill, run, visit, source) {
  const [from, to] = [run.named(source), run.named(visit)];
  const handed = run.handed(visit, source);
  pill.classList.toggle("known", Boolean(handed?.total));
  let words = ["", `${to} waits for ${from}.`];
  if (visit.kept.has(source.key)) words = ["kept back", `A condition or a limit kept ${from}'s message from ${to}.`];
  else if (handed?.total) {
    const reused = handed.exact + handed.realigned;
    pill.style.setProperty("--share", `${(100 * reused) / handed.total}%`);
    pill.classList.toggle("exactly", handed.exact > handed.realigned);
    words = [
      `${tokens(handed.total)}\n${percent(reused, handed.total)} reused`,
      `${to} reads ${tokens(handed.total)} of ${from}: ${handed.exact} placed-exact, ${handed.realigned} placed-realigned, ${handed.computed} computed.`,
    ];
  } else if (visit.call) words = ["not read", `Nothing of ${from}'s message is in ${to}'s prompt.`];
  else if (source.message) words = [`${tokens(source.message.tokens)}`, `${from} has handed ${tokens(source.message.tokens)} to ${to}.`];
  say(pill, words[0]);
  pill.setAttribute("aria-label", words[1]);
  pill.dataset.from = from;
}
