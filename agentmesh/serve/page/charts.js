// The timeline, the prompts, the times to first token, and the texts of a run.
import { count, keyed, listing, make, percent, piece, reachable, say, telling, time, tokens } from "./dom.js";
import { keyOf, MARKS, WORDS } from "./run.js";

const LANE = 50; // as in page.css
const STEPS = [0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600];

/** The stretches of a visit: kind, from when, to when, a word for the bar, and a sentence. */
function stretches(run, visit) {
  const who = run.named(visit);
  const found = run.waits(visit).map(({ from, to, missing }) => {
    const whom = listing(missing.map((one) => run.named(one)));
    return { kind: "waiting", from, to, word: `waits for ${whom}`, told: `waited for ${whom}` };
  });
  if (visit.started) {
    const end = visit.finished || run.now();
    const called = visit.called || end;
    const read = Math.min(visit.wrote || end, end);
    const queued = Math.min(called + (visit.call?.queue_ms ?? 0) / 1000, read);
    found.push({ kind: "work", from: visit.started, to: called, word: "works", told: visit.called ? "prepared its prompt" : "worked without the model" });
    found.push({ kind: "queue", from: called, to: queued, word: "waits for the engine", told: "waited for the engine" });
    found.push({ kind: "prefill", from: queued, to: read, word: "reads", told: `read its prompt of ${tokens(visit.prompt)}, up to the first token` });
    const wrote = visit.message ? tokens(visit.message.tokens) : "its message";
    if (visit.wrote) found.push({ kind: "writing", from: read, to: end, word: visit.state === "writing" ? "writes" : `wrote ${wrote}`, told: `wrote ${wrote}` });
  }
  return found
    .filter(({ kind, from, to }) => to - from > (kind === "waiting" || kind === "writing" ? 0 : 0.002))
    .map((one) => ({ ...one, key: `${visit.key} ${one.kind} ${one.from}`, told: `${who} ${one.told} for ${time(1000 * (one.to - one.from))}.` }));
}

export class Timeline {
  grows = true;

  constructor(box, why) {
    this.lanes = make("div", { class: "lanes" });
    this.links = make("div", { class: "links", "aria-hidden": "true" });
    this.axis = make("div", { class: "time-axis", "aria-hidden": "true" });
    box.append(make("div", { class: "time-body" }, this.links, this.lanes), this.axis);
    this.why = why;
    telling(this.lanes, why);
  }

  show(run) {
    this.run = run;
    say(this.why, "");
    this.update();
  }

  update() {
    const { run } = this;
    const [begun, now] = [run.begun, run.begun ? run.now() : 0];
    const long = Math.max(now - begun, 0.05);
    const at = (moment) => (100 * (moment - begun)) / long;
    const nodes = [...Map.groupBy([...run.visits.values()], (visit) => visit.node)];
    keyed(this.lanes, nodes, ([name]) => name, lane).forEach((row, index) => {
      const [, visits] = nodes[index];
      say(row.querySelector("small"), visits.find((visit) => visit.role && visit.role !== visit.node)?.role ?? "");
      const parts = begun ? visits.flatMap((visit) => stretches(run, visit)) : [];
      const bar = row.querySelector(".track");
      keyed(bar, parts, (part) => part.key, ({ kind }) => piece(`span-${kind}`, "")).forEach((one, number) => {
        const part = parts[number];
        const width = at(part.to) - at(part.from);
        one.style.left = `${at(part.from)}%`;
        one.style.width = `${width}%`;
        one.setAttribute("aria-label", part.told);
        say(one, (width * bar.clientWidth) / 100 > 46 ? part.word : "");
      });
    });
    this.#hand(nodes, at);
    this.#ticks(long);
    reachable(this.lanes);
  }

  /** Arrows down or up from where a message was there to those who read it. */
  #hand(nodes, at) {
    const { run } = this;
    const row = new Map(nodes.map(([name], index) => [name, index]));
    const found = [...run.visits.values()].filter((visit) => visit.started).flatMap((visit) =>
      visit.needs.map((key) => run.visits.get(key)).filter((source) => source?.message && source.node !== visit.node && !visit.kept.has(source.key))
        .map((source) => ({ key: `${source.key} ${visit.key}`, x: at(source.finished), from: row.get(source.node), to: row.get(visit.node) })));
    keyed(this.links, found, (one) => one.key, () => make("i")).forEach((link, index) => {
      const { x, from, to } = found[index];
      link.className = to > from ? "down" : "up";
      link.style.left = `${x}%`;
      link.style.top = `${Math.min(from, to) * LANE + (to > from ? LANE - 4 : LANE - 2)}px`;
      link.style.height = `${Math.abs(to - from) * LANE - (to > from ? 24 : 26)}px`;
    });
  }

  #ticks(long) {
    const step = STEPS.find((one) => long / one <= 8) ?? Math.ceil(long / 8);
    const ticks = Array.from({ length: Math.floor(long / step) + 1 }, (_, index) => index * step);
    keyed(this.axis, ticks, (tick) => tick, (tick) => make("span", {}, `${Number(tick.toFixed(2))} s`)).forEach((mark, index) => {
      mark.style.left = `${(100 * ticks[index]) / long}%`;
      mark.classList.toggle("last", ticks[index] / long > 0.94);
    });
  }
}

function lane([name]) {
  return make("div", { class: "lane", role: "group", "aria-label": name }, make("p", {}, make("b", {}, name), " ", make("small")), make("div", { class: "track" }));
}

/** What a segment's label means to people. */
export function segmentName(label, run) {
  const [, kind, rest] = /^(message|document|result) (.*)$/.exec(label) ?? [];
  if (label === "fixed") return "its own text";
  if (!kind) return label;
  const visit = run.visits.get(rest);
  return visit ? `${run.named(visit)}'s ${kind}` : `${kind} ${rest}`;
}

/** Each call's prompt as a bar of pieces; a piece tells what happened to it, and why. */
export class Prompts {
  constructor(box, reasons) {
    [this.box, this.reasons] = [box, reasons];
  }

  show(run) {
    this.run = run;
    this.box.replaceChildren();
    this.update();
  }

  update() {
    const visits = [...this.run.visits.values()].filter((visit) => visit.first);
    const longest = Math.max(1, ...visits.map((visit) => visit.prompt));
    keyed(this.box, visits, (visit) => visit.key, promptRow).forEach((row, index) => {
      const visit = visits[index];
      const bar = row.querySelector(".prompt");
      bar.style.width = `${(100 * visit.prompt) / longest}%`;
      const { first } = visit;
      say(row.querySelector("b"), this.run.named(visit));
      say(row.querySelector("small"), `${percent(visit.prompt - first.computed, visit.prompt)} reused: ${count(visit.prompt - first.computed)} of ${tokens(visit.prompt)}`);
      const rows = visit.call?.plan.filter((one) => one.tokens) ?? [];
      const filled = visit.call ? "plan" : "counts";
      if (bar.dataset.filled === filled) return;
      bar.dataset.filled = filled;
      bar.replaceChildren(...(visit.call ? segments(rows).map((part) => this.#segment(part)) : [this.#counts(first)]));
      reachable(bar);
    });
  }

  #segment([label, rows]) {
    const name = segmentName(label, this.run);
    const parts = rows.map((row) => {
      const from = row.source ? ` From: ${row.source}.` : "";
      const about = this.reasons()[row.reason] ?? "";
      const shown = row.text.replace(/\s+/g, " ").trim();
      const quote = shown ? ` “${shown.length > 160 ? `${shown.slice(0, 110)} … ${shown.slice(-40)}` : shown}”` : "";
      const one = piece(row.kind, `${name}, ${tokens(row.tokens)}: ${row.kind}, ${row.reason}. ${about}${from}${quote}`);
      one.style.flexGrow = row.tokens;
      return one;
    });
    const whole = make("div", { class: "segment" }, make("span", { class: "segment-name", title: name }, name), make("div", { class: "pieces" }, ...parts));
    whole.style.flexGrow = rows.reduce((all, row) => all + row.tokens, 0);
    return whole;
  }

  /** Before a call has ended only its sums are known. */
  #counts(first) {
    const kinds = [["placed-exact", first.placed_exact], ["placed-realigned", first.placed_realigned], ["computed", first.computed]];
    const parts = kinds.filter(([, size]) => size).map(([kind, size]) => {
      const one = piece(kind, `${tokens(size)} ${kind}; which ones, and why, is shown when the message is written.`);
      one.style.flexGrow = size;
      return one;
    });
    const whole = make("div", { class: "segment" }, make("span", { class: "segment-name" }, "writing; the parts follow"), make("div", { class: "pieces" }, ...parts));
    whole.style.flexGrow = 1;
    return whole;
  }
}

function promptRow(visit) {
  const bar = make("div", { class: "prompt", role: "group", "aria-label": `prompt of ${visit.node}` });
  const why = make("p", { class: "why" });
  telling(bar, why);
  return make("article", { class: "call" }, make("p", {}, make("b"), " ", make("small")), bar, why);
}

/** Rows of a plan that lie side by side in the same text. */
function segments(rows) {
  const found = [];
  for (const row of rows) {
    if (found.at(-1)?.[0] === row.segment) found.at(-1)[1].push(row);
    else found.push([row.segment, [row]]);
  }
  return found;
}

/** A call's time to first token in three parts, milliseconds. */
function parts(call) {
  const { plan = 0, match = 0, realign = 0, compose = 0, forward = 0 } = call.parts_ms;
  const placing = plan + match + realign + compose;
  return { queue: call.queue_ms, plan: placing, forward: forward || Math.max(0, call.ttft_ms - call.queue_ms - placing) };
}

/** Each call's time to first token, and below it what computing everything would have taken. */
export class Firsts {
  constructor(box, tip) {
    [this.box, this.tip] = [box, tip];
  }

  show(run) {
    this.run = run;
    this.box.replaceChildren();
    this.update();
  }

  update() {
    const { run } = this;
    const calls = run.calls();
    const { of, least, rate } = run.estimates();
    say(this.tip, explained(run, least, rate));
    const longest = Math.max(1, ...calls.map((call) => call.ttft_ms), ...of.values());
    keyed(this.box, calls, (call) => keyOf(call.node, call.round), firstRow).forEach((row, index) => {
      const call = calls[index];
      const visit = run.visits.get(keyOf(call.node, call.round));
      const dense = of.get(visit.key);
      say(row.querySelector("b"), run.named(visit));
      const [measured, estimate] = row.querySelectorAll(".ttft");
      const lengths = Object.entries(parts(call)).filter(([, ms]) => ms > 0);
      keyed(measured, lengths, ([name]) => name, ([name]) => make("i", { class: `part-${name}` })).forEach((one, at) => {
        one.style.width = `${(100 * lengths[at][1]) / longest}%`;
      });
      const placed = call.placed_exact + call.placed_realigned;
      const shown = dense !== undefined && run.preset !== "dense";
      estimate.hidden = !shown;
      if (shown) estimate.firstElementChild.style.width = `${(100 * dense) / longest}%`;
      const tail = shown ? ` · dense ≈ ${time(dense)}` : "";
      say(row.querySelector("small"), `${time(call.ttft_ms)}${tail}`);
      row.title = `${time(call.queue_ms)} waiting, ${Object.entries(call.parts_ms).map(([name, ms]) => `${name} ${time(ms)}`).join(", ")}; ${tokens(placed)} placed`;
    });
  }
}

function firstRow() {
  const estimate = make("div", { class: "ttft" }, make("i", { class: "part-dense" }));
  return make("article", { class: "first" }, make("p", {}, make("b"), " ", make("small")), make("div", { class: "ttft" }), estimate);
}

function explained(run, least, rate) {
  if (run.preset === "dense") return "This run computes everything: what is measured is the cost of dense.";
  if (!least) return "No estimate: no call of this run has told what its model time was.";
  const who = run.named(run.visits.get(keyOf(least.node, least.round)));
  return (
    "Not measured. The preset dense would compute the placed tokens, too. An estimate is what the call waited for the engine and " +
    `computed, and ${time(rate)} more for each placed token: the least that a computed token took in any call of this run (${who}: ` +
    `${count(least.computed)} in ${time(least.parts_ms.forward)}). To measure it, run the same question under the preset dense.`
  );
}

/** Every visit's whole text, as it is written. */
export class Texts {
  grows = true;

  constructor(box) {
    this.box = box;
  }

  show(run) {
    this.run = run;
    this.box.replaceChildren();
    this.update();
  }

  update() {
    const visits = [...this.run.visits.values()].filter((visit) => visit.started || visit.error);
    keyed(this.box, visits, (visit) => visit.key, textRow).forEach((row, index) => {
      const visit = visits[index];
      row.className = `wrote ${visit.state}`;
      say(row.querySelector("b"), this.run.named(visit));
      say(row.querySelector("small"), visit.role === visit.node ? "" : visit.role);
      say(row.querySelector(".chip"), `${MARKS[visit.state]} ${WORDS[visit.state]}`);
      const [text, error] = row.querySelectorAll("pre");
      const follow = text.scrollTop + text.clientHeight >= text.scrollHeight - 4;
      say(text, visit.text.trim());
      if (follow) text.scrollTop = text.scrollHeight;
      error.hidden = !visit.error;
      say(error, visit.error);
      const told = visit.checks.map((check) => check.error || check.text.trim());
      keyed(row.querySelector(".checks"), told, (words) => words, (words) =>
        make("div", {}, make("p", { class: "small" }, "asked once more, with its inbox in another order, it wrote"), make("pre", { class: "box" }, words)));
    });
  }
}

function textRow(visit) {
  const id = `text-${visit.key}`;
  const head = make("p", {}, make("b"), " ", make("small"), " ", make("span", { class: "chip" }));
  const text = make("pre", { class: "box said-text", tabindex: 0, "aria-label": `what ${visit.node} wrote` });
  return make("article", { id, tabindex: -1 }, head, text, make("pre", { class: "error", hidden: "" }), make("div", { class: "checks" }));
}
