// New tasks that queries near no task might be, and what else an operator should look at: drift. For operators.

import { call } from "./api.js";
import { attempt, confirm, field, h, replace, setText, table } from "./dom.js";
import { count, fixed, moment, percent } from "./format.js";

export class Proposals {
  constructor() {
    this.error = h("p", { class: "error", role: "alert", hidden: true });
    this.kept = h("p", { class: "lead" });
    this.list = h("div", { class: "stack" });
    this.events = h("div", { class: "card" });
    this.forget = h("button", { type: "button", class: "danger", onclick: () => this.forgetAll() }, "Forget all queries");
    this.element = h("section", { "aria-labelledby": "proposals-title" },
      h("div", { class: "head" }, h("div", {}, h("h1", { id: "proposals-title" }, "Proposals"), this.kept),
        h("div", { class: "buttons" }, this.forget)),
      this.error, h("div", { class: "stack" }, this.list, this.events));
  }

  async show(_rest, session) {
    this.forget.hidden = this.events.hidden = !session.operator;
    if (!session.operator) {
      setText(this.kept, "Proposals are for operators; this key may only query.");
      return;
    }
    await attempt(this.error, () => this.refresh());
  }

  hide() {}

  async refresh() {
    const found = await call("GET", "/v1/proposals");
    const { events } = await call("GET", "/v1/events");
    this.forget.disabled = found.kept === 0;
    setText(this.kept, found.limit === 0
      ? "Queries that are near no task are not kept: MOEPAGER_KEEP_UNMATCHED says how many may be."
      : `${count(found.kept)} of at most ${count(found.limit)} queries are kept that were near no task.`);
    replace(this.list, found.proposals.length > 0
      ? found.proposals.map((proposal) => this.card(proposal))
      : h("p", { class: "card empty" }, "Nothing to propose: too few of the kept queries are alike."));
    replace(this.events, events.length > 0 ? eventTable(events) : h("p", { class: "empty" }, "No event: no task's traffic has drifted."));
  }

  card(proposal) {
    const name = h("input", { value: proposal.name, maxlength: "200", required: true, autocomplete: "off" });
    const title = `proposal-${proposal.id}`;
    const boxes = proposal.exemplars.map((query) => h("input", { type: "checkbox", value: query.digest, checked: true }));
    const queries = proposal.exemplars.map((query, at) =>
      h("li", {}, h("label", { class: "choice" }, boxes[at], h("span", { class: "clip" }, query.text, " ",
        h("span", { class: "hint" }, `asked ${count(query.count)} ${query.count === 1 ? "time" : "times"}`)))));
    const without = () => boxes.filter((box) => !box.checked).map((box) => box.value);
    const more = proposal.queries - proposal.exemplars.length;
    return h("form", { class: "card stack", "aria-labelledby": title,
      onsubmit: (event) => { event.preventDefault(); attempt(this.error, () => this.accept(proposal, name.value.trim(), without())); } },
      h("h2", { id: title, class: "clip" }, proposal.name),
      h("p", { class: "hint" }, `${count(proposal.queries)} queries, asked ${count(proposal.asked)} times; their mean similarity is `
        + `${fixed(proposal.cohesion, 2)}. What is unticked does not become part of the task.`),
      field("Name of the task", name),
      h("ul", { class: "queries", "aria-label": "Queries" }, queries, more > 0 && h("li", { class: "hint" }, `and ${count(more)} more`)),
      h("div", { class: "buttons" },
        h("button", { type: "submit", class: "primary" }, "Make it a task"),
        h("button", { type: "button", class: "danger", onclick: () => attempt(this.error, () => this.reject(proposal)) }, "Reject")));
  }

  async accept(proposal, name, without) {
    await call("POST", `/v1/proposals/${encodeURIComponent(proposal.id)}/accept`, { name, without });
    location.hash = "#/jobs";
  }

  async reject(proposal) {
    if (!(await confirm(`Forget the ${count(proposal.queries)} queries of the proposal ${proposal.name}?`, "Forget them"))) return;
    await call("DELETE", `/v1/proposals/${encodeURIComponent(proposal.id)}`);
    await this.refresh();
  }

  async forgetAll() {
    if (!(await confirm("Forget all queries that are kept?", "Forget them"))) return;
    await attempt(this.error, async () => {
      await call("DELETE", "/v1/unmatched");
      await this.refresh();
    });
  }
}

function eventTable(events) {
  const columns = [["Task"], ["Kind"], ["Value", true], ["Bound", true], ["What it says"], ["When"]];
  const rows = events.map((event) => [event.task, event.kind, percent(event.value), percent(event.bound), event.detail, moment(event.created)]);
  return table("Events", columns, rows);
}
