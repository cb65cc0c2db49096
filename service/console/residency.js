// What the device holds now: every expert of every layer, or every slot, coloured by state or by a task's selection.

import { Poll, call } from "./api.js";
import { field, h, options, replace, setText } from "./dom.js";
import { bytes, count } from "./format.js";
import { ExpertMap, cellText, kindsOf } from "./map.js";

const LOOK_MS = 1000;

export class Residency {
  constructor() {
    this.poll = new Poll(() => this.look(), () => LOOK_MS, (error) => this.fail(error));
    this.paused = false;
    this.selections = { changes: null, tasks: {} };
    this.map = new ExpertMap((cell) => this.showCell(cell));
    this.buildControls();
    this.figures = h("dl", { class: "figures" });
    this.legend = h("ul", { class: "legend", "aria-label": "Legend" });
    this.cell = h("p", { class: "cell", "aria-live": "polite" }, "");
    this.error = h("p", { class: "error", role: "alert", hidden: true });
    this.summary = h("p", { class: "unseen", id: "map-summary" });
    this.element = h("section", { "aria-labelledby": "residency-title" },
      h("div", { class: "head" },
        h("div", {}, h("h1", { id: "residency-title" }, "Residency"),
          h("p", { class: "lead" }, "Which experts lie in device memory now. Any slot may hold any expert of any layer.")),
        h("div", { class: "buttons" }, this.pause, this.evict)),
      this.error,
      h("div", { class: "stack" },
        h("div", { class: "card" }, this.figures),
        h("div", { class: "card" }, this.controls, this.legend,
          h("div", { class: "map" }, this.map.canvas), this.summary, this.cell)));
  }

  buildControls() {
    this.colours = h("select", { onchange: () => this.draw() });
    this.order = h("select", { onchange: () => this.draw() },
      h("option", { value: "experts" }, "layers × experts"), h("option", { value: "slots" }, "slots of the bank"));
    this.controls = h("div", { class: "fields" }, field("Coloured by", this.colours), field("Laid out as", this.order));
    this.pause = h("button", { type: "button", "aria-pressed": "false", onclick: () => this.toggle() }, "Pause");
    this.evict = h("button", { type: "button", onclick: () => this.forget() }, "Evict what is idle");
  }

  show(_rest, session) {
    this.evict.disabled = !session.operator;
    this.evict.title = session.operator ? "The next query of every task is then served cold" : "For operators";
    if (!this.paused) this.poll.start();
    this.map.listen();
  }

  hide() {
    this.poll.stop();
    this.map.deafen();
  }

  toggle() {
    this.paused = !this.paused;
    this.pause.setAttribute("aria-pressed", String(this.paused));
    setText(this.pause, this.paused ? "Paused" : "Pause");
    if (this.paused) this.poll.stop();
    else this.poll.start();
  }

  async forget() {
    try {
      const { evicted } = await call("DELETE", "/v1/residency");
      await this.look();
      setText(this.cell, `${evicted} experts evicted.`);
    } catch (error) {
      this.fail(error);
    }
  }

  async look() {
    const found = await call("GET", "/v1/residency?experts=true");
    if (found.changes !== this.selections.changes) {
      this.selections = await call("GET", "/v1/residency/selections");
      const tasks = Object.keys(this.selections.tasks).map((name) => [`=${name}`, `selection of ${name}`]);
      options(this.colours, [["state", "state"], ["shared", "how many tasks keep it"], ...tasks]);
    }
    this.found = found;
    this.error.hidden = true;
    this.draw();
  }

  fail(error) {
    setText(this.error, error.message);
    this.error.hidden = false;
  }

  draw() {
    if (!this.found) return;
    const chosen = this.colours.value;
    const task = chosen.startsWith("=") ? this.selections.tasks[chosen.slice(1)] : undefined;
    const kinds = kindsOf(this.found, this.selections.tasks, chosen, task);
    this.map.draw(this.found, kinds, this.order.value);
    this.showFigures();
    this.showLegend(kinds);
    this.map.retell();
  }

  showFigures() {
    const found = this.found;
    const rows = [
      ["Resident", `${count(found.resident)} of ${count(found.slots)} slots`],
      ["Leased now", count(found.leased)],
      ["Expert bytes", bytes(found.resident * found.slot_bytes)],
      ["Budget", found.budget === null ? "no limit" : bytes(found.budget)],
    ];
    if (found.bytes_read !== null) {  // the service's whole work is not told to a key that is limited to tasks
      rows.push(["Paged in so far", `${count(found.experts_paged)} experts`], ["Read so far", bytes(found.bytes_read)],
        ["Time in reads", `${found.paging_seconds.toFixed(2)} s`]);
    }
    if (this.figures.childElementCount !== rows.length) {
      replace(this.figures, rows.map(([name]) => h("div", {}, h("dt", {}, name), h("dd", {}))));
    }
    this.figures.querySelectorAll("dd").forEach((cell, at) => setText(cell, rows[at][1]));
    setText(this.summary, `Map of ${found.table.length} layers by ${found.table[0].length} experts: ${found.resident} resident, `
      + `${found.leased} leased. Arrow keys move through it.`);
  }

  showLegend(kinds) {
    const rows = kinds.legend.map((kind) => [kind, `${kind.name}: ${count(kinds.counts[kind.id] ?? 0)}`]);
    const key = rows.map(([kind]) => kind.id).join(" ");
    if (this.legendKey !== key + this.map.theme) {
      this.legendKey = key + this.map.theme;
      replace(this.legend, rows.map(([kind]) => h("li", {}, this.map.swatch(kind), h("span", {}))));
    }
    this.legend.querySelectorAll("span").forEach((cell, at) => setText(cell, rows[at][1]));
  }

  showCell(cell) {
    setText(this.cell, cell === null || !this.found ? "" : cellText(cell, this.found, this.selections.tasks));
  }
}
