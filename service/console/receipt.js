// A receipt as a table that people read: every field that the service sent, those it is asked for most with words of their own.

import { bytes, count, fixed, milliseconds, percent } from "./format.js";
import { h } from "./dom.js";

const REASONS = {
  pinned: "named in the request",
  retrieved: "retrieved by the query",
  session: "kept from the conversation",
  "below-threshold": "no task was near enough",
  "no-tasks": "no task has a profile yet",
  "no-text": "exact, and no text of the user's to retrieve by",
};

const ROWS = [
  ["task", "Task", (r) => r.task ?? "none"],
  ["reason", "Why this task", (r) => reasonOf(r.reason)],
  ["similarity", "Similarity", (r) => fixed(r.similarity, 3)],
  ["served_task", "Profile of", (r) => r.served_task ?? "none: every expert was within reach"],
  ["mode", "Mode", (r) => r.mode],
  ["escalated", "Escalated", (r) => (r.escalated ? escalation(r.escalated) : "no")],
  ["keep", "Experts kept", (r) => percent(r.keep)],
  ["scorer", "Scorer", (r) => r.scorer ?? "–"],
  ["stand_in", "Stands in for the rest", (r) => r.stand_in || "nothing"],
  ["active", "Calls of experts made", (r) => percent(r.active)],
  ["calls", "Calls in each layer", (r) => (r.calls ? r.calls.join(" ") : "as many as the model's own")],
  ["coverage", "Coverage", (r) => percent(r.coverage)],
  ["level", "Lowest level", (r) => percent(r.level)],
  ["guard", "Guard", (r) => (r.guard ? `bound ${percent(r.guard.bound)}, from ${r.guard.items} items` : "none")],
  ["experts", "Experts leased", (r) => count(r.experts)],
  ["experts_paged", "Experts paged in", (r) => count(r.experts_paged)],
  ["bytes_paged", "Bytes paged in", (r) => bytes(r.bytes_paged)],
  ["predicted_bytes", "Bytes predicted", (r) => bytes(r.predicted_bytes)],
  ["swap_ms", "Swap", (r) => milliseconds(r.swap_ms)],
  ["predicted_swap_ms", "Swap predicted", (r) => milliseconds(r.predicted_swap_ms)],
  ["queue_ms", "In the queue", (r) => milliseconds(r.queue_ms)],
  ["ttft_ms", "First token after", (r) => milliseconds(r.ttft_ms)],
  ["resident_bytes", "Resident", (r) => bytes(r.resident_bytes)],
  ["prompt_tokens", "Prompt tokens", (r) => count(r.prompt_tokens)],
  ["completion_tokens", "Answer tokens", (r) => count(r.completion_tokens)],
  ["priority", "Priority", (r) => r.priority],
  ["model", "Model", (r) => r.model],
  ["profile_id", "Profile", (r) => r.profile_id ?? "–"],
  ["selection", "Selection", (r) => r.selection ?? "–"],
  ["ignored", "Ignored fields", (r) => r.ignored.join(", ") || "none"],
  ["doubts", "Doubts about the profile", (r) => r.doubts.join(" ") || "none"],  // sentences: a line of their own, the last
];

export function reasonOf(reason) {
  return REASONS[reason] ?? reason;
}

export function receiptList(receipt) {
  const known = ROWS.filter(([name]) => name in receipt).map(([name, label, show]) => row(name, label, show(receipt)));
  const names = new Set(ROWS.map(([name]) => name));
  const others = Object.entries(receipt).filter(([name]) => !names.has(name));
  const rest = others.map(([name, value]) =>
    row(name, name.replaceAll("_", " "), typeof value === "string" ? value : JSON.stringify(value)));
  const wide = known.filter((each) => each.dataset.field === "doubts");
  return h("dl", {}, known.filter((each) => !wide.includes(each)), rest, wide);
}

function escalation({ at_token, coverage, bound }) {
  return `routed freely from token ${at_token} on: level ${percent(coverage)} under ${percent(bound)}`;
}

function row(name, label, text) {
  return h("div", { "data-field": name }, h("dt", {}, label), h("dd", {}, text));
}
