// The routes of this service, out of its own OpenAPI description: what each is for, its fields, and a call to copy.

import { call } from "./api.js";
import { field, h, replace, setText, table } from "./dom.js";

const TAGS = ["query", "openai", "tasks", "jobs", "proposals", "residency", "plan", "health", "console"];  // the rest follow
const METHODS = ["get", "post", "put", "patch", "delete"];

export class Reference {
  constructor() {
    this.error = h("p", { class: "error", role: "alert", hidden: true });
    this.filter = h("input", { type: "search", autocomplete: "off", spellcheck: "false", oninput: () => this.narrow() });
    this.count = h("p", { class: "hint", role: "status" });
    this.list = h("div", { class: "stack" });
    this.element = h("section", { "aria-labelledby": "api-title" },
      h("div", { class: "head" },
        h("div", {}, h("h1", { id: "api-title" }, "API"),
          h("p", { class: "lead" }, "Every route of this service. Machines read ", h("code", {}, "/openapi.json"), "."))),
      this.error, h("div", { class: "card" }, field("Find a route or a field", this.filter), this.count), this.list);
  }

  async show() {
    if (this.operations) return;
    try {
      this.found = await call("GET", "/openapi.json");
    } catch (error) {
      setText(this.error, error.message);
      this.error.hidden = false;
      return;
    }
    this.error.hidden = true;
    this.operations = operationsOf(this.found);
    this.build();
    this.narrow();
  }

  hide() {}

  build() {
    const tags = [...new Set([...TAGS, ...this.operations.map((each) => each.tag)])];
    this.groups = tags.map((tag) => {
      const own = this.operations.filter((each) => each.tag === tag);
      for (const each of own) each.element = this.operation(each);
      return { own, element: h("div", { class: "card" }, h("h2", {}, tag), own.map((each) => each.element)) };
    });
    replace(this.list, this.groups.map((group) => group.element));
  }

  operation(each) {
    const body = h("div", { class: "operation" });
    const details = h("details", {},
      h("summary", {}, h("span", { class: `method ${each.method}` }, each.method.toUpperCase()), " ", h("code", { class: "path" }, each.path),
        each.operators && h("span", { class: "tag" }, "for operators")),
      body);
    details.addEventListener("toggle", () => {
      if (details.open && !body.childElementCount) replace(body, this.told(each));
    });
    return details;
  }

  told(each) {
    const parts = [h("p", {}, withCode(each.description || "No more is said of it."))];
    if (each.parameters.length > 0) parts.push(fieldsTable("Parameters", each.parameters));
    for (const [name, fields] of each.bodies) parts.push(fieldsTable(`Fields of ${name}`, fields));
    parts.push(h("p", { class: "hint" }, `Answers: ${each.answers.join(", ")}. A refusal is {"error": {"message", "type", "param", "code"}}.`),
      h("pre", { tabindex: "0", "aria-label": "A call" }, h("code", {}, curl(each))));
    return parts;
  }

  narrow() {
    if (!this.groups) return;
    const wanted = this.filter.value.trim().toLowerCase();
    let shown = 0;
    for (const group of this.groups) {
      for (const each of group.own) {
        each.element.hidden = !each.words.includes(wanted);
        shown += each.element.hidden ? 0 : 1;
      }
      group.element.hidden = group.own.every((each) => each.element.hidden);
    }
    setText(this.count, `${shown} of ${this.operations.length} routes`);
  }
}

// What stands between backticks as code.
function withCode(text) {
  return text.split("`").map((part, at) => (at % 2 ? h("code", {}, part) : part));
}

export function operationsOf(description) {
  const found = [];
  for (const [path, item] of Object.entries(description.paths)) {
    for (const method of METHODS.filter((name) => item[name])) found.push(operationOf(path, method, item[method], description));
  }
  return found;
}

function operationOf(path, method, given, description) {
  const parameters = (given.parameters ?? []).map((each) =>
    ({ name: each.name, where: each.in, required: each.required, schema: each.schema, description: each.description }));
  const schema = given.requestBody?.content?.["application/json"]?.schema;
  const form = given.requestBody?.content?.["multipart/form-data"]?.schema;
  const bodies = form ? [["Form", fieldsOf(form)]] : schema ? bodiesOf(schema, description) : [];
  const answers = Object.entries(given.responses).filter(([, each]) => each.content).map(([status, each]) =>
    `${status} (${Object.keys(each.content).join(" or ")})`);
  const names = [...parameters, ...bodies.flatMap(([, fields]) => fields)].map((each) => each.name);
  return { path, method, parameters, bodies, form: form !== undefined, answers, tag: given.tags?.[0] ?? "more", description: given.description ?? "",
    operators: given["x-operators-only"] === true,
    words: [method, path, given.description ?? "", ...names].join(" ").toLowerCase() };
}

// The body's own fields, and those of every body inside it: [name, fields] in the order in which they are met.
function bodiesOf(schema, description) {
  const met = new Map();
  const visit = (each) => {
    if (!each || typeof each !== "object") return;
    if (each.$ref) {
      const name = each.$ref.split("/").pop();
      if (met.has(name)) return;
      const inner = description.components.schemas[name];
      met.set(name, fieldsOf(inner));
      visit(inner);
      return;
    }
    for (const inner of [...Object.values(each.properties ?? {}), ...(each.anyOf ?? []), ...(each.oneOf ?? []), each.items]) visit(inner);
  };
  visit(schema);
  return [...met].filter(([, fields]) => fields.length > 0);
}

function fieldsOf(schema) {
  return Object.entries(schema.properties ?? {}).map(([name, each]) =>
    ({ name, required: schema.required?.includes(name) ?? false, schema: each, description: each.description }));
}

function fieldsTable(caption, fields) {
  const told = fields.some((each) => each.description);
  const rows = fields.map((each) => [h("span", {}, h("code", {}, each.name), each.where ? ` in the ${each.where}` : ""), kindOf(each.schema),
    each.required ? "required" : defaultOf(each.schema), ...(told ? [each.description] : [])]);
  return table(caption, [["Name"], ["What it is"], ["Without it"], ...(told ? [["What for"]] : [])], rows);
}

function defaultOf(schema) {
  return schema.default === undefined || schema.default === null ? "left out" : JSON.stringify(schema.default);
}

const LARGEST = 2 ** 31;  // limits above are those of the machine's numbers
const LIMITS = [["exclusiveMinimum", ">"], ["minimum", "≥"], ["exclusiveMaximum", "<"], ["maximum", "≤"]];

// A schema in words: "number > 0 ≤ 1", "list of Message, 1 or more".
export function kindOf(schema) {
  if (schema.$ref) return schema.$ref.split("/").pop();
  const several = (schema.anyOf ?? schema.oneOf)?.filter((each) => each.type !== "null");
  if (several) return several.map(kindOf).join(" or ");
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((each) => JSON.stringify(each)).join(" or ");
  const limits = LIMITS.filter(([name]) => Math.abs(schema[name]) < LARGEST).map(([name, sign]) => ` ${sign} ${schema[name]}`).join("");
  if (schema.type === "array") return `list of ${kindOf(schema.items ?? {})}${lengthOf(schema.minItems, schema.maxItems)}`;
  if (schema.format === "binary") return "file";
  if (schema.type === "string") return `text${lengthOf(schema.minLength > 1 ? schema.minLength : undefined, schema.maxLength)}`;
  return `${schema.type ?? "anything"}${limits}`;
}

function lengthOf(least, most) {
  if (least && most) return `, ${least} to ${most}`;
  return least ? `, ${least} or more` : most ? `, at most ${most}` : "";
}

// With the fields that must be there, each of the plainest kind.
function curl(each) {
  const path = each.path.replace(/{(\w+)}/g, (_, name) => name.toUpperCase());
  const words = [`curl ${each.method === "get" ? "" : `-X ${each.method.toUpperCase()} `}${location.origin}${path}`,
    "  -H 'authorization: Bearer KEY'"];
  if (each.form) {
    const fields = each.bodies[0][1].filter(({ required, schema }) => required || schema.format === "binary");
    words.push(...fields.map(({ name, schema }) => `  -F ${name}=${schema.format === "binary" ? `@${name}` : "text"}`));
  } else if (each.bodies.length > 0) {
    words.push("  -H 'content-type: application/json'", `  -d '${JSON.stringify(sample(each.bodies[0][1], new Map(each.bodies)))}'`);
  }
  return words.join(" \\\n");
}

function sample(fields, bodies) {
  return Object.fromEntries(fields.filter((each) => each.required).map((each) => [each.name, valueOf(each.schema, bodies)]));
}

function valueOf(schema, bodies) {
  if (schema.$ref) return sample(bodies.get(schema.$ref.split("/").pop()) ?? [], bodies);
  const one = (schema.anyOf ?? schema.oneOf)?.[0];
  if (one) return valueOf(one, bodies);
  if (schema.const !== undefined) return schema.const;
  if (schema.enum) return schema.enum.includes("user") ? "user" : schema.enum[0];
  if (schema.type === "array") return schema.items ? [valueOf(schema.items, bodies)] : [];
  if (schema.type === "integer" || schema.type === "number") return schema.minimum ?? 1;
  if (schema.type === "boolean") return false;
  return schema.type === "object" ? {} : "...";
}
