// The page: starts runs, lists them, and shows one as its events come.
import * as api from "./api.js";
import { Firsts, Prompts, Texts, Timeline } from "./charts.js";
import { byId, keyed, make, percent, say, time } from "./dom.js";
import { Graph } from "./graph.js";
import { inShort, present, Run } from "./run.js";

const MARK = { running: "▶", done: "✓", failed: "✕", cancelled: "■", lost: "?" };
const POLL_MS = 3000;
const FRAME_MS = 100; // the model may need this machine more than the page does

let meshes = [];
let reasons = {};
let run = null;
let follower = null;
let drawn = -1;
let timer = 0;

const views = [
  new Graph(byId("graph"), byId("graph-why")),
  new Timeline(byId("timeline"), byId("time-why")),
  new Prompts(byId("prompts"), () => reasons),
  new Firsts(byId("firsts"), byId("estimate")),
  new Texts(byId("texts")),
];

/** Do something with the server; a refusal is shown, and a missing key asked for. */
async function attempt(work, box) {
  box.hidden = true;
  try {
    return await work();
  } catch (error) {
    if (error.name === "AbortError") return undefined;
    if (!(error instanceof api.Refused)) throw error;
    if (error.status === 401) askForKey();
    say(box, error.message);
    box.hidden = false;
    return undefined;
  }
}

function askForKey() {
  byId("key").hidden = false;
  byId("key-field").focus();
}

// Starting

function chosen() {
  return meshes.find((mesh) => mesh.name === byId("mesh").value);
}

function fillForm() {
  const mesh = chosen();
  if (!mesh) return;
  say(byId("about"), `${mesh.about} ${mesh.model}, preset ${mesh.preset}.`.trim());
  byId("inputs").replaceChildren(...mesh.inputs.flatMap((name) => {
    const id = `input-${name}`;
    const field = make("textarea", { id, name, rows: 4 });
    field.value = mesh.defaults[name] ?? "";
    field.required = !(name in mesh.defaults);
    field.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("start").requestSubmit();
    });
    return [make("label", { for: id }, name), field];
  }));
}

async function begin(event) {
  event.preventDefault();
  const mesh = chosen();
  const fields = [...byId("inputs").querySelectorAll("textarea")];
  const inputs = Object.fromEntries(fields.map((field) => [field.name, field.value]));
  const seed = byId("seed").value.trim();
  const button = byId("start").querySelector("button.main");
  button.disabled = true;
  const id = await attempt(() => api.start(mesh.name, inputs, seed ? Number(seed) : null), byId("refused"));
  button.disabled = false;
  if (id) location.hash = `run=${id}`;
}

// The list of runs

async function refresh() {
  const rows = await attempt(api.runs, byId("unlisted"));
  if (!rows) return;
  byId("no-runs").hidden = rows.length > 0;
  keyed(byId("history"), rows, (row) => row.run, historyRow).forEach((item, index) => {
    const row = rows[index];
    const all = row.tokens_placed + row.tokens_computed;
    const link = item.firstElementChild;
    link.setAttribute("aria-current", row.run === run?.id ? "page" : "false");
    item.className = row.status;
    say(link.querySelector(".mark"), MARK[row.status]);
    say(link.querySelector(".tail"), row.error ?? row.answer ?? "");
    const took = row.wall_s === null ? row.status : time(1000 * row.wall_s);
    say(link.querySelector("small"), all ? `${took} · ${percent(row.tokens_placed, all)} reused` : took);
  });
}

function historyRow(row) {
  const when = new Date(row.begun).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit" });
  const title = make("span", {}, make("span", { class: "mark", "aria-hidden": "true" }), " ", make("b", {}, row.mesh), ` ${when}`);
  const link = make("a", { href: `#run=${row.run}` }, title, make("small"), make("span", { class: "tail" }));
  link.addEventListener("click", () => row.run === run?.id && open(true));
  return make("li", {}, link);
}

// One run

async function open(moving) {
  const id = new URLSearchParams(location.hash.slice(1)).get("run");
  if (!id || (id === run?.id && run.status !== "lost")) return;
  follower?.abort();
  const mine = (follower = new AbortController());
  const row = await attempt(() => api.run(id), byId("failure"));
  if (!row || mine.signal.aborted) return;
  const known = meshes.find((mesh) => mesh.name === row.mesh);
  run = new Run(id, known?.graph);
  run.mesh = row.mesh;
  run.inputs = row.inputs;
  drawn = -1;
  byId("nothing").hidden = true;
  byId("view").hidden = false;
  for (const view of views) view.show(run);
  if (moving) byId("main").focus();
  refresh();
  redraw();
  await attempt(() => follow(run, mine.signal), byId("failure"));
  if (!mine.signal.aborted) run.settle({ status: "lost" });
}

async function follow(one, signal) {
  for await (const event of api.events(one.id, signal)) {
    one.take(event);
    redraw();
  }
  one.settle(await api.run(one.id));
  redraw();
  refresh();
}

function redraw() {
  timer ||= setTimeout(frame, FRAME_MS);
}

/** Draw the run as it is now: everything where something happened, else what grows with time and text. */
function frame() {
  timer = 0;
  const changed = drawn !== run.version;
  drawn = run.version;
  head(changed);
  for (const view of views) if (changed || view.grows) view.update();
  if (run.status === "running") redraw();
}

function head(changed) {
  if (run.status === "running" && run.begun) say(byId("run-status"), `${MARK.running} running, ${(run.now() - run.begun).toFixed(1)} s`);
  if (!changed) return;
  say(byId("run-mesh"), run.mesh);
  say(byId("run-facts"), run.model && `${run.preset} on ${run.model}`);
  byId("run-status").className = `chip ${run.status}`;
  if (run.status !== "running") say(byId("run-status"), `${MARK[run.status]} ${run.status}`);
  byId("cancel").hidden = run.status !== "running";
  say(byId("now"), present(run));
  if (run.error) say(byId("failure"), run.error);
  if (run.error) byId("failure").hidden = false;
  byId("answer").hidden = !run.answer;
  say(byId("answer-text"), run.answer);
  for (const [id, lines] of [["told", inShort(run)], ["warnings", run.warnings]]) {
    keyed(byId(id), [...lines.keys()], (index) => index, () => make("li")).forEach((item, index) => say(item, lines[index]));
  }
  keyed(byId("asked"), Object.entries(run.inputs), ([name]) => name, ([name, words]) =>
    make("div", {}, make("p", { class: "small" }, name), make("pre", { class: "box", tabindex: 0 }, words)));
  document.title = `${MARK[run.status]} ${run.mesh}: agentmesh`;
}

async function load() {
  const found = await attempt(api.meshes, byId("refused"));
  if (!found) return;
  byId("key").hidden = true;
  ({ meshes, reasons = {} } = found);
  keyed(byId("mesh"), meshes, (mesh) => mesh.name, (mesh) => make("option", { value: mesh.name }, mesh.name));
  fillForm();
  await refresh();
  await open(false);
}

byId("mesh").addEventListener("change", fillForm);
byId("start").addEventListener("submit", begin);
byId("cancel").addEventListener("click", () => attempt(() => api.cancel(run.id), byId("failure")));
byId("key").addEventListener("submit", (event) => {
  event.preventDefault();
  api.useKey(byId("key-field").value.trim());
  byId("key-field").value = "";
  load();
});
addEventListener("hashchange", open);
document.addEventListener("visibilitychange", () => document.hidden || refresh());
setInterval(() => document.hidden || !byId("key").hidden || refresh(), POLL_MS);
load();
