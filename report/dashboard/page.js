// The script of the dashboard's page: the address, light and dark, tabs by click and key, and the chosen runs.
//
// It keeps what is chosen itself and tells the server the whole of it, so that neither a quick second click nor a list
// drawn anew loses the first. Dash calls the functions at the end by their names (see app.py).

(() => {
  const tell = (store, data) => window.dash_clientside.set_props(store, {data});
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  let chosen = [], looks = 0, cancels = 0, focused = null, asked = null, current = null;

  // --- The token that shows the server that a POST comes from this page, and not from another one ---

  const token = document.querySelector("meta[name=revprobe-token]").content, name = "X-Revprobe-Token";
  const plain = window.fetch;
  window.fetch = async (what, how = {}) => {
    const to = new URL(what.url ?? what, location.href), posts = (how.method ?? "GET").toUpperCase() === "POST";
    if (posts && to.origin === location.origin) {
      const headers = new Headers(how.headers);
      headers.set(name, token);
      how = {...how, headers};
    }
    const answer = await plain(what, how);
    if (answer.status === 403 && answer.headers.get(name) === "stale") location.reload();  // another server runs here now
    return answer;
  };

  // --- The chosen runs: one line of the list is a check box ---

  function choose(keys, on) {
    const others = chosen.filter((key) => !keys.includes(key));
    chosen = on ? [...chosen, ...keys.filter((key) => !chosen.includes(key))] : others;
    for (const line of all("[data-run]"))
      if (keys.includes(line.dataset.run)) line.setAttribute("aria-checked", String(on));
    tell("selected", [...chosen]);
  }
  document.addEventListener("focusin", ({target}) => { focused = target.closest("[data-run]")?.dataset.run ?? null; });
  const runsOf = (heading) => all("[data-run]", heading.closest(".sweep")).map((line) => line.dataset.run);

  // --- Tabs: by click, and by arrow keys, Home and End ---

  function openTab(name) {
    show(name);
    tell("tab", name);
  }
  function show(name) {
    for (const tab of all("[data-tab]")) {
      const open = tab.dataset.tab === name;
      tab.setAttribute("aria-selected", String(open));
      tab.tabIndex = open ? 0 : -1;
    }
    const opened = document.getElementById(`tab-${name}`).getAttribute("aria-controls");
    for (const panel of all("[role=tabpanel]")) panel.hidden = panel.id !== opened;
    document.getElementById(opened).setAttribute("aria-labelledby", `tab-${name}`);
    document.getElementById("chooser").hidden = name === "training";
    current = name;
    freshen();
  }
  // The instruments share a panel: until its own figure is there, a tab shows no other's.
  function freshen() {
    const drawn = document.querySelector("#instrument-said [data-for]");
    document.getElementById("panel-instrument").classList.toggle("stale", drawn?.dataset.for !== current);
  }
  function step(tab, key) {
    const tabs = all("[data-tab]"), at = tabs.indexOf(tab), last = tabs.length - 1;
    const to = {ArrowRight: at === last ? 0 : at + 1, ArrowLeft: at ? at - 1 : last, Home: 0, End: last}[key];
    if (to === undefined) return false;
    tabs[to].focus();
    openTab(tabs[to].dataset.tab);
    return true;
  }

  document.addEventListener("click", ({target}) => {
    const line = target.closest("[data-run]"), every = target.closest("[data-every]"), tab = target.closest("[data-tab]");
    if (line) choose([line.dataset.run], line.getAttribute("aria-checked") !== "true");
    if (every) choose(runsOf(every), every.dataset.every === "all");
    if (tab) openTab(tab.dataset.tab);
    const token = target.closest("[data-at]"), cancel = target.closest("[data-cancel]");
    if (token) {
      asked = token.dataset.at;
      window.dash_clientside.set_props("at", {value: asked});
      window.dash_clientside.set_props("edit", {value: "mask"});
    }
    if (cancel) tell("cancel", ++cancels);
  });
  document.addEventListener("keydown", (event) => {
    const tab = event.target.closest?.("[data-tab]");
    if (tab && step(tab, event.key)) event.preventDefault();
  });

  // --- Light and dark: chosen here, remembered by this browser, and known before anything is drawn ---

  const system = matchMedia("(prefers-color-scheme: dark)");
  let wish = "system";
  try { wish = localStorage.getItem("revprobe-theme") || wish; } catch { /* a browser may keep nothing */ }
  const dark = () => wish === "dark" || (wish !== "light" && system.matches);
  const dress = () => document.documentElement.classList.toggle("dark", dark());
  dress();
  system.addEventListener("change", () => { dress(); tell("theme", dark() ? "dark" : "light"); });

  // --- Dash's own controls, as a screen reader is to hear them ---

  // Their choices are native inputs in elements that say to be options of a nameless list box: the inputs are left to
  // speak for themselves, under the label that stands beside the control.
  const label = (id) => document.getElementById(`${id}-label`)?.textContent ?? "";
  function mend() {
    for (const option of all(".dash-options-list-option"))
      for (const name of ["role", "aria-selected"]) option.removeAttribute(name);
    for (const list of all("[role=listbox]")) {
      const window = list.closest("[role=dialog]");
      const words = label(window ? document.querySelector(`[aria-controls="${window.id}"]`)?.id : list.id) || "choices";
      list.setAttribute("role", list.querySelector("[type=radio]") ? "radiogroup" : "group");
      list.setAttribute("aria-label", words);
      window?.setAttribute("aria-label", words);
    }
    for (const stop of all(".dash-dropdown-focus-target[aria-hidden]")) {  // the keyboard's way into a list
      stop.removeAttribute("aria-hidden");
      stop.setAttribute("aria-label", label(stop.parentElement.querySelector("button")?.id) || "choices");
    }
    for (const button of all("button.dash-dropdown[id]")) {
      const told = button.getAttribute("aria-labelledby") ?? "", own = `${button.id}-label`;
      if (!told.includes(own)) button.setAttribute("aria-labelledby", `${own} ${told}`.trim());
    }
  }
  new MutationObserver(mend).observe(document.documentElement, {childList: true, subtree: true,
    attributeFilter: ["role", "aria-selected", "aria-labelledby"]});

  // --- What Dash calls ---

  window.dash_clientside = window.dash_clientside || {};
  const look = () => ({search: location.search, look: ++looks});
  addEventListener("popstate", () => tell("url", look()));
  let dressedBefore = false;
  window.dash_clientside.revprobe = {
    // The page has been opened: what its address asks for, and the theme that was chosen before.
    opened: () => {
      if (wish !== "system") window.dash_clientside.set_props("theme-choice", {value: wish});
      return look();
    },
    // A view was settled: the address says it; a step of the visitor's own can be gone back from.
    addressed: (address) => {
      if (address && address.search !== location.search)
        history[address.push ? "pushState" : "replaceState"](null, "", location.pathname + address.search);
      return window.dash_clientside.no_update;
    },
    dressed: (value) => {
      if (dressedBefore || value !== "system") {
        wish = value;
        try { localStorage.setItem("revprobe-theme", value); } catch { /* as above */ }
      }
      dressedBefore = true;
      dress();
      return dark() ? "dark" : "light";
    },
    shown: (view, filled) => {
      if (view) {
        chosen = [...view.runs];
        show(view.tab);
      }
      for (const tab of all("[aria-controls=panel-instrument]"))
        tab.classList.toggle("empty", !(filled ?? []).includes(tab.dataset.tab));
      return window.dash_clientside.no_update;
    },
    // This copy of the page, by a name that no other has: a later question of it takes the place of an earlier one.
    named: () => [...crypto.getRandomValues(new Uint32Array(4))].map((part) => part.toString(36)).join("-"),
    // An answer was drawn: the token that was chosen in the one before has the focus.
    answered: () => {
      setTimeout(() => {
        if (asked && document.activeElement === document.body)
          document.querySelector(`[data-at="${asked}"]`)?.focus({preventScroll: true});
        asked = null;
      }, 0);
      return window.dash_clientside.no_update;
    },
    // An instrument's figure was drawn.
    fresh: () => {
      setTimeout(freshen, 0);
      return window.dash_clientside.no_update;
    },
    // As high as a figure asks for, and as wide where it says so.
    sized: (figure) => {
      const {height, width} = figure?.layout ?? {};
      return {height: `${Math.round(height ?? 450)}px`, ...(width ? {width: `${Math.round(width)}px`} : {})};
    },
    // The list or the figure was drawn: a run's dot has the colour of its line, and the line that had the focus has it.
    dotted: (figure) => {
      const colours = figure?.layout?.meta?.colours ?? {};
      setTimeout(() => {
        for (const dot of all("[data-dot]")) dot.style.background = colours[dot.dataset.dot] ?? "";
        if (focused && document.activeElement === document.body)
          all("[data-run]").find((line) => line.dataset.run === focused)?.focus({preventScroll: true});
      }, 0);
      return window.dash_clientside.no_update;
    },
  };
})();
