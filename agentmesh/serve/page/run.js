// What is known of a run, as its events tell it. Knows nothing of the page.
import { count, listing, percent, sum, time, tokens } from "./dom.js";

const OVER = new Set(["done", "failed", "skipped", "stopped"]);
export const WORDS = {
  waiting: "waiting", working: "at work", prefilling: "prefilling", writing: "writing",
  done: "done", failed: "failed", skipped: "skipped", stopped: "stopped",
};
export const MARKS = {
  waiting: "◌", working: "⚙", prefilling: "▶", writing: "✎", done: "✓", failed: "✕", skipped: "–", stopped: "■",
};

export const keyOf = (node, round) => `${node}@${round}`;

/** Whether a segment of a prompt is what a visit said. */
const saidBy = (segment, key) => /^(message|document|result) /.test(segment) && segment.slice(segment.indexOf(" ") + 1) === key;

export class Run {
  constructor(id, graph) {
    this.id = id;
    this.graph = graph;
    this.status = "running";
    this.visits = new Map();
    this.warnings = [];
    this.answer = "";
    this.error = "";
    this.mesh = this.model = this.preset = "";
    this.inputs = {};
    this.begun = this.last = this.ended = 0;
    this.heard = 0;
    this.version = 0;
    for (const { node, round, inbox } of graph?.visits ?? []) {
      this.#add(node, round, inbox.map((one) => keyOf(one.from, one.round)));
    }
    this.rounds = graph?.rounds ?? 1;
    this.output = graph?.output ?? "";
  }

  /** Follow one event. `version` changes with everything but streamed text. */
  take(event) {
    this.last = event.ts;
    this.heard = performance.now();
    if (event.type !== "model.token") this.version += 1;
    this[event.type]?.(event);
  }

  /** The run's clock: seconds since 1970, from its last event on by this machine's own. */
  now() {
    return this.ended || this.last + (performance.now() - this.heard) / 1000;
  }

  /** The visits that one still waits for: of other agents, and its own of the round before. */
  awaited(visit) {
    return this.#before(visit).filter((one) => !OVER.has(one.state));
  }

  /** How an agent is called, with its round where there are several. */
  named(visit) {
    return this.rounds > 1 ? `${visit.node} (round ${visit.round})` : visit.node;
  }

  /** From when to when a visit waited for whom: stretches that end when another visit ends. */
  waits(visit) {
    const before = this.#before(visit);
    const own = this.visits.get(keyOf(visit.node, visit.round - 1));
    const until = visit.started || visit.finished || this.now();
    const stretches = [];
    let from = own?.finished ? own.finished : this.begun;
    for (const end of [...new Set(before.map((one) => one.finished || until)), until].sort((a, b) => a - b)) {
      const missing = before.filter((one) => (one.finished || until) >= end && one !== own);
      if (end > from && end <= until && missing.length) {
        stretches.push({ from, to: end, missing });
        from = end;
      }
    }
    return own && !own.finished ? [] : stretches;
  }

  /** What a visit read of another's message: its tokens in the prompt by treatment; `null` before that is known. */
  handed(visit, source) {
    if (!visit.call) return null;
    const direct = (row) => saidBy(row.segment, source.key);
    const strange = (row) => row.segment.startsWith("document ") && !this.visits.has(row.segment.slice(9));
    const rows = visit.call.plan.filter(direct);
    return tally(rows.length || source.call ? rows : visit.call.plan.filter(strange));
  }

  calls() {
    return [...this.visits.values()].map((visit) => visit.call).filter(Boolean);
  }

  /** What every call would take to its first token if nothing were placed: milliseconds by visit; empty where unknown. */
  estimates() {
    const calls = this.calls().filter((call) => call.parts_ms.forward && call.computed);
    const each = (call) => call.parts_ms.forward / call.computed;
    const least = calls.reduce((best, call) => (best && each(best) <= each(call) ? best : call), null);
    const cost = (call) => call.queue_ms + call.parts_ms.forward + each(least) * (call.prompt_tokens - call.computed);
    return { of: new Map(calls.map((call) => [keyOf(call.node, call.round), cost(call)])), least, rate: least ? each(least) : 0 };
  }

  /** Take over how the server says that it ended, which also tells of runs that never began; or that it was lost sight of. */
  settle(row) {
    if (this.status !== "running" || row.status === "running") return;
    this.#end(row.status, this.ended || this.last);
    this.answer ||= row.answer ?? "";
    if (row.status === "failed") this.error ||= row.error ?? "";
    this.version += 1;
  }

  #before(visit) {
    return [...visit.needs, keyOf(visit.node, visit.round - 1)].map((key) => this.visits.get(key)).filter(Boolean);
  }

  #add(node, round, needs) {
    const key = keyOf(node, round);
    const made = {
      key, node, round, needs, role: "", state: "waiting", text: "", error: "", attempt: 0, prompt: 0, first: null, call: null,
      started: 0, called: 0, wrote: 0, finished: 0, kept: new Set(), message: null, checks: [],
    };
    this.visits.set(key, made);
    return made;
  }

  #visit(event) {
    return this.visits.get(keyOf(event.node, event.round)) ?? this.#add(event.node, event.round, []);
  }

  ["run.started"](event) {
    Object.assign(this, { mesh: event.mesh, model: event.model, preset: event.preset, inputs: event.inputs, begun: event.ts });
    this.rounds = event.rounds;
    if (!this.visits.size) for (const node of event.nodes) this.#add(node, 0, []);
  }

  ["node.started"](event) {
    const visit = this.#visit(event);
    const again = { text: "", first: null, call: null, called: 0, wrote: 0 };
    Object.assign(visit, again, { state: "working", role: event.role, attempt: event.attempt });
    visit.started ||= event.ts;
  }

  ["model.started"](event) {
    Object.assign(this.#visit(event), { state: "prefilling", called: event.ts, prompt: event.prompt_tokens });
  }

  ["model.first_token"](event) {
    const visit = this.#visit(event);
    Object.assign(visit, { state: "writing", first: event, prompt: event.prompt_tokens, wrote: event.ts });
    visit.called ||= event.ts - event.ttft_ms / 1000;
  }

  ["model.token"](event) {
    this.#visit(event).text += event.text;
  }

  ["model.finished"]({ call }) {
    this.#visit(call).call = call;
  }

  ["node.finished"]({ message, ts }) {
    Object.assign(this.#visit(message), { state: "done", message, text: message.text, finished: ts });
  }

  ["node.retrying"](event) {
    this.#visit(event).error = `attempt ${event.attempt} follows: ${event.error}`;
  }

  ["node.failed"](event) {
    Object.assign(this.#visit(event), { state: "failed", error: `${event.error_type}: ${event.error}`, finished: event.ts });
  }

  ["node.skipped"](event) {
    Object.assign(this.#visit(event), { state: "skipped", error: event.reason, finished: event.ts });
  }

  edge(event) {
    const target = this.#visit({ node: event.target, round: event.round });
    const known = target.needs.map((key) => this.visits.get(key)).find((one) => one?.node === event.source);
    const ended = [...this.visits.values()].findLast((one) => one.node === event.source && one.finished);
    const source = known ?? ended;
    if (!known && source) target.needs.push(source.key);
    if (!event.taken && source) target.kept.add(source.key);
  }

  warning(event) {
    this.warnings.push(event.text);
  }

  ["judge.checked"]({ check }) {
    this.#visit(check).checks.push(check);
  }

  ["run.finished"](event) {
    this.#end("done", event.ts);
    this.answer = event.answer;
  }

  ["run.failed"](event) {
    this.#end("failed", event.ts);
    this.error = `${event.error_type}: ${event.error}`;
  }

  ["run.cancelled"](event) {
    this.#end("cancelled", event.ts);
  }

  #end(status, ts) {
    Object.assign(this, { status, ended: ts });
    for (const visit of this.visits.values()) {
      if (!OVER.has(visit.state)) Object.assign(visit, { state: "stopped", finished: visit.started ? ts : 0 });
    }
  }
}

/** Rows of a plan by treatment. */
export function tally(rows) {
  const of = (kind) => sum(rows.filter((row) => row.kind === kind).map((row) => row.tokens));
  const [exact, realigned, computed] = ["placed-exact", "placed-realigned", "computed"].map(of);
  return { exact, realigned, computed, total: exact + realigned + computed };
}

/** What every agent does at this moment, for people. */
export function present(run) {
  if (run.status !== "running") {
    const took = run.ended && run.begun ? ` after ${time(1000 * (run.ended - run.begun))}` : "";
    return `${{ done: "Done", failed: "Failed", cancelled: "Cancelled", lost: "Lost sight of it" }[run.status]}${took}.`;
  }
  if (!run.begun) return "Waiting for its turn.";
  const visits = [...run.visits.values()];
  const active = visits.filter((one) => ["working", "prefilling", "writing"].includes(one.state));
  const next = visits.filter((one) => one.state === "waiting");
  const told = active.map((one) => `${run.named(one)} is ${WORDS[one.state]}`);
  told.push(...next.slice(0, 3).map((one) => `${run.named(one)} waits for ${listing(run.awaited(one).map((who) => run.named(who)))}`));
  if (next.length > 3) told.push(`${next.length - 3} more wait`);
  return told.length ? `${told.join(". ")}.` : "Between two agents.";
}

/** The run in a few sentences: who waited, what was reused, what that saved. */
export function inShort(run) {
  const told = [];
  const length = ([, waits]) => (waits.length ? waits.at(-1).to - waits[0].from : 0);
  const notable = (run.now() - run.begun) / 50;
  const waited = [...run.visits.values()].map((visit) => [visit, run.waits(visit)]).filter((one) => length(one) > notable);
  for (const [visit, waits] of waited.slice(0, 4)) {
    const whom = [...new Set(waits.flatMap((one) => one.missing))].map((one) => run.named(one));
    const ms = 1000 * length([visit, waits]);
    const verb = visit.state === "waiting" ? "has waited" : "waited";
    told.push(`${run.named(visit)} ${verb} ${time(ms)} for ${listing(whom)}.`);
  }
  if (waited.length > 4) told.push(`${waited.length - 4} more waited; the chart below shows for whom.`);
  const firsts = [...run.visits.values()].map((visit) => visit.first).filter(Boolean);
  if (!firsts.length) return told;
  const [total, exact, realigned] = ["prompt_tokens", "placed_exact", "placed_realigned"].map((name) => sum(firsts.map((one) => one[name])));
  const reused = exact + realigned;
  told.push(
    `${tokens(reused)} of ${count(total)} in all prompts (${percent(reused, total)}) were reused: ${count(exact)} bit for bit, ` +
      `${count(realigned)} taken over from another agent and moved. The model computed the other ${count(total - reused)}.`,
  );
  const { of } = run.estimates();
  const calls = run.calls();
  if (of.size && calls.some((call) => call.computed < call.prompt_tokens)) {
    const measured = sum(calls.map((call) => call.ttft_ms));
    told.push(`First tokens took ${time(measured)} together; computing everything would have taken about ${time(sum([...of.values()]))} (an estimate).`);
  }
  return told;
}
