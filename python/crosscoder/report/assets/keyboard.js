// Keys that work anywhere on the page, and the help that lists them.
const Keyboard = (() => {
  const KEYS = [
    ["/", "search"], ["j  k  or  ↓  ↑", "next and previous feature"], ["Enter", "open the feature"], ["Esc", "close the panel; leave the search"],
    ["l", "log or linear step axis"], ["d", "dark or light"], ["o  f", "overview, features"], ["?", "this help"],
  ];

  function showHelp() {
    const dialog = byId("help-dialog");
    dialog.replaceChildren(
      el("header", {}, el("h2", { id: "help-title" }, "Keyboard"), el("button", { type: "button", class: "icon", "aria-label": "Close", on: { click: () => dialog.close() } }, "×")),
      el("dl", { class: "keys" }, KEYS.map(([keys, meaning]) => el("div", {},
        el("dt", {}, keys.split("  ").map((key) => (key === "or" ? " or " : el("kbd", {}, key)))), el("dd", {}, meaning)))),
      el("h3", {}, "Searching"),
      el("p", {}, "A number finds features whose number begins with it. Text is looked for in the top contexts, across token borders, without regard to case. Quotes keep spaces and digits: ", el("code", {}, '" the"'), ", ", el("code", {}, '"1863"'), "."),
      el("p", { class: "muted" }, "The log axis is log(1 + step), so that step 0 has a place. Click a bar of “When features emerge” to list its features; click a curve to open its feature. This file is complete: it asks the network for nothing."));
    dialog.showModal();
  }

  const isTyping = (target) => target.matches?.("input, select, textarea");
  function onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented || document.querySelector("dialog[open]")) return;
    const inFeatures = !byId("view-features").hidden;
    if (event.key === "Escape") {
      if (event.target.id === "search") {
        if (event.target.value) Browser.clearSearch();
        else Browser.focusList();
      } else if (inFeatures && Browser.isOpen()) Browser.close();
      else return;
    } else if (event.target.id === "search" && (event.key === "Enter" || event.key === "ArrowDown")) {
      Browser.focusList();
      if (event.key === "Enter") Browser.openCursor();
    } else if (isTyping(event.target)) return;
    else if (!act(event.key, inFeatures, event)) return;
    event.preventDefault();
  }

  function act(key, inFeatures, event) {
    switch (key) {
      case "?": showHelp(); return true;
      case "l": Axis.toggle(); return true;
      case "d": Theme.toggle(); return true;
      case "o": go("overview"); return true;
    }
    if (!Store.features) return false;
    if (key === "f") go("features");
    else if (key === "/") {
      if (!inFeatures) go("features");
      Browser.focusSearch();
    } else if (inFeatures && (key === "j" || key === "ArrowDown")) {
      if (key === "ArrowDown" && event.target.closest?.("#panel")) return false; // scrolls the panel
      Browser.moveBy(1);
    } else if (inFeatures && (key === "k" || key === "ArrowUp")) {
      if (key === "ArrowUp" && event.target.closest?.("#panel")) return false;
      Browser.moveBy(-1);
    } else if (inFeatures && key === "Enter" && !event.target.closest?.("button, a, summary")) Browser.openCursor();
    else return false;
    return true;
  }
  return { showHelp, start: () => addEventListener("keydown", onKey) };
})();
