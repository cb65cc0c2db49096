// Which colours: the system's, unless the person chose. Runs before the first paint, so that nothing flashes.
"use strict";

(function () {
  const THEMES = ["auto", "light", "dark"];
  const NAME = "moepager.theme";

  function stored() {
    const found = localStorage.getItem(NAME);
    return THEMES.includes(found) ? found : "auto";
  }

  function apply(theme) {
    document.documentElement.dataset.theme = theme;
    document.dispatchEvent(new CustomEvent("theme", { detail: theme }));
  }

  window.moepagerTheme = {
    current: stored,
    next() {
      const theme = THEMES[(THEMES.indexOf(stored()) + 1) % THEMES.length];
      localStorage.setItem(NAME, theme);
      apply(theme);
      return theme;
    },
  };
  apply(stored());
})();
