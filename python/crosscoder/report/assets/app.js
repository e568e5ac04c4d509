// Puts the parts together: views by address, controls of the header, features after the first paint.
let routed = null;
function go(address) {
  location.hash = address;
  route(); // now, not at the event: what follows may focus something in the new view
}
function route() {
  const address = location.hash.slice(1);
  if (address === routed) return;
  routed = address;
  const feature = /^feature=(\d+)$/.exec(address);
  const inFeatures = Boolean(Store.features) && (address === "features" || feature !== null);
  byId("view-overview").hidden = inFeatures;
  byId("view-features").hidden = !inFeatures;
  document.body.classList.toggle("in-features", inFeatures);
  byId("tab-overview").toggleAttribute("aria-current", !inFeatures);
  byId("tab-features").toggleAttribute("aria-current", inFeatures);
  for (const id of ["tab-overview", "tab-features"]) {
    if (byId(id).hasAttribute("aria-current")) byId(id).setAttribute("aria-current", "page");
  }
  document.title = feature && inFeatures ? `Feature ${feature[1]} · ${Store.overview.title}` : Store.overview.title;
  if (Store.features) Browser.showFeature(inFeatures && feature ? Number(feature[1]) : null);
}

async function startFeatures() {
  try {
    await Store.load();
    await Browser.start();
  } catch (error) {
    Browser.fail(error.message);
  }
}

Theme.apply();
Axis.show();
byId("axis-log").addEventListener("click", () => Axis.set("log"));
byId("axis-linear").addEventListener("click", () => Axis.set("linear"));
byId("theme").addEventListener("click", Theme.toggle);
byId("help").addEventListener("click", Keyboard.showHelp);
byId("skip").addEventListener("click", (event) => {
  event.preventDefault(); // the address belongs to the views
  byId("main").focus();
});
Overview.render(byId("view-overview"));
if (Store.features) {
  byId("tab-features").hidden = false;
  Browser.render(byId("view-features"));
  // the blocks come after this script: the document must be complete, and painted first
  const begin = () => afterPaint().then(startFeatures);
  if (document.readyState === "loading") addEventListener("DOMContentLoaded", begin, { once: true });
  else begin();
}
addEventListener("hashchange", route);
Keyboard.start();
route();
