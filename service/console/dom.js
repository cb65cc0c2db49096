// Elements from data. Text only ever becomes text: nothing here, or anywhere in the console, parses markup.

const SVG = "http://www.w3.org/2000/svg";

// h("p", { class: "hint", onclick: f, hidden: true }, "text", element, [more]) -> HTMLElement
export function h(tag, props = {}, ...children) {
  return fill(document.createElement(tag), props, children);
}

export function svg(tag, props = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), props, children);
}

function fill(element, props, children) {
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.flat(2).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export function replace(element, ...children) {
  element.replaceChildren(...children.flat(2).filter((child) => child !== null && child !== undefined && child !== false));
}

// A text that is only written where it changed: live regions are not read out again, selections survive.
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

let labels = 0;

// A control under its label.
export function field(label, control, hint) {
  control.id ||= `field-${++labels}`;
  const described = hint && h("small", { id: `${control.id}-hint`, class: "hint" }, hint);
  if (described) control.setAttribute("aria-describedby", described.id);
  return h("div", { class: "field" }, h("label", { for: control.id }, label), control, described);
}

export function options(select, entries, chosen) {
  const had = chosen ?? select.value;
  replace(select, entries.map(([value, text]) => h("option", { value }, text)));
  if (entries.some(([value]) => value === had)) select.value = had;
}

// columns: [heading, isNumber]; rows: arrays of texts or elements. A wide table scrolls by itself, never the page.
export function table(caption, columns, rows, { hideCaption = false } = {}) {
  const head = columns.map(([text, number]) => h("th", { scope: "col", class: number && "number" }, text));
  const body = rows.map((row) =>
    h("tr", {}, row.map((cell, at) =>
      at === 0
        ? h("th", { scope: "row" }, cell)
        : h("td", { class: columns[at][1] && "number" }, cell ?? "–"))));
  return h("div", { class: "scroll", role: "region", "aria-label": caption, tabindex: "0" },
    h("table", {},
      h("caption", { class: hideCaption && "unseen" }, caption),
      h("thead", {}, h("tr", {}, head)),
      h("tbody", {}, body)));
}

// Does something, and says in `place` what went wrong with it.
export async function attempt(place, action) {
  place.hidden = true;
  try {
    await action();
  } catch (error) {
    setText(place, error.message);
    place.hidden = false;
  }
}

// A question before something that can't be undone. Resolves to whether it was answered with yes.
export function confirm(question, yes) {
  return new Promise((resolve) => {
    let answer = false;
    const ok = h("button", { type: "submit", class: "danger" }, yes);
    const no = h("button", { type: "button", onclick: () => end(false) }, "Keep it");
    const text = h("p", { id: "question" }, question);
    const form = h("form", { onsubmit: (event) => { event.preventDefault(); end(true); } }, text,
      h("div", { class: "buttons" }, ok, no));
    const dialog = h("dialog", { "aria-labelledby": "question" }, form);
    function end(given) {
      answer = given;
      dialog.close();
    }
    dialog.addEventListener("close", () => {  // by then the focus is back where it was
      dialog.remove();
      resolve(answer);
    });
    document.body.append(dialog);
    dialog.showModal();
    no.focus();
  });
}
