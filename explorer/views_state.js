// The views of what the model keeps and counts: Cache, Positions, Mistakes, Image, Sizes and code. page.js calls them.
// The first part is arithmetic that needs no page; tests/test_explorer_state.py compares it with the Python files.
"use strict";

// ------------------------------------------------------------------------------------------------ arithmetic
// The cache of a layer after a forward pass with `fresh` new tokens on `past` earlier ones: ministral.SlidingLayerCache
// with `window` slots, or LayerCache if `window` is null. slots: the position in each slot that is in use; written: the
// slots of the new tokens; overwritten: {slot, old}; keys: the positions that attention gets, in the order of the cache.
function cacheStep(past, fresh, window) {
  const end = past + fresh;
  const first = window === null ? 0 : Math.max(end - window, 0); // the oldest position that is kept
  const held = (length) => newestPositions(length, window);
  const before = held(past);
  const slots = held(end);
  const written = [];
  const overwritten = [];
  for (let position = Math.max(past, first); position < end; position++) {
    const slot = window === null ? position : position % window;
    written.push(slot);
    if (slot < before.length) overwritten.push({ slot, old: before[slot] });
  }
  let keys = slots;
  if (window !== null && !(fresh === 1 && end > window)) { // one token in a full ring: slot order; else text order
    const oldest = Math.max(past - window + 1, 0);
    keys = Array.from({ length: end - oldest }, (_, index) => oldest + index);
  }
  return { slots, written, overwritten, keys };
}

// The position in each slot after `length` tokens: the newest p < length with p % window equal to the slot.
function newestPositions(length, window) {
  const count = window === null ? length : Math.min(length, window);
  const newest = length - 1;
  return Array.from({ length: count }, (_, slot) => window === null ? slot : newest - ((newest - slot) % window));
}

// The D/2 rotary pairs of a text configuration: the radians for each position without YaRN (plain) and with it (used),
// the zone of YaRN's ramp, null without YaRN, and the share of the plain frequency in the used one.
function rotaryPairs(text) {
  const rope = text.rope_parameters;
  const plain = rotaryFrequencies(text.head_dim, rope);
  if (!hasYarn(text)) return Array.from(plain, (value, pair) => ({ pair, plain: value, used: value, zone: null, share: 1 }));
  return Array.from(rotaryFrequencies(text.head_dim, rope, true), (used, pair) => {
    const stretched = plain[pair] / rope.factor;
    const share = (used - stretched) / (plain[pair] - stretched);
    let zone = "blended";
    if (used === plain[pair]) zone = "kept";
    else if (Math.abs(share) < 1e-4) zone = "stretched";
    return { pair, plain: plain[pair], used, zone, share };
  });
}

function hasYarn(text) {
  return text.rope_parameters.rope_type === "yarn";
}

// The factor on the query of a position, as ministral3.YarnRotaryEmbedding.forward; 1 without llama_4_scaling_beta.
function queryScale(text, position) {
  const rope = text.rope_parameters;
  if (!rope.llama_4_scaling_beta) return 1;
  return 1 + rope.llama_4_scaling_beta * Math.log(1 + Math.floor(position / rope.original_max_position_embeddings));
}

// An image (64 x 64 x 3 bytes) of shapes {place, kind, colour}, as training/shapes.paint with the middle of each draw.
const IMAGE_SIZE = 64;
const KINDS = ["circle", "square", "triangle"];
const COLOURS = { red: [220, 40, 40], green: [40, 160, 60], blue: [50, 80, 220], yellow: [240, 210, 40] };
const PLACES = ["top left", "top right", "bottom left", "bottom right"];

function paintShapes(shapes) {
  const radius = 11;
  const image = new Float32Array(IMAGE_SIZE * IMAGE_SIZE * 3).fill(240);
  for (const { place, kind, colour } of shapes) {
    const centreY = Math.floor(place / 2) * 32 + 16;
    const centreX = (place % 2) * 32 + 16;
    for (let row = 0; row < IMAGE_SIZE; row++) {
      for (let column = 0; column < IMAGE_SIZE; column++) {
        const edge = edgeDistance(kind, row + 0.5 - centreY, column + 0.5 - centreX, radius);
        const cover = Math.min(Math.max(0.5 - edge, 0), 1);
        for (let channel = 0; channel < 3; channel++) {
          const index = (row * IMAGE_SIZE + column) * 3 + channel;
          image[index] = image[index] * (1 - cover) + COLOURS[colour][channel] * cover;
        }
      }
    }
  }
  return Uint8Array.from(image, Math.round);
}

// Pixels from a point to the edge of a shape around (0, 0); negative inside. As training/shapes.distance.
function edgeDistance(kind, y, x, radius) {
  if (kind === "circle") return Math.hypot(y, x) - radius;
  if (kind === "square") return Math.max(Math.abs(y), Math.abs(x)) - 0.85 * radius;
  return Math.max(Math.abs(x) * 0.894 - (y + radius) * 0.447, y - radius);
}

// What two traces {name: {shape, data}} of one text differ in. first: the first point with another number, null if
// there is none; points: {name: largest difference}; layers: the largest difference of each layer's output.
function compareTraces(right, wrong) {
  const points = {};
  const layers = [];
  let first = null;
  for (const name of Object.keys(right)) {
    const difference = largestDifference(right[name].data, wrong[name]?.data);
    points[name] = difference;
    if (difference !== 0 && first === null) first = name;
    if (/^layers\.\d+\.mlp_residual$/.test(name)) layers.push(difference);
  }
  return { first, points, layers };
}

function largestDifference(a, b) {
  if (b === undefined || a.length !== b.length) return NaN; // a point that only one of them has
  let largest = 0;
  for (let index = 0; index < a.length; index++) {
    const difference = Math.abs(a[index] - b[index]);
    if (difference > largest) largest = difference;
  }
  return largest;
}

// ------------------------------------------------------------------------------------------------------ code
// Each point of reference/trace.POINTS: dimensions, and where it is computed: file, function, part of the line.
const IN_LAYER = ["ministral.py", "MinistralDecoderLayer.forward"];
const IN_ATTENTION = ["ministral.py", "MinistralAttention.forward"];
const EAGER = ["ministral.py", "eager_attention"];
const NORM = ["ministral.py", "RMSNorm.forward", "return self.weight"];
const MLP = ["ministral.py", "MinistralMLP.forward", "self.down_proj"];
const ROTATION = ["ministral.py", "apply_rotary_pos_emb", "return q * cos"];
const IN_TOWER = ["vision.py", "PixtralVisionModel.forward"];
const IN_VISION_LAYER = ["vision.py", "PixtralAttentionLayer.forward"];
const IN_VISION_ATTENTION = ["vision.py", "PixtralAttention.forward"];
const VISION_ANGLES = ["vision.py", "PixtralRotaryEmbedding.forward", "return angles.cos()"];
const IN_PROJECTOR = ["vision.py", "Mistral3MultiModalProjector.forward"];
const SOURCES = {
  "vision.patches": ["P C", [...IN_TOWER, "self.patch_conv("]],
  "vision.ln_pre": ["P C", [...IN_TOWER, "self.ln_pre("], NORM],
  "vision.cos": ["P D", VISION_ANGLES],
  "vision.sin": ["P D", VISION_ANGLES],
  "vision.layers.N.input_norm": ["P C", [...IN_VISION_LAYER, "self.attention_norm(x)"], NORM],
  "vision.layers.N.attention.q": ["H P D", [...IN_VISION_ATTENTION, "self.q_proj"]],
  "vision.layers.N.attention.k": ["H P D", [...IN_VISION_ATTENTION, "self.k_proj"]],
  "vision.layers.N.attention.v": ["H P D", [...IN_VISION_ATTENTION, "self.v_proj"]],
  "vision.layers.N.attention.q_rotated": ["H P D", [...IN_VISION_ATTENTION, "apply_rotary_pos_emb"], ROTATION],
  "vision.layers.N.attention.k_rotated": ["H P D", [...IN_VISION_ATTENTION, "apply_rotary_pos_emb"], ROTATION],
  "vision.layers.N.attention.heads": ["P C", ["vision.py", "PixtralAttention._attend", "F.scaled_dot_product"]],
  "vision.layers.N.attention.output": ["P C", [...IN_VISION_ATTENTION, "self.o_proj"]],
  "vision.layers.N.attention_residual": ["P C", [...IN_VISION_LAYER, "x = x + self.attention("]],
  "vision.layers.N.post_attention_norm": ["P C", [...IN_VISION_LAYER, "self.ffn_norm(x)"], NORM],
  "vision.layers.N.mlp.gate": ["P F", MLP],
  "vision.layers.N.mlp.up": ["P F", MLP],
  "vision.layers.N.mlp.activation": ["P F", MLP],
  "vision.layers.N.mlp.product": ["P F", MLP],
  "vision.layers.N.mlp.down": ["P C", MLP],
  "vision.layers.N.mlp_residual": ["P C", [...IN_VISION_LAYER, "return x + self.feed_forward"]],
  "projector.norm": ["P C", [...IN_PROJECTOR, "self.norm(x)"], NORM],
  "projector.merged": ["M C", ["vision.py", "Mistral3PatchMerger.forward", "self.merging_layer("]],
  "projector.hidden": ["M E", [...IN_PROJECTOR, "self.linear_1(x)"]],
  "projector.output": ["M E", [...IN_PROJECTOR, "self.linear_2("]],
  "embedding": ["B S E", ["ministral.py", "MinistralModel.embed", "self.embed_tokens(input_ids)"]],
  "layers.N.input_norm": ["B S E", [...IN_LAYER, "self.input_layernorm(x)"], NORM],
  "layers.N.attention.q": ["B H S D", [...IN_ATTENTION, "q = self.q_proj"]],
  "layers.N.attention.k": ["B G S D", [...IN_ATTENTION, "k = self.k_proj"]],
  "layers.N.attention.v": ["B G S D", [...IN_ATTENTION, "v = self.v_proj"]],
  "layers.N.attention.q_rotated": ["B H S D", ROTATION, ["ministral.py", "rotate_half", "torch.cat"]],
  "layers.N.attention.k_rotated": ["B G S D", ROTATION, ["ministral.py", "rotate_half", "torch.cat"]],
  "layers.N.attention.q_scaled": ["B H S D", ["ministral3.py", "Ministral3Attention.rotate", "q * scale"]],
  "layers.N.attention.scores": ["B H S T", [...EAGER, "scores = torch.matmul("]],
  "layers.N.attention.mask": ["B S T", ["ministral.py", "make_attention_mask", "mask = distance >= 0"]],
  "layers.N.attention.probabilities": ["B H S T", [...EAGER, "F.softmax("]],
  "layers.N.attention.heads": ["B S HD", [...EAGER, "torch.matmul(probs, v)"]],
  "layers.N.attention.output": ["B S E", [...IN_ATTENTION, "self.o_proj("]],
  "layers.N.attention_residual": ["B S E", [...IN_LAYER, "x = x + attended"]],
  "layers.N.post_attention_norm": ["B S E", [...IN_LAYER, "self.post_attention_layernorm(x)"], NORM],
  "layers.N.mlp.gate": ["B S F", MLP],
  "layers.N.mlp.up": ["B S F", MLP],
  "layers.N.mlp.activation": ["B S F", MLP],
  "layers.N.mlp.product": ["B S F", MLP],
  "layers.N.mlp.down": ["B S E", MLP],
  "layers.N.mlp_residual": ["B S E", [...IN_LAYER, "return x + self.mlp("]],
  "final_norm": ["B S E", ["ministral.py", "MinistralModel.forward", "x = self.norm(x)"], NORM],
  "logits": ["B S V", ["ministral.py", "MinistralForCausalLM.forward", "logits_and_loss(self.lm_head"]],
};

// Where a point is computed in this model: a list of [file, function, part of the line].
function sourcesOf(name, config) {
  const general = name.replace(/layers\.\d+/, "layers.N");
  const isFirstFamily = (config.text_config ?? config).model_type === "ministral";
  if (general.endsWith("q_scaled") && isFirstFamily) {
    return [["ministral.py", "MinistralAttention.rotate", "apply_rotary_pos_emb"]]; // there is no scale
  }
  if (general === "embedding" && config.vision_config) {
    return [...SOURCES.embedding.slice(1), ["vision.py", "Mistral3Model.embed", "masked_scatter"]];
  }
  return SOURCES[general].slice(1);
}

// The lines of a Python function, "name" or "Class.name", in a file: {first (counted from 1), lines}, or null.
function functionLines(source, name) {
  const lines = source.split("\n");
  let start = 0;
  let indent = "";
  for (const part of name.split(".")) {
    const opening = new RegExp(`^${indent}(class|def) ${part}\\b`);
    start = lines.findIndex((line, index) => index >= start && opening.test(line));
    if (start < 0) return null;
    indent += "    ";
  }
  const body = new RegExp(`^(${indent}|\\s*$|${indent.slice(4)}\\))`); // a line ") -> int:" ends the head of a function
  let end = start + 1;
  while (end < lines.length && body.test(lines[end])) end++;
  while (lines[end - 1].trim() === "") end--;
  return { first: start + 1, lines: lines.slice(start, end) };
}

// --------------------------------------------------------------------------------------------------- elements
// What the reader chose in a view. It lives here, because a view is made anew when the selection changes.
const chosen = {
  cache: { step: null, slot: 3, window: "model", reading: "single" },
  positions: { position: null },
  mistakes: { name: null, long: false, result: null },
  image: { shapes: [{ place: 0, kind: "circle", colour: "red" }, { place: 3, kind: "square", colour: "blue" }],
    question: "What do you see?", head: "all" },
  sizes: { point: null },
};

let madeIds = 0;

// The token that was chosen since a view was last made, or null.
function newQuery(run, state) {
  const isNew = state.query !== undefined && state.query !== run.selected.query;
  state.query = run.selected.query;
  return isNew ? state.query : null;
}

// A label over a control, and below it what `describe` says of the value.
function slider(label, { min, max, value, describe }, changed) {
  madeIds += 1;
  const id = `state-${madeIds}`;
  const output = make("output", { htmlFor: id }, describe(value));
  const input = make("input", { type: "range", id, min, max, value, "aria-valuetext": describe(value), input: () => {
    element.set(Number(input.value));
    changed(Number(input.value));
  } });
  const element = make("div", { className: "state-control state-slider" }, make("label", { htmlFor: id }, label), input, output);
  element.set = (other) => {
    input.value = other;
    output.textContent = describe(other);
    input.setAttribute("aria-valuetext", describe(other));
  };
  return element;
}

function choice(label, options, value, changed) {
  madeIds += 1;
  const id = `state-${madeIds}`;
  const select = make("select", { id, change: () => changed(select.value) }, options.map(([key, text]) =>
    make("option", { value: key, selected: String(key) === String(value) }, text)));
  return make("div", { className: "state-control" }, make("label", { htmlFor: id }, label), select);
}

function paragraph(...children) {
  return make("p", {}, ...children);
}

// A table that scrolls sideways on a narrow screen. Cells are texts or elements; the first of a row is its heading.
function table(caption, head, rows, className = "") {
  const cells = (row) => row.map((cell, index) => make(index === 0 ? "th" : "td", { scope: index === 0 ? "row" : null }, cell));
  return make("div", { className: "state-scroll", tabIndex: 0, role: "region", "aria-label": caption },
    make("table", { className }, make("caption", {}, caption),
      make("thead", {}, make("tr", {}, head.map((cell) => make("th", { scope: "col" }, cell)))),
      make("tbody", {}, rows.map((row) => make("tr", {}, cells(row))))));
}

// Arrow keys move between the buttons of a group, of which one can be reached with Tab.
function arrowKeys(group, columns) {
  group.addEventListener("keydown", (event) => {
    const buttons = [...group.querySelectorAll("button")];
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns(), ArrowUp: -columns() };
    const target = buttons[buttons.indexOf(document.activeElement) + steps[event.key]];
    if (target === undefined) return;
    event.preventDefault();
    target.focus();
  });
}

function quoted(run, position) {
  if (position >= run.tokens.length) return "";
  return ` “${run.help.tokenLabel(position)}”`;
}

// A number with separators of thousands; a byte count in the largest fitting unit.
function count(number) {
  return number.toLocaleString("en-US");
}

function byteText(bytes) {
  if (bytes < 1000) return `${bytes} B`;
  if (bytes < 1e6) return `${(bytes / 1e3).toFixed(1)} kB`;
  if (bytes < 1e9) return `${(bytes / 1e6).toFixed(2)} MB`;
  return `${(bytes / 1e9).toFixed(2)} GB`;
}

// ------------------------------------------------------------------------------------------------------ cache
VIEWS.push({
  id: "cache",
  title: "Cache",
  about: "Which position is in which slot of the cache, step by step, and which keys attention gets.",
  render(element, run) {
    const state = chosen.cache;
    const kinds = run.text.layer_types;
    const kind = kinds[run.selected.layer];
    const modelWindow = kind === "sliding_attention" ? run.text.sliding_window : null;
    const window = state.window === "model" ? modelWindow : Number(state.window);
    const last = Math.max(lastStep(run, state.reading), 32, (window ?? 0) + 16);
    const query = newQuery(run, state);
    if (query !== null) state.step = stepOf(run, state.reading, query);
    state.step = Math.min(state.step ?? lastStep(run, state.reading), last);

    const own = modelWindow === null ? "none: every position is kept" : `${modelWindow}, of this model`;
    const windows = [["model", own], ...[4, 8, 16].map((size) => [size, `${size}, a demonstration`])];
    const readings = [["single", "token by token"], ["once", "in one step, as in this run"]];
    const result = make("div");
    const draw = () => result.replaceChildren(...cacheResult(run, window, draw));
    element.replaceChildren(
      make("div", { className: "state-controls" },
        layerChoice(run),
        choice("Window", windows, state.window, (value) => { state.window = value; state.step = null; select({}); }),
        choice("The prompt is read", readings, state.reading, (value) => { state.reading = value; state.step = null; select({}); }),
        slider("Step", { min: 1, max: last, value: state.step, describe: (step) => stepText(run, state.reading, step) },
          (step) => { state.step = step; draw(); })),
      cacheAbout(run, modelWindow, window),
      result);
    draw();
  },
});

// Steps of this run: the prompt is one step, or as many as it has tokens.
function lastStep(run, reading) {
  if (reading === "single") return run.tokens.length;
  return 1 + run.tokens.length - run.prompt;
}

// The tokens that a step reads: [how many before it, how many].
function stepTokens(run, reading, step) {
  if (reading === "single") return [step - 1, 1];
  if (step === 1) return [0, run.prompt];
  return [run.prompt + step - 2, 1];
}

function stepOf(run, reading, position) {
  if (reading === "single") return position + 1;
  return Math.max(position - run.prompt + 2, 1);
}

function stepText(run, reading, step) {
  const [past, fresh] = stepTokens(run, reading, step);
  return `step ${step}: ${past + fresh} ${past + fresh === 1 ? "token" : "tokens"} read`;
}

function cacheAbout(run, modelWindow, window) {
  if (window === null) {
    const rings = [...run.text.layer_types.keys()].filter((layer) => run.text.layer_types[layer] === "sliding_attention");
    let hint = "No layer of this model has a ring; choose a small window to see what one does with the same text.";
    if (rings.length > 0) hint = `Layers ${rings.join(", ")} have a ring of ${run.text.sliding_window} slots.`;
    return paragraph("This layer uses full attention. Its cache only grows: position p is in slot p, and no key is overwritten. ", hint);
  }
  const text = `A ring of W = ${window} slots: position p is in slot p % ${window}. A token sees the last ${window} positions, `
    + `its own included. So ${window} keys are all that it needs, and a new key takes the place of the one that has just left the window.`;
  if (window === modelWindow) return paragraph(text);
  const model = modelWindow === null ? "keeps every position" : `has ${modelWindow} slots`;
  return paragraph(make("strong", {}, "Demonstration of the slot arithmetic. "), text,
    ` The layer of this model ${model}.`);
}

function cacheResult(run, window) {
  const state = chosen.cache;
  const [past, fresh] = stepTokens(run, state.reading, state.step);
  const step = cacheStep(past, fresh, window);
  const size = window ?? step.slots.length;
  state.slot = Math.min(state.slot, size - 1);
  const note = make("p", { className: "state-note", role: "status" });
  const describe = () => { note.textContent = slotSentence(run, window, past + fresh, state.slot); };
  describe();
  return [
    make("p", { className: "state-lead", role: "status" }, stepSentence(run, window, past, fresh, step)),
    slotGrid(run, size, step, describe),
    note,
    make("h3", {}, `Attention gets ${count(step.keys.length)} keys`),
    make("ol", { className: "state-keys" }, step.keys.map((position) => make("li", {
      className: position >= past ? "state-new" : "" }, String(position)))),
    paragraph(keysSentence(window, past, fresh, step)),
  ];
}

function stepSentence(run, window, past, fresh, step) {
  const end = past + fresh;
  const tail = end > run.tokens.length ? " The text ends before: this is the arithmetic alone." : "";
  if (fresh > 1) {
    const stored = step.written.length;
    let kept = "All of them are stored.";
    if (stored < fresh) kept = `The last ${stored} of them are stored.`;
    return `Step ${chosen.cache.step} reads ${fresh} tokens at once, positions ${past} to ${end - 1}. ${kept}${tail}`;
  }
  let place = `It goes into slot ${past}.`;
  if (window !== null) place = `It goes into slot ${past} % ${window} = ${past % window}.`;
  let old = " The slot was empty.";
  for (const { old: position } of step.overwritten) old = ` It overwrites position ${position}${quoted(run, position)}.`;
  return `Step ${chosen.cache.step} reads position ${past}${quoted(run, past)}. ${place}${old}${tail}`;
}

function slotSentence(run, window, length, slot) {
  const position = newestPositions(length, window)[slot];
  if (position === undefined) return `Slot ${slot} is empty: no position below ${length} belongs into it.`;
  const holds = `Slot ${slot} holds position ${position}${quoted(run, position)}`;
  if (window === null) return `${holds}.`;
  const all = [];
  for (let p = slot; p < length; p += window) all.push(p);
  const list = all.length > 6 ? ["…", ...all.slice(-5)] : all;
  return `${holds}. Positions with p % ${window} = ${slot} so far: ${list.join(", ")}. The newest stays: `
    + `${length - 1} − (${length - 1} − ${slot}) % ${window} = ${position}.`;
}

function slotGrid(run, size, step, describe) {
  const written = new Set(step.written);
  const old = new Map(step.overwritten.map((item) => [item.slot, item.old]));
  const grid = make("div", { className: "state-slots", role: "group", "aria-label": "Slots of the cache" });
  const choose = (slot) => {
    chosen.cache.slot = slot;
    [...grid.children].forEach((button, index) => {
      button.tabIndex = index === slot ? 0 : -1;
      button.setAttribute("aria-pressed", String(index === slot));
    });
    describe();
  };
  for (let slot = 0; slot < size; slot++) {
    const position = step.slots[slot];
    let change = "";
    if (written.has(slot)) change = "new";
    if (old.has(slot)) change = `was ${old.get(slot)}`;
    grid.append(slotButton(run, slot, position, change, () => choose(slot)));
  }
  choose(chosen.cache.slot);
  arrowKeys(grid, () => getComputedStyle(grid).gridTemplateColumns.split(" ").length);
  return grid;
}

function slotButton(run, slot, position, change, choose) {
  let content = ["–", "empty"];
  let kind = "state-empty";
  if (position !== undefined) {
    content = [String(position), position < run.tokens.length ? run.help.tokenLabel(position) : "not read"];
    kind = change ? "state-new" : "";
  }
  const label = `slot ${slot}: ${position === undefined ? "empty" : `position ${content.join(", ")}`}${change && `, ${change}`}`;
  return make("button", { type: "button", className: `state-slot ${kind}`, "aria-label": label, focus: choose, click: choose },
    make("span", { className: "state-small" }, `slot ${slot}`),
    make("b", {}, content[0]),
    make("span", { className: "state-token" }, content[1]),
    make("span", { className: "state-small" }, change || "\u00a0"));
}

function keysSentence(window, past, fresh, step) {
  const end = past + fresh;
  if (window === null) return "Every position so far, in the order of the text.";
  if (fresh > 1) {
    const old = step.keys.length - fresh;
    const before = old === 0 ? "There are no earlier keys." : `The last ${old} earlier ones are what the first new token still sees.`;
    return `The ${fresh} new keys, in the order of the text. ${before} The mask hides those outside the window of each token.`;
  }
  if (end <= window) return "The ring is not full: slots are positions, and all of them are visible.";
  return `Position ${past} sees positions ${end - window} to ${past}: these are W = ${window} keys, and they are all in the `
    + "ring. They come in the order of slots. That does not matter: a key is rotated by its position before it is stored, and "
    + "attention adds up all of them.";
}

// -------------------------------------------------------------------------------------------------- positions
VIEWS.push({
  id: "positions",
  title: "Positions",
  about: "By which angles a position rotates queries and keys, what YaRN changes, and how queries are scaled.",
  render(element, run) {
    const state = chosen.positions;
    const longest = run.text.max_position_embeddings - 1;
    const length = run.tokens.length;
    state.position = newQuery(run, state) ?? state.position ?? 5;
    const result = make("div");
    const end = Math.min(Math.max(length + 15, 31), longest);
    const near = slider("Position near the text", { min: 0, max: end, value: Math.min(state.position, end),
      describe: (position) => `position ${position}${quoted(run, position)}` }, (position) => show(position));
    const show = (position) => {
      state.position = Math.min(Math.max(Math.round(position) || 0, 0), longest);
      number.value = state.position;
      near.set(state.position);
      result.replaceChildren(...positionResult(run, state.position));
    };
    const number = make("input", { type: "number", id: "state-position", min: 0, max: longest, change: () => show(number.value) });
    const original = run.text.rope_parameters.original_max_position_embeddings;
    const jumps = [5, 100, original - 1, original, longest].filter((position) => position >= 0 && position <= longest);
    element.replaceChildren(
      make("div", { className: "state-controls" },
        make("div", { className: "state-control" },
          make("label", { htmlFor: "state-position" }, `Position (0 to ${count(longest)})`), number),
        near,
        make("div", { className: "state-buttons", role: "group", "aria-label": "Positions" },
          jumps.map((position) => make("button", { type: "button", click: () => show(position) }, count(position))))),
      result);
    show(state.position);
  },
});

function positionResult(run, position) {
  const pairs = rotaryPairs(run.text);
  return [
    make("p", { className: "state-lead", role: "status" }, positionSentence(run, pairs, position)),
    make("div", { className: "state-dials", role: "list" }, pairs.map((pair) => dial(pair, position))),
    dialLegend(run.text),
    make("div", { className: "state-split" },
      angleTable(run.text, pairs, position),
      make("div", {},
        make("h3", {}, "Periods"), periods(run.text, pairs),
        make("h3", {}, "Scale of the query"), scales(run.text, position))),
  ];
}

function positionSentence(run, pairs, position) {
  const start = `Position ${count(position)}${quoted(run, position)}`;
  if (pairs[0].zone === null) {
    return `${start}: pair i turns by ${position} · θ^(−2i/D) radians, with θ = ${count(run.text.rope_parameters.rope_theta)} and D = `
      + `${run.text.head_dim}. This model has plain rotary positions, no YaRN.`;
  }
  const changed = pairs.filter((pair) => pair.used !== pair.plain);
  if (position === 0) return `${start}: every angle is 0, with YaRN and without.`;
  const most = changed.reduce((best, pair) => (pair.plain - pair.used > best.plain - best.used ? pair : best));
  return `${start}: YaRN changes the angles of ${changed.length} of ${pairs.length} pairs. It changes pair ${most.pair} most: `
    + `${radians(position * most.plain)} rad without YaRN, ${radians(position * most.used)} rad with it.`;
}

function radians(angle) {
  if (angle === 0) return "0";
  if (angle < 0.001) return angle.toExponential(3);
  return angle.toPrecision(Math.max(5, Math.ceil(Math.log10(angle)) + 3));
}

const DIAL = 32; // radius

function dial(pair, position) {
  const hand = (angle, name) => make("svg:line", { class: name, x1: 36, y1: 36,
    x2: 36 + DIAL * Math.cos(angle), y2: 36 - DIAL * Math.sin(angle) });
  const plain = position * pair.plain;
  const used = position * pair.used;
  let said = `pair ${pair.pair}: ${radians(used)} radians`;
  if (pair.zone !== null) said += `, ${radians(plain)} without YaRN, ${pair.zone}`;
  return make("div", { className: "state-dial", role: "listitem" },
    make("svg:svg", { viewBox: "0 0 72 72", width: 72, height: 72, role: "img", "aria-label": said },
      make("svg:circle", { cx: 36, cy: 36, r: DIAL }),
      make("svg:line", { class: "state-tick", x1: 36 + DIAL - 5, y1: 36, x2: 36 + DIAL, y2: 36 }),
      pair.zone === null ? null : hand(plain, "state-hand-plain"),
      hand(used, "state-hand")),
    make("span", {}, `pair ${pair.pair}`),
    pair.zone === null ? null : make("span", { className: `state-small state-zone-${pair.zone}` }, pair.zone));
}

function dialLegend(text) {
  const turning = "Angles grow counterclockwise from the right.";
  if (!hasYarn(text)) return make("p", { className: "state-legend" }, turning);
  return make("p", { className: "state-legend" }, make("span", { className: "state-key" }, "with YaRN (this model)"),
    make("span", { className: "state-key state-key-plain" }, "without YaRN"), turning);
}

function angleTable(text, pairs, position) {
  if (!hasYarn(text)) {
    return table(`Angles at position ${position}`, ["Pair", "Radians per position", "Angle in radians"],
      pairs.map((pair) => [String(pair.pair), radians(pair.plain), radians(position * pair.plain)]), "state-numbers");
  }
  const head = ["Pair", "Without YaRN", "With YaRN", "Difference", "Zone"];
  return table(`Angles at position ${position}, in radians`, head, pairs.map((pair) => [
    String(pair.pair), radians(position * pair.plain), radians(position * pair.used),
    pair.used === pair.plain ? "0" : `−${radians(position * (pair.plain - pair.used))}`, zoneText(pair)]), "state-numbers");
}

function zoneText(pair) {
  if (pair.zone !== "blended") return pair.zone;
  return `blended, ${Math.round(100 * pair.share)} % plain`;
}

// A plot that fills the width of its element and is drawn again when that changes. Its text keeps its size in pixels.
// x and y: {from, to, log, ticks, label}; series: [{points: [[x, y], ...], className}]; zones: [{from, to, className}].
function plot(description, x, y, series, zones = [], mark = null) {
  const element = make("div", { className: "state-plot" });
  element.redraw = () => {
    const width = Math.max(element.clientWidth, 240);
    const height = 220;
    const [left, right, top, bottom] = [56, 12, 10, 40];
    const scale = (axis, start, end) => (value) => {
      const of = axis.log ? Math.log : Number;
      return start + ((of(value) - of(axis.from)) / (of(axis.to) - of(axis.from))) * (end - start);
    };
    const toX = scale(x, left, width - right);
    const toY = scale(y, height - bottom, top);
    const line = (name, x1, y1, x2, y2) => make("svg:line", { class: name, x1, y1, x2, y2 });
    const label = (text, at, line, anchor) => make("svg:text", { x: at, y: line, "text-anchor": anchor }, text);
    element.replaceChildren(make("svg:svg", { width, height, role: "img", "aria-label": description },
      zones.map((zone) => make("svg:rect", { class: zone.className, x: toX(zone.from), y: top,
        width: Math.max(toX(zone.to) - toX(zone.from), 0), height: height - bottom - top })),
      y.ticks.map((tick) => [line("state-grid", left, toY(tick), width - right, toY(tick)),
        label(y.text(tick), left - 8, toY(tick) + 4, "end")]),
      x.ticks.map((tick) => label(x.text(tick), toX(tick), height - bottom + 18, tick === x.to ? "end" : "middle")),
      label(x.label, (left + width - right) / 2, height - 4, "middle"),
      series.map(({ className, points }) => make("svg:polyline", { class: className,
        points: points.map(([a, b]) => `${toX(a)},${toY(b)}`).join(" ") })),
      mark && [line("state-mark", toX(mark.x), top, toX(mark.x), height - bottom),
        make("svg:circle", { class: "state-dot", cx: toX(mark.x), cy: toY(mark.y), r: 5 })]));
  };
  new ResizeObserver(() => { if (element.clientWidth) element.redraw(); }).observe(element);
  return element;
}

// The period of each pair: positions until it has turned once.
function periods(text, pairs) {
  const rope = text.rope_parameters;
  const of = (frequency) => (2 * Math.PI) / frequency;
  const last = pairs.length - 1;
  const longest = of(pairs[last].used);
  const ticks = [10, 100, 1000, 1e4, 1e5, 1e6, 1e7, 1e8].filter((tick) => tick <= longest);
  const step = Math.ceil(pairs.length / 8);
  const x = { from: -0.5, to: last + 0.5, label: "pair", text: String,
    ticks: pairs.map(({ pair }) => pair).filter((pair) => pair % step === 0) };
  const y = { from: 5, to: longest * 1.3, log: true, ticks,
    text: (tick) => (tick < 1e5 ? count(tick) : tick.toExponential(0).replace("e+", "e")) };
  const used = { className: "state-line", points: pairs.map((pair) => [pair.pair, of(pair.used)]) };
  if (pairs[0].zone === null) {
    return [plot("Periods of the rotary pairs", x, y, [used]),
      paragraph("The period of a pair is the number of positions in which it turns once: "
        + `from ${of(pairs[0].used).toFixed(2)} to ${count(Math.round(longest))}.`)];
  }
  const zones = ["kept", "blended", "stretched"].map((name) => {
    const inside = pairs.filter((pair) => pair.zone === name).map((pair) => pair.pair);
    return { name, inside, from: inside[0] - 0.5, to: inside.at(-1) + 0.5, className: `state-band-${name}` };
  }).filter((zone) => zone.inside.length > 0);
  const plain = { className: "state-line-plain", points: pairs.map((pair) => [pair.pair, of(pair.plain)]) };
  const words = {
    kept: `They turn more than ${rope.beta_fast ?? 32} times within the original context and stay as they are.`,
    blended: "They are stretched in part.",
    stretched: `They turn less than ${turnsText(rope.beta_slow ?? 1)} within it. Their period is ${rope.factor} times as long.`,
  };
  return [
    plot("Periods of the rotary pairs, with YaRN and without, on a logarithmic scale", x, y, [plain, used], zones),
    make("ul", { className: "state-zones" }, zones.map((zone) => make("li", {},
      make("span", { className: `state-key state-band-${zone.name}` }), make("b", {}, zone.name),
      `, ${rangeText(zone.inside)}. ${words[zone.name]}`))),
    paragraph("The period of a pair is the number of positions in which it turns once. The original context has "
      + `${count(rope.original_max_position_embeddings)} positions. Solid: with YaRN. Dashed: without.`),
  ];
}

function turnsText(turns) {
  return turns === 1 ? "once" : `${turns} times`;
}

function rangeText(pairs) {
  if (pairs.length === 1) return `pair ${pairs[0]}`;
  return `pairs ${pairs[0]} to ${pairs.at(-1)}`;
}

function scales(text, position) {
  const rope = text.rope_parameters;
  const beta = rope.llama_4_scaling_beta;
  if (!beta) return [paragraph("This model does not scale its queries.")];
  const original = rope.original_max_position_embeddings;
  const end = text.max_position_embeddings;
  const points = [];
  for (let start = 0; start < end; start += original) {
    const scale = queryScale(text, start);
    points.push([start, scale], [Math.min(start + original, end), scale]);
  }
  const top = queryScale(text, end - 1);
  const scale = queryScale(text, position);
  const x = { from: 0, to: end, label: "position", text: count, ticks: [0, 1, 2, 3, 4].map((part) => (part * end) / 4) };
  const y = { from: 0.95, to: Math.ceil(top * 10 + 0.5) / 10, text: (tick) => tick.toFixed(1),
    ticks: [1, 1.1, 1.2, 1.3, 1.4, 1.5].filter((tick) => tick <= top + 0.05) };
  const steps = Math.floor(position / original);
  let place = "Scores of later queries are larger, so that the softmax stays sharp over long texts.";
  if (position < original) place = `It stays 1 below position ${count(original)}, so short texts do not show it.`;
  return [
    plot(`Scale of the query by position; ${scale.toFixed(4)} at position ${position}`, x, y,
      [{ className: "state-line", points }], [], { x: position, y: scale }),
    paragraph(`The query of position ${count(position)} is multiplied by `
      + `1 + ${beta} · ln(1 + ⌊${count(position)} / ${count(original)}⌋) = 1 + ${beta} · ln(${1 + steps}) = `, make("b", {}, scale.toFixed(4)), `. ${place}`),
  ];
}

// --------------------------------------------------------------------------------------------------- mistakes
// Known mistakes of ports, by their names in reference/mutants. says(text): what the mistake is and how it happens;
// cannot(text): why this model cannot show it, or null; from(text): the number of tokens from which it shows.
const MISTAKE_TEXTS = {
  yarn_missing: {
    title: "YaRN off",
    says: ({ rope_parameters: rope }) => "The port uses plain rotary frequencies. This happens when it reads rope_theta "
      + "alone, or when it applies YaRN only to texts longer than the original context of "
      + `${count(rope.original_max_position_embeddings)} tokens. YaRN acts at every position, also in short texts.`,
    cannot: (text) => hasYarn(text) ? null : "This model has plain rotary positions.",
    from: () => 2,
  },
  yarn_magnitude_1_277: {
    title: "Magnitude 1.277",
    says: ({ rope_parameters: rope }) => {
      const magnitude = 0.1 * Math.log(rope.factor) + 1;
      return `The port multiplies cosine and sine by 0.1 · ln(${rope.factor}) + 1 = ${magnitude.toFixed(3)}, the magnitude of `
        + "the YaRN paper. Ministral 3 sets mscale and mscale_all_dim to the same value, and then it is 1. A port that does not "
        + "read these two keys multiplies "
        + `every score by ${(magnitude ** 2).toFixed(2)}, and attention becomes too sharp.`;
    },
    cannot: (text) => hasYarn(text) ? null : "Only YaRN has a magnitude.",
    from: () => 1,
  },
  query_scale_missing: {
    title: "Query scale off",
    says: ({ rope_parameters: rope }) => "The port does not scale queries by their position (llama_4_scaling_beta). The scale "
      + `is 1 below position ${count(rope.original_max_position_embeddings)}, so tests with short texts do not find the mistake.`,
    cannot: (text) => text.rope_parameters.llama_4_scaling_beta ? null : "This model does not scale its queries.",
    from: (text) => text.rope_parameters.original_max_position_embeddings + 1,
  },
  window_plus_1: {
    title: "Window W + 1",
    says: ({ sliding_window: window }) => `The port lets a token see ${window} keys and itself. It is ${window} keys, its own `
      + `included. FlashAttention's window_size=(W, 0) is W + 1 keys: a port must pass ${window - 1} there.`,
    cannot: (text) => {
      if (text.layer_types.includes("sliding_attention")) return null;
      return "This model has no sliding window: every layer uses full attention.";
    },
    from: (text) => text.sliding_window + 1,
  },
  rope_interleaved: {
    title: "Interleaved RoPE",
    says: ({ head_dim: D }) => "The port rotates neighbouring numbers of a head, (x[2i], x[2i + 1]). These weights are in the "
      + `order of Transformers, whose pairs are ${D / 2} apart, (x[i], x[i + ${D / 2}]). Mistral's own files have the other `
      + "order, so a port that mixes the two makes this mistake.",
    cannot: () => null,
    from: () => 2,
  },
  no_cache: {
    title: "No cache",
    says: () => "The port reads the whole text again for each new token. The text stays the same. Only time is lost, and more "
      + "with each token.",
    cannot: () => null,
    from: () => 1,
  },
};
const WRITTEN = 24; // tokens that both models write
const TIMED = 12; // tokens that are written with a cache and without one
const LONGEST = 480; // tokens of a text that is made longer; the worker reads up to 512

VIEWS.push({
  id: "mistakes",
  title: "Mistakes",
  about: "Known mistakes of ports: the right model and the mistaken one read the same text, side by side.",
  render(element, run) {
    const state = chosen.mistakes;
    const list = make("fieldset", { className: "state-options" }, make("legend", {}, "Choose a mistake"));
    const places = { about: make("div"), lead: make("p", { className: "state-lead", role: "status" }), rest: make("div") };
    for (const [name, mistake] of Object.entries(MISTAKE_TEXTS)) {
      const reason = mistake.cannot(run.text);
      const choose = () => {
        Object.assign(state, { name, long: false });
        showMistake(places, run);
      };
      list.append(make("label", { className: reason === null ? "" : "state-off" },
        make("input", { type: "radio", name: "state-mistake", value: name, checked: name === state.name,
          disabled: reason !== null, change: choose }),
        make("span", {}, mistake.title, reason && make("span", { className: "state-small" }, reason))));
    }
    places.lead.textContent = "Both models then read the text above: the right one, and one with the mistake.";
    element.replaceChildren(list, ...Object.values(places));
    if (state.name !== null && MISTAKE_TEXTS[state.name].cannot(run.text) === null) showMistake(places, run);
  },
});

// Show a mistake: from the last result if it is of this text, else after the worker has computed it.
async function showMistake(places, run) {
  const state = chosen.mistakes;
  const { name, long } = state;
  const mistake = MISTAKE_TEXTS[name];
  const key = [name, long, run.prompt, ...run.tokens.map(({ id }) => id)].join();
  const { about, lead, rest } = places;
  about.replaceChildren(make("h3", {}, mistake.title), paragraph(mistake.says(run.text)));
  if (state.result?.key !== key) {
    lead.textContent = "Computing with both models …";
    rest.replaceChildren();
    await new Promise((resolve) => setTimeout(resolve, 200)); // arrow keys may pass over this mistake
    const isStill = () => state.name === name && state.long === long && lead.isConnected;
    if (!isStill()) return;
    try {
      const result = await (name === "no_cache" ? withoutCache(run) : withMistake(run, name, long));
      if (!isStill()) return;
      state.result = { key, ...result };
    } catch (error) {
      lead.textContent = error.message;
      return;
    }
  }
  if (name === "no_cache") showTimes(places, run, state.result);
  else if (state.result.difference.first === null) showNoDifference(places, run, mistake, state.result);
  else showDifference(places, run, mistake, state.result);
}

// Both models read the same tokens, and both write on from the prompt, always with the most likely token.
async function withMistake(run, name, long) {
  const { images } = run;
  let ids = run.tokens.map(({ id }) => id);
  let prompt = ids.slice(0, run.prompt);
  if (long) prompt = ids = longerIds(run.tokens, MISTAKE_TEXTS[name].from(run.text) + 15);
  const write = { kind: "run", ids: prompt, images, generate: WRITTEN };
  const right = long ? (await run.ask({ kind: "run", ids, images, trace: true })).trace : run.trace;
  const wrong = (await run.ask({ kind: "run", ids, images, trace: true, mistakes: [name] })).trace;
  const difference = compareTraces(right, wrong);
  if (difference.first === null) return { difference, length: ids.length };
  const texts = [await run.ask(write), await run.ask({ ...write, mistakes: [name] })].map((answer) => answer.tokens.slice(prompt.length));
  const changes = run.text.layer_types.map((_, layer) => largestChange(right, wrong, layer, null));
  const most = changes.reduce((best, change) => (change.size > best.size ? change : best));
  return { right, wrong, texts, difference, most, length: ids.length };
}

// Where the attention of a layer changed most, in one head or (null) in any: {layer, head, query, key, before, after, size}.
function largestChange(right, wrong, layer, head) {
  const name = `layers.${layer}.attention.probabilities`;
  const { shape, data } = right[name];
  const [, , S, T] = shape;
  const other = wrong[name].data;
  let most = (head ?? 0) * S * T;
  const end = head === null ? data.length : (head + 1) * S * T;
  for (let index = most; index < end; index++) {
    if (Math.abs(data[index] - other[index]) > Math.abs(data[most] - other[most])) most = index;
  }
  return { layer, head: Math.floor(most / (S * T)), query: Math.floor(most / T) % S, key: most % T, before: data[most], after: other[most],
    size: Math.abs(data[most] - other[most]) };
}

// The ids of a text whose tokens that are not special follow again and again, until there are `length`.
function longerIds(tokens, length) {
  const ids = tokens.map(({ id }) => id);
  const again = tokens.filter(({ special }) => special === null).map(({ id }) => id);
  if (again.length === 0) again.push(ids[0]);
  return [...ids, ...Array.from({ length: Math.max(length - ids.length, 0) }, (_, index) => again[index % again.length])];
}

async function withoutCache(run) {
  const ids = run.tokens.slice(0, run.prompt).map(({ id }) => id);
  const times = [];
  const texts = [];
  for (const cache of [true, false]) {
    const ends = [];
    const progress = ({ token }) => { if (token !== undefined) ends.push(performance.now()); };
    const { tokens } = await run.ask({ kind: "run", ids, images: run.images, generate: TIMED, cache }, progress);
    texts.push(tokens.slice(ids.length));
    times.push(ends.slice(1).map((end, index) => end - ends[index])); // the first token needs the prompt in any case
  }
  return { times, texts };
}

function showNoDifference({ lead, rest }, run, mistake, result) {
  const from = mistake.from(run.text);
  lead.textContent = "No number differs in this text.";
  if (result.length >= from) return;
  lead.textContent += ` It shows in texts of ${count(from)} tokens and more; this one has ${count(result.length)}.`;
  if (from + 15 > LONGEST) return;
  rest.replaceChildren(make("button", { type: "button", click: () => {
    chosen.mistakes.long = true;
    select({});
  } }, `Repeat the text up to ${count(from + 15)} tokens`));
}

function showDifference({ lead, rest }, run, mistake, result) {
  const { first, points, layers } = result.difference;
  const show = make("button", { type: "button", className: "state-link", click: () => run.help.showCode(first) }, first);
  const differing = Object.values(points).filter((difference) => difference !== 0).length;
  lead.replaceChildren("The first stage that differs is ", show, `, by up to ${run.help.number(points[first])}. `,
    `${count(differing)} of ${count(Object.keys(points).length)} stages differ.`);
  if (result.length > run.tokens.length) lead.append(` The text was repeated up to ${count(result.length)} tokens.`);
  const heads = Array.from({ length: run.text.num_attention_heads }, (_, head) => [head, String(head)]);
  const { layer, head } = result.most;
  rest.replaceChildren(
    twoTexts(result.texts, "The right model", `The model with the mistake: ${mistake.title}`),
    make("h3", {}, "Attention"),
    make("div", { className: "state-controls" },
      layerChoice(run),
      choice("Head", heads, run.selected.head, (value) => select({ head: Number(value) })),
      make("button", { type: "button", click: () => select({ layer, head }) }, "Find the head that changes most")),
    ...threeMaps(run, result),
    make("h3", {}, "Largest difference in the output of each layer"),
    bars(run, layers.map((value, index) => [`layer ${index}`, value]).concat([["logits", points.logits]])));
}

function layerChoice(run) {
  const layers = run.text.layer_types.map((kind, index) => [index, `${index}: ${kind.replace("_", " ")}`]);
  return choice("Layer", layers, run.selected.layer, (layer) => select({ layer: Number(layer) }));
}

function twoTexts(texts, ...titles) {
  const [right, wrong] = texts;
  let same = 0;
  while (same < right.length && right[same]?.id === wrong[same]?.id) same++;
  const column = (tokens, title) => make("section", { className: "state-text" }, make("h4", {}, title),
    make("p", {}, tokens.slice(0, same).map(({ text }) => text).join(""),
      make("mark", {}, tokens.slice(same).map((token) => token.special ?? token.text).join(""))));
  let said = `Both write the same ${right.length} tokens.`;
  if (same < Math.max(right.length, wrong.length)) said = `The texts differ from token ${same + 1} on (marked).`;
  return make("div", {}, make("h3", {}, "What both write after the prompt"), paragraph(said, " Each time, the most likely token is taken."),
    make("div", { className: "state-pair" }, column(right, titles[0]), column(wrong, titles[1])));
}

// The maps of the chosen layer and head: right, wrong, and what changed.
function threeMaps(run, { right, wrong, length }) {
  const { layer, head } = run.selected;
  const name = `layers.${layer}.attention.probabilities`;
  const start = head * length * length;
  const mask = right[`layers.${layer}.attention.mask`].data;
  const change = largestChange(right, wrong, layer, head);
  const words = `Largest change in layer ${layer}, head ${head}: query ${change.query}, key ${change.key}, `
    + `from ${run.help.percent(change.before)} to ${run.help.percent(change.after)}.`;
  const map = (title, value, otherMask = mask) => {
    const canvas = make("canvas", { className: "state-map", role: "img", "aria-label": `${title}. ${words}` });
    run.help.heat(canvas, { rows: length, columns: length, cells: true, value: (row, column) => value(start + row * length + column),
      hidden: (row, column) => {
        if (mask[row * length + column] || otherMask[row * length + column]) return null;
        return column > row ? "future" : "window";
      } });
    return make("figure", {}, canvas, make("figcaption", {}, title));
  };
  const other = wrong[`layers.${layer}.attention.mask`].data;
  return [
    make("div", { className: "state-maps" },
      map("Right", (index) => right[name].data[index]),
      map("With the mistake", (index) => wrong[name].data[index], other),
      map("Difference, on the same scale", (index) => Math.abs(right[name].data[index] - wrong[name].data[index]), other)),
    paragraph("Rows are queries, columns are keys. ", words)];
}

// Horizontal bars with their numbers: rows of [label, value].
function bars(run, rows) {
  const largest = Math.max(...rows.map(([, value]) => value), 1e-30);
  return make("dl", { className: "state-bars" }, rows.map(([label, value]) => make("div", {}, make("dt", {}, label),
    make("dd", {}, make("svg:svg", { class: "state-bar", viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" },
      make("svg:rect", { x: 0, y: 0, width: (100 * value) / largest, height: 10 })), make("span", {}, run.help.number(value))))));
}

function showTimes({ lead, rest }, run, { times, texts }) {
  const total = times.map((list) => list.reduce((sum, time) => sum + time, 0));
  const steps = times[0].length;
  const same = texts[0].map(({ id }) => id).join() === texts[1].map(({ id }) => id).join();
  lead.textContent = `${same ? "The text is the same. " : "The texts differ, which must not happen. "}${steps} tokens after the first take `
    + `${Math.round(total[0])} ms with a cache and ${Math.round(total[1])} ms without: ${(total[1] / total[0]).toFixed(1)} times as long.`;
  const highest = Math.max(...times.flat(), 1);
  const line = (list, className) => ({ className, points: list.map((time, index) => [run.prompt + 1 + index, time]) });
  const first = run.prompt + 1;
  const last = first + Math.max(steps - 1, 1);
  const x = { from: first, to: last, label: "tokens read so far", text: String, ticks: [first, Math.round((first + last) / 2), last] };
  const y = { from: 0, to: highest * 1.1, ticks: [0, 0.5, 1].map((part) => highest * part), text: (tick) => `${Math.round(tick)} ms` };
  rest.replaceChildren(
    steps > 1 ? plot(lead.textContent, x, y, [line(times[1], "state-line"), line(times[0], "state-line-plain")]) : "",
    paragraph("Solid: without a cache, where each step reads all positions again. Dashed: with a cache, where it reads one "
      + "position and the stored keys."),
    twoTexts(texts, "With a cache", "Without a cache"));
}

// ------------------------------------------------------------------------------------------------------ image
const QUESTIONS = ["What do you see?", "How many shapes are there?", "What is at the top left?", "What colour is the circle?",
  "Where is the blue square?"];
const PREVIEW = 256; // CSS pixels of an edge

VIEWS.push({
  id: "image",
  title: "Image",
  about: "An image becomes patches, patches become tokens, and the tokens of the text look at them.",
  render(element, run) {
    if (!run.config.vision_config) {
      element.replaceChildren(paragraph("This model reads text only. The page of models/ministral3 has images: ",
        make("code", {}, "python -m explorer --model models/ministral3")));
      return;
    }
    const result = make("div");
    element.replaceChildren(imageEditor(run), result);
    if (run.images.length > 0) result.replaceChildren(...imageResult(run));
    else result.replaceChildren(paragraph("Ask the question: the page then shows the answer, and which token looks where."));
  },
});

function imageEditor(run) {
  const state = chosen.image;
  const canvas = make("canvas", { className: "state-image", role: "img" });
  const note = make("p", { className: "state-small", role: "status" });
  const draw = () => {
    drawImage(canvas, paintShapes(state.shapes), run.config);
    const names = state.shapes.map(({ place, kind, colour }) => `${colour} ${kind} at the ${PLACES[place]}`).join(", ");
    canvas.setAttribute("aria-label", `The image, cut into patches: ${names || "empty"}`);
    note.textContent = canAsk(state) ? "" : "The model was trained on images of one to three shapes. Choose as many.";
  };
  const ask = async () => {
    if (!canAsk(state)) return;
    const image = { rgb: paintShapes(state.shapes), height: IMAGE_SIZE, width: IMAGE_SIZE };
    await run.help.answer({ text: state.question, mode: "chat", images: [image] });
    const answered = explorer.run;
    if (answered.steps.length > 0) lookClosest(answered, answered.prompt); // the first token of the answer
  };
  const question = make("input", { type: "text", id: "state-question", value: state.question,
    input: () => { state.question = question.value; },
    keydown: (event) => { if (event.key === "Enter") ask(); } });
  const suggestions = QUESTIONS.map((text) => make("button", { type: "button", click: () => {
    state.question = text;
    question.value = text;
    ask();
  } }, text));
  draw();
  return make("div", { className: "state-editor" },
    make("figure", {}, canvas, make("figcaption", { className: "state-small" }, patchText(run.config))),
    make("div", {},
      make("div", { className: "state-places" }, PLACES.map((_, place) => placeEditor(place, draw))), note,
      make("div", { className: "state-control" }, make("label", { htmlFor: "state-question" }, "Question"),
        make("div", { className: "state-ask" }, question, make("button", { type: "button", className: "primary", click: ask }, "Ask"))),
      make("div", { className: "state-buttons", role: "group", "aria-label": "Questions" }, suggestions)));
}

// Choose a token, and the layer and head in which it gives the largest share to one merged patch.
function lookClosest(run, query) {
  const places = imagePlaces(run).patches;
  let best = { share: -1 };
  run.text.layer_types.forEach((_, layer) => {
    for (let head = 0; head < run.text.num_attention_heads; head++) {
      const share = Math.max(...places.map(attentionOf(run, layer, head, query)));
      if (share > best.share) best = { share, layer, head };
    }
  });
  chosen.image.head = best.head;
  select({ query, layer: best.layer, head: best.head });
}

function canAsk({ shapes, question }) {
  return shapes.length >= 1 && shapes.length <= 3 && question.trim() !== "";
}

function placeEditor(place, draw) {
  const state = chosen.image;
  const old = state.shapes.find((shape) => shape.place === place);
  const values = { kind: old?.kind ?? "nothing", colour: old?.colour ?? "red" };
  const change = (name, value) => {
    values[name] = value;
    state.shapes = state.shapes.filter((shape) => shape.place !== place);
    if (values.kind !== "nothing") state.shapes.push({ place, ...values });
    state.shapes.sort((a, b) => a.place - b.place);
    draw();
  };
  const options = (names) => names.map((name) => [name, name]);
  return make("fieldset", {}, make("legend", {}, PLACES[place]),
    choice("Shape", options(["nothing", ...KINDS]), values.kind, (value) => change("kind", value)),
    choice("Colour", options(Object.keys(COLOURS)), values.colour, (value) => change("colour", value)));
}

// The sizes of an image of this model: {patch, merged: pixels of an edge, rows: of merged patches}.
function imageGrid(config) {
  const patch = config.vision_config.patch_size;
  const merged = patch * (config.spatial_merge_size ?? 2);
  return { patch, merged, rows: IMAGE_SIZE / merged };
}

function patchText(config) {
  const { patch, merged, rows } = imageGrid(config);
  const all = IMAGE_SIZE / patch;
  return `${IMAGE_SIZE} × ${IMAGE_SIZE} pixels, not resized: ${all} × ${all} patches of ${patch} × ${patch} pixels (thin lines). `
    + `${merged / patch} × ${merged / patch} neighbours become one token (thick lines): ${rows * rows} tokens.`;
}

// Draw the image, enlarged, with the lines of patches. shares: of attention, of each merged patch; the others are veiled.
function drawImage(canvas, rgb, config, shares = null, isDark = false) {
  const { patch, merged, rows } = imageGrid(config);
  const edge = 2 * PREVIEW;
  const scale = edge / IMAGE_SIZE;
  [canvas.width, canvas.height] = [edge, edge];
  const context = canvas.getContext("2d");
  for (let pixel = 0; pixel < IMAGE_SIZE ** 2; pixel++) {
    context.fillStyle = `rgb(${rgb.subarray(3 * pixel, 3 * pixel + 3).join()})`;
    context.fillRect((pixel % IMAGE_SIZE) * scale, Math.floor(pixel / IMAGE_SIZE) * scale, scale, scale);
  }
  for (let at = patch; at < IMAGE_SIZE; at += patch) {
    const isMerged = at % merged === 0;
    context.fillStyle = isMerged ? "rgba(0, 0, 0, 0.55)" : "rgba(0, 0, 0, 0.18)";
    const width = isMerged ? 3 : 1;
    context.fillRect(at * scale - width / 2, 0, width, edge);
    context.fillRect(0, at * scale - width / 2, edge, width);
  }
  if (shares === null) return;
  const most = Math.max(...shares, 1e-9);
  const cell = edge / rows;
  shares.forEach((share, index) => {
    const [x, y] = [(index % rows) * cell, Math.floor(index / rows) * cell];
    context.fillStyle = `rgba(${isDark ? "18, 19, 23" : "255, 255, 255"}, ${(0.9 * (1 - share / most)).toFixed(3)})`;
    context.fillRect(x, y, cell, cell);
    context.fillStyle = isDark ? "#000000cc" : "#ffffffdd";
    context.fillRect(x + cell / 2 - 44, y + cell - 40, 88, 34);
    context.fillStyle = isDark ? "#fff" : "#000";
    context.font = "26px system-ui, sans-serif"; // 13 CSS pixels
    context.textAlign = "center";
    context.fillText(`${(100 * share).toFixed(1)} %`, x + cell / 2, y + cell - 14);
  });
}

// Where the tokens of the first image are: positions of [IMG], and the first and last position.
function imagePlaces(run) {
  const names = ["[IMG]", "[IMG_BREAK]", "[IMG_END]"];
  const all = [...run.tokens.keys()].filter((position) => names.includes(run.tokens[position].special));
  return { all, patches: all.filter((position) => run.tokens[position].special === "[IMG]"), last: all.at(-1) };
}

function imageResult(run) {
  const places = imagePlaces(run);
  const answer = run.tokens.slice(run.prompt).filter(({ special }) => special === null).map(({ text }) => text).join("");
  const { layer } = run.selected;
  const query = Math.max(run.selected.query, places.last + 1);
  const share = attentionOf(run, layer, chosen.image.head, query);
  const canvas = make("canvas", { className: "state-image", role: "img" });
  const shares = places.patches.map(share);
  drawImage(canvas, run.images[0].rgb, run.config, shares, run.help.isDark());
  const said = attentionSentence(run, places, share, query);
  canvas.setAttribute("aria-label", said);
  return [
    make("div", { className: "state-answer" }, make("p", { className: "state-small" }, run.source.text),
      make("p", { className: "state-big", role: "status" }, answer || "No answer yet.")),
    make("h3", {}, "Which token looks where"),
    paragraph("Choose a token of the question or the answer:"),
    tokenChoice(run, places, query),
    make("div", { className: "state-controls" },
      layerChoice(run),
      choice("Heads", headOptions(run), chosen.image.head, (value) => {
        chosen.image.head = value;
        select(value === "all" ? {} : { head: Number(value) });
      }),
      make("button", { type: "button", click: () => lookClosest(run, query) }, "Find the head that looks at one patch most")),
    make("div", { className: "state-editor" }, make("figure", {}, canvas), make("div", {},
      make("p", { className: "state-lead", role: "status" }, said),
      make("h4", {}, "The image as tokens"), imageTokens(run, places, share),
      paragraph("[IMG_BREAK] ends a row, [IMG_END] the image. The model also looks at these, and at the rest of the text."))),
  ];
}

function headOptions(run) {
  return [["all", "the mean of all"], ...Array.from({ length: run.text.num_attention_heads }, (_, head) => [head, String(head)])];
}

// The share of attention that a query gives to a key, in one head or as the mean of all.
function attentionOf(run, layer, head, query) {
  const { shape, data } = run.trace[`layers.${layer}.attention.probabilities`];
  const [, H, S, T] = shape;
  const at = (number, key) => data[(number * S + query) * T + key];
  if (head !== "all") return (key) => at(Number(head), key);
  return (key) => Array.from({ length: H }, (_, number) => at(number, key)).reduce((sum, value) => sum + value, 0) / H;
}

function attentionSentence(run, places, share, query) {
  const shares = places.patches.map(share);
  const most = shares.indexOf(Math.max(...shares));
  const { rows } = imageGrid(run.config);
  const { percent } = run.help;
  const heads = chosen.image.head === "all" ? "mean of all heads" : `head ${chosen.image.head}`;
  const all = shares.reduce((sum, value) => sum + value, 0);
  return `Position ${query}${quoted(run, query)} gives ${percent(all)} of its attention to the ${shares.length} merged patches `
    + `(layer ${run.selected.layer}, ${heads}). Most of it goes to row ${Math.floor(most / rows) + 1}, `
    + `column ${(most % rows) + 1}: ${percent(shares[most])}.`;
}

function tokenChoice(run, places, query) {
  const group = make("div", { className: "state-tokens", role: "group", "aria-label": "Tokens after the image" });
  for (let position = places.last + 1; position < run.tokens.length; position++) {
    const written = position >= run.prompt ? " state-written" : "";
    const choose = () => { if (position !== query) select({ query: position }); };
    group.append(make("button", { type: "button", className: `state-token-button${written}`, tabIndex: position === query ? 0 : -1,
      "aria-pressed": String(position === query), click: choose, focus: choose }, run.help.tokenLabel(position)));
  }
  arrowKeys(group, () => 1);
  return group;
}

// The tokens of the image as rows, coloured by the attention that they get.
function imageTokens(run, places, share) {
  const rows = [[]];
  for (const position of places.all) {
    rows.at(-1).push(position);
    if (run.tokens[position].special !== "[IMG]") rows.push([]);
  }
  const most = Math.max(...places.all.map(share), 1e-9);
  const cell = (position) => run.help.tint(make("td", { title: `position ${position}` }, `${run.help.tokenLabel(position)} `,
    make("b", {}, run.help.percent(share(position)))), share(position) / most);
  return make("div", { className: "state-scroll", tabIndex: 0, role: "region", "aria-label": "The image as tokens" },
    make("table", { className: "state-image-tokens" }, make("tbody", {},
      rows.filter((row) => row.length > 0).map((row) => make("tr", {}, row.map(cell))))));
}

// -------------------------------------------------------------------------------------------- sizes and code
// The weights of a model by part: [[part, numbers], ...].
function weightCounts(config) {
  const text = config.text_config ?? config;
  const { hidden_size: E, vocab_size: V, num_attention_heads: H, head_dim: D, intermediate_size: F } = text;
  const G = text.num_key_value_heads;
  const L = text.num_hidden_layers;
  const parts = [
    ["embeddings", V * E],
    [`attention of ${L} layers`, L * (2 * E * H * D + 2 * E * G * D)],
    [`MLP of ${L} layers`, L * 3 * E * F],
    ["norms", (2 * L + 1) * E],
  ];
  if (!(config.tie_word_embeddings ?? text.tie_word_embeddings)) parts.push(["head", V * E]);
  const vision = config.vision_config;
  if (vision) {
    const C = vision.hidden_size;
    const inLayer = 4 * C * C + 3 * C * vision.intermediate_size + 2 * C;
    const merge = (config.spatial_merge_size ?? 2) ** 2;
    const bias = config.multimodal_projector_bias ? 2 * E : 0;
    parts.push(["vision encoder", vision.num_channels * vision.patch_size ** 2 * C + C + vision.num_hidden_layers * inLayer]);
    parts.push(["projector", C + merge * C * C + C * E + E * E + bias]);
  }
  return parts;
}

// Bytes of the cache after `length` tokens, in bfloat16: keys and values of all layers.
function cacheBytes(text, length) {
  const perPosition = 2 * text.num_key_value_heads * text.head_dim * 2;
  const kept = text.layer_types.map((kind) => (kind === "sliding_attention" ? Math.min(length, text.sliding_window) : length));
  return kept.reduce((sum, positions) => sum + positions * perPosition, 0);
}

VIEWS.push({
  id: "sizes",
  title: "Sizes and code",
  about: "The shape and the bytes of every stage, and the lines of Python that compute it.",
  render(element, run) {
    const state = chosen.sizes;
    if (run.codePoint !== undefined) { // another view wants to show these lines
      state.point = run.codePoint;
      run.codePoint = undefined;
      if (/^layers/.test(state.point)) run.selected.layer = Number(state.point.match(/\d+/)[0]);
    }
    const names = Object.keys(run.trace).filter((name) => inLayer(name, run.selected.layer));
    state.point = state.point?.replace(/^layers\.\d+/, `layers.${run.selected.layer}`);
    if (!names.includes(state.point)) state.point = names.find((name) => name.endsWith("attention.scores")) ?? names[0];
    const code = make("div", { className: "state-code", role: "region", "aria-label": "Code of the chosen stage" });
    const list = make("div");
    const show = (name) => {
      state.point = name;
      code.replaceChildren(...codeOf(name, run));
      list.querySelectorAll("button").forEach((button) => button.setAttribute("aria-pressed", String(button.dataset.point === name)));
    };
    list.append(stageTable(run, names, show));
    element.replaceChildren(
      sizeTotals(run),
      make("div", { className: "state-controls" }, layerChoice(run)),
      paragraph("The stages in the order of computing, of one layer; the other layers have the same shapes. A click on a stage "
        + "shows the lines that compute it."),
      lettersText(run),
      make("div", { className: "state-split" }, list, code));
    show(state.point);
  },
});

// Points of the chosen layer, and those outside of layers. Of the vision layers, the first.
function inLayer(name, layer) {
  const number = name.match(/layers\.(\d+)\./);
  if (name.startsWith("cache.")) return false;
  if (number === null) return true;
  return Number(number[1]) === (name.startsWith("vision.") ? 0 : layer);
}

function sizeTotals(run) {
  const weights = weightCounts(run.config);
  const all = weights.reduce((sum, [, numbers]) => sum + numbers, 0);
  const length = run.tokens.length;
  const longest = run.text.max_position_embeddings;
  const groups = run.text.num_attention_heads / run.text.num_key_value_heads;
  const stages = Object.entries(run.trace).filter(([name]) => !name.startsWith("cache."));
  const activations = stages.reduce((sum, [name, { data }]) => sum + stageBytes(name, data), 0);
  const card = (title, bytes, ...rest) => make("div", { className: "state-card" }, make("h3", {}, title),
    make("p", { className: "state-big" }, byteText(bytes)), rest);
  const more = groups > 1 ? ` With a key head for each query head it would be ${groups} times as much.` : "";
  return make("div", { className: "state-cards" },
    card("Weights", 2 * all, paragraph(`${count(all)} numbers in bfloat16, 2 bytes each.`),
      make("details", {}, make("summary", {}, "by part"), table("Weights by part", ["Part", "Numbers", "Bytes"],
        weights.map(([part, numbers]) => [part, count(numbers), byteText(2 * numbers)]), "state-numbers"))),
    card("Cache", cacheBytes(run.text, length), paragraph(`${length} tokens: 2 · G · D numbers in each layer for a token, its keys and `
      + `values. At ${count(longest)} tokens: ${byteText(cacheBytes(run.text, longest))}.${more}`)),
    card("Activations", activations, paragraph(`All ${count(stages.length)} stages of this text in one pass. A model that `
      + "generates text keeps those of one stage or two at a time.")));
}

function lettersText(run) {
  const { hidden_size: E, num_attention_heads: H, num_key_value_heads: G, head_dim: D, intermediate_size: F, vocab_size: V } = run.text;
  const S = run.tokens.length;
  const letters = { B: [1, "text"], S: [S, "tokens"], T: [S, "keys"], E: [E, "hidden size"], H: [H, "query heads"],
    G: [G, "key/value heads"], D: [D, "size of a head"], F: [F, "size of the MLP"], V: [V, "vocabulary"] };
  const vision = run.config.vision_config;
  if (run.trace["vision.patches"]) {
    Object.assign(letters, { P: [run.trace["vision.patches"].shape[0], "patches"], C: [vision.hidden_size, "size of their vectors"],
      M: [run.trace["projector.merged"].shape[0], "merged patches"],
      "H, F": [`${vision.num_attention_heads}, ${vision.intermediate_size}`, "in the vision encoder"] });
  }
  return make("dl", { className: "state-letters" }, Object.entries(letters).map(([letter, [size, meaning]]) =>
    make("div", {}, make("dt", {}, letter), make("dd", {}, `${size.toLocaleString("en-US")} ${meaning}`))));
}

function stageTable(run, names, show) {
  return table("Stages in the order of computing, bytes in bfloat16", ["Stage", "Letters", "Shape", "Bytes"], names.map((name) => {
    const { shape, data } = run.trace[name];
    const letters = SOURCES[name.replace(/layers\.\d+/, "layers.N")][0];
    const button = make("button", { type: "button", className: "state-link", "data-point": name, click: () => show(name) }, name);
    return [button, letters, shape.join(" × "), byteText(stageBytes(name, data))];
  }), "state-numbers");
}

// Bytes of a stage in a bfloat16 model. A mask is bool: 1 byte each.
function stageBytes(name, data) {
  return name.endsWith(".mask") ? data.length : 2 * data.length;
}

function codeOf(name, run) {
  const blocks = sourcesOf(name, run.config).map(([file, functionName, part]) => {
    const found = functionLines(run.sources[file], functionName);
    const lines = found.lines.map((line, index) => make("div", { className: line.includes(part) ? "state-hit" : "" },
      make("span", { className: "state-line-number" }, String(found.first + index)), line || " "));
    return [make("h4", {}, `${functionName} `, make("span", { className: "state-small" }, `${file}, line ${found.first}`)),
      make("pre", { tabIndex: 0, "aria-label": `${functionName} of ${file}` }, lines)];
  });
  return [make("h3", {}, name), ...blocks.flat()];
}
