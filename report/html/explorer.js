// What a report's page draws of one checkpoint of one run, by layer and head. It stands in the page before page.js,
// whose basics it uses when it is called. Numbers are as report/html/explorer.py packs them.

const HALVED = 880, GAP = 16;  // pixels: room for two panels beside each other, and what is between them
const UNDEFINED = -32768, FINE = 30000, COARSE = 100, UNMEASURED = -128, FIRST_REASON = -127;
const fine = (number) => number === UNDEFINED ? NaN : number / FINE;
const now = {run: null, step: null, series: null, layer: "all", head: "all"};
const data = () => keep(now.run);
const place = () => data().steps.indexOf(now.step) * data().series.length + data().series.indexOf(now.series);
// A panel's layout, half as wide as its place where that leaves room for titles and scales.
function panel(name) {
  const place = byId(name).parentElement, two = place.children.length > 1 && place.clientWidth >= HALVED;
  return {...structuredClone(keep("panels")[name]), width: two ? (place.clientWidth - GAP) / 2 | 0 : place.clientWidth};
}
// Limits of an axis, as theme.py's `reach`: small differences are seen, and zero with them.
function reach(numbers, least = 0.2) {
  const known = numbers.filter((one) => Number.isFinite(one));
  let low = Math.floor(Math.min(0, ...known) * 10 + 1e-6) / 10, high = Math.ceil(Math.max(0, ...known) * 10 - 1e-6) / 10;
  if (high - low < least) -low > high ? low = high - least : high = low + least;
  const air = 0.04 * (high - low);
  return [low - air, high + air];
}
// A map's colours as far as any checkpoint of the run reaches, the same on both sides of zero; its ends are printed.
function colours(layout, numbers) {
  const most = Math.max(0.1, ...numbers.filter((one) => Number.isFinite(one)).map(Math.abs));
  const end = Math.min(1, Math.ceil(most * 10 - 1e-6) / 10), ticks = [-end, -end / 2, 0, end / 2, end];
  Object.assign(layout.coloraxis, {cmin: -end, cmax: end});
  const bar = layout.coloraxis.colorbar;
  layout.coloraxis.colorbar = {...bar, tickvals: ticks, ticktext: ticks.map((one) => String(Number(one.toFixed(2))))};
  return layout;
}
const everyStep = () => data().steps.map((_, index) => index * data().series.length
  + data().series.indexOf(now.series));
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
  + ` ${interval(title.value, title.low, title.high, title.control)}, ${title.sample}`
  + (title.gone ? `; undefined: ${title.gone}` : "");

function drawHeads(about) {
  const [layers, heads] = [about.layers, about.heads], text = [];
  const z = layers.map((layer, row) => (text.push([]), heads.map((head, column) => {
    const numbers = correlation(about, place(), 1 + layers.length + row * heads.length + column);
    text[row].push(interval(...numbers));
    return Number.isNaN(numbers[0]) ? null : numbers[0];
  })));
  const all = everyStep().flatMap((at) => layers.flatMap((_, row) => heads.map((_, column) =>
    correlation(about, at, 1 + layers.length + row * heads.length + column)[0])));
  const layout = colours(heading(panel("heads"), "Correlation by layer and head (click to choose)"), all);
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
  const numbers = everyStep().map((at) => correlation(about, at, unit(about, "head")));
  const control = everyStep().map((at) => about.titles[at]?.control ?? null);
  const x = data().positions, at_x = numbers.map((one, index) => [x[index], ...one]);
  const outline = {x: [], y: []};  // a polygon for each stretch without a gap: an undefined checkpoint stays one
  for (const part of stretches(at_x, ([, , low]) => !Number.isNaN(low))) {
    outline.x.push(...part.map((one) => one[0]), ...part.map((one) => one[0]).reverse(), null);
    outline.y.push(...part.map((one) => one[2]), ...part.map((one) => one[3]).reverse(), null);
  }
  const layout = heading(panel("course"), `Correlation over training: ${words(about, "head")}`);
  layout.xaxis = {...layout.xaxis, ...data().axis};
  layout.yaxis.range = reach([...numbers.flat(), ...control]);
  layout.shapes = [{type: "line", yref: "paper", y0: 0, y1: 1, x0: x[data().steps.indexOf(now.step)],
    x1: x[data().steps.indexOf(now.step)], line: {color: look.grey, width: 1, dash: "dot"}}];
  const band = {...outline, mode: "lines", fill: "toself", fillcolor: look.band, line: {width: 0}, hoverinfo: "skip",
    showlegend: false};
  const hover = numbers.map((one, index) => `step ${thousands(data().steps[index])}: ${interval(...one)}`);
  const line = {x, y: numbers.map((one) => Number.isNaN(one[0]) ? null : one[0]), mode: "lines+markers",
    name: "forward and reverse score", line: {color: look.forward, width: 2}, hovertext: hover, hoverinfo: "text"};
  const beside = {x, y: control, mode: "lines", name: "control (shuffled facts, all heads)", hoverinfo: "y+name",
    line: {color: look.grey, width: 1.5, dash: "dash"}};
  return draw("course", [band, line, beside], layout);
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
    Object.assign(shown, {texttemplate: "%{z:.2f}", textfont: {size: 11, color: look.cell}});
  const every = everyStep().flatMap((at) => [...values.subarray((at * units + unit(about, level)) * count,
    (at * units + unit(about, level) + 1) * count)]).filter((one) => one >= -COARSE).map((one) => one / COARSE);
  const layout = colours(heading(panel("distances"), `By distance: ${words(about, level)}`), every);
  return draw("distances", [grey, shown], layout);
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

function cosine(about, at, where = place()) {
  const values = arrays(about, "values", Int16Array), row = where * about.role.length + at;
  return [0, 1, 2, 3].map((number) => fine(values[row * 4 + number]));
}
function drawRoles(about, layer) {
  const rows = about.role.map((role, at) => [role, at]).filter(([role, at]) => about.layer[at] === layer).reverse();
  const counts = arrays(about, "counts", Int32Array);
  const numbers = rows.map(([role, at]) => cosine(about, at)), known = (one) => Number.isNaN(one) ? null : one;
  const y = rows.map(([role, at]) => `${role} (${thousands(counts[place() * about.role.length + at])} pairs)`);
  const control = {x: numbers.map((one) => known(one[3])), y, mode: "markers", name: "control (shuffled facts)",
    marker: {color: look.grey, symbol: "diamond-open", size: 9}, hoverinfo: "x+y+name"};
  const value = {x: numbers.map((one) => known(one[0])), y, mode: "markers", name: "forward and reverse gradient",
    marker: {color: look.forward, size: 9}, hovertext: numbers.map((one) => interval(...one)), hoverinfo: "y+text",
    error_x: {type: "data", symmetric: false, color: look.forward, array: numbers.map((one) => known(one[2] - one[0])),
      arrayminus: numbers.map((one) => known(one[0] - one[1]))}};
  const layout = heading(panel("roles"), `Cosine by role: ${layer === "all" ? "all layers" : "layer " + layer}`);
  layout.height = 220 + 32 * rows.length;
  layout.xaxis.range = reach(everyStep().flatMap((at) => rows.flatMap(([, row]) => cosine(about, row, at))));
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
  const all = everyStep().flatMap((step) => about.role.map((_, at) => cosine(about, at, step)[0]));
  return draw("role-map", [trace], colours(heading(panel("role-map"), "Cosine by layer and role"), all));
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
const percent = ([value, low, high]) => interval(value, low, high, null, true) + (known(value) ? " %" : "");
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
    const control = title?.measures.reverse_probability?.[3];
    const said = mean ? `: mean ${interval(mean[0], mean[1], mean[2])}, accuracy ${percent(hits)}`
      : row === 2 && Number.isFinite(control) ? `: mean ${interval(control)}` : "";
    const hover = y.map((part, index) => `${(Math.min(index, bins - 1) / bins).toFixed(2)} to `
      + `${((Math.min(index, bins - 1) + 1) / bins).toFixed(2)}: ${(100 * part).toFixed(1)} %`);
    return {x, y, mode: "lines", name: name + said, line: {color, dash, width: 2, shape: "hv"}, hovertext: hover,
      hoverinfo: "name+text"};
  });
  const layout = heading(panel("shares"), `Probability of the target, step ${thousands(now.step)}`);
  layout.yaxis.title.text = `share of pairs (${title ? title.sample : "n = 0"})`;
  await draw("shares", title ? traces : [], layout);
}
