// The views of the text: Tokens, Sampling, Attention, Layers.
"use strict";

// The label of a token, set off from the sentence around it.
function mark(label) {
  return make("span", { className: "label" }, label);
}

function muted(...words) {
  return make("p", { className: "muted" }, words);
}

function button(words, click, properties = {}) {
  return make("button", { type: "button", className: "small", click, ...properties }, words);
}

function headRow(names) {
  return make("thead", {}, make("tr", {}, names.map((name) => make("th", { scope: "col" }, name))));
}

// A table that scrolls sideways where it does not fit.
function scrolling(label, className, ...parts) {
  const region = { className: `scroll ${className}`, tabIndex: 0, role: "region", "aria-label": label };
  return make("div", region, make("table", {}, parts));
}

function chosenIf(condition) {
  return condition ? "chosen" : "";
}

// "After" and the chosen token.
function afterHeading(run) {
  const { query } = run.selected;
  return make("h3", {}, "After ", mark(run.help.tokenLabel(query)), ` (position ${query})`);
}

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
  about: "The text as the model reads it: pieces from a fixed vocabulary, each with a number and its bytes.",
  render(element, run) {
    const { labelOf } = run.help;
    const { query } = run.selected;
    const plain = run.tokens.filter((token) => token.special === null);
    const bytes = plain.reduce((sum, token) => sum + token.bytes.length, 0);
    const rows = run.tokens.map((token, position) => make("tr",
      { className: chosenIf(position === query), click: () => select({ query: position }) },
      make("th", { scope: "row" }, String(position)),
      make("td", { className: "label" }, labelOf(token)),
      make("td", {}, String(token.id)),
      make("td", { className: "mono label" }, hex(token.bytes)),
      make("td", { className: "muted" }, position < run.prompt ? "read" : "written")));
    const [size, unit] = count(bytes, "byte").split(" ");
    let mean = null;
    if (plain.length > 0) mean = fact((bytes / plain.length).toFixed(1), "bytes for each token of text");
    element.replaceChildren(
      make("div", { className: "facts" },
        fact(...count(run.tokens.length, "token").split(" ")),
        fact(size, `${unit} of text (UTF-8)`),
        mean,
        fact(run.text.vocab_size.toLocaleString("en-US"), "tokens in the vocabulary")),
      make("h3", {}, `Token at position ${query}`),
      make("p", {}, mark(run.help.tokenLabel(query)), tokenSentence(run, query)),
      muted("Signs: · is a blank, ↵ a newline. A blank usually belongs to the word after it. ",
        "Encoding cuts the text with a regular expression, then merges neighbouring bytes as long as the result is in ",
        "the vocabulary."),
      make("h3", {}, "All tokens"),
      scrolling("All tokens", "tall", headRow(["position", "token", "id", "bytes", "from"]),
        make("tbody", {}, rows)));
  },
});

function tokenSentence(run, query) {
  const token = run.tokens[query];
  const same = run.tokens.filter(({ id }) => id === token.id).length;
  let bytes = "It has no bytes.";
  if (token.bytes.length > 0) bytes = `Its bytes are ${hex(token.bytes)} (hexadecimal).`;
  const times = same > 1 ? `The same id is in this text ${same} times.` : "Its id is in this text once.";
  return ` has the id ${token.id}. Its kind is ${KIND_ABOUT[kindOf(token)]}. ${bytes} ${times}`;
}

function hex(bytes) {
  return [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join(" ");
}

function fact(value, words) {
  return make("p", { className: "fact" }, make("strong", {}, String(value)), ` ${words}`);
}

// ----------------------------------------------------------------------------------------------------- sampling
const SHOWN = 14; // candidates in the table
const STEP_NAMES = { temperature: "temperature", top_k: "top-k", top_p: "top-p", min_p: "min-p" };

function showChoice(run, place) {
  const last = run.tokens.length - 1;
  if (place >= 0 && place <= last + 1) select({ query: Math.min(place, last), ahead: place > last });
}

function choiceTitle(run, place) {
  if (place === run.tokens.length) return `The next token (position ${place}), not drawn yet`;
  const token = mark(run.help.tokenLabel(place));
  if (place < run.prompt) return ["How likely ", token, ` (position ${place}) was in the prompt`];
  return ["How ", token, ` (position ${place}) was drawn`];
}

// The heading of a choice, and the way to its neighbours.
function choiceHeading(run, place) {
  const step = (label, target, isEnd) => {
    return button(label, () => showChoice(run, target), { "aria-disabled": String(isEnd) });
  };
  return [
    make("h3", {}, choiceTitle(run, place)),
    make("div", { className: "buttons" },
      step("← Choice before", place - 1, place === 0),
      step("Choice after →", place + 1, place === run.tokens.length)),
  ];
}

// The logits (V,) after the token at a position.
function logitsAfter(run, position) {
  const { shape: [, , V], data } = run.trace.logits;
  return data.subarray(position * V, (position + 1) * V);
}

function probabilitiesOf(logits) {
  return softmax(Float64Array.from(logits)); // a copy, because softmax writes in place
}

// What the settings do to logits: [{name, probabilities, left}], the model's own first.
function samplingStages(logits, settings) {
  const stages = [{ name: "model", probabilities: probabilitiesOf(logits), left: logits.length }];
  if (settings.temperature === 0) {
    const best = logits.indexOf(logits.reduce((a, b) => Math.max(a, b)));
    stages.push({ name: "temperature", probabilities: logits.map((_, id) => Number(id === best)), left: 1 });
    return stages;
  }
  const steps = filterLogits(logits, { ...settings, min_p: settings.min_p || null });
  for (const { name, logits: filtered } of steps) {
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
  about: "The model gives each token of the vocabulary a number, its logit. "
    + "The softmax makes probabilities of the logits. The settings decide which tokens can be drawn.",
  glow(run, position) { // how likely the model held each token before it
    if (position === 0) return null;
    return probabilitiesOf(logitsAfter(run, position - 1))[run.tokens[position].id];
  },
  legend(run) {
    const end = run.help.isDark() ? "brighter" : "darker";
    return `Colour: the probability that the model gave to a token before it was read; ${end} is higher.`;
  },
  render(element, run) {
    const { query, ahead } = run.selected;
    const place = ahead ? query + 1 : query; // the position whose choice is shown
    if (place === 0) {
      const given = "Nothing chooses the first token: every text begins with it.";
      element.replaceChildren(...choiceHeading(run, place), make("p", {}, given));
      return;
    }
    const stages = samplingStages(logitsAfter(run, place - 1), run.settings);
    const model = stages[0].probabilities;
    const order = [...model.keys()].sort((a, b) => model[b] - model[a]);
    const next = run.tokens[place]?.id ?? null;
    const shown = order.slice(0, SHOWN);
    if (next !== null && !shown.includes(next)) shown.push(next);
    if (!nameIds(run, shown)) return;

    const rows = shown.map((id) => candidateRow(run, stages, id, order.indexOf(id) + 1, place));
    const head = headRow(["rank", "token", ...stages.map(({ name }) => stageTitle(run, name)), "result"]);
    head.querySelector("th").className = "rank";
    element.replaceChildren(
      ...choiceHeading(run, place),
      make("p", {}, drawnSentence(run, order, place)),
      make("ol", { className: "funnel" }, stageBoxes(run, stages)),
      scrolling("Candidates", "bars", make("caption", {}, "The most likely candidates"), head,
        make("tbody", {}, rows)),
      muted("The columns are the steps above, from left to right. Each step works on the column before it. ",
        "The tokens that stay are scaled to 100 % together. Change a setting above: the bars follow."));
  },
});

function candidateRow(run, stages, id, rank, place) {
  const removed = removedBy(stages, id);
  const next = run.tokens[place]?.id;
  let fate = removed === null ? "kept" : `cut by ${removed}`;
  if (id === next) fate += place < run.prompt ? ", in the prompt" : ", drawn";
  return make("tr", { className: `${chosenIf(id === next)} ${removed === null ? "" : "removed"}` },
    make("td", { className: "muted rank" }, String(rank)),
    make("th", { scope: "row", className: "label" }, run.help.labelOf(names.get(id))),
    stages.map(({ probabilities }) => bar(run, probabilities[id])),
    make("td", {}, fate));
}

function stageTitle(run, name) {
  return name === "model" ? "model" : `${STEP_NAMES[name]} ${run.settings[name]}`;
}

// What each step does, in the order in which they act; those that are off last.
function stageBoxes(run, stages) {
  const box = (className, title, ...lines) => make("li", { className },
    make("strong", {}, title), lines.map((line) => make("span", {}, line)));
  const boxes = stages.map((stage, index) => {
    const { left, name } = stage;
    const verb = left === 1 ? "stays" : "stay";
    const words = stageWords(run, stages[index - 1], name);
    return box("", `${index + 1}. ${stageTitle(run, name)}`, words, `${count(left, "token")} ${verb}.`);
  });
  const isOn = (name) => stages.some((stage) => stage.name === name);
  const words = run.settings.temperature === 0 ? "Not used at temperature 0." : "Off.";
  for (const name of Object.keys(STEP_NAMES)) {
    if (!isOn(name)) boxes.push(box("off", stageTitle(run, name), words));
  }
  return boxes;
}

// What a step does to the probabilities of the step before it.
function stageWords(run, before, name) {
  const { temperature, top_k: k, top_p: p, min_p: least } = run.settings;
  if (name === "model") return "The softmax of the logits.";
  if (name === "top_k") return `Keeps the ${count(k)} most likely.`;
  if (name === "top_p") return `Keeps the most likely, until they reach ${exactPercent(p)} together.`;
  if (name === "min_p") {
    const most = Math.max(...before.probabilities);
    return `Cuts what is below ${least} × ${percent(most)} (the first) = ${exactPercent(least * most, 3)}.`;
  }
  if (temperature === 0) return "Takes the most likely token.";
  const rule = `Divides the logits by ${temperature}.`;
  if (temperature === 1) return `${rule} Nothing changes.`;
  return temperature < 1 ? `${rule} Likely tokens gain.` : `${rule} Likely tokens lose to the others.`;
}

function drawnSentence(run, order, place) {
  const id = run.tokens[place]?.id;
  if (id === undefined) return "The text ends here. “Next token” draws from the last column.";
  const token = `“${run.help.tokenLabel(place)}”`;
  const rank = order.indexOf(id) + 1;
  const rated = rank === 1 ? "the most likely token" : `number ${count(rank)} of the candidates`;
  if (place < run.prompt) return `The prompt goes on with ${token}, ${rated} of the model.`;
  const { settings } = run.steps[place - run.prompt];
  const changed = Object.keys(settings).some((name) => settings[name] !== run.settings[name]);
  const drawn = `${token} was drawn, ${rated} of the model.`;
  if (!changed) return drawn;
  const old = Object.entries(settings).map(([name, value]) => `${STEP_NAMES[name]} ${value}`);
  return `${drawn} It was drawn with other settings: ${old.join(", ")}.`;
}

// A table cell with a probability as a bar and in percent.
function bar(run, share) {
  const track = make("span", { className: "track" });
  if (share > 0) {
    track.append(make("span", { className: "fill" }));
    track.firstChild.style.width = `${100 * share}%`;
  }
  return make("td", { className: "bar" }, track, make("span", {}, run.help.percent(share)));
}

// ---------------------------------------------------------------------------------------------------- attention
const PATTERNS = [
  { id: "previous", title: "previous token", key: (_, query) => (query > 1 ? [query - 1] : []) },
  { id: "first", title: "first token", key: (_, query) => (query > 1 ? [0] : []) },
  { id: "itself", title: "the token itself", key: (_, query) => (query > 0 ? [query] : []) },
  {
    id: "continued", title: "the token after an earlier copy of this token (copying)",
    key: (tokens, query) => {
      const keys = [];
      for (let key = 2; key < query; key++) {
        if (tokens[key - 1].id === tokens[query].id) keys.push(key);
      }
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
  const because = {
    future: `Hidden: position ${key} is in the future of position ${query}. A token sees no later token.`,
    window: `Hidden: outside the window. Position ${key} is ${query - key} positions back, `
      + `and this layer sees the last ${windowOf(run, layer)}, the token itself included.`,
    padding: "Hidden: this key is padding, which only fills up a batch.",
  }[whyHidden(run, layer, map, query, key)];
  if (because !== undefined) return because;
  const [best] = keysByProbability(run, map, query);
  const share = percent(map.probability(query, key));
  if (best === key) return `Visible, and the highest score of this query: it gets ${share} of the attention.`;
  const less = map.score(query, best) - map.score(query, key);
  return `Visible. The score is ${number(less)} below that of “${tokenLabel(best)}” (position ${best}), `
    + `so the probability is exp(${number(less)}) = ${number(Math.exp(less))} times smaller: ${share}.`;
}

// The visible keys of a query, the most likely first.
function keysByProbability(run, map, query) {
  const keys = [...run.tokens.keys()].filter((key) => map.visible(query, key));
  return keys.sort((a, b) => map.probability(query, b) - map.probability(query, a));
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
  about: "A layer has several attention heads. "
    + "In each, a token (row, query) looks at earlier ones (columns, keys). A row sums to 100 %.",
  glow(run, position) {
    const { layer, head, query } = run.selected;
    if (position > query) return null;
    return headMap(run, layer, head).probability(query, position);
  },
  first(run) { // the head in which the last token looks most at one earlier token with letters or digits
    const { query } = run.selected;
    const isWord = ({ text }) => /[\p{L}\p{N}]/u.test(text);
    const words = [...run.tokens.keys()].filter((key) => key < query && isWord(run.tokens[key]));
    let best = { layer: 0, head: 0, share: 0 };
    for (const { layer, head } of patternScores(run)) {
      const map = headMap(run, layer, head);
      const share = Math.max(...words.map((key) => map.probability(query, key)));
      if (share > best.share) best = { layer, head, share };
    }
    return { layer: best.layer, head: best.head };
  },
  legend(run) {
    const { layer, head, query } = run.selected;
    const token = `“${run.help.tokenLabel(query)}” (position ${query})`;
    return `Colour: where ${token} looks in layer ${layer}, head ${head}.`;
  },
  render(element, run) {
    const dark = run.help.isDark();
    if (drawn.trace !== run.trace || drawn.dark !== dark) {
      drawn = { trace: run.trace, dark, grid: smallMaps(run), scores: patternScores(run) };
    }
    const { layer, head } = run.selected;
    for (const small of drawn.grid.querySelectorAll("button")) {
      const isChosen = small.dataset.head === `${layer}.${head}`;
      small.setAttribute("aria-pressed", String(isChosen));
      small.tabIndex = isChosen ? 0 : -1;
    }
    let kinds = "";
    if (isMixed(run)) kinds = ` W: a window of ${run.text.sliding_window} tokens. full: all earlier tokens.`;
    element.replaceChildren(make("div", { className: "attention" },
      largeMap(run),
      make("div", { className: "heads" },
        make("h3", {}, "All heads"),
        muted("A row is a layer, a column is a head. Click one, or use the arrow keys.", kinds),
        drawn.grid,
        patternTable(run))));
  },
});

// Whether the model has layers with and without a window.
function isMixed(run) {
  return new Set(run.text.layer_types).size > 1;
}

// A button with a map for each layer and head.
function smallMaps(run) {
  const H = headCount(run);
  const S = run.tokens.length;
  const grid = make("div", { className: "maps", role: "group", "aria-label": "Heads" });
  grid.classList.toggle("smooth", S > 36); // a map has about 36 pixels on a phone
  grid.style.gridTemplateColumns = `auto repeat(${H}, minmax(0, 1fr))`;
  run.text.layer_types.forEach((_, layer) => {
    const window = windowOf(run, layer);
    const words = window === null ? "full attention" : `window of ${window}`;
    let name = String(layer);
    if (isMixed(run)) name += window === null ? " full" : " W";
    grid.append(make("span", { className: "muted" }, name));
    for (let head = 0; head < H; head++) {
      const canvas = make("canvas", { "aria-hidden": "true" });
      drawMap(run, canvas, layer, headMap(run, layer, head), { cells: true });
      grid.append(make("button", {
        type: "button", click: () => select({ layer, head }), "data-head": `${layer}.${head}`,
        "aria-label": `layer ${layer}, head ${head}, ${words}`,
      }, canvas));
    }
  });
  grid.addEventListener("keydown", (event) => {
    const steps = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
    if (steps === undefined) return;
    event.preventDefault();
    const { layer, head } = explorer.run.selected;
    select({
      layer: Math.min(Math.max(layer + steps[0], 0), run.text.layer_types.length - 1),
      head: Math.min(Math.max(head + steps[1], 0), H - 1),
    });
    grid.querySelector("[aria-pressed=true]").focus();
  });
  return grid;
}

function drawMap(run, canvas, layer, map, size) {
  const S = run.tokens.length;
  const hidden = (query, key) => whyHidden(run, layer, map, query, key);
  run.help.heat(canvas, { rows: S, columns: S, value: map.probability, hidden, ...size });
}

// Which head does most of what, with buttons that choose it.
function patternTable(run) {
  const { percent } = run.help;
  const { layer, head } = run.selected;
  const own = drawn.scores.find((scores) => scores.layer === layer && scores.head === head);
  const rows = PATTERNS.map(({ title }, index) => {
    const name = make("th", { scope: "row" }, title);
    if (own.means[index] === null) {
      return make("tr", {}, name, make("td", { className: "muted", colSpan: 2 }, "no case in this text"));
    }
    const best = [...drawn.scores].sort((a, b) => b.means[index] - a.means[index]).slice(0, 3);
    const buttons = best.map((other) => button(`${other.layer}.${other.head}: ${percent(other.means[index])}`,
      () => select({ layer: other.layer, head: other.head })));
    return make("tr", {}, name,
      make("td", {}, make("div", { className: "buttons" }, buttons)),
      make("td", { className: "label" }, percent(own.means[index])));
  });
  return make("div", { className: "patterns" },
    make("h3", {}, "Which head looks where, in this text"),
    scrolling("Which head looks where", "",
      headRow(["attention to", "most, as layer.head", `head ${layer}.${head}`]),
      make("tbody", {}, rows)),
    muted("Means over the queries that have such a key. The rows “previous token” and “first token” count from "
      + "position 2: at position 1, both are the same token. ",
      mark(`${layer}.${head}`), ` is layer ${layer}, head ${head}.`));
}

const LABELLED = 13; // pixels of a cell from which tokens are written beside the map

// The map of the selected head with a readout. The pointer previews a cell; a click or the arrow keys choose it.
function largeMap(run) {
  const { layer, head, query } = run.selected;
  const map = headMap(run, layer, head);
  const window = windowOf(run, layer);
  const kind = window === null ? "full attention" : `window of ${window} tokens`;
  const canvas = make("canvas", {
    className: "map", id: "large-map", tabIndex: 0, role: "application", "aria-describedby": "readout",
    "aria-label": `Attention of layer ${layer}, head ${head}. Arrow keys move the query and the key.`,
  });
  const readout = make("div", { id: "readout", role: "status" });
  listenToMap(run, layer, map, canvas, readout);
  const code = `layers.${layer}.attention.probabilities`;
  const rows = keysByProbability(run, map, query).slice(0, 5).map((key) => make("tr", {},
    make("td", { className: "muted" }, String(key)),
    make("th", { scope: "row", className: "label" }, run.help.tokenLabel(key)),
    make("td", {}, run.help.number(map.score(query, key))),
    bar(run, map.probability(query, key))));
  return make("div", { className: "large" },
    make("h3", {}, `Layer ${layer}, head ${head}: ${kind}`),
    canvas, readout,
    make("table", { className: "bars" },
      make("caption", {}, "Where ", mark(run.help.tokenLabel(query)), ` (position ${query}) looks`),
      headRow(["key", "token", "score", "probability"]),
      make("tbody", {}, rows)),
    scaleLegend(run, window),
    muted("The score is the product of query and key, divided by the root of their size D. ",
      scaleSentence(run, query),
      "The softmax makes probabilities of the scores of a row."),
    make("p", {}, button("Show the Python lines (in “Sizes and code”)", () => run.help.showCode(code))));
}

// What a query scale above 1 does, at positions beyond the original context; nothing elsewhere.
function scaleSentence(run, query) {
  const scale = queryScale(run.text, query);
  if (scale === 1) return "";
  return `Before that, the query is multiplied by the query scale of its position ${query}, ${scale.toFixed(4)}. `;
}

// Draw the map, and let pointer and keys move in it.
function listenToMap(run, layer, map, canvas, readout) {
  const { query, key } = run.selected;
  const last = run.tokens.length - 1;
  const paint = mapPainter(run, layer, map, canvas);
  const show = (row, column) => {
    paint(row, column);
    readout.replaceChildren(...readoutOf(run, layer, map, row, column));
  };
  const cellAt = (event) => {
    const box = canvas.getBoundingClientRect();
    const scale = canvas.width / paint.ratio / box.width;
    const row = Math.floor(((event.clientY - box.top) * scale - paint.edge) / paint.cell);
    const column = Math.floor(((event.clientX - box.left) * scale - paint.edge) / paint.cell);
    const isInside = [row, column].every((place) => place >= 0 && place <= last);
    return isInside ? [row, column] : null;
  };
  canvas.addEventListener("pointermove", (event) => show(...(cellAt(event) ?? [query, key])));
  canvas.addEventListener("pointerleave", () => show(query, key));
  canvas.addEventListener("click", (event) => {
    const chosen = cellAt(event);
    if (chosen !== null) select({ query: chosen[0], key: chosen[1] });
  });
  canvas.addEventListener("keydown", (event) => {
    const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (steps === undefined) return;
    event.preventDefault();
    const limit = (place) => Math.min(Math.max(place, 0), last);
    select({ query: limit(query + steps[0]), key: limit(key + steps[1]) });
  });
  show(query, key);
}

function readoutOf(run, layer, map, query, key) {
  const { tokenLabel, number, percent } = run.help;
  const isHidden = whyHidden(run, layer, map, query, key) !== null;
  const token = (name, place) => make("p", { className: "fact" }, `${name} `,
    make("strong", { className: "label" }, tokenLabel(place)), ` ${place}`);
  const value = (name, words) => make("p", { className: "fact" }, `${name} `, make("strong", {}, words));
  return [
    make("div", { className: "facts" },
      token("query", query),
      token("key", key),
      value("score", number(map.score(query, key))),
      value("probability", percent(isHidden ? 0 : map.probability(query, key)))),
    make("p", { className: "why" }, cellSentence(run, layer, map, query, key)),
  ];
}

// A function (query, key) that draws the map with these two marked. Token labels stand beside it if they fit.
function mapPainter(run, layer, map, canvas) {
  const S = run.tokens.length;
  const ratio = Math.min(devicePixelRatio || 1, 2);
  const width = document.getElementById("view").clientWidth;
  const share = width > 800 ? 0.5 : 1; // the small maps stand beside it
  const room = Math.min(Math.max(share * width, 240), 620);
  const labels = run.tokens.map((_, place) => clip(run.help.tokenLabel(place), 11));
  const font = `12px ${getComputedStyle(document.documentElement).fontFamily}`;
  const context = canvas.getContext("2d");
  context.font = `bold ${font}`;
  let edge = Math.ceil(Math.max(...labels.map((label) => context.measureText(label).width))) + 10;
  const hasLabels = (room - edge) / S >= LABELLED;
  if (!hasLabels) edge = 22;
  const cell = Math.min((room - edge) / S, 30);
  const side = Math.round(cell * S);
  const base = document.createElement("canvas");
  drawMap(run, base, layer, map, { size: side });
  canvas.width = canvas.height = (edge + side) * ratio;
  canvas.style.width = `${edge + side}px`;
  const ink = getComputedStyle(document.getElementById("about")).color;

  const write = (text, x, y, { turned = false, marked = false, align = "right" } = {}) => {
    context.save();
    context.translate(x, y);
    if (turned) context.rotate(Math.PI / 2);
    context.font = marked ? `bold ${font}` : font;
    context.fillStyle = marked ? accent() : ink;
    context.textAlign = align;
    context.textBaseline = "middle";
    context.fillText(text, 0, 0);
    context.restore();
  };
  const paint = (query, key) => {
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, canvas.width, canvas.height);
    context.drawImage(base, edge, edge, side, side);
    if (hasLabels) {
      labels.forEach((label, place) => {
        const middle = edge + (place + 0.5) * cell;
        write(label, edge - 5, middle, { marked: place === query });
        write(label, middle, edge - 5, { turned: true, marked: place === key });
      });
    } else {
      write("key →", edge, edge / 2, { align: "left" });
      write("query →", edge / 2, edge, { turned: true, align: "left" });
    }
    context.strokeStyle = accent();
    context.lineWidth = 1;
    context.strokeRect(edge + 0.5, edge + query * cell, side - 1, cell);
    context.lineWidth = 2;
    context.strokeRect(edge + key * cell, edge + query * cell, cell, cell);
  };
  return Object.assign(paint, { edge, cell, ratio });
}

function accent() {
  return getComputedStyle(document.querySelector("#tabs [aria-selected=true]")).color;
}

function clip(text, length) {
  return text.length > length ? `${text.slice(0, length - 1)}…` : text;
}

// What the colours mean.
function scaleLegend(run, window) {
  const { scaleColour } = run.help;
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
  run.text.layer_types.forEach((_, layer) => {
    rows.push({ title: `after layer ${layer}`, point: `layers.${layer}.mlp_residual` });
  });
  return rows;
}

// Positions whose guesses are missing are asked of the worker; then the view renders again.
function guessAt(run, positions) {
  if (lensed.trace !== run.trace) lensed = { trace: run.trace, guesses: new Map() };
  const missing = positions.filter((position) => !lensed.guesses.has(position));
  if (missing.length === 0) return true;
  const rows = lensRows(run);
  const E = run.text.hidden_size;
  const count = rows.length;
  const vectors = new Float32Array(missing.length * count * E);
  missing.forEach((position, index) => rows.forEach(({ point }, row) => {
    const vector = run.trace[point].data.subarray(position * E, (position + 1) * E);
    vectors.set(vector, (index * count + row) * E);
  }));
  const { trace, guesses } = lensed;
  run.ask({ kind: "lens", vectors }).then((result) => {
    missing.forEach((position, index) => {
      guesses.set(position, result.guesses.slice(index * count, (index + 1) * count));
    });
    if (trace === lensed.trace) select({});
  });
  return false;
}

VIEWS.push({
  id: "layers",
  title: "Layers",
  about: "The logit lens: which next token the model would give if it had no more layers than so far.",
  render(element, run) {
    const { query } = run.selected;
    const rows = lensRows(run);
    const first = Math.max(Math.min(query - COLUMNS + 3, run.tokens.length - COLUMNS), 0);
    const positions = [...run.tokens.keys()].slice(first, first + COLUMNS);
    if (!guessAt(run, positions)) {
      if (element.children.length === 0) element.replaceChildren(muted("Computing ..."));
      return;
    }
    element.replaceChildren(
      afterHeading(run),
      make("p", {}, depthSentence(run, rows)),
      muted("Each layer adds its result to one vector for each token, the residual stream. ",
        "The lens takes this vector early through the last norm and the output matrix. ",
        "The norm scales it to a root mean square of 1, times learned weights. ",
        "The output matrix has a row for each token of the vocabulary. ",
        "The product with this row is the token's logit."),
      make("div", { className: "stages" }, rows.map((row, index) => stageOf(run, row, index))),
      make("h3", {}, "The first guess at several positions"),
      lensTable(run, rows, positions),
      muted("After the last layer, the lens shows the model's own answer. ",
        "The embedding alone is nearest to its own token where it shares one matrix with the output."));
  },
});

// The most likely tokens after one layer, at the chosen position.
function stageOf(run, { title, point }, row) {
  const { query } = run.selected;
  const { labelOf, percent, tint } = run.help;
  const next = run.tokens[query + 1]?.id;
  const guesses = lensed.guesses.get(query)[row].slice(0, 4);
  const items = guesses.map((guess) => make("li", { className: chosenIf(guess.id === next) },
    make("span", { className: "label" }, labelOf(guess)),
    tint(make("span", { className: "share" }, percent(guess.probability)), guess.probability)));
  return make("section", { className: "guesses" },
    make("h4", {}, title),
    make("ol", {}, items),
    button("Python lines", () => run.help.showCode(point),
      { "aria-label": `Python lines ${title}`, title: "opens “Sizes and code”" }));
}

// The first guess after each layer (rows) at some positions (columns).
function lensTable(run, rows, positions) {
  const { tokenLabel, labelOf, percent, tint } = run.help;
  const { query } = run.selected;
  const choose = (position) => () => select({ query: position });
  const head = positions.map((position) => make("th", { scope: "col" },
    button(`${position} ${tokenLabel(position)}`, choose(position),
      { className: "small label", "aria-pressed": String(position === query) })));
  const guess = (position, row) => {
    const [best] = lensed.guesses.get(position)[row];
    const title = percent(best.probability);
    const cell = make("td", { className: "label guess", title, click: choose(position) }, labelOf(best));
    return tint(cell, best.probability);
  };
  const body = rows.map(({ title }, row) => make("tr", {},
    make("th", { scope: "row" }, title),
    positions.map((position) => guess(position, row))));
  const nextLabel = (position) => (position + 1 < run.tokens.length ? tokenLabel(position + 1) : "");
  const truth = make("tr", {},
    make("th", { scope: "row" }, "next in the text"),
    positions.map((position) => make("td", { className: "label" }, nextLabel(position))));
  return scrolling("First guesses", "lens",
    make("thead", {}, make("tr", {}, make("td", {}, ""), head)),
    make("tbody", {}, body, truth));
}

// From which layer on the first guess is the one of the model.
function depthSentence(run, rows) {
  const { labelOf } = run.help;
  const next = run.tokens[run.selected.query + 1];
  const guesses = lensed.guesses.get(run.selected.query).map(([best]) => best);
  const final = guesses.at(-1);
  let from = guesses.length - 1;
  while (from > 0 && guesses[from - 1].id === final.id) from -= 1;
  const since = rows[from].title;
  const text = `The model's first guess is “${labelOf(final)}”. It stands first from “${since}” on.`;
  if (next === undefined) return text;
  return `${text} The text goes on with “${labelOf(next)}”.`;
}
