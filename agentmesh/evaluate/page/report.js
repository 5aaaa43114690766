"use strict";
// Shows the samples. Text from models and tasks only ever becomes text nodes, never markup.
const data = JSON.parse(document.getElementById("data").textContent);

function make(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const text = (number) => data.texts[number];
const count = (number) => number.toLocaleString("en");

const FILTERS = [
  ["all", () => true],
  ["answers differ between presets", (sample) => sample.differ],
  ["texts differ between presets", (sample) => sample.parted],
  ["wrong under some preset", (sample) => sample.wrong],
  ["failed", (sample) => sample.failed],
];

function question(sample) {
  return sample.inputs.map(([, words]) => text(words)).join(" ").replace(/\s+/g, " ").trim();
}

function chip(row, name) {
  if (row.error) return make("span", { class: "chip bad" }, `${name}failed`);
  const score = row.scores[data.metric];
  if (score === undefined) return make("span", { class: "chip" }, `${name}not scored`);
  const word = score === 1 ? "right" : score === 0 ? "wrong" : score.toFixed(2);
  return make("span", { class: `chip ${score === 1 ? "good" : "bad"}` }, `${name}${word}`);
}

function summary(sample) {
  const asked = question(sample);
  const tail = asked.length > 110 ? `… ${asked.slice(-110).replace(/^\S*\s/, "")}` : asked;
  const chips = sample.rows.map((row) => chip(row, `${data.presets[row.preset]} `));
  const name = sample.epoch ? `${sample.id}, epoch ${sample.epoch}` : sample.id;
  return make("summary", {}, make("b", {}, name), make("span", { class: "tail" }, tail), ...chips);
}

function inside(sample) {
  const node = make("div", { class: "inside" });
  for (const [name, words] of sample.inputs) {
    const box = make("pre", { class: "question", tabindex: 0, "aria-label": data.names[name] }, text(words));
    node.append(make("h4", {}, data.names[name]), box);
  }
  if (text(sample.expected)) node.append(make("h4", {}, "expected"), make("pre", { class: "box" }, text(sample.expected)));
  const views = sample.rows.map((row) => presetView(row, sample));
  node.append(make("div", { class: "presets" }, ...views));
  return node;
}

function presetView(row, sample) {
  const node = make("article", { class: "preset-view" }, make("h4", {}, data.presets[row.preset], " ", chip(row, "")));
  if (row.error) {
    node.append(make("pre", {}, row.error));
    return node;
  }
  const found = Object.entries(row.extracted).filter(([, answer]) => answer);
  const scores = Object.entries(row.scores).map(([name, value]) => `${name} ${Number(value.toFixed(3))}`);
  const answers = found.length ? found.map(([scorer, answer]) => `${scorer} found: ${answer}`) : ["no answer found"];
  const facts = [...answers, ...scores, `${row.wall_s.toFixed(1)} s`];
  node.append(make("p", { class: "small" }, facts.join(" · ")));
  for (const note of Object.values(row.notes)) node.append(make("p", { class: "small" }, note));
  for (const agent of row.agents) node.append(...agentView(agent, row, sample));
  return node;
}

function agentView(agent, row, sample) {
  const round = agent.round ? `, round ${agent.round}` : "";
  const nodes = [make("h5", {}, `${agent.node}${agent.role && agent.role !== agent.node ? ` (${agent.role})` : ""}${round}`)];
  if (agent.call) nodes.push(...callView(agent.call, sample));
  nodes.push(...messageView(agent, row, sample));
  if (text(agent.again)) {
    nodes.push(make("p", { class: "small" }, "asked once more, with its inbox in another order, it wrote"));
    nodes.push(make("pre", { class: "box said-text", tabindex: 0 }, text(agent.again).trimEnd()));
  }
  return nodes;
}

function callView(call, sample) {
  const total = call.tokens.reduce((sum, tokens) => sum + tokens, 0);
  const placed = call.tokens[0] + call.tokens[1];
  const parts = call.tokens.map((tokens, kind) =>
    make("span", { class: data.kinds[kind], style: `width: ${(100 * tokens) / total}%`, title: `${data.kinds[kind]}: ${tokens} tokens` }));
  const label = `${count(placed)} of ${count(total)} prompt tokens placed`;
  const told = `${label} · first token after ${count(call.ttft_ms)} ms (${count(call.queue_ms)} waiting)`;
  const nodes = [make("div", { class: "strip", role: "img", "aria-label": label }, ...parts), make("p", { class: "small" }, told)];
  if (call.prompt) nodes.push(promptView(call.prompt));
  else nodes.push(make("p", { class: "small" }, sample.cut ? "The prompt was left out to keep this page light." : "No prompt."));
  return nodes;
}

function explain([kind, reason, source, tokens], name) {
  const [word, about] = data.reasons[reason];
  const from = data.names[source] ? ` From: ${data.names[source]}.` : "";
  return `${data.kinds[kind]}, ${word}: ${about}${from} ${tokens} tokens of ${name}.`;
}

function promptView(prompt) {
  const box = make("pre", { class: "box prompt", tabindex: 0, "aria-label": "prompt" });
  const rows = make("tbody", {});
  for (const [name, words, runs] of prompt) {
    const label = data.names[name];
    if (label !== "fixed") box.append(make("span", { class: "tag" }, label));
    let at = 0;
    for (const run of runs) {
      const [kind, reason, source, tokens, length] = run;
      const piece = text(words).slice(at, at + length);
      at += length;
      if (piece) box.append(make("span", { class: `run ${data.kinds[kind]}`, title: explain(run, label) }, piece));
      const cells = [label, data.kinds[kind], tokens, data.reasons[reason][0], data.names[source]];
      rows.append(make("tr", {}, ...cells.map((cell) => make("td", {}, cell))));
    }
  }
  const why = make("p", { class: "why", "aria-live": "polite" }, "Point at a piece of text, or click it, to see why.");
  const tell = (event) => {
    if (event.target.classList.contains("run")) why.textContent = event.target.title;
  };
  box.addEventListener("mouseover", tell);
  box.addEventListener("click", tell);
  const head = ["text", "what happened", "tokens", "why", "from"].map((word) => make("th", { scope: "col" }, word));
  const table = make("table", {}, make("thead", {}, make("tr", {}, ...head)), rows);
  const recorded = box.querySelector(".run") !== null;
  const shown = recorded ? [box, why] : [make("p", { class: "note" }, "The prompt's text was not recorded.")];
  const listing = make("details", {}, make("summary", { class: "small" }, "the same as a table"), make("div", { class: "scroll" }, table));
  return make("details", { open: "" }, make("summary", { class: "small" }, "prompt"), ...shown, listing);
}

function messageView(agent, row, sample) {
  const said = text(agent.said).trimEnd();
  const first = sample.rows.find((one) => !one.error);
  const same = (one) => one.node === agent.node && one.round === agent.round;
  const other = row === first ? undefined : first.agents.find(same);
  if (!other) return [make("p", { class: "small" }, "wrote"), make("pre", { class: "box said-text", tabindex: 0 }, said)];
  const name = data.presets[first.preset];
  if (other.said === agent.said) {
    return [make("p", { class: "small" }, `wrote the same text as under ${name}`), make("pre", { class: "box said-text", tabindex: 0 }, said)];
  }
  const theirs = text(other.said);
  let at = 0;
  while (at < said.length && said[at] === theirs[at]) at += 1;
  return [
    make("p", { class: "small" }, `wrote; marked from where it parts from ${name}`),
    make("pre", { class: "box said-text", tabindex: 0 }, said.slice(0, at), make("mark", {}, said.slice(at))),
  ];
}

const list = document.getElementById("list");
const entries = data.samples.map((sample) => {
  const node = make("details", { class: "sample" }, summary(sample));
  node.addEventListener("toggle", () => {
    if (!node.open || node.querySelector(".inside")) return;
    node.append(inside(sample));
    for (const box of node.querySelectorAll(".question")) box.scrollTop = box.scrollHeight;
  });
  list.append(node);
  return [sample, node];
});

const filter = document.getElementById("filter");
filter.hidden = false;
FILTERS.forEach(([name, keeps], number) => {
  const radio = make("input", { type: "radio", name: "filter", id: `filter-${number}` });
  radio.checked = number === 0;
  radio.addEventListener("change", () => {
    for (const [sample, node] of entries) node.hidden = !keeps(sample);
  });
  const label = `${name} (${data.samples.filter(keeps).length})`;
  filter.append(make("label", { for: radio.id }, radio, " ", label));
});
