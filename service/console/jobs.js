// Profiling jobs, as they go. For operators.

import { Poll, call } from "./api.js";
import { confirm, h, replace, setText } from "./dom.js";
import { moment, percent } from "./format.js";

const ACTIVE = ["queued", "running"];
const COLUMNS = ["Task", "State", "Progress", "What it does", "Changed", ""];

export class Jobs {
  constructor() {
    this.rows = new Map();
    this.poll = new Poll(() => this.look(), () => (this.active ? 1000 : 4000), (error) => this.fail(error));
    this.error = h("p", { class: "error", role: "alert", hidden: true });
    this.body = h("tbody", {});
    this.empty = h("p", { class: "empty", hidden: true }, "No job yet. A task's page starts one.");
    this.table = h("div", { class: "scroll", role: "region", "aria-label": "Jobs", tabindex: "0" },
      h("table", {}, h("caption", { class: "unseen" }, "Jobs"),
        h("thead", {}, h("tr", {}, COLUMNS.map((text) =>
          h("th", { scope: "col" }, text || h("span", { class: "unseen" }, "Actions"))))), this.body));
    this.news = h("p", { class: "unseen", role: "status" });
    this.element = h("section", { "aria-labelledby": "jobs-title" },
      h("div", { class: "head" }, h("div", {}, h("h1", { id: "jobs-title" }, "Jobs"),
        h("p", { class: "lead" }, "Profiling runs beside the service, one at a time. What is done comes into service by itself."))),
      this.error, this.news, h("div", { class: "card" }, this.empty, this.table));
  }

  show(_rest, session) {
    if (session.operator) {
      this.poll.start();
      return;
    }
    this.table.hidden = true;
    setText(this.empty, "Jobs are for operators; this key may only query.");
    this.empty.hidden = false;
  }

  hide() {
    this.poll.stop();
  }

  async look() {
    const { jobs } = await call("GET", "/v1/jobs");
    this.error.hidden = true;
    this.draw([...jobs].sort((a, b) => b.created.localeCompare(a.created)));
  }

  fail(error) {
    setText(this.error, error.message);
    this.error.hidden = false;
  }

  // Rows stay where they are and only change: focus and screen readers are not thrown about.
  draw(jobs) {
    this.active = jobs.some((job) => ACTIVE.includes(job.state));
    this.empty.hidden = jobs.length > 0;
    this.table.hidden = jobs.length === 0;
    for (const [id, row] of this.rows) {
      if (!jobs.some((job) => job.id === id)) {
        row.element.remove();
        this.rows.delete(id);
      }
    }
    jobs.forEach((job, at) => {
      if (!this.rows.has(job.id)) this.rows.set(job.id, new Row(job, () => this.cancel(job)));
      const row = this.rows.get(job.id);
      if (row.change(job)) setText(this.news, `The job of ${job.task} is ${job.state}.`);
      if (this.body.children[at] !== row.element) this.body.insertBefore(row.element, this.body.children[at] ?? null);
    });
  }

  async cancel(job) {
    if (!(await confirm(`Cancel the job of the task ${job.task}? What it has read so far is kept for the next one.`, "Cancel the job"))) return;
    try {
      await call("DELETE", `/v1/jobs/${encodeURIComponent(job.id)}`);
      await this.look();
    } catch (error) {
      this.fail(error);
    }
  }
}

class Row {
  constructor(job, cancel) {
    this.state = h("span", { class: "tag" });
    this.progress = h("progress", { max: "1", "aria-label": `progress of ${job.task}` });
    this.share = h("span", { class: "number" });
    this.detail = h("td", { class: "clip" });
    this.changed = h("td", {});
    this.button = h("button", { type: "button", class: "danger", "aria-label": `Cancel the job of ${job.task}`, onclick: cancel }, "Cancel");
    this.element = h("tr", {},
      h("th", { scope: "row" }, h("a", { href: `#/tasks/${encodeURIComponent(job.task)}`, class: "clip" }, job.task)),
      h("td", {}, this.state), h("td", {}, this.progress, this.share), this.detail, this.changed, h("td", {}, this.button));
  }

  // Whether the state is another than before.
  change(job) {
    const moved = this.was !== undefined && this.was !== job.state;
    this.was = job.state;
    setText(this.state, job.state);
    this.state.className = `tag ${job.state === "failed" ? "warn" : ACTIVE.includes(job.state) ? "on" : ""}`;
    this.progress.value = job.progress;
    setText(this.share, percent(job.progress, 0));
    setText(this.detail, job.detail);
    setText(this.changed, moment(job.updated));
    this.button.hidden = !ACTIVE.includes(job.state);
    return moved;
  }
}
