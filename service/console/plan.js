// What a memory budget would hold: the plan's parts, and for each task what fits, its quality and how long it loads.

import { call } from "./api.js";
import { field, h, replace, setText, table } from "./dom.js";
import { bytes, percent, seconds } from "./format.js";
import { accuracy, named } from "./tasks.js";

const MIB = 2 ** 20;
const STEPS = 400;
const PARTS = [["dense_bytes", "dense weights"], ["kv_bytes", "KV cache"], ["state_bytes", "running states"], ["staging_bytes", "staging"], ["router_bytes", "router copies"],
  ["kernel_bytes", "compiled kernels"], ["workspace_bytes", "workspace"]];

export class Plan {
  constructor() {
    this.turn = 0;
    this.slider = h("input", { type: "range", min: "0", max: String(STEPS), step: "1", oninput: () => this.slid() });
    this.text = h("input", { inputmode: "text", autocomplete: "off", spellcheck: "false", onchange: () => this.ask(this.text.value) });
    this.error = h("p", { class: "error", role: "alert", hidden: true });
    this.status = h("p", { class: "status", role: "status" });
    this.result = h("div", { class: "stack" });
    this.element = h("section", { "aria-labelledby": "plan-title" },
      h("div", { class: "head" }, h("div", {}, h("h1", { id: "plan-title" }, "Plan for a budget"),
        h("p", { class: "lead" }, "What another memory budget would hold of this model, before anything is loaded. Nothing changes here."))),
      h("div", { class: "stack" },
        h("form", { class: "card", onsubmit: (event) => { event.preventDefault(); this.ask(this.text.value); } },
          h("div", { class: "fields" },
            field("Memory", this.text, "Such as 2GiB or 900MiB, for everything on the device."),
            field("From the least that serves to all experts", this.slider)),
          this.error, this.status),
        this.result));
  }

  async show() {
    if (!this.found) await this.ask("");
  }

  hide() {}

  slid() {
    const size = this.floor + (this.slider.value / STEPS) * (this.whole - this.floor);
    this.text.value = `${(size / MIB).toFixed(size < 100 * MIB ? 1 : 0)}MiB`;
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.ask(this.text.value), 120);
  }

  // Without a size: the service's own budget.
  async ask(memory) {
    const turn = ++this.turn;
    clearTimeout(this.timer);
    setText(this.status, "Planning.");
    try {
      const found = await call("GET", `/v1/plan${memory.trim() ? `?memory=${encodeURIComponent(memory.trim())}` : ""}`);
      if (turn !== this.turn) return;  // a later one is on its way
      this.take(found);
    } catch (error) {
      if (turn !== this.turn) return;
      setText(this.error, error.message);
      this.error.hidden = false;
      setText(this.status, "");
      replace(this.result);
    }
  }

  take(found) {
    this.error.hidden = true;
    const size = found.budget ?? found.whole_bytes;
    if (!this.found) this.range(found);
    this.found = found;
    const share = Math.round((STEPS * (size - this.floor)) / Math.max(1, this.whole - this.floor));
    if (document.activeElement !== this.slider) this.slider.value = Math.min(STEPS, Math.max(0, share));
    this.slider.setAttribute("aria-valuetext", bytes(size));
    if (!this.text.value) this.text.value = `${(size / MIB).toFixed(1)}MiB`;
    setText(this.status, `${found.slots} slots: ${found.slots_per_layer} of ${found.experts} experts a layer `
      + `(${percent(found.slots / (found.layers * found.experts))}).`);
    replace(this.result, h("div", { class: "card" }, tasksTable(found), doubtsList(found)), h("div", { class: "card" }, partsTable(found)),
      h("p", { class: "hint" }, `Load times: every expert of the task read at ${bytes(found.disk_bytes_per_second)}/s, measured on this disk. `
        + "As good at: a smaller size whose accuracy lies inside the interval; these items can't tell the two apart."));
  }

  range(found) {
    this.floor = Math.ceil((found.floor_bytes + 1) / MIB * 10) / 10 * MIB;
    this.whole = Math.ceil(found.whole_bytes / MIB) * MIB;
  }
}

function tasksTable(found) {
  const columns = [["Task"], ["Experts kept", true], ["Memory", true], ["Quality", true], ["Accuracy, 95%", true],
    ["Off its task", true], ["As good at", true], ["Load", true], ["Served by"]];
  const rows = found.tasks.map((each) => [named(each),
    percent(each.keep), bytes(each.bytes), percent(each.quality), each.keep === null ? null : accuracy(each),
    percent(each.others_quality), percent(each.as_good_keep), seconds(each.load_seconds),
    each.refusal ? h("span", { class: "error" }, each.refusal) : each.scorer]);
  if (rows.length === 0) return h("p", { class: "empty" }, "No task has a profile of this model yet.");
  return table("What fits of each task", columns, rows);
}

function doubtsList(found) {
  const doubts = found.tasks.flatMap((each) => each.doubts.map((doubt) => h("li", {}, `${each.task}: ${doubt}`)));
  return doubts.length > 0 && h("div", {}, h("h2", {}, "Doubts about profiles"), h("ul", { class: "doubts" }, doubts));
}

function partsTable(found) {
  const slots = found.slots * found.slot_bytes;
  const rows = PARTS.filter(([name]) => found[name] > 0).map(([name, label]) => part(label, found[name], found.total_bytes));
  return table("Where the bytes go", [["Part"], ["Bytes", true], ["Share"]], [...rows,
    part(`${found.slots} expert slots`, slots, found.total_bytes), part("in all", found.total_bytes, found.total_bytes)]);
}

function part(label, size, all) {
  return [label, bytes(size), h("meter", { min: "0", max: "1", value: String(size / all), "aria-label": `share of ${label}` })];
}
