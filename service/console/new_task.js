// A new task from exemplars typed in or files: JSON lines as `moepager profile` reads them. Parsed here, sent as JSON.

import { call } from "./api.js";
import { attempt, field, h, replace } from "./dom.js";

const ITEM = "One item a line: {\"prompt\"}, {\"prompt\", \"response\"} or {\"messages\"}.";

export class NewTask {
  constructor(made) {
    this.made = made;
    this.name = h("input", { required: true, maxlength: "200", autocomplete: "off" });
    this.description = h("input", { maxlength: "2000", autocomplete: "off" });
    this.exemplars = h("textarea", { rows: "5" });
    this.calibration = h("input", { type: "file", accept: ".jsonl,.json,.txt" });
    this.evaluation = h("input", { type: "file", accept: ".jsonl,.json,.txt" });
    this.now = h("input", { type: "checkbox", id: "profile-now", checked: true });
    this.error = h("p", { class: "error", role: "alert", hidden: true });
    this.submit = h("button", { type: "submit", class: "primary" }, "Create the task");
    this.form = h("form", { class: "card stack", "aria-label": "New task", onsubmit: (event) => { event.preventDefault(); this.create(); } },
      h("h2", {}, "New task"),
      h("div", { class: "fields" }, field("Name", this.name), field("Description", this.description)),
      field("Exemplar queries", this.exemplars, "One a line. New queries like these are matched to the task."),
      h("div", { class: "fields" },
        field("Calibration file", this.calibration, `${ITEM} Without a file the exemplars are the calibration text.`),
        field("Evaluation file", this.evaluation, `${ITEM} Without evidence only exact mode serves the task.`)),
      h("label", { class: "choice", for: "profile-now" }, this.now, "Start the profiling job at once"),
      this.error,
      h("div", { class: "buttons" }, this.submit, h("a", { href: "#/tasks" }, "Cancel")));
  }

  show(place) {
    if (this.form.parentElement !== place || place.childElementCount !== 1) replace(place, this.form);
    this.name.focus();
  }

  async create() {
    this.submit.disabled = true;
    await attempt(this.error, async () => {
      const name = this.name.value.trim();
      await call("POST", "/v1/tasks", await this.body(name));
      if (this.now.checked) await call("POST", "/v1/jobs", { task: name });
      const started = this.now.checked;
      this.form.reset();
      if (started) location.hash = "#/jobs";
      else this.made(name);
    });
    this.submit.disabled = false;
  }

  async body(name) {
    const exemplars = this.exemplars.value.split("\n").map((line) => line.trim()).filter(Boolean);
    return { name, description: this.description.value.trim(), exemplars,
      calibration: await items(this.calibration), evaluation: await items(this.evaluation) };
  }
}

async function items(input) {
  const [file] = input.files;
  if (!file) return [];
  const found = [];
  for (const [at, line] of (await file.text()).split("\n").entries()) {
    if (!line.trim()) continue;
    try {
      found.push(JSON.parse(line));
    } catch {
      throw new Error(`${file.name}, line ${at + 1}: not JSON. ${ITEM}`);
    }
  }
  return found;
}
