// The script of a report's page: tabs, a checkpoint slider, selectors, the address of a view, light and dark.
//
// It draws what stands in the page as JSON and asks nobody for anything. A panel is drawn when its tab is first opened
// and again when a choice changes what it shows.

// --- Basics: data out of the page, colours, drawing, numbers as text ---

const CONFIG = {displaylogo: false, displayModeBar: "hover", responsive: true, showSendToCloud: false,
  modeBarButtonsToRemove: ["select2d", "lasso2d"]};
const byId = (id) => document.getElementById(id);
const held = {};
const figure = (id) => JSON.parse(byId(id + "-data").textContent);
const keep = (id) => held[id] ??= figure(id);
const chosen = (id) => byId(id) ? byId(id).value : "all";
const look = keep("look");
let dark = false;

// Colours that ink and paper decide are swapped in the dark; the others keep their meaning.
function dressed(value) {
  if (typeof value === "string") return dark && look.swap[value] || value;
  if (Array.isArray(value)) return value.length > 50 && typeof value[0] !== "object" ? value : value.map(dressed);
  if (value && typeof value === "object" && !ArrayBuffer.isView(value))
    return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, dressed(inner)]));
  return value;
}
const draw = (id, traces, layout) => Plotly.react(id, dressed(traces),
  {...dressed(layout), template: dark ? look.dark : look.light}, CONFIG);
// As wide as its place, unless it says how wide: plotly alone would keep the first width of a figure that has a height.
const drawFigure = (id, {data, layout}) => draw(id, data, fitted({width: byId(id).clientWidth, ...layout},
  byId(id).clientWidth));
// The layout in a place of so many pixels, where the figure says what it changes there (training_curves.py).
function fitted(layout, room) {
  if (!layout.meta?.below) return layout;
  const {below, narrow} = layout.meta, columns = Math.max(1, Math.floor((room - below.beside) / below.entry));
  if (room >= narrow.below) return {...layout, meta: {...layout.meta, below: {...below, columns}}};
  const inner = (name, change) => Array.isArray(change) ? layout[name].map((one, at) => ({...one, ...change[at]}))
    : {...layout[name], ...change, title: {...layout[name].title, ...change.title}};
  const changed = Object.entries(narrow.layout).map(([name, change]) => [name, inner(name, change)]);
  const meta = {...layout.meta, below: {...below, columns, panels: narrow.panels}};
  return {...layout, ...Object.fromEntries(changed), meta};
}

function unpacked(text, Kind) {
  const letters = atob(text), bytes = new Uint8Array(letters.length);
  for (let at = 0; at < letters.length; at++) bytes[at] = letters.charCodeAt(at);
  return new Kind(bytes.buffer);
}
const arrays = (about, name, Kind) => about["_" + name] ??= unpacked(about[name], Kind);

// As `interval_text` in probes/figures/theme.py writes them.
const SMALL = 1e-3, NOISE = 1e-16, ONE_IN_A_MILLION = 1e-4;
function rounded(number, digits = 2) {
  const text = number.toFixed(digits);
  return Number(text) === 0 ? text.replace("-", "") : text;
}
function power(number, digits) {
  if (Math.abs(number) <= NOISE) return "0";
  return Math.abs(number) < SMALL ? number.toExponential(digits) : rounded(number, Math.abs(number) < 0.01 ? 3 : 2);
}
// An end in per cent that would read as 0 or 100 and is not has the digits that say so.
function notWhole(number, text) {
  const reads = Math.abs(Number(text));
  const told = Array.from({length: 14}, (_, at) => rounded(number, at + 1));
  if (Math.min(Math.abs(number), Math.abs(100 - Math.abs(number))) < ONE_IN_A_MILLION) return text;
  if (reads === 0) return told.find((one) => Number(one));
  return reads === 100 && Math.abs(number) < 100 ? told.find((one) => Math.abs(one) < 100) ?? text : text;
}
const known = (number) => number !== null && number !== undefined && !Number.isNaN(number);
function interval(value, low, high, control, percent = false) {
  if (!known(value)) return "undefined";
  if (percent) [value, low, high, control] = [value, low, high, control].map((one) => known(one) ? 100 * one : one);
  const reach = Math.max(...[value, low, high].filter(known).map(Math.abs)), small = NOISE < reach && reach < SMALL;
  const text = small ? power : rounded, least = small || percent ? 1 : 2, most = 16;
  // The digits that tell the ends apart; a number by itself shows one that is not zero.
  const first = (fits) => { for (let n = least; n < most; n++) if (fits(n)) return n; };
  const apart = known(low) && low < high ? first((n) => text(low, n) !== text(high, n)) : undefined;
  const digits = apart ?? (first((n) => small || value === 0 || Number(text(value, n))) ?? least);
  const plain = [value, low, high].map((one) => known(one) ? text(one, digits) : ""), told = [...plain];
  if (percent && !small) {
    if (apart) [low, high].forEach((one, at) => told[at + 1] = notWhole(one, plain[at + 1]));
    // The value keeps its digits but where it would read as lying outside of such an end, or has no interval.
    if (!apart || told[1] !== plain[1] || told[2] !== plain[2]) told[0] = notWhole(value, plain[0]);
  }
  const beside = known(control) ? ` (control ${text(control, digits)})` : "";
  return told[0] + (apart ? ` [${told[1]}, ${told[2]}]` : "") + beside;
}

// --- Overview: the signatures over training, and which of them are shown ---

const AXES = ["length", "run", "model", "task", "variant"];  // what a choice shows the lines of; a page has some
function showSeries() {
  const [view, against] = ["choose-weights", "choose-against"].map(chosen);
  const wanted = AXES.map((axis) => [axis, chosen("choose-" + axis)]);
  const held = (tags) => against === "all" || !tags.against || tags.against === against;
  const agrees = (tags) => held(tags) && (tags.part === "key" || (view === "all" || tags.views.includes(view))
    && wanted.every(([axis, value]) => value === "all" || tags[axis] === value));
  const traces = byId("signatures").data, below = byId("signatures").layout.meta.below;
  const rows = Math.ceil(traces.filter((trace) => trace.showlegend && agrees(trace.meta)).length / below.columns);
  const bottom = below.axis + below.row * rows, ends = limits(agrees);
  // Crosses stand at the foot of their panel, wherever that is.
  const foot = ([low, high]) => low + 0.03 * (high - low);
  const y = keep("signatures").data.map(({y, yaxis, meta}) =>
    meta.part === "undefined" && ends[yaxis] ? y.map(() => foot(ends[yaxis])) : y);
  const ranges = Object.entries(ends).map(([axis, end]) => [axis.replace("y", "yaxis") + ".range", end]);
  return Plotly.update("signatures", {visible: traces.map((trace) => agrees(trace.meta)), y},
    {"margin.b": bottom, height: below.panels + bottom, ...Object.fromEntries(ranges)});
}
function limits(agrees) {  // of each panel's axis: what is shown fills it, whatever else the figure could show
  const numbers = {};
  for (const {y, yaxis, meta} of keep("signatures").data)
    if (agrees(meta) && !["undefined", "key"].includes(meta.part)) (numbers[yaxis] ??= []).push(...y);
  return Object.fromEntries(Object.entries(numbers).map(([axis, of]) => [axis, reach(of)]));
}
async function drawSignatures() {
  await drawFigure("signatures", keep("signatures"));
  if (byId("signatures").data[0]?.meta) await showSeries();
}

// --- Choices: selectors, tabs, and one drawing after the other ---

function fill(id, values, names, wanted) {
  const select = byId(id);
  select.replaceChildren(...values.map((value, index) => new Option(names[index], value)));
  select.value = values.map(String).includes(String(wanted)) ? wanted : values[0];
  select.disabled = values.length < 2;
  return select.value;
}
function chooseRun() {
  now.run = chosen("explore-run");
  const steps = data().steps, layers = data().attention_correlation?.layers
    ?? [...new Set(data().gradient_cosine?.layer ?? [])].filter((one) => one !== "all" && one !== "none");
  // Another run at the same checkpoint and weights, where it has them: so runs compare.
  now.series = fill("explore-series", data().series, data().names, now.series);
  const slider = byId("explore-step"), same = steps.indexOf(now.step);
  slider.max = steps.length - 1; slider.value = same < 0 ? steps.length - 1 : same;
  slider.disabled = steps.length < 2;
  now.layer = fill("explore-layer", ["all", ...layers], ["all", ...layers], now.layer);
  say("explored-said", data().notes.join("; "));
  chooseHead();
  chooseStep();
}
function chooseHead() {
  const heads = now.layer === "all" ? [] : data().attention_correlation?.heads ?? [];
  const every = now.layer === "all" ? "all (choose a layer first)" : "all";
  now.head = fill("explore-head", ["all", ...heads], [every, ...heads], now.head);
}
function chooseClicked({points: [point]}) {
  byId("explore-layer").value = now.layer = String(point.y);
  chooseHead();
  byId("explore-head").value = now.head = String(point.x);
  redraw(Object.keys(DRAWERS));
  settle();
}
function chooseStep() {
  now.step = data().steps[Number(byId("explore-step").value)];
  byId("explore-step-shown").textContent = thousands(now.step);
}
const DRAWERS = {routing: drawRouting, gradients: drawGradients, probability: drawProbability};
const stale = new Set();
let opened = "overview", drawing = Promise.resolve();

async function drawTab(name) {
  if (!stale.delete(name)) return;
  const tab = byId("tab-" + name);
  if (DRAWERS[name] && byId("explore")) await DRAWERS[name]();
  if (tab.contains(byId("signatures"))) await drawSignatures();
  for (const one of tab.querySelectorAll("div.drawn")) await drawFigure(one.id, keep(one.id));
  for (const one of tab.querySelectorAll("div.gallery")) await drawFigure(one.id, keep(chosen(one.dataset.choice)));
}
// One drawing after the other: a slider asks faster than plotly draws, and what nobody waits for any more is skipped.
let asked = 0;
function redraw(names) {
  names.forEach((name) => stale.add(name));
  const mine = ++asked;
  delete document.body.dataset.drawn;
  drawing = drawing.then(async () => {
    if (mine === asked) await drawTab(opened);
    if (mine === asked) document.body.dataset.drawn = "yes";
  }).catch((error) => { console.error(error); document.body.dataset.drawn = "failed"; });
  return drawing;
}
function openTab(name) {
  opened = name;
  for (const button of document.querySelectorAll("[role=tab]")) {
    button.setAttribute("aria-selected", String(button.dataset.tab === name));
    button.tabIndex = button.dataset.tab === name ? 0 : -1;  // one stop for all tabs; arrow keys lead on from it
  }
  for (const tab of document.querySelectorAll("[role=tabpanel]")) tab.hidden = tab.id !== "tab-" + name;
  if (byId("explore")) byId("explore").hidden = !(name in DRAWERS);
  return redraw([]);
}
async function showAll() {  // for printing and pictures: every tab under each other
  if (byId("explore")) byId("explore").hidden = false;
  for (const tab of document.querySelectorAll("[role=tabpanel]")) {
    tab.hidden = false;
    await drawTab(tab.id.slice(4));
  }
}
const everyTab = () => [...document.querySelectorAll("[role=tab]")].map((button) => button.dataset.tab);
function stepTab(event) {  // by arrow keys, Home and End
  const tabs = everyTab(), at = tabs.indexOf(event.target.dataset.tab), last = tabs.length - 1;
  const to = {ArrowRight: at === last ? 0 : at + 1, ArrowLeft: at ? at - 1 : last, Home: 0, End: last}[event.key];
  if (to === undefined) return;
  event.preventDefault();
  document.querySelector(`[data-tab=${tabs[to]}]`).focus();
  go(tabs[to]);
}
function go(name) {  // as the reader asks: the address says it, so that the browser leads back
  openTab(name);
  settle();
}
// A slider is drawn while it moves, and the address says where it stopped.
function listen(id, change, names, event = "change") {
  if (!byId(id)) return;
  byId(id).addEventListener(event, () => { change(); redraw(names); });
  byId(id).addEventListener("change", () => settle(event === "input" ? id : null));
}

// --- The address: what is chosen stands behind its #, so that a view can be linked, reloaded and gone back to ---

// By the names in the address, each after those that decide what it can be.
const GALLERIES = [...document.querySelectorAll("div.gallery")].map((one) => one.id.slice("gallery-".length));
const CHOICES = {weights: "choose-weights", length: "choose-length", shown: "choose-run", controls: "choose-against",
  model: "choose-model", task: "choose-task", variant: "choose-variant", run: "explore-run", series: "explore-series",
  layer: "explore-layer", head: "explore-head", ...Object.fromEntries(GALLERIES.map((name) => [name, "choose-" + name]))};
// These stand in the address by their words: their values are places in a list, and the next report's may be longer.
const BY_WORDS = ["run", ...GALLERIES];
const LONGEST = 10000;  // letters of an address that are read
let usual = {};

const inAddress = (name, option) => BY_WORDS.includes(name) ? option.text : option.value;
function selection() {
  const found = {tab: opened};
  for (const [name, id] of Object.entries(CHOICES))
    if (byId(id)?.selectedOptions.length) found[name] = inAddress(name, byId(id).selectedOptions[0]);
  if (byId("explore")) found.step = String(now.step);
  return found;
}
function wished() {
  const said = location.hash.slice(1, LONGEST), part = said.startsWith("section-") && byId(decoded(said));
  if (part) return {tab: part.closest("[role=tabpanel]")?.id.slice(4)};
  return everyTab().includes(said) ? {tab: said} : Object.fromEntries(new URLSearchParams(said));
}
function decoded(text) {
  try { return decodeURIComponent(text); } catch { return text; }
}
// What the address asks for and the page has; all else is as usual.
function take() {
  const wish = {...usual, ...wished()}, choose = (name) => {
    const options = [...byId(CHOICES[name])?.options ?? []];
    const of = (text) => options.find((option) => inAddress(name, option) === text);
    const found = of(wish[name]) ?? of(usual[name]);
    if (found) byId(CHOICES[name]).value = found.value;
  };
  Object.keys(CHOICES).filter((name) => !["series", "layer", "head"].includes(name)).forEach(choose);
  if (byId("explore")) {
    Object.assign(now, {step: Number(wish.step), series: wish.series, layer: wish.layer, head: wish.head});
    chooseRun();
  }
  everyTab().forEach((name) => stale.add(name));
  return openTab(everyTab().includes(wish.tab) ? wish.tab : usual.tab);
}
const unusual = () => Object.entries(selection()).filter(([name, value]) => value !== usual[name]);
function settle(by = null) {
  const address = String(new URLSearchParams(unusual()));
  if (address === location.hash.slice(1)) return;
  const again = by && history.state?.by === by;  // steps of one slider are one step back
  write(again ? "replaceState" : "pushState", {by}, address);
}
function write(how, state, address) {
  const here = location.href.split("#")[0] + (address && "#" + address);
  try { history[how](state, "", here); } catch { /* a page in a frame may have none */ }
}
function arrive() {
  take();
  const part = location.hash.startsWith("#section-") && byId(decoded(location.hash.slice(1)));
  if (part) drawing.then(() => part.scrollIntoView());
  else write("replaceState", history.state, String(new URLSearchParams(unusual())));
}

// --- Light and dark: as the system, or as chosen here, which this browser keeps ---

const system = matchMedia("(prefers-color-scheme: dark)");
const themes = [...document.querySelectorAll("[name=theme]")];
function keptTheme() {
  try { return localStorage.getItem("revprobe-theme"); } catch { return null; }  // a browser may keep nothing
}
function dress() {
  const wish = themes.find((one) => one.checked).value;
  dark = wish === "dark" || (wish === "system" && system.matches);
  document.documentElement.classList.toggle("dark", dark);
  for (const dot of document.querySelectorAll("[data-dot]")) {
    const colour = keep("colours")[dot.dataset.dot];
    dot.hidden = !colour;
    dot.style.background = dressed(colour ?? "");
  }
}
function chooseTheme() {
  const wish = themes.find((one) => one.checked).value;
  try { localStorage.setItem("revprobe-theme", wish); } catch { /* as above */ }
  dress();
  redraw(everyTab());
}

// --- The beginning ---

function start() {
  (themes.find((one) => one.value === keptTheme()) ?? themes[0]).checked = true;
  dress();
  themes.forEach((one) => one.addEventListener("change", chooseTheme));
  system.addEventListener("change", () => { dress(); redraw(everyTab()); });
  for (const button of document.querySelectorAll("[role=tab]")) {
    button.addEventListener("click", () => go(button.dataset.tab));
    button.addEventListener("keydown", stepTab);
  }
  for (const name of ["weights", "against", ...AXES])
    byId("choose-" + name)?.addEventListener("change", () => { showSeries(); settle(); });
  for (const one of document.querySelectorAll("div.gallery"))
    listen(one.dataset.choice, () => {}, [one.closest("[role=tabpanel]").id.slice(4)]);
  if (byId("explore")) {
    const three = Object.keys(DRAWERS);
    chooseRun();
    listen("explore-run", chooseRun, three);
    listen("explore-series", () => { now.series = chosen("explore-series"); }, three);
    listen("explore-step", chooseStep, three, "input");
    listen("explore-layer", () => { now.layer = chosen("explore-layer"); chooseHead(); }, three);
    listen("explore-head", () => { now.head = chosen("explore-head"); }, three);
    if (byId("heads")) Plotly.newPlot("heads", [], {}, CONFIG).then((plot) => plot.on("plotly_click", chooseClicked));
  }
  usual = selection();
  arrive();
  addEventListener("popstate", arrive);
}
addEventListener("beforeprint", showAll);
let width = innerWidth;
addEventListener("resize", () => {
  if (width !== innerWidth) redraw(everyTab());
  width = innerWidth;
});
start();
