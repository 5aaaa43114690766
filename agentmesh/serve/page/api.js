// The server's requests. A key, where one is asked for, is kept in this tab only.

const KEY = "agentmesh-key";
const TRIES = 6;

/** The server refused a request; `status` 0 where it was not reached. */
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export const useKey = (key) => sessionStorage.setItem(KEY, key);

async function ask(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "The server cannot be reached. Is `agentmesh serve` still running?");
  }
  if (!response.ok) throw new Refused(response.status, await reason(response));
  return response;
}

async function reason(response) {
  const text = await response.text();
  try {
    const { error, detail } = JSON.parse(text);
    return error?.message ?? detail ?? text;
  } catch {
    return text || `${response.status} ${response.statusText}`;
  }
}

const read = async (path, options) => (await ask(path, options)).json();

export const meshes = () => read("/api/meshes");
export const runs = async () => (await read("/api/runs")).runs;
export const run = (id) => read(`/api/runs/${encodeURIComponent(id)}`);
export const cancel = (id) => ask(`/api/runs/${encodeURIComponent(id)}`, { method: "DELETE" });

export async function start(mesh, inputs, seed) {
  const body = JSON.stringify({ inputs, seed });
  const headers = { "Content-Type": "application/json" };
  return (await read(`/api/meshes/${encodeURIComponent(mesh)}/runs`, { method: "POST", headers, body })).run;
}

/** A run's events in order, each once, until its end; a lost connection is taken up again where it broke off. */
export async function* events(id, signal) {
  let last = null;
  for (let failures = 0; failures < TRIES; failures += 1) {
    if (failures) await new Promise((done) => setTimeout(done, 250 * 2 ** failures));
    try {
      const headers = last === null ? {} : { "Last-Event-ID": last };
      const response = await ask(`/api/runs/${encodeURIComponent(id)}/events`, { signal, headers });
      for await (const message of messages(response.body)) {
        if (message.event === "end") return;
        if (!message.data) continue;
        last = message.id ?? last;
        failures = 0;
        yield JSON.parse(message.data);
      }
    } catch (error) {
      if (signal.aborted || error.status >= 400) throw error;
    }
  }
  throw new Refused(0, "The connection to the server was lost, and did not come back. Open the run again to go on.");
}

/** The messages of a text/event-stream. */
async function* messages(body) {
  let rest = "";
  for await (const piece of chunks(body.pipeThrough(new TextDecoderStream()))) {
    const parts = (rest + piece).replaceAll("\r\n", "\n").split("\n\n");
    rest = parts.pop();
    for (const part of parts) yield message(part);
  }
}

async function* chunks(stream) {
  const reader = stream.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield value;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function message(part) {
  const found = { event: "message", data: "" };
  for (const line of part.split("\n")) {
    const [, field, value] = /^([a-z]+): ?(.*)$/.exec(line) ?? [];
    if (field === "data") found.data += (found.data && "\n") + value;
    else if (field) found[field] = value;
  }
  return found;
}
