// Ask the model: a conversation with streamed answers, each with what it was served from.

import { ApiError, call, stream } from "./api.js";
import { field, h, options, replace, setText } from "./dom.js";
import { fixed, percent } from "./format.js";
import { receiptList } from "./receipt.js";

const AUTOMATIC = "";
const MODES = [
  ["", "service's own", "Mask where a task is known, else what the service is set to."],
  ["mask", "mask", "Route only inside the task's experts."],
  ["exact", "exact", "Route freely; what misses is paged in."],
  ["auto", "auto", "Mask under a guard that goes over to exact."],
];

export class Playground {
  constructor() {
    this.messages = [];
    this.session = newSession();
    this.abort = null;
    this.buildSide();
    this.buildComposer();
    this.log = h("div", { class: "log", role: "log", "aria-label": "Conversation" });
    this.empty = h("p", { class: "empty" }, "Ask something. The task is retrieved from the words of your question unless you name one.");
    this.element = h("section", { "aria-labelledby": "playground-title" },
      h("div", { class: "head" },
        h("div", {}, h("h1", { id: "playground-title" }, "Playground"),
          h("p", { class: "lead" }, "Answers stream in; each ends with a receipt of what it was served from.")),
        h("button", { type: "button", onclick: () => this.clear() }, "New conversation")),
      h("div", { class: "playground" },
        h("div", {}, this.empty, this.log, this.composer),
        this.side));
    this.element.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && this.abort) this.stop();
    });
  }

  buildSide() {
    this.task = h("select", { onchange: () => this.showSizes() });
    this.keep = h("select", {});
    this.limit = h("input", { type: "number", min: "1", step: "1", inputmode: "numeric" });
    this.temperature = h("input", { type: "number", min: "0", max: "2", step: "0.1", value: "0", inputmode: "decimal" });
    this.system = h("textarea", { rows: "2" });
    this.along = h("input", { type: "checkbox", checked: true });
    const modes = MODES.map(([value, name, hint]) =>
      h("label", { title: hint }, h("input", { type: "radio", name: "mode", value, checked: value === "" }), name));
    this.modes = h("fieldset", {}, h("legend", {}, "Mode"), h("div", { class: "choices" }, modes));
    this.side = h("div", { class: "card side" },
      h("h2", {}, "How to serve it"),
      field("Task", this.task), this.modes, field("Experts kept", this.keep),
      field("Most tokens", this.limit), field("Temperature", this.temperature, "0 takes the likeliest token each time."),
      field("System message", this.system),
      h("label", { class: "choice" }, this.along, "Send the earlier turns along"));
  }

  buildComposer() {
    this.input = h("textarea", { rows: "3", id: "question-input", onkeydown: (event) => this.key(event) });
    this.send = h("button", { type: "submit", class: "primary" }, "Ask");
    this.stopper = h("button", { type: "button", disabled: true, onclick: () => this.stop() }, "Stop");
    this.status = h("p", { class: "status", role: "status" });
    this.composer = h("form", { class: "composer card", onsubmit: (event) => { event.preventDefault(); this.ask(); } },
      field("Your question", this.input, "Enter sends, Shift+Enter begins a line, Escape stops the answer."),
      h("div", { class: "buttons" }, this.send, this.stopper), this.status);
  }

  async show(_rest, session) {
    this.model = session.model;
    this.limit.setAttribute("placeholder", `up to ${Math.min(session.answer_tokens, session.max_context)}`);
    this.limit.setAttribute("max", session.max_context);
    try {
      this.tasks = (await call("GET", "/v1/tasks")).tasks;
    } catch (error) {
      setText(this.status, error.message);
      return;
    }
    options(this.task, [[AUTOMATIC, "Automatic: retrieve it"], ...this.tasks.map((task) => [`=${task.task}`, task.task])]);
    this.showSizes();
  }

  hide() {}

  showSizes() {
    const named = this.tasks.filter((task) => this.task.value === AUTOMATIC || `=${task.task}` === this.task.value);
    const sizes = new Set(named.flatMap((task) => task.evidence.filter((each) => each.fits).map((each) => each.keep)));
    const entries = [...sizes].sort((a, b) => b - a).map((keep) => [String(keep), percent(keep)]);
    options(this.keep, [["", "service's own"], ...entries]);
  }

  key(event) {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    this.ask();
  }

  clear() {
    this.stop();
    this.messages = [];
    this.session = newSession();
    replace(this.log);
    this.empty.hidden = false;
    setText(this.status, "");
    this.input.focus();
  }

  stop() {
    this.abort?.abort();
  }

  body(messages) {
    const expert = this.along.checked ? { session: this.session } : {};
    if (this.task.value !== AUTOMATIC) expert.task = this.task.value.slice(1);
    const mode = this.modes.querySelector("input:checked").value;
    if (mode) expert.mode = mode;
    if (this.keep.value) expert.keep = Number(this.keep.value);
    const body = { model: this.model, messages, stream: true, expert,
      stream_options: { include_usage: true, continuous_usage_stats: true } };
    if (this.limit.value) body.max_tokens = Number(this.limit.value);
    if (this.temperature.value) body.temperature = Number(this.temperature.value);
    return body;
  }

  async ask() {
    const text = this.input.value.trim();
    if (!text || this.abort) return;
    const turn = new Turn(text);
    const system = this.system.value.trim();
    const messages = [...(this.along.checked ? this.messages : []), { role: "user", content: text }];
    const body = this.body(system ? [{ role: "system", content: system }, ...messages] : messages);
    for (const other of this.log.querySelectorAll("details[open]")) other.open = false;
    this.log.append(turn.element);
    this.empty.hidden = true;
    this.begin();
    try {
      await this.receive(turn, body);
      this.messages = [...messages, { role: "assistant", content: turn.text }];
      this.input.value = "";
    } catch (error) {
      turn.fail(error);  // the question stays in the box, and out of the conversation
    } finally {
      turn.done();
      this.end(turn.summary());
    }
  }

  begin() {
    this.abort = new AbortController();
    this.send.disabled = true;
    this.stopper.disabled = false;
    this.log.setAttribute("aria-busy", "true");  // an answer is read out once it is whole
    setText(this.status, "Waiting for the first token.");
  }

  end(status) {
    const focused = document.activeElement === this.stopper || document.activeElement === document.body;
    this.abort = null;
    this.log.removeAttribute("aria-busy");
    this.send.disabled = false;
    this.stopper.disabled = true;
    setText(this.status, status);
    if (focused) this.input.focus();
  }

  async receive(turn, body) {
    for await (const { data, comment } of stream("/v1/chat/completions", body, this.abort.signal)) {
      if (comment) setText(this.status, comment);
      if (data === undefined || data === "[DONE]") continue;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(chunk.error.message, 0, chunk.error.code);
      turn.take(chunk);
      if (turn.rate) setText(this.status, `${turn.rate.toFixed(1)} tokens/s`);
    }
    if (!turn.reason) throw new ApiError("The stream broke off before the answer was whole.", 0, "broken");
  }
}

// One question and its answer.
class Turn {
  constructor(question) {
    this.question = question;
    this.text = "";
    this.tokens = 0;
    this.rate = 0;
    this.first = null;
    this.reason = null;
    this.thought = h("p", { class: "thinks" });
    this.thinking = h("details", { class: "thought", hidden: true }, h("summary", {}, "Thought"), this.thought);
    this.answer = h("p", { class: "answer", "aria-busy": "true" });
    this.tags = h("div", { class: "tags" });
    this.more = h("div", { class: "more" });
    this.element = h("article", { class: "turn card", "aria-label": "Question and answer" }, h("p", { class: "asked" }, question), this.thinking, this.answer, this.tags, this.more);
  }

  take(chunk) {
    const now = performance.now();
    if (chunk.usage?.completion_tokens > this.tokens) {
      this.tokens = chunk.usage.completion_tokens;
      if (this.first === null) this.first = { at: now, tokens: this.tokens };
      else this.rate = (1000 * (this.tokens - this.first.tokens)) / Math.max(now - this.first.at, 1);
    }
    for (const choice of chunk.choices) {
      if (choice.delta?.reasoning_content) {
        this.thinking.hidden = false;
        this.thought.append(choice.delta.reasoning_content);
      }
      if (choice.delta?.content) {
        this.text += choice.delta.content;
        this.answer.append(choice.delta.content);
      }
      this.reason = choice.finish_reason ?? this.reason;
    }
    if (chunk.expert) this.showReceipt(chunk.expert);
  }

  showReceipt(receipt) {
    this.receipt = receipt;
    const named = receipt.task ?? "no task";
    const near = receipt.similarity === null ? "" : ` (${fixed(receipt.similarity, 2)})`;
    replace(this.tags,
      h("span", { class: "tag on" }, `${named}${near}`),
      h("span", { class: "tag" }, receipt.mode),
      h("span", { class: "tag" }, `${percent(receipt.keep)} of the experts`),
      receipt.coverage !== null && h("span", { class: "tag" }, `coverage ${percent(receipt.coverage)}`),
      receipt.doubts?.length > 0 && h("a", { class: "tag warn", href: `#/tasks/${encodeURIComponent(receipt.served_task)}` }, "doubted profile"),
      receipt.escalated && h("span", { class: "tag warn" }, "escalated"),
      receipt.ignored?.length > 0 && h("span", { class: "tag warn" }, `ignored: ${receipt.ignored.join(", ")}`));
    const details = h("details", { class: "receipt", open: true }, h("summary", {}, "Receipt"), receiptList(receipt));
    replace(this.more, details, this.candidates());
  }

  // Asked for only when opened: the service stores every retrieval that it decides.
  candidates() {
    const list = h("div", {});
    const details = h("details", {}, h("summary", {}, "Candidates of the retrieval"), list);
    details.addEventListener("toggle", async () => {
      if (!details.open || list.childElementCount) return;
      try {
        replace(list, ranking(await call("POST", "/v1/retrieve", { query: this.question })));
      } catch (error) {
        replace(list, h("p", { class: "error" }, error.message));
      }
    });
    return details;
  }

  fail(error) {
    if (error.name === "AbortError") {
      this.stopped = true;
      this.tags.append(h("span", { class: "tag warn" }, "stopped"));
      return;
    }
    this.failed = true;
    this.more.append(h("p", { class: "error", role: "alert" }, error.message));
  }

  done() {
    this.answer.removeAttribute("aria-busy");
    if (this.receipt && this.text === "") replace(this.answer, h("span", { class: "hint" }, "(an empty answer)"));
    if (this.reason === "length") this.tags.append(h("span", { class: "tag warn" }, "cut at the token limit"));
  }

  summary() {
    if (this.failed) return "The service refused.";
    const rate = this.rate ? `, ${this.rate.toFixed(1)} tokens/s` : "";
    return `${this.stopped ? "Stopped" : "Answered"}: ${this.tokens} tokens${rate}`;
  }
}

// The service keeps the task of a conversation that has a name. (randomUUID is not there without TLS.)
function newSession() {
  return Array.from(crypto.getRandomValues(new Uint32Array(4)), (part) => part.toString(16).padStart(8, "0")).join("");
}

function ranking(found) {
  const rows = found.ranked.map(({ task, similarity }) =>
    h("li", {},
      h("span", { title: task }, task),
      h("meter", { min: "0", max: "1", value: Math.max(0, similarity), "aria-label": `similarity of ${task}` }),
      h("span", { class: "number" }, fixed(similarity, 3))));
  const said = found.task === null ? "no task is near enough" : `chosen: ${found.task}`;
  return [h("p", { class: "hint" }, `Threshold ${fixed(found.threshold, 3)}; ${said}.`), h("ol", { class: "ranked" }, rows)];
}
