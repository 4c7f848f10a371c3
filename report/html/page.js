// The script of a report's page: tabs, a checkpoint slider, selectors, light and dark.
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
const drawFigure = (id, {data, layout}) => draw(id, data, {width: byId(id).clientWidth, ...layout});

function unpacked(text, Kind) {
  const letters = atob(text), bytes = new Uint8Array(letters.length);
  for (let at = 0; at < letters.length; at++) bytes[at] = letters.charCodeAt(at);
  return new Kind(bytes.buffer);
}
const arrays = (about, name, Kind) => about["_" + name] ??= unpacked(about[name], Kind);

function rounded(number) {
  const text = number.toFixed(2);
  return text === "-0.00" ? "0.00" : text;
}
function interval(value, low, high, control) {
  if (value === null || Number.isNaN(value)) return "undefined";
  const known = (number) => number !== null && number !== undefined && !Number.isNaN(number);
  return rounded(value) + (known(low) && known(high) ? ` [${rounded(low)}, ${rounded(high)}]` : "")
    + (known(control) ? ` (control ${rounded(control)})` : "");
}

// --- Overview: the signatures over training, and which of them are shown ---

function showSeries() {
  const [view, length, run, against] = ["choose-weights", "choose-length", "choose-run", "choose-against"].map(chosen);
  const held = (tags) => against === "all" || !tags.against || tags.against === against;
  const agrees = (tags) => held(tags) && (tags.part === "key" || (view === "all" || tags.views.includes(view))
    && (length === "all" || tags.length === length) && (run === "all" || tags.run === run));
  const traces = byId("signatures").data, below = byId("signatures").layout.meta.below;
  const rows = Math.ceil(traces.filter((trace) => trace.showlegend && agrees(trace.meta)).length / below.columns);
  const bottom = below.axis + below.row * rows;
  return Plotly.update("signatures", {visible: traces.map((trace) => agrees(trace.meta))},
    {"margin.b": bottom, height: below.panels + bottom});
}
async function drawSignatures() {
  await drawFigure("signatures", keep("signatures"));
  if (byId("signatures").data[0]?.meta) await showSeries();
}

// --- Explorer: one checkpoint of one run, by layer and head (numbers as report/html/explorer.py packs them) ---

const UNDEFINED = -32768, FINE = 30000, COARSE = 100, UNMEASURED = -128, FIRST_REASON = -127;
const fine = (number) => number === UNDEFINED ? NaN : number / FINE;
const now = {run: null, step: null, series: null, layer: "all", head: "all"};
const data = () => keep(now.run);
const place = () => data().steps.indexOf(now.step) * data().series.length + data().series.indexOf(now.series);
const panel = (name) => structuredClone(keep("panels")[name]);
const heading = (layout, text) => { layout.title.text = text; return layout; };

// Where (layer, head) stands among everything, then layers, then heads, as far as the level goes.
function unit(about, level) {
  if (now.layer === "all" || level === "all") return 0;
  const layer = about.layers.indexOf(Number(now.layer));
  if (now.head === "all" || level === "layer") return 1 + layer;
  return 1 + about.layers.length + layer * about.heads.length + about.heads.indexOf(Number(now.head));
}
function words(about, level) {
  const heads = about.heads.length, every = heads * about.layers.length;
  if (now.layer === "all" || level === "all") return every > 1 ? `mean over ${every} heads` : "one head";
  if (now.head === "all" || level === "layer")
    return `layer ${now.layer}` + (heads > 1 ? `, mean over ${heads} heads` : "");
  return `layer ${now.layer}, head ${now.head}`;
}
function correlation(about, at, which) {
  const units = 1 + about.layers.length * (1 + about.heads.length), values = arrays(about, "values", Int16Array);
  return [0, 1, 2].map((number) => fine(values[(at * units + which) * 3 + number]));
}
const absent = "No reading at this checkpoint with these weights.";
const thousands = (number) => number.toLocaleString("en");
const whole = (what, title) => !title ? absent : what
  + ` ${interval(title.value, title.low, title.high, title.control)}, n = ${thousands(title.n)}`
  + (title.gone ? `; undefined: ${title.gone}` : "");

function drawHeads(about) {
  const [layers, heads] = [about.layers, about.heads], text = [];
  const z = layers.map((layer, row) => (text.push([]), heads.map((head, column) => {
    const numbers = correlation(about, place(), 1 + layers.length + row * heads.length + column);
    text[row].push(interval(...numbers));
    return Number.isNaN(numbers[0]) ? null : numbers[0];
  })));
  const layout = heading(panel("heads"), "Correlation by layer and head (click to choose)");
  if (now.layer !== "all") {
    const y = layers.indexOf(Number(now.layer)), x = heads.indexOf(Number(now.head));
    layout.shapes = [{type: "rect", x0: x < 0 ? -0.5 : x - 0.5, x1: x < 0 ? heads.length - 0.5 : x + 0.5,
      y0: y - 0.5, y1: y + 0.5, line: {color: look.ink, width: 2}}];
  }
  const trace = {type: "heatmap", x: heads.map(String), y: layers.map(String), z, text, hoverongaps: false,
    coloraxis: "coloraxis", hovertemplate: "layer %{y}, head %{x}: r = %{text}<extra></extra>"};
  return draw("heads", [trace], layout);
}
function stretches(list, holds) {
  const parts = [[]];
  for (const one of list) holds(one) ? parts.at(-1).push(one) : parts.push([]);
  return parts.filter((part) => part.length);
}
function drawCourse(about) {
  const at = data().series.indexOf(now.series), count = data().series.length;
  const numbers = data().steps.map((step, index) => correlation(about, index * count + at, unit(about, "head")));
  const x = data().positions, at_x = numbers.map((one, index) => [x[index], ...one]);
  const outline = {x: [], y: []};  // a polygon for each stretch without a gap: an undefined checkpoint stays one
  for (const part of stretches(at_x, ([, , low]) => !Number.isNaN(low))) {
    outline.x.push(...part.map((one) => one[0]), ...part.map((one) => one[0]).reverse(), null);
    outline.y.push(...part.map((one) => one[2]), ...part.map((one) => one[3]).reverse(), null);
  }
  const layout = heading(panel("course"), `Correlation over training: ${words(about, "head")}`);
  layout.xaxis = {...layout.xaxis, ...data().axis};
  layout.shapes = [{type: "line", yref: "paper", y0: 0, y1: 1, x0: x[data().steps.indexOf(now.step)],
    x1: x[data().steps.indexOf(now.step)], line: {color: look.grey, width: 1, dash: "dot"}}];
  const band = {...outline, mode: "lines", fill: "toself", fillcolor: look.band, line: {width: 0}, hoverinfo: "skip",
    showlegend: false};
  const hover = numbers.map((one, index) => `step ${thousands(data().steps[index])}: ${interval(...one)}`);
  const line = {x, y: numbers.map((one) => Number.isNaN(one[0]) ? null : one[0]), mode: "lines+markers",
    line: {color: look.forward, width: 2}, hovertext: hover, hoverinfo: "text", showlegend: false};
  return draw("course", [band, line], layout);
}
function drawDistances(about) {
  const maps = about.maps, cells = maps.cells, count = cells.offsets.length, level = maps.level;
  const units = level === "all" ? 1 : 1 + about.layers.length * (level === "layer" ? 1 : 1 + about.heads.length);
  const values = arrays(maps, "values", Int8Array), counts = arrays(maps, "counts", Int32Array);
  const [rows, columns] = [maps.forward, maps.reverse].map((axis) => new Map(axis.map((one, index) => [one, index])));
  const empty = () => maps.forward.map(() => maps.reverse.map(() => null));
  const [z, n, offsets, gone, reason] = [empty(), empty(), empty(), empty(), empty()];
  for (let cell = 0; cell < count; cell++) {
    const row = rows.get(cells.distance_forward[cell]), column = columns.get(cells.distance_reverse[cell]);
    const value = values[(place() * units + unit(about, level)) * count + cell];
    if (value === UNMEASURED) continue;
    if (value < -COARSE) { gone[row][column] = 0; reason[row][column] = maps.reasons[value - FIRST_REASON]; continue; }
    [z[row][column], n[row][column]] = [value / COARSE, counts[place() * count + cell]];
    offsets[row][column] = cells.offsets[cell];
  }
  const common = {type: "heatmap", x: maps.reverse.map(String), y: maps.forward.map(String), xgap: 1, ygap: 1,
    hoverongaps: false}, where = "forward distance %{y}, reverse distance %{x}<br>";
  const grey = {...common, z: gone, customdata: reason, showscale: false, colorscale: [[0, look.gone], [1, look.gone]],
    hovertemplate: where + "undefined: %{customdata}<extra></extra>"};
  const shown = {...common, z, customdata: n, text: offsets, coloraxis: "coloraxis", hovertemplate: where
    + "r = %{z:.2f}, n = %{customdata} pairs<br>offsets (forward, reverse): %{text}<extra></extra>"};
  if (Math.max(maps.forward.length, maps.reverse.length) <= 12)
    Object.assign(shown, {texttemplate: "%{z:.2f}", textfont: {size: 10}});
  return draw("distances", [grey, shown], heading(panel("distances"), `By distance: ${words(about, level)}`));
}
function drawScores(about) {
  const scores = about.scores, pairs = scores.pairs, count = pairs.pair.length, level = scores.level;
  const units = level === "all" ? 1 : 1 + about.layers.length * (level === "layer" ? 1 : 1 + about.heads.length);
  const values = arrays(scores, "values", Int16Array), at = place() * units + unit(about, level);
  const side = (which) => pairs.pair.map((_, index) => {
    const number = fine(values[(at * 2 + which) * count + index]);
    return Number.isNaN(number) ? null : number * scores.scale[at];
  });
  const [x, y] = [side(0), side(1)], defined = x.filter((one) => one !== null).length;
  const limit = 1.05 * scores.scale[at] || 1;
  const hover = pairs.pair.map((pair, index) => `fact ${scores.facts[pairs.fact[index]]}, pair ${pair}<br>`
    + `${words(about, level)}, step ${thousands(now.step)}, `
    + `distances ${pairs.distance_forward[index]} / ${pairs.distance_reverse[index]}`
    + (x[index] === null ? "" : `<br>score − group mean: ${x[index].toFixed(3)} / ${y[index].toFixed(3)}`));
  const [r, low, high] = correlation(about, place(), unit(about, level));
  const title = `Scores of single pairs: ${words(about, level)}<br>r = ${interval(r, low, high)}`;
  const layout = heading(panel("scores"), title);
  layout.xaxis.title.text = `forward score − group mean (${defined} pairs)`;
  layout.xaxis.range = [-limit, limit]; layout.yaxis.range = [-limit, limit];
  const diagonal = {x: [-limit, limit], y: [-limit, limit], mode: "lines", hoverinfo: "skip", showlegend: false,
    line: {color: look.grey, dash: "dot", width: 1}};
  const points = {x, y, mode: "markers", hovertext: hover, hoverinfo: "text", showlegend: false,
    marker: {size: 4, opacity: 0.55, color: look.forward}};
  return draw("scores", [diagonal, points], layout);
}
async function drawRouting() {
  const about = data().attention_correlation;
  for (const id of ["heads", "course", "distances", "scores"]) byId(id).hidden = !about;
  const title = about?.titles[place()];
  say("routing-said", !about ? "This run has no attention reading that can be drawn." : whole("All heads: r =", title));
  if (!about) return;
  byId("heads").hidden = about.layers.length * about.heads.length < 2;
  if (!byId("heads").hidden) await drawHeads(about);
  await drawCourse(about); await drawDistances(about); await drawScores(about);
}
const say = (id, text) => { byId(id).innerHTML = text; };  // every text from data in it was escaped when written

function cosine(about, at) {
  const values = arrays(about, "values", Int16Array), row = place() * about.role.length + at;
  return [0, 1, 2, 3].map((number) => fine(values[row * 4 + number]));
}
function drawRoles(about, layer) {
  const rows = about.role.map((role, at) => [role, at]).filter(([role, at]) => about.layer[at] === layer).reverse();
  const counts = arrays(about, "counts", Int32Array);
  const numbers = rows.map(([role, at]) => cosine(about, at)), known = (one) => Number.isNaN(one) ? null : one;
  const y = rows.map(([role, at]) => `${role} (n = ${thousands(counts[place() * about.role.length + at])})`);
  const control = {x: numbers.map((one) => known(one[3])), y, mode: "markers", name: "control (shuffled facts)",
    marker: {color: look.grey, symbol: "diamond-open", size: 9}, hoverinfo: "x+y+name"};
  const value = {x: numbers.map((one) => known(one[0])), y, mode: "markers", name: "forward and reverse gradient",
    marker: {color: look.forward, size: 9}, hovertext: numbers.map((one) => interval(...one)), hoverinfo: "y+text",
    error_x: {type: "data", symmetric: false, color: look.forward, array: numbers.map((one) => known(one[2] - one[0])),
      arrayminus: numbers.map((one) => known(one[0] - one[1]))}};
  const layout = heading(panel("roles"), `Cosine by role: ${layer === "all" ? "all layers" : "layer " + layer}`);
  layout.height = 170 + 32 * rows.length;
  return draw("roles", [control, value], layout);
}
function drawRoleMap(about) {
  const unique = (list) => [...new Set(list)].filter((one) => one !== "all");
  const layers = unique(about.layer), roles = unique(about.role), text = layers.map(() => roles.map(() => ""));
  const z = layers.map(() => roles.map(() => null));
  about.role.forEach((role, at) => {
    const row = layers.indexOf(about.layer[at]), column = roles.indexOf(role);
    if (row < 0 || column < 0) return;
    const numbers = cosine(about, at);
    z[row][column] = Number.isNaN(numbers[0]) ? null : numbers[0];
    text[row][column] = interval(...numbers);
  });
  const trace = {type: "heatmap", x: roles, y: layers, z, text, hoverongaps: false, coloraxis: "coloraxis",
    hovertemplate: "layer %{y}, %{x}: cosine %{text}<extra></extra>"};
  return draw("role-map", [trace], heading(panel("role-map"), "Cosine by layer and role"));
}
async function drawGradients() {
  const about = data().gradient_cosine;
  for (const id of ["roles", "role-map"]) byId(id).hidden = !about;
  const title = about?.titles[place()];
  say("gradients-said",
    !about ? "This run has no gradient reading that can be drawn." : whole("All parameters: cosine", title));
  if (!about) return;
  await drawRoles(about, about.layer.includes(now.layer) ? now.layer : "all");
  await drawRoleMap(about);
}
async function drawProbability() {
  const about = data().reverse_probability;
  byId("shares").hidden = !about;
  const title = about?.titles[place()];
  say("probability-said", !about ? "This run has no probability reading that can be drawn." : !title ? absent : "");
  if (!about) return;
  const shares = arrays(about, "shares", Int16Array), bins = keep("panels").bins;
  const curves = [["forward", look.forward, "solid"], ["reverse", look.reverse, "solid"],
    ["control (reverse, shuffled facts)", look.grey, "dash"]];
  const x = Array.from({length: bins + 1}, (_, index) => index / bins);
  const traces = curves.map(([name, color, dash], row) => {
    const y = x.map((_, index) => fine(shares[(place() * 3 + row) * bins + Math.min(index, bins - 1)]));
    const [mean, hits] = ["probability", "accuracy"].map((what) => title?.measures[`${name}_${what}`]);
    const said = mean ? `: mean ${interval(mean[0], mean[1], mean[2])}, accuracy ${(100 * hits[0]).toFixed(1)} %` : "";
    const hover = y.map((part, index) => `${(Math.min(index, bins - 1) / bins).toFixed(2)} to `
      + `${((Math.min(index, bins - 1) + 1) / bins).toFixed(2)}: ${(100 * part).toFixed(1)} %`);
    return {x, y, mode: "lines", name: name + said, line: {color, dash, width: 2, shape: "hv"}, hovertext: hover,
      hoverinfo: "name+text"};
  });
  const layout = heading(panel("shares"), `Probability of the target, step ${thousands(now.step)}`);
  layout.yaxis.title.text = `share of pairs (n = ${title ? thousands(title.n) : 0})`;
  await draw("shares", title ? traces : [], layout);
}

// --- Choices: selectors, tabs, light and dark, and one drawing after the other ---

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
function dress(wanted) {
  dark = wanted;
  document.documentElement.classList.toggle("dark", dark);
  byId("choose-theme").textContent = dark ? "Light theme" : "Dark theme";
}
const everyTab = () => [...document.querySelectorAll("[role=tab]")].map((button) => button.dataset.tab);
function stepTab(event) {  // by arrow keys, Home and End
  const tabs = everyTab(), at = tabs.indexOf(event.target.dataset.tab), last = tabs.length - 1;
  const to = {ArrowRight: at === last ? 0 : at + 1, ArrowLeft: at ? at - 1 : last, Home: 0, End: last}[event.key];
  if (to === undefined) return;
  event.preventDefault();
  document.querySelector(`[data-tab=${tabs[to]}]`).focus();
  openTab(tabs[to]);
}
function listen(id, change, names, event = "change") {
  if (byId(id)) byId(id).addEventListener(event, () => { change(); redraw(names); });
}
function start() {
  dress(matchMedia("(prefers-color-scheme: dark)").matches);
  byId("choose-theme").addEventListener("click", () => { dress(!dark); redraw(everyTab()); });
  for (const button of document.querySelectorAll("[role=tab]")) {
    button.addEventListener("click", () => openTab(button.dataset.tab));
    button.addEventListener("keydown", stepTab);
  }
  for (const id of ["choose-weights", "choose-length", "choose-run", "choose-against"])
    if (byId(id)) byId(id).addEventListener("change", showSeries);
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
    Plotly.newPlot("heads", [], {}, CONFIG).then((plot) => plot.on("plotly_click", ({points: [point]}) => {
      byId("explore-layer").value = now.layer = String(point.y); chooseHead();
      byId("explore-head").value = now.head = String(point.x); redraw(three);
    }));
  }
  everyTab().forEach((name) => stale.add(name));
  const asked = location.hash.slice(1);
  openTab(everyTab().includes(asked) ? asked : "overview");
}
addEventListener("beforeprint", showAll);
let width = innerWidth;
addEventListener("resize", () => {
  if (width !== innerWidth) redraw(everyTab());
  width = innerWidth;
});
start();
