// How each query got its task, the youngest first, page by page. For operators. Queries themselves are never kept.

import { call } from "./api.js";
import { attempt, field, h, options, replace, setText, table } from "./dom.js";
import { count, fixed, moment, percent } from "./format.js";
import { reasonOf } from "./receipt.js";
import { link } from "./tasks.js";

const PAGE = 50;
const COLUMNS = [
  ["When", false], ["Task", false], ["Why", false], ["Similarity", true], ["Threshold", true], ["Nearest", false],
  ["Mode", false], ["Kept", true], ["Key", false], ["Request", false],
];

export class Decisions {
  constructor() {
    this.pages = [null];  // where each page that was seen begins; the last is shown
    this.error = h("p", { class: "error", role: "alert", hidden: true });
    this.lead = h("p", { class: "lead" }, "How each query got its task.");
    this.task = h("select", { onchange: () => this.first() });
    this.newer = h("button", { type: "button", onclick: () => this.back() }, "Newer");
    this.older = h("button", { type: "button", onclick: () => this.on() }, "Older");
    this.place = h("p", { class: "status", role: "status" });
    this.list = h("div", { class: "card" });
    this.tools = h("div", { class: "fields" }, field("Only of the task", this.task));
    this.element = h("section", { "aria-labelledby": "decisions-title" },
      h("div", { class: "head" }, h("div", {}, h("h1", { id: "decisions-title" }, "Decisions"), this.lead),
        h("div", { class: "buttons" }, h("button", { type: "button", onclick: () => this.first() }, "Look again"))),
      this.error, h("div", { class: "stack" }, this.tools, this.list,
        h("div", { class: "buttons" }, this.newer, this.older, this.place)));
  }

  async show(_rest, session) {
    for (const part of [this.tools, this.list, this.newer, this.older]) part.hidden = !session.operator;
    if (!session.operator) {
      setText(this.lead, "Decisions are for operators; this key may only query.");
      return;
    }
    await attempt(this.error, async () => {
      const { tasks } = await call("GET", "/v1/tasks");
      options(this.task, [["", "all, and none"], ...tasks.map(({ task }) => [task, task])]);
      await this.look();
    });
  }

  hide() {}

  first() {
    this.pages = [null];
    return attempt(this.error, () => this.look());
  }

  back() {
    this.pages.pop();
    return attempt(this.error, () => this.look());
  }

  on() {
    this.pages.push(this.next);
    return attempt(this.error, () => this.look());
  }

  async look() {
    const asked = new URLSearchParams({ limit: PAGE });
    if (this.task.value) asked.set("task", this.task.value);
    if (this.pages.at(-1) !== null) asked.set("before", this.pages.at(-1));
    const found = await call("GET", `/v1/decisions?${asked}`);
    this.next = found.next;
    this.newer.disabled = this.pages.length === 1;
    this.older.disabled = found.next === null;
    setText(this.lead, `How each query got its task. Kept for ${count(found.days_kept)} days, without the queries.`);
    setText(this.place, `Page ${this.pages.length}${found.next === null ? ", the last" : ""}`);
    replace(this.list, found.decisions.length > 0
      ? table("Decisions of retrieval", COLUMNS, found.decisions.map(row), { hideCaption: true })
      : h("p", { class: "empty" }, this.task.value ? "No query was given this task." : "No query has been decided yet."));
  }
}

function row(one) {
  return [
    moment(one.created),
    one.task === null ? "none" : link(one.task),
    reasonOf(one.reason),
    fixed(one.similarity, 3),
    fixed(one.threshold, 3),
    one.nearest,
    one.mode,
    percent(one.keep),
    one.key,
    h("code", { class: "clip" }, one.request),
  ];
}
