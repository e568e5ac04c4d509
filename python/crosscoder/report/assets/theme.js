// Light or dark: the reader's choice if there is one, else the system's. Runs in the head, before anything is painted.
const Theme = (() => {
  const KEY = "crosscoder-theme";
  const system = matchMedia("(prefers-color-scheme: dark)");
  const stored = () => {
    try {
      return localStorage.getItem(KEY);
    } catch {
      return null; // storage is off: the choice lasts as long as the page
    }
  };
  let choice = stored();
  const isDark = () => (choice ? choice === "dark" : system.matches);
  const apply = () => {
    document.documentElement.dataset.theme = isDark() ? "dark" : "light";
    document.getElementById("theme")?.setAttribute("aria-pressed", String(isDark()));
  };
  system.addEventListener("change", apply);
  apply();
  return {
    apply,
    toggle() {
      choice = isDark() ? "light" : "dark";
      try {
        localStorage.setItem(KEY, choice);
      } catch {
        // as above
      }
      apply();
    },
  };
})();
