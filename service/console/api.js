// Requests to the service that served this page, with the person's key. The key stays in this tab's sessionStorage.

const KEY = "moepager.key";

export class ApiError extends Error {
  constructor(message, status, code, retryAfter = 0) {
    super(message);
    this.status = status;
    this.code = code;
    this.retryAfter = retryAfter;  // seconds
  }
}

export function storedKey() {
  return sessionStorage.getItem(KEY);
}

export function storeKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

async function send(method, path, body, signal) {
  const headers = {};
  if (storedKey()) headers.authorization = `Bearer ${storedKey()}`;
  if (body !== undefined) headers["content-type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method, headers, signal, body: body === undefined ? undefined : JSON.stringify(body), cache: "no-store",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The service can't be reached. Is it running?", 0, "unreachable");
  }
  if (!response.ok) throw await refused(response);
  return response;
}

async function refused(response) {
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch {
    // not the service's own words: a proxy's page, or nothing
  }
  if (response.status === 401) document.dispatchEvent(new CustomEvent("key-refused"));
  const wait = Number(response.headers.get("retry-after")) || 0;
  return new ApiError(error.message ?? `HTTP ${response.status} ${response.statusText}`, response.status, error.code, wait);
}

export async function call(method, path, body, signal) {
  return (await send(method, path, body, signal)).json();
}

// Server-sent events of a POST: { event, data }, and { comment } for the lines that only keep it alive.
export async function* stream(path, body, signal) {
  const response = await send("POST", path, body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    let end;
    while ((end = text.indexOf("\n\n")) >= 0) {
      const frame = parse(text.slice(0, end));
      text = text.slice(end + 2);
      if (frame) yield frame;
    }
  }
}

export function parse(frame) {
  const data = [];
  let event = "", comment = "";
  for (const line of frame.split("\n")) {
    if (line.startsWith(":")) comment = line.slice(1).trim();
    else if (line.startsWith("event:")) event = line.slice(6).trim();
    else if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
  }
  if (data.length) return { event, data: data.join("\n") };
  return comment ? { comment } : null;
}

const PATIENCE = 3000;  // ms after a look that failed: a service in trouble, or a key's limit, needs no hurry

// Calls `look` now and then every `interval()` ms while running; one at a time, and not while the tab is hidden.
// What `look` throws goes to `fail`; a refused key ends it until it is started again.
export class Poll {
  constructor(look, interval, fail) {
    this.look = look;
    this.interval = interval;
    this.fail = fail;
    this.timer = null;
    this.running = false;
    this.turn = 0;
  }

  start() {
    if (this.running) return;
    this.running = true;
    this.again();
  }

  stop() {
    this.running = false;
    this.turn++;
    clearTimeout(this.timer);
  }

  async again() {
    clearTimeout(this.timer);
    const turn = ++this.turn;
    let wait = 0;
    try {
      if (!document.hidden) await this.look();
    } catch (error) {
      this.fail(error);
      if (error.status === 401) this.stop();
      wait = Math.max(PATIENCE, 1000 * (error.retryAfter ?? 0));
    }
    if (this.running && turn === this.turn) this.timer = setTimeout(() => this.again(), Math.max(wait, this.interval()));
  }
}
