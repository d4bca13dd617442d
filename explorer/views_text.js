// The views of the text: Tokens, Sampling, Attention, Layers.
"use strict";

// ------------------------------------------------------------------------------------------------------- tokens
const KIND_ABOUT = {
  special: "special: made by the page or by the model, never by text",
  part: "part of a character of several bytes",
  word: "text",
};

function kindOf(token) {
  if (token.special !== null) return "special";
  return token.text.includes("\ufffd") ? "part" : "word";
}

VIEWS.push({
  id: "tokens",
  title: "Tokens",
  about: "The text as the model reads it: pieces from a fixed vocabulary, each with a number and one or more bytes.",
  render(element, run) {
    const { make, labelOf, tokenLabel } = run.help;
    const { query } = run.selected;
    const plain = run.tokens.filter((token) => token.special === null);
    const bytes = plain.reduce((sum, token) => sum + token.bytes.length, 0);
    const token = run.tokens[query];
    const same = run.tokens.filter(({ id }) => id === token.id).length;
    const row = (position) => {
      const { id, bytes } = run.tokens[position];
      const choose = () => select({ query: position });
      return make("tr", { className: position === query ? "chosen" : "", click: choose },
        make("th", { scope: "row" }, String(position)),
        make("td", { className: "label" }, labelOf(run.tokens[position])),
        make("td", {}, String(id)),
        make("td", { className: "mono label" }, hex(bytes)),
        make("td", { className: "muted" }, position < run.prompt ? "read" : "written"));
    };
    element.replaceChildren(
      make("div", { className: "facts" },
        fact(make, String(run.tokens.length), "tokens"),
        fact(make, String(bytes), "bytes of text (UTF-8)"),
        fact(make, (bytes / Math.max(plain.length, 1)).toFixed(1), "bytes for each token of text"),
        fact(make, run.text.vocab_size.toLocaleString("en-US"), "tokens in the vocabulary")),
      make("h3", {}, "Token at position ", String(query)),
      make("p", {}, make("strong", { className: "label" }, tokenLabel(query)), ` has the id ${token.id}. `,
        `Its kind is ${KIND_ABOUT[kindOf(token)]}. `, token.bytes.length ? `Its bytes are ${hex(token.bytes)} (hexadecimal). ` : "It has no bytes. ",
        same > 1 ? `The same id is in this text ${same} times.` : "Its id is in this text once."),
      make("p", { className: "muted" }, "Signs: · is a blank, ↵ a newline. A blank belongs to the word after it. ",
        "Encoding cuts the text with a regular expression, then merges neighbouring bytes as long as the result is in the vocabulary."),
      make("h3", {}, "All tokens"),
      make("div", { className: "scroll tall", tabIndex: 0, role: "region", "aria-label": "All tokens" },
        make("table", {},
          make("thead", {}, make("tr", {}, ["position", "token", "id", "bytes", "from"].map((name) => make("th", { scope: "col" }, name)))),
          make("tbody", {}, run.tokens.map((_, position) => row(position))))));
  },
});

function hex(bytes) {
  return [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join(" ");
}

function fact(make, value, words) {
  return make("p", { className: "fact" }, make("strong", {}, value), " ", words);
}

// ----------------------------------------------------------------------------------------------------- sampling
const SHOWN = 14; // candidates in the table
const STEP_NAMES = { temperature: "temperature", top_k: "top-k", top_p: "top-p", min_p: "min-p" };

// The logits (V,) after the token at a position.
function logitsAfter(run, position) {
  const { shape: [, , V], data } = run.trace.logits;
  return data.subarray(position * V, (position + 1) * V);
}

function probabilitiesOf(logits) {
  return softmax(Float64Array.from(logits)); // a copy, because softmax writes in place
}

// What the settings do to logits: [{name, probabilities, left, removed: Set of ids}], the model's own first.
function samplingStages(logits, settings) {
  const stages = [{ name: "model", probabilities: probabilitiesOf(logits), left: logits.length }];
  if (settings.temperature === 0) {
    const best = logits.indexOf(logits.reduce((a, b) => Math.max(a, b)));
    stages.push({ name: "temperature", probabilities: logits.map((_, id) => Number(id === best)), left: 1 });
    return stages;
  }
  for (const { name, logits: filtered } of filterLogits(logits, { ...settings, min_p: settings.min_p || null })) {
    const left = filtered.reduce((sum, logit) => sum + Number(logit > -Infinity), 0);
    stages.push({ name, probabilities: probabilitiesOf(filtered), left });
  }
  return stages;
}

// The step that removed a candidate, or null if it is left.
function removedBy(stages, id) {
  const index = stages.findIndex(({ probabilities }, place) => place > 0 && probabilities[id] === 0);
  return index < 0 ? null : STEP_NAMES[stages[index].name];
}

let names = new Map(); // id -> token, of ids that the worker has named

// Tokens of ids that are not in the text are asked of the worker; then the view renders again.
function nameIds(run, ids) {
  for (const token of run.tokens) names.set(token.id, token);
  const unknown = ids.filter((id) => !names.has(id));
  if (unknown.length === 0) return true;
  run.ask({ kind: "name", ids: unknown }).then(({ tokens }) => {
    for (const token of tokens) names.set(token.id, token);
    select({});
  });
  return false;
}

VIEWS.push({
  id: "sampling",
  title: "Sampling",
  about: "The model gives each token of the vocabulary a number, its logit. The settings decide from which tokens one is drawn.",
  glow(run, position) { // how likely the model held each token before it
    if (position === 0) return null;
    return probabilitiesOf(logitsAfter(run, position - 1))[run.tokens[position].id];
  },
  legend(run) {
    const end = run.help.isDark() ? "brighter" : "darker";
    return `Colour: the probability that the model gave to a token before it was read; ${end} is higher.`;
  },
  render(element, run) {
    const { make, labelOf, tokenLabel, percent } = run.help;
    const { query } = run.selected;
    const stages = samplingStages(logitsAfter(run, query), run.settings);
    const order = [...stages[0].probabilities.keys()].sort((a, b) => stages[0].probabilities[b] - stages[0].probabilities[a]);
    const next = run.tokens[query + 1]?.id ?? null;
    const shown = order.slice(0, SHOWN);
    if (next !== null && !shown.includes(next)) shown.push(next);
    if (!nameIds(run, shown)) return;

    const steps = stages.map((stage, index) => make("li", {},
      make("strong", {}, index === 0 ? "vocabulary" : `${STEP_NAMES[stage.name]} ${run.settings[stage.name]}`),
      make("span", {}, stageWords(run, stages, index))));
    const rows = shown.map((id) => {
      const removed = removedBy(stages, id);
      let fate = removed === null ? "kept" : `cut by ${removed}`;
      if (id === next) fate += query + 1 < run.prompt ? ", in the prompt" : ", drawn";
      return make("tr", { className: `${id === next ? "chosen" : ""} ${removed === null ? "" : "removed"}` },
        make("td", { className: "muted rank" }, String(order.indexOf(id) + 1)),
        make("th", { scope: "row", className: "label" }, labelOf(names.get(id))),
        bar(make, stages[0].probabilities[id], percent),
        bar(make, stages[1].probabilities[id], percent),
        bar(make, stages.at(-1).probabilities[id], percent, removed !== null),
        make("td", {}, fate));
    });
    element.replaceChildren(
      make("h3", {}, "After ", make("span", { className: "label" }, tokenLabel(query)), ` (position ${query})`),
      make("p", {}, drawnSentence(run, query, order, next)),
      make("ol", { className: "funnel" }, steps),
      make("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": "Candidates" },
        make("table", { className: "bars" },
          make("caption", {}, "The most likely candidates"),
          make("thead", {}, make("tr", {}, ["rank", "token", "model", `temperature ${run.settings.temperature}`, "after all settings", "result"]
            .map((name) => make("th", { scope: "col", className: name === "rank" ? "rank" : "" }, name)))),
          make("tbody", {}, rows))),
      make("p", { className: "muted" }, "Change the settings above: the bars follow. A low temperature widens the lead of the first; ",
        "top-k keeps the k most likely; top-p keeps the most likely that together reach p; min-p removes what is less likely than min-p times the first."));
  },
});

function stageWords(run, stages, index) {
  const { left, name } = stages[index];
  const count = left.toLocaleString("en-US");
  if (index === 0) return `${count} tokens`;
  if (name === "temperature" && left > 1) return run.settings.temperature < 1 ? "sharper, all stay" : "all stay";
  return left === 1 ? "1 token stays" : `${count} tokens stay`;
}

function drawnSentence(run, query, order, next) {
  if (next === null) return "The text ends here. “Next token” draws from the last column.";
  const token = `“${run.help.tokenLabel(query + 1)}”`;
  const rank = order.indexOf(next) + 1;
  const place = rank === 1 ? "the most likely token" : `number ${rank} of the candidates`;
  if (query + 1 < run.prompt) return `The prompt goes on with ${token}, ${place} of the model.`;
  const { settings } = run.steps[query + 1 - run.prompt];
  const changed = Object.keys(settings).some((name) => settings[name] !== run.settings[name]);
  const old = changed ? ` It was drawn with other settings: ${Object.entries(settings).map(([name, value]) => `${STEP_NAMES[name]} ${value}`).join(", ")}.` : "";
  return `Here ${token} was drawn, ${place} of the model.${old}`;
}

function bar(make, share, percent, off = false) {
  const fill = make("span", { className: "fill" });
  fill.style.width = `${100 * share}%`;
  return make("td", { className: "bar" }, make("span", { className: "track" }, fill), make("span", {}, off ? "0" : percent(share)));
}

// ---------------------------------------------------------------------------------------------------- attention
const PATTERNS = [
  { id: "previous", title: "previous token", key: (_, query) => (query > 1 ? [query - 1] : []) },
  { id: "first", title: "first token", key: (_, query) => (query > 1 ? [0] : []) },
  { id: "itself", title: "the token itself", key: (_, query) => (query > 0 ? [query] : []) },
  {
    id: "continued", title: "what came after the same token before",
    key: (tokens, query) => {
      const keys = [];
      for (let key = 1; key < query; key++) if (tokens[key - 1].id === tokens[query].id && key - 1 > 0) keys.push(key);
      return keys;
    },
  },
];
let drawn = { trace: null, dark: null, grid: null, scores: null }; // what the small maps show

function headCount(run) {
  return run.text.num_attention_heads;
}

// Tensors of a layer and head: {probability(query, key), score(query, key), visible(query, key)}.
function headMap(run, layer, head) {
  const prefix = `layers.${layer}.attention.`;
  const probabilities = run.trace[`${prefix}probabilities`].data;
  const scores = run.trace[`${prefix}scores`].data;
  const mask = run.trace[`${prefix}mask`].data;
  const S = run.tokens.length;
  const place = (query, key) => (head * S + query) * S + key;
  return {
    probability: (query, key) => probabilities[place(query, key)],
    score: (query, key) => scores[place(query, key)],
    visible: (query, key) => mask[query * S + key] !== 0,
  };
}

function windowOf(run, layer) {
  return run.text.layer_types[layer] === "sliding_attention" ? run.text.sliding_window : null;
}

// Why a key is hidden from a query: "future", "window", "padding"; or null.
function whyHidden(run, layer, map, query, key) {
  const window = windowOf(run, layer);
  if (key > query) return "future";
  if (window !== null && query - key >= window) return "window";
  return map.visible(query, key) ? null : "padding";
}

function cellSentence(run, layer, map, query, key) {
  const { tokenLabel, number, percent } = run.help;
  const window = windowOf(run, layer);
  const because = {
    future: `Hidden: position ${key} is in the future of position ${query}. A token sees no later token.`,
    window: `Hidden: outside the window. Position ${key} is ${query - key} positions back, and this layer sees the last ${window}, the token itself included.`,
    padding: "Hidden: this key is padding, which only fills up a batch.",
  }[whyHidden(run, layer, map, query, key)];
  if (because !== undefined) return because;
  let best = key;
  for (let other = 0; other <= query; other++) if (map.probability(query, other) > map.probability(query, best)) best = other;
  const p = map.probability(query, key);
  if (best === key) return `Visible, and the highest score of this query: it gets ${percent(p)} of the attention.`;
  const less = map.score(query, best) - map.score(query, key);
  return `Visible. The score is ${number(less)} below that of “${tokenLabel(best)}” (position ${best}), so the probability is `
    + `exp(${number(less)}) = ${number(Math.exp(less))} times smaller: ${percent(p)}.`;
}

// For each layer and head, the mean probability of each pattern in this text; null where the text has no case of it.
function patternScores(run) {
  const heads = [];
  run.text.layer_types.forEach((_, layer) => {
    for (let head = 0; head < headCount(run); head++) {
      const map = headMap(run, layer, head);
      heads.push({ layer, head, means: PATTERNS.map(({ key }) => meanOf(run, map, key)) });
    }
  });
  return heads;
}

function meanOf(run, map, keysOf) {
  let total = 0;
  let cases = 0;
  run.tokens.forEach((_, query) => {
    const keys = keysOf(run.tokens, query).filter((key) => map.visible(query, key));
    if (keys.length === 0) return;
    cases += 1;
    for (const key of keys) total += map.probability(query, key);
  });
  return cases === 0 ? null : total / cases;
}

VIEWS.push({
  id: "attention",
  title: "Attention",
  about: "Each head of each layer lets a token (the query, a row) look at earlier tokens (the keys, columns). A row sums to 100 %.",
  glow(run, position) {
    const { layer, head, query } = run.selected;
    if (position > query) return null;
    return headMap(run, layer, head).probability(query, position);
  },
  first(run) { // the head that looks most at the token before, and where it looks
    const { layer, head } = patternScores(run).reduce((best, scores) => (scores.means[0] > best.means[0] ? scores : best));
    return { layer, head, key: Math.max(run.selected.query - 1, 0) };
  },
  legend(run) {
    const { layer, head, query } = run.selected;
    return `Colour: where “${run.help.tokenLabel(query)}” (position ${query}) looks in layer ${layer}, head ${head}.`;
  },
  render(element, run) {
    const { make, isDark } = run.help;
    if (drawn.trace !== run.trace || drawn.dark !== isDark()) {
      drawn = { trace: run.trace, dark: isDark(), grid: smallMaps(run), scores: patternScores(run) };
    }
    const { layer, head } = run.selected;
    for (const button of drawn.grid.querySelectorAll("button")) {
      const isChosen = button.dataset.head === `${layer}.${head}`;
      button.setAttribute("aria-pressed", String(isChosen));
      button.tabIndex = isChosen ? 0 : -1;
    }
    element.replaceChildren(make("div", { className: "attention" }, largeMap(run),
      make("div", { className: "heads" },
        make("h3", {}, "All heads"),
        make("p", { className: "muted" }, "A row is a layer, a column is a head. Click one, or use the arrow keys.",
          new Set(run.text.layer_types).size > 1 ? ` W: a window of ${run.text.sliding_window} tokens.` : ""),
        drawn.grid, patternTable(run))));
  },
});

// A button with a map for each layer and head.
function smallMaps(run) {
  const { make, heat } = run.help;
  const H = headCount(run);
  const S = run.tokens.length;
  const grid = make("div", { className: "maps", role: "group", "aria-label": "Heads" });
  grid.classList.toggle("smooth", S > 36); // a map has about 36 pixels on a phone
  grid.style.gridTemplateColumns = `auto repeat(${H}, minmax(0, 1fr))`;
  const isMixed = new Set(run.text.layer_types).size > 1;
  run.text.layer_types.forEach((_, layer) => {
    const window = windowOf(run, layer);
    const words = window === null ? "full attention" : `window of ${window}`;
    grid.append(make("span", { className: "muted" }, `${layer}${isMixed ? ` ${window === null ? "full" : "W"}` : ""}`));
    for (let head = 0; head < H; head++) {
      const map = headMap(run, layer, head);
      const canvas = make("canvas", { "aria-hidden": "true" });
      heat(canvas, { rows: S, columns: S, cells: true, value: map.probability, hidden: (query, key) => whyHidden(run, layer, map, query, key) });
      grid.append(make("button", {
        type: "button", "data-head": `${layer}.${head}`, "aria-label": `layer ${layer}, head ${head}, ${words}`,
        click: () => select({ layer, head }),
      }, canvas));
    }
  });
  grid.addEventListener("keydown", (event) => {
    const steps = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] };
    if (steps[event.key] === undefined) return;
    event.preventDefault();
    const { layer, head } = explorer.run.selected;
    const target = [Math.min(Math.max(layer + steps[event.key][0], 0), run.text.layer_types.length - 1),
      Math.min(Math.max(head + steps[event.key][1], 0), H - 1)];
    select({ layer: target[0], head: target[1] });
    grid.querySelector("[aria-pressed=true]").focus();
  });
  return grid;
}

// Which head does most of what, with buttons that choose it.
function patternTable(run) {
  const { make, percent } = run.help;
  const { layer, head } = run.selected;
  const own = drawn.scores.find((scores) => scores.layer === layer && scores.head === head);
  const rows = PATTERNS.map(({ title }, index) => {
    if (own.means[index] === null) {
      return make("tr", {}, make("th", { scope: "row" }, title), make("td", { className: "muted", colSpan: 2 }, "no case in this text"));
    }
    const best = [...drawn.scores].sort((a, b) => b.means[index] - a.means[index]).slice(0, 3);
    return make("tr", {}, make("th", { scope: "row" }, title),
      make("td", {}, make("div", { className: "buttons" }, best.map((other) => make("button", {
        type: "button", className: "small", click: () => select({ layer: other.layer, head: other.head }),
      }, `${other.layer}.${other.head}: ${percent(other.means[index])}`)))),
      make("td", { className: "label" }, percent(own.means[index])));
  });
  return make("div", { className: "patterns" },
    make("h3", {}, "Which head looks where, in this text"),
    make("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": "Patterns" },
      make("table", {},
        make("thead", {}, make("tr", {}, ["attention to", "most, as layer.head", `head ${layer}.${head}`].map((name) => make("th", { scope: "col" }, name)))),
        make("tbody", {}, rows))),
    make("p", { className: "muted" }, "Means over the queries of this text."));
}

const LABELLED = 13; // pixels of a cell from which tokens are written beside the map

// The map of the selected head with a readout. The pointer previews a cell; a click or the arrow keys choose it.
function largeMap(run) {
  const { make, tokenLabel, number, percent } = run.help;
  const { layer, head, query, key } = run.selected;
  const map = headMap(run, layer, head);
  const window = windowOf(run, layer);
  const kind = window === null ? "full attention" : `window of ${window} tokens`;
  const canvas = make("canvas", { className: "map", tabIndex: 0, role: "application", id: "large-map", "aria-describedby": "readout",
    "aria-label": `Attention of layer ${layer}, head ${head}. Arrow keys move the query and the key.` });
  const readout = make("div", { id: "readout", role: "status" });
  const show = (row, column) => readout.replaceChildren(...readoutOf(run, layer, map, row, column));
  const painter = mapPainter(run, layer, map, canvas);
  painter(query, key);
  show(query, key);
  const cellAt = (event) => {
    const box = canvas.getBoundingClientRect();
    const { margin, cell } = painter;
    const scale = canvas.width / painter.ratio / box.width;
    const row = Math.floor(((event.clientY - box.top) * scale - margin.top) / cell);
    const column = Math.floor(((event.clientX - box.left) * scale - margin.left) / cell);
    const inside = [row, column].every((place) => place >= 0 && place < run.tokens.length);
    return inside ? [row, column] : null;
  };
  const preview = (event) => {
    const [row, column] = cellAt(event) ?? [query, key];
    painter(row, column);
    show(row, column);
  };
  canvas.addEventListener("pointermove", preview);
  canvas.addEventListener("pointerleave", () => { painter(query, key); show(query, key); });
  canvas.addEventListener("click", (event) => {
    const chosen = cellAt(event);
    if (chosen !== null) select({ query: chosen[0], key: chosen[1] });
  });
  canvas.addEventListener("keydown", (event) => {
    const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    if (steps[event.key] === undefined) return;
    event.preventDefault();
    const limit = (place) => Math.min(Math.max(place, 0), run.tokens.length - 1);
    select({ query: limit(query + steps[event.key][0]), key: limit(key + steps[event.key][1]) });
  });
  const keys = [...run.tokens.keys()].filter((place) => map.visible(query, place))
    .sort((a, b) => map.probability(query, b) - map.probability(query, a)).slice(0, 5);
  return make("div", { className: "large" },
    make("h3", {}, `Layer ${layer}, head ${head}: ${kind}`),
    canvas, readout,
    make("table", { className: "bars" },
      make("caption", {}, "Where ", make("span", { className: "label" }, tokenLabel(query)), ` (position ${query}) looks`),
      make("thead", {}, make("tr", {}, ["key", "token", "score", "probability"].map((name) => make("th", { scope: "col" }, name)))),
      make("tbody", {}, keys.map((place) => make("tr", {},
        make("td", { className: "muted" }, String(place)), make("th", { scope: "row", className: "label" }, tokenLabel(place)),
        make("td", {}, number(map.score(query, place))), bar(make, map.probability(query, place), percent))))),
    scaleLegend(run, window),
    make("p", {}, make("button", { type: "button", className: "small", click: () => run.help.showCode(`layers.${layer}.attention.probabilities`) },
      "Show the Python lines")));
}

function readoutOf(run, layer, map, query, key) {
  const { make, tokenLabel, number, percent } = run.help;
  const isHidden = whyHidden(run, layer, map, query, key) !== null;
  const pair = (name, ...value) => make("p", { className: "fact" }, `${name} `, ...value);
  const token = (place) => [make("strong", { className: "label" }, tokenLabel(place)), ` ${place}`];
  return [
    make("div", { className: "facts" },
      pair("query", ...token(query)), pair("key", ...token(key)),
      pair("score", make("strong", {}, number(map.score(query, key)))),
      pair("probability", make("strong", {}, isHidden ? "0" : percent(map.probability(query, key))))),
    make("p", { className: "why" }, cellSentence(run, layer, map, query, key)),
  ];
}

// A function (query, key) that draws the map with these two marked. Token labels stand beside it if they fit.
function mapPainter(run, layer, map, canvas) {
  const { heat, tokenLabel } = run.help;
  const S = run.tokens.length;
  const ratio = Math.min(devicePixelRatio || 1, 2);
  const room = Math.min(Math.max(document.getElementById("view").clientWidth, 240), 620);
  const hasLabels = (room - 84) / S >= LABELLED;
  const style = getComputedStyle(document.documentElement);
  const context = canvas.getContext("2d");
  const font = `12px ${style.fontFamily}`;
  context.font = `bold ${font}`;
  const widest = Math.max(...run.tokens.map((_, place) => context.measureText(clip(tokenLabel(place), 11)).width));
  const edge = hasLabels ? Math.ceil(widest) + 10 : 22;
  const margin = { left: edge, top: edge };
  const cell = Math.min((room - margin.left) / S, 30);
  const side = Math.round(cell * S);
  const probe = getComputedStyle(document.getElementById("about"));
  const base = document.createElement("canvas");
  heat(base, { rows: S, columns: S, size: side, value: map.probability, hidden: (query, key) => whyHidden(run, layer, map, query, key) });
  canvas.width = (margin.left + side) * ratio;
  canvas.height = (margin.top + side) * ratio;
  canvas.style.width = `${margin.left + side}px`;
  const paint = (query, key) => {
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, canvas.width, canvas.height);
    context.drawImage(base, margin.left, margin.top, side, side);
    context.textBaseline = "middle";
    context.textAlign = "right";
    const text = (place, marked) => {
      context.fillStyle = marked ? accent() : probe.color;
      context.font = `${marked ? "bold " : ""}${font}`;
    };
    for (let place = 0; hasLabels && place < S; place++) {
      text(place, place === query);
      context.fillText(clip(tokenLabel(place), 11), margin.left - 5, margin.top + (place + 0.5) * cell);
      context.save();
      context.translate(margin.left + (place + 0.5) * cell, margin.top - 5);
      context.rotate(Math.PI / 2);
      text(place, place === key);
      context.fillText(clip(tokenLabel(place), 11), 0, 0);
      context.restore();
    }
    if (!hasLabels) {
      text(0, false);
      context.textAlign = "left";
      context.fillText("key →", margin.left, margin.top / 2);
      context.save();
      context.translate(margin.left / 2, margin.top);
      context.rotate(Math.PI / 2);
      context.fillText("query →", 0, 0);
      context.restore();
    }
    context.strokeStyle = accent();
    context.lineWidth = 1;
    context.strokeRect(margin.left + 0.5, margin.top + query * cell, side - 1, cell);
    context.lineWidth = 2;
    context.strokeRect(margin.left + key * cell, margin.top + query * cell, cell, cell);
  };
  return Object.assign(paint, { margin, cell, ratio });
}

function accent() {
  return getComputedStyle(document.querySelector("#tabs [aria-selected=true]")).color;
}

function clip(text, length) {
  return text.length > length ? `${text.slice(0, length - 1)}…` : text;
}

// What the colours mean.
function scaleLegend(run, window) {
  const { make, scaleColour } = run.help;
  const steps = [0, 0.01, 0.05, 0.2, 0.5, 1];
  const swatch = (className, colour) => {
    const element = make("span", { className: `swatch ${className}` });
    if (colour !== undefined) element.style.background = `rgb(${colour.join()})`;
    return element;
  };
  const items = steps.map((share) => make("span", {}, swatch("", scaleColour(share)), ` ${100 * share} %`));
  items.push(make("span", {}, swatch("future"), " future"));
  if (window !== null) items.push(make("span", {}, swatch("outside"), " outside the window"));
  return make("p", { className: "scale" }, items);
}

// ------------------------------------------------------------------------------------------------------- layers
const COLUMNS = 12; // positions in the table
let lensed = { trace: null, guesses: new Map() }; // position -> for each row, the most likely tokens

// The rows of the lens: [{title, point}] of the residual stream, from the embedding to the last layer.
function lensRows(run) {
  const rows = [{ title: "embedding", point: "embedding" }];
  run.text.layer_types.forEach((_, layer) => rows.push({ title: `after layer ${layer}`, point: `layers.${layer}.mlp_residual` }));
  return rows;
}

// Positions whose guesses are missing are asked of the worker; then the view renders again.
function guessAt(run, positions) {
  if (lensed.trace !== run.trace) lensed = { trace: run.trace, guesses: new Map() };
  const missing = positions.filter((position) => !lensed.guesses.has(position));
  if (missing.length === 0) return true;
  const rows = lensRows(run);
  const E = run.text.hidden_size;
  const vectors = new Float32Array(missing.length * rows.length * E);
  missing.forEach((position, index) => rows.forEach(({ point }, row) => {
    vectors.set(run.trace[point].data.subarray(position * E, (position + 1) * E), (index * rows.length + row) * E);
  }));
  const { trace, guesses } = lensed;
  run.ask({ kind: "lens", vectors }).then((result) => {
    missing.forEach((position, index) => guesses.set(position, result.guesses.slice(index * rows.length, (index + 1) * rows.length)));
    if (trace === lensed.trace) select({});
  });
  return false;
}

VIEWS.push({
  id: "layers",
  title: "Layers",
  about: "The logit lens: what the head of the model would say after each layer. The guess forms from top to bottom.",
  render(element, run) {
    const { make, tokenLabel, labelOf, percent, tint } = run.help;
    const { query } = run.selected;
    const rows = lensRows(run);
    const first = Math.max(Math.min(query - COLUMNS + 3, run.tokens.length - COLUMNS), 0);
    const positions = [...run.tokens.keys()].slice(first, first + COLUMNS);
    if (!guessAt(run, positions)) {
      if (element.children.length === 0) element.replaceChildren(make("p", { className: "muted" }, "Computing ..."));
      return;
    }
    const head = make("tr", {}, make("td", {}, ""), positions.map((position) => make("th", { scope: "col", className: position === query ? "chosen" : "" },
      make("button", { type: "button", className: "small label", "aria-pressed": String(position === query), click: () => select({ query: position }) },
        `${position} ${tokenLabel(position)}`))));
    const body = rows.map(({ title }, row) => make("tr", {}, make("th", { scope: "row" }, title), positions.map((position) => {
      const [best] = lensed.guesses.get(position)[row];
      return tint(make("td", { className: `label guess ${position === query ? "chosen" : ""}`, title: percent(best.probability),
        click: () => select({ query: position }) }, labelOf(best)), best.probability);
    })));
    const next = run.tokens[query + 1];
    const truth = make("tr", {}, make("th", { scope: "row" }, "next in the text"), positions.map((position) => make("td", { className: "label" },
      position + 1 < run.tokens.length ? tokenLabel(position + 1) : "")));
    const detail = rows.map(({ title, point }, row) => make("section", { className: "guesses" },
      make("h4", {}, title),
      make("ol", {}, lensed.guesses.get(query)[row].slice(0, 4).map((guess) => make("li", { className: guess.id === next?.id ? "chosen" : "" },
        make("span", { className: "label" }, labelOf(guess)), tint(make("span", { className: "share" }, percent(guess.probability)), guess.probability)))),
      make("button", { type: "button", className: "small", "aria-label": `Show the Python lines of ${title}`, click: () => run.help.showCode(point) }, "Lines")));
    element.replaceChildren(
      make("h3", {}, "After ", make("span", { className: "label" }, tokenLabel(query)), ` (position ${query})`),
      make("p", {}, depthSentence(run, rows, next)),
      make("div", { className: "stages" }, detail),
      make("h3", {}, "The first guess at several positions"),
      make("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": "First guesses" },
        make("table", { className: "lens" }, make("thead", {}, head), make("tbody", {}, body, truth))),
      make("p", { className: "muted" }, "Each layer adds to one vector for each token, the residual stream. Here that vector goes through the last norm and the head early. ",
        "After the last layer this is the model's own answer. The embedding alone is nearest to its own token where both share one matrix."));
  },
});

// From which layer on the first guess is the one of the model.
function depthSentence(run, rows, next) {
  const { labelOf } = run.help;
  const guesses = lensed.guesses.get(run.selected.query).map(([best]) => best);
  const final = guesses.at(-1);
  let from = guesses.length - 1;
  while (from > 0 && guesses[from - 1].id === final.id) from -= 1;
  const text = `The model's first guess is “${labelOf(final)}”. It stands first from “${rows[from].title}” on.`;
  if (next === undefined) return text;
  return `${text} The text goes on with “${labelOf(next)}”.`;
}
