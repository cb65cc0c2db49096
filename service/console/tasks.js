// Tasks: what serves each, its evidence and curves, and for operators making, profiling and deleting them.

import { call } from "./api.js";
import { chart } from "./chart.js";
import { confirm, h, replace, setText, table } from "./dom.js";
import { bytes, fixed, percent } from "./format.js";
import { NewTask } from "./new_task.js";

const BASELINES = ["random", "frequency"];
const NEW = " new";  // no task's name begins with a space

export class Tasks {
  constructor() {
    this.error = h("p", { class: "error", role: "alert", hidden: true });
    this.said = h("p", { class: "hint", role: "status" });
    this.list = h("div", { class: "card" });
    this.detail = h("div", { class: "stack" });
    this.form = new NewTask((name) => { location.hash = `#/tasks/${encodeURIComponent(name)}`; });
    this.newer = h("a", { href: `#/tasks/${encodeURIComponent(NEW)}` }, "New task");
    this.why = h("span", { class: "hint" }, "New tasks are made by operators.");
    this.element = h("section", { "aria-labelledby": "tasks-title" },
      h("div", { class: "head" },
        h("div", {}, h("h1", { id: "tasks-title" }, "Tasks"),
          h("p", { class: "lead" }, "What each task is served from, and what was measured of it on held-out text.")),
        h("div", { class: "buttons" }, this.newer, this.why)),
      this.error, this.said, h("div", { class: "stack" }, this.detail, this.list));
  }

  async show(rest, session) {
    this.session = session;
    this.newer.hidden = !session.operator;
    this.why.hidden = session.operator;
    await this.refresh(rest);
  }

  hide() {}

  async refresh(rest) {
    try {
      this.found = await call("GET", "/v1/tasks");
      this.budget = await call("GET", "/v1/residency");
      this.error.hidden = true;
    } catch (error) {
      this.fail(error);
      return;
    }
    setText(this.said, "");
    this.showList(rest);
    this.showDetail(rest);
  }

  fail(error) {
    setText(this.error, error.message);
    this.error.hidden = false;
  }

  showList(chosen) {
    const rows = this.found.tasks.map((task) => {
      const served = task.evidence.find((each) => each.selection === task.serves);
      return [named(task), served ? served.scorer : "exact only", served && percent(served.keep),
        served && bytes(served.bytes), served && accuracy(served), served && percent(served.coverage)];
    });
    const waiting = this.found.without_profile.map(({ task }) => [link(task), "no profile yet", null, null, null, null]);
    const columns = [["Task"], ["Served by"], ["Experts kept", true], ["Memory", true], ["Accuracy", true], ["Coverage", true]];
    const body = table("All tasks", columns, [...rows, ...waiting]);
    for (const each of body.querySelectorAll("tbody tr")) {
      if (each.querySelector("a").textContent === chosen) each.classList.add("chosen");
    }
    const none = rows.length + waiting.length === 0;
    replace(this.list, none ? h("p", { class: "empty" }, "No task yet. An operator makes one here, or `moepager profile` does.") : body);
  }

  showDetail(name) {
    if (name === NEW) {
      if (this.session.operator) this.form.show(this.detail);
      else replace(this.detail, h("p", { class: "card" }, "New tasks are made by operators; this key may only query."));
      return;
    }
    if (!name) {
      replace(this.detail);
      return;
    }
    const task = this.found.tasks.find((each) => each.task === name);
    const waiting = this.found.without_profile.find((each) => each.task === name);
    if (!task && !waiting) replace(this.detail, h("p", { class: "card" }, `There is no task named ${name}.`));
    else replace(this.detail, h("div", { class: "card" }, this.title(task ?? waiting), task ? this.remarks(task) : NOT_YET()),
      task?.evidence.length > 0 && [this.curves(task), h("div", { class: "card" }, evidenceTable(task))]);
  }

  title(task) {
    const operator = this.session.operator;
    return h("div", { class: "head" },
      h("div", {}, h("h2", { class: "clip" }, task.task), h("p", { class: "clip" }, task.description || h("span", { class: "hint" }, "No description."))),
      operator
        ? h("div", { class: "buttons" },
          task.serves && h("button", { type: "button", onclick: () => this.prefetch(task.task) }, "Page it in"),
          task.has_text && h("button", { type: "button", onclick: () => this.profile(task.task) }, "Profile it"),
          h("button", { type: "button", class: "danger", onclick: () => this.remove(task.task) }, "Delete"))
        : h("span", { class: "hint" }, "Paging in, profiling and deleting are for operators."));
  }

  remarks(task) {
    const served = task.evidence.find((each) => each.selection === task.serves);
    const doubts = [...task.doubts, ...doubtsOf(task, served)];
    return [
      task.refusal && h("p", { class: "error" }, task.refusal),
      served && h("p", {}, `Served from ${served.experts} experts, ${bytes(served.bytes)}, chosen by ${served.scorer}.`),
      task.trust && h("p", { class: "hint" }, trusted(task.trust)),
      doubts.length > 0 && h("div", {}, h("h3", {}, "Doubts"),
        h("ul", { class: "doubts" }, doubts.map((text) => h("li", {}, text)))),
      served && doubts.length === 0 && h("p", { class: "good" }, "Nothing in its profile or its evidence speaks against it."),
    ].flat().filter(Boolean);
  }

  curves(task) {
    const scorers = new Map();
    for (const each of task.evidence) {
      if (each.accuracy === null) continue;
      const points = scorers.get(each.scorer) ?? scorers.set(each.scorer, []).get(each.scorer);
      points.push({ x: each.bytes, y: each.accuracy, low: each.low, high: each.high,
        title: `${each.scorer}, ${percent(each.keep)} of the experts: ${accuracy(each)} of ${each.items} items` });
    }
    const series = [...scorers].map(([name, points]) => ({ name, points }));
    series.sort((a, b) => BASELINES.includes(a.name) - BASELINES.includes(b.name) || a.name.localeCompare(b.name));
    const marks = [{ x: this.budget.slots * this.budget.slot_bytes, name: "slots of this service" }];
    const whole = task.evidence.find((each) => each.full_accuracy !== null)?.full_accuracy;
    if (whole !== undefined) marks.push({ y: whole, name: `whole model ${percent(whole)}` });
    return h("div", { class: "card" }, h("h2", {}, "Accuracy over memory"),
      series.length > 0
        ? chart(`Accuracy of ${task.task} over the memory of its experts, one line for each scorer`, series, marks)
        : h("p", { class: "empty" }, "The evaluation has no accuracy: its items have no answers to compare with."),
      h("p", { class: "hint" }, "Bars are 95% intervals of the accuracy, over items and, where there are any, draws of the "
        + "calibration text. random and frequency are baselines."));
  }

  async prefetch(name) {
    this.tell("Paging its experts in.");
    try {
      const found = await call("POST", "/v1/residency/prefetch", { task: name });
      this.tell(`${found.experts_paged} of its ${found.experts} experts were read, ${bytes(found.bytes_paged)}; all are in memory.`);
    } catch (error) {
      this.tell("");
      this.fail(error);
    }
  }

  tell(text) {
    this.error.hidden = true;
    setText(this.said, text);
  }

  async profile(name) {
    try {
      await call("POST", "/v1/jobs", { task: name });
      location.hash = "#/jobs";
    } catch (error) {
      this.fail(error);
    }
  }

  async remove(name) {
    if (!(await confirm(`Delete the task ${name}, with its text, its profiles and its evidence? This can't be undone.`, "Delete it"))) return;
    try {
      await call("DELETE", `/v1/tasks/${encodeURIComponent(name)}`);
      location.hash = "#/tasks";
    } catch (error) {
      this.fail(error);
    }
  }
}

const NOT_YET = () => h("p", { class: "hint" }, "Its text is stored; it has no profile of this model. Profile it, and it is in service.");

export function link(name) {
  return h("a", { href: `#/tasks/${encodeURIComponent(name)}`, class: "clip" }, name);
}

export function accuracy(each) {
  if (each.accuracy === null) return "–";
  return `${percent(each.accuracy)} (${percent(each.low, 0)}–${percent(each.high, 0)})`;
}

// A task's link, and beside it whether the profiler doubted its profile: the words are on the task's own page.
export function named(task) {
  if (task.doubts.length === 0) return link(task.task);
  return h("span", {}, link(task.task), " ", h("span", { class: "tag warn", title: task.doubts.join("\n") }, "in doubt"));
}

function trusted(trust) {
  const halves = trust.agreement === null ? "one half of the text is empty" : `two halves of the text agree on ${percent(trust.agreement, 0)} of the experts`;
  const surprise = trust.surprise === null ? "" : `; the model's surprise at it is ${trust.surprise.toFixed(1)} nats a token against even odds`;
  return `The profile's text gave an expert ${trust.tokens_per_expert.toFixed(0)} tokens on the average, and ${percent(trust.unseen)} of them none; `
    + `routing is ${trust.skew.toFixed(1)} times as uneven as chance (${trust.least_skew.toFixed(1)} in the most even layer); ${halves}${surprise}.`;
}

// What the numbers themselves say against a selection.
function doubtsOf(task, served) {
  const found = [];
  if (!served) return found;
  if (served.items < 30) found.push(`Only ${served.items} held-out items were measured; the interval is wide.`);
  if (served.high !== null && served.full_accuracy !== null && served.high < served.full_accuracy) {
    found.push(`It is worse than the whole model (${percent(served.full_accuracy)}), beyond what chance explains.`);
  }
  for (const base of task.evidence.filter((each) => BASELINES.includes(each.scorer) && each.keep === served.keep && served.keep < 1)) {
    if (base.accuracy !== null && served.accuracy !== null && base.accuracy >= served.accuracy) {
      found.push(`At this size the baseline ${base.scorer} is as good (${percent(base.accuracy)}).`);
    }
  }
  return found;
}

// Of a selection with which a token calls fewer experts than the model would; nothing of any other.
function called(each) {
  return each.calls ? `, ${percent(each.active)} of the calls (${each.calls_by})` : "";
}

function evidenceTable(task) {
  const columns = [["Scorer"], ["Experts kept", true], ["Memory", true], ["Accuracy, 95%", true], ["Of the whole", true],
    ["NLL", true], ["Coverage", true], ["Off its task", true], ["Items", true], ["Draws", true], ["Fits"]];
  const rows = task.evidence.map((each) => [
    each.scorer + called(each) + (each.selection === task.serves ? " (serves)" : ""), percent(each.keep), bytes(each.bytes), accuracy(each),
    percent(each.retention), fixed(each.nll, 3), percent(each.coverage), percent(each.others_quality),
    String(each.items), String(each.draws), each.fits ? "yes" : "no"]);
  return table("Evidence", columns, rows);
}
