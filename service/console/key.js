// The dialog in which a person enters the key. It is kept in this tab's sessionStorage and goes nowhere but to the service.

import { storeKey, storedKey } from "./api.js";
import { field, h } from "./dom.js";

export function askForKey(changed) {
  if (document.getElementById("key-dialog")) return;
  const input = h("input", { type: "password", id: "key-input", autocomplete: "off", spellcheck: "false" });
  const form = h("form", { onsubmit: (event) => { event.preventDefault(); end(input.value.trim()); } },
    h("h2", { id: "key-title" }, "API key"),
    h("p", { class: "hint" }, "Where the service has keys, every request needs one. It is kept in this tab until the tab is closed. "
      + "An operator's key may also start jobs, and create and delete tasks."),
    field("Key", input, storedKey() ? "A key is set; a new one replaces it." : "No key is set."),
    h("div", { class: "buttons" },
      h("button", { type: "submit", class: "primary" }, "Use this key"),
      storedKey() && h("button", { type: "button", class: "danger", onclick: () => end("") }, "Forget the key"),
      h("button", { type: "button", onclick: () => dialog.close() }, "Cancel")));
  const dialog = h("dialog", { id: "key-dialog", "aria-labelledby": "key-title" }, form);

  function end(key) {
    dialog.close();
    storeKey(key);
    changed();
  }
  dialog.addEventListener("close", () => dialog.remove());  // by then the focus is back where it was
  document.body.append(dialog);
  dialog.showModal();
  input.focus();
}
