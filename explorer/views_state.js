// The views of what the model keeps and counts: Cache, Positions, Sizes and code. page.js calls them. The first part is
// arithmetic that needs no page; tests/test_explorer_state.py compares it with the Python files.
"use strict";

// ------------------------------------------------------------------------------------------------ arithmetic
// The cache of a layer after a forward pass with `fresh` new tokens on `past` earlier ones: ministral.SlidingLayerCache
// with `window` slots, or LayerCache if `window` is null. slots: the position in each slot that is in use; written: the
// slots of the new tokens; overwritten: {slot, old}; keys: the positions that attention gets, in the cache's order.
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
  if (!hasYarn(text)) {
    return Array.from(plain, (value, pair) => ({ pair, plain: value, used: value, zone: null, share: 1 }));
  }
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
Object.assign(globalThis, { hasYarn, queryScale }); // the other views need them, too

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
chosen.cache = { step: null, slot: 3, layer: null, window: "model", reading: "single" };
chosen.positions = { position: null };
chosen.sizes = { point: null };

// The token that was chosen since a view was last made, or null.
function newQuery(run, state) {
  const isNew = state.query !== undefined && state.query !== run.selected.query;
  state.query = run.selected.query;
  return isNew ? state.query : null;
}

// A label over a control, and below it what `describe` says of the value.
function slider(label, { min, max, value, describe }, changed) {
  const id = newId();
  const output = make("output", { htmlFor: id }, describe(value));
  const move = () => {
    element.set(Number(input.value));
    changed(Number(input.value));
  };
  const said = { "aria-valuetext": describe(value) };
  const input = make("input", { type: "range", id, min, max, value, ...said, input: move });
  const heading = make("label", { htmlFor: id }, label);
  const element = make("div", { className: "state-control state-slider" }, heading, input, output);
  element.set = (other) => {
    input.value = other;
    output.textContent = describe(other);
    input.setAttribute("aria-valuetext", describe(other));
  };
  return element;
}

// A table that scrolls sideways on a narrow screen. Cells are texts or elements; the first of a row is its heading.
function table(caption, head, rows, className = "") {
  const cells = ([first, ...others]) => {
    return [make("th", { scope: "row" }, first), ...others.map((cell) => make("td", {}, cell))];
  };
  return make("div", { className: "state-scroll", tabIndex: 0, role: "region", "aria-label": caption },
    make("table", { className }, make("caption", {}, caption),
      make("thead", {}, make("tr", {}, head.map((cell) => make("th", { scope: "col" }, cell)))),
      make("tbody", {}, rows.map((row) => make("tr", {}, cells(row))))));
}

// A byte count in the largest fitting unit.
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
    if (state.layer !== run.selected.layer) state.window = "model"; // a demonstration is of one layer
    state.layer = run.selected.layer;
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
    const draw = () => result.replaceChildren(...cacheResult(run, window));
    const describe = (step) => stepText(run, state.reading, step);
    const change = (changes) => {
      if ("reading" in changes) state.step = null; // its steps are other ones
      Object.assign(state, changes);
      select({});
    };
    element.replaceChildren(
      make("div", { className: "state-controls" },
        layerChoice(run),
        choice("Window", windows, state.window, (value) => change({ window: value })),
        choice("The prompt is read", readings, state.reading, (value) => change({ reading: value })),
        slider("Step", { min: 1, max: last, value: state.step, describe }, (step) => {
          state.step = step;
          draw();
        })),
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
    const kinds = run.text.layer_types;
    const rings = [...kinds.keys()].filter((layer) => kinds[layer] === "sliding_attention");
    let hint = "No layer of this model has a ring; choose a small window to see what one does with the same text.";
    if (rings.length > 0) hint = `Layers ${rings.join(", ")} have a ring of ${run.text.sliding_window} slots.`;
    const text = "This layer uses full attention. "
      + "Its cache only grows: position p is in slot p, and no key is overwritten. ";
    return paragraph(text, hint);
  }
  const text = `A ring of W = ${window} slots: position p is in slot p % ${window}. `
    + `A token sees the last ${window} positions, its own included. So ${window} keys are all that it needs, `
    + "and a new key takes the place of the one that has just left the window.";
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
    make("ol", { className: "state-keys" }, step.keys.map((position) =>
      make("li", { className: position >= past ? "state-new" : "" }, String(position)))),
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
  for (const { old: position } of step.overwritten) {
    old = ` It overwrites position ${position}${quoted(run, position)}.`;
  }
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
  let label = `slot ${slot}: empty`;
  if (position !== undefined) label = `slot ${slot}: position ${content.join(", ")}`;
  if (change) label += `, ${change}`;
  const properties = { type: "button", className: `state-slot ${kind}`, "aria-label": label };
  return make("button", { ...properties, focus: choose, click: choose },
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
    let before = `The last ${old} earlier ones are what the first new token still sees.`;
    if (old === 0) before = "There are no earlier keys.";
    return `The ${fresh} new keys, in the order of the text. ${before} `
      + "The mask hides those outside the window of each token.";
  }
  if (end <= window) return "The ring is not full: slots are positions, and all of them are visible.";
  return `Position ${past} sees positions ${end - window} to ${past}: these are W = ${window} keys, and they are all `
    + "in the ring. They come in the order of slots. That does not matter: a key is rotated by its position before it "
    + "is stored, and attention adds up all of them.";
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
    const describe = (position) => `position ${position}${quoted(run, position)}`;
    const range = { min: 0, max: end, value: Math.min(state.position, end), describe };
    const near = slider("Position near the text", range, (position) => show(position));
    const show = (position) => {
      state.position = Math.min(position, longest);
      refusal.textContent = "";
      number.value = state.position;
      near.set(state.position);
      result.replaceChildren(...positionResult(run, state.position));
    };
    const limits = { min: 0, max: longest };
    const number = make("input", { type: "number", id: "state-position", step: 1, ...limits });
    const refusal = make("p", { className: "state-refusal", role: "alert" });
    number.addEventListener("change", () => {
      const found = complaint("Position", number);
      if (found === null) show(number.valueAsNumber);
      else refusal.textContent = `${found}. Position ${count(state.position)} stays.`;
    });
    const original = run.text.rope_parameters.original_max_position_embeddings;
    const jumps = [5, 100, original - 1, original, longest].filter((position) => position >= 0 && position <= longest);
    element.replaceChildren(
      make("div", { className: "state-controls" },
        make("div", { className: "state-control" },
          make("label", { htmlFor: "state-position" }, `Position (0 to ${count(longest)})`), number),
        near,
        make("div", { className: "state-buttons", role: "group", "aria-label": "Positions" },
          jumps.map((position) => make("button", { type: "button", click: () => show(position) }, count(position))))),
      refusal,
      result);
    show(state.position);
  },
});

function positionResult(run, position) {
  const pairs = rotaryPairs(run.text);
  return [
    paragraph(`The ${run.text.head_dim} numbers of a query or a key form ${pairs.length} pairs. `
      + "A pair is a point in a plane, and the position turns each pair around the origin by an angle of its own."),
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
    const theta = count(run.text.rope_parameters.rope_theta);
    return `${start}: pair i turns by ${position} · θ^(−2i/D) radians, with θ = ${theta} and D = ${run.text.head_dim}. `
      + "This model has plain rotary positions, no YaRN.";
  }
  const changed = pairs.filter((pair) => pair.used !== pair.plain);
  if (position === 0) return `${start}: every angle is 0, with YaRN and without.`;
  const most = changed.reduce((best, pair) => (pair.plain - pair.used > best.plain - best.used ? pair : best));
  return `${start}: YaRN changes the angles of ${changed.length} of ${pairs.length} pairs. `
    + `It changes pair ${most.pair} most: ${radians(position * most.plain)} rad without YaRN, `
    + `${radians(position * most.used)} rad with it.`;
}

function radians(angle) {
  const whole = Math.ceil(Math.log10(Math.max(angle, 1))); // digits before the point
  return number(angle, Math.max(5, whole + 3));
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
  const rows = pairs.map((pair) => {
    let difference = "0";
    if (pair.used !== pair.plain) difference = `−${radians(position * (pair.plain - pair.used))}`;
    const [plain, used] = [radians(position * pair.plain), radians(position * pair.used)];
    return [String(pair.pair), plain, used, difference, zoneText(pair)];
  });
  return table(`Angles at position ${position}, in radians`, head, rows, "state-numbers");
}

function zoneText(pair) {
  if (pair.zone !== "blended") return pair.zone;
  return `blended, ${percent(pair.share)} unstretched`;
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
    text: (tick) => (tick < 1e5 ? count(tick) : powerOfTen(Math.log10(tick))) };
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
  const words = (zone) => {
    let [they, turn, are, period] = ["They", "turn", "are", "Their periods are"];
    if (zone.inside.length === 1) [they, turn, are, period] = ["It", "turns", "is", "Its period is"];
    return {
      kept: `${they} ${turn} more than ${rope.beta_fast ?? 32} times within the original context `
        + `and ${are} not changed.`,
      blended: `${they} ${are} stretched in part.`,
      stretched: `${they} ${turn} less than ${turnsText(rope.beta_slow ?? 1)} within it. `
        + `${period} ${rope.factor} times as long: position p gives the angle that position p / ${rope.factor} `
        + "gives without YaRN.",
    }[zone.name];
  };
  return [
    plot("Periods of the rotary pairs, with YaRN and without, on a logarithmic scale", x, y, [plain, used], zones),
    make("ul", { className: "state-zones" }, zones.map((zone) => make("li", {},
      make("span", { className: `state-key state-band-${zone.name}` }), make("b", {}, zone.name),
      `, ${rangeText(zone.inside)}. ${words(zone)}`))),
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
  const quarters = [0, 1, 2, 3, 4].map((part) => (part * end) / 4);
  const x = { from: 0, to: end, label: "position", text: count, ticks: quarters };
  const y = { from: 0.95, to: Math.ceil(top * 10 + 0.5) / 10, text: (tick) => tick.toFixed(1),
    ticks: [1, 1.1, 1.2, 1.3, 1.4, 1.5].filter((tick) => tick <= top + 0.05) };
  const steps = Math.floor(position / original);
  let place = "Scores of later queries are larger, so that the softmax stays sharp over long texts.";
  if (position < original) place = `It stays 1 below position ${count(original)}, so short texts do not show it.`;
  return [
    plot(`Scale of the query by position; ${scale.toFixed(4)} at position ${position}`, x, y,
      [{ className: "state-line", points }], [], { x: position, y: scale }),
    paragraph(`The query of position ${count(position)} is multiplied by `
      + `1 + ${beta} · ln(1 + ⌊${count(position)} / ${count(original)}⌋) = 1 + ${beta} · ln(${1 + steps}) = `,
      make("b", {}, scale.toFixed(4)), `. ${place}`),
  ];
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
  if (!(config.tie_word_embeddings ?? text.tie_word_embeddings)) parts.push(["output matrix", V * E]);
  const vision = config.vision_config;
  if (vision) {
    const C = vision.hidden_size;
    const inLayer = 4 * C * C + 3 * C * vision.intermediate_size + 2 * C;
    const merge = (config.spatial_merge_size ?? 2) ** 2;
    const bias = config.multimodal_projector_bias ? 2 * E : 0;
    const patches = vision.num_channels * vision.patch_size ** 2 * C;
    parts.push(["vision encoder", patches + C + vision.num_hidden_layers * inLayer]);
    parts.push(["projector", C + merge * C * C + C * E + E * E + bias]);
  }
  return parts;
}

// Bytes of the cache after `length` tokens, in bfloat16: keys and values of all layers.
function cacheBytes(text, length) {
  const perPosition = 2 * text.num_key_value_heads * text.head_dim * 2;
  const kept = text.layer_types.map((kind) => {
    if (kind === "sliding_attention") return Math.min(length, text.sliding_window);
    return length;
  });
  return kept.reduce((sum, positions) => sum + positions * perPosition, 0);
}

// Save all stages of this text as a file for `python -m reference diff`.
function downloadTrace(run) {
  const trace = saveTrace(run.trace, run.tokens.map(({ id }) => id), { prompt: run.source.text });
  const link = make("a", { href: URL.createObjectURL(new Blob([trace])), download: "trace.safetensors" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000); // after the browser has begun to save
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
    if (!names.includes(state.point)) {
      state.point = names.find((name) => name.endsWith("attention.scores")) ?? names[0];
    }
    const code = make("div", { className: "state-code", role: "region", "aria-label": "Code of the chosen stage" });
    const list = make("div");
    const show = (name) => {
      state.point = name;
      code.replaceChildren(...codeOf(name, run));
      for (const button of list.querySelectorAll("button")) {
        button.setAttribute("aria-pressed", String(button.dataset.point === name));
      }
    };
    list.append(stageTable(run, names, show));
    element.replaceChildren(
      sizeTotals(run),
      make("div", { className: "state-controls" }, layerChoice(run),
        make("button", { type: "button", click: () => downloadTrace(run) }, "Save the trace")),
      paragraph("The trace is a .safetensors file with all stages, for ",
        make("code", {}, "python -m reference diff"), "."),
      paragraph("The stages in the order of computing, of one layer; the other layers have the same shapes. "
        + "A click on a stage shows the lines that compute it."),
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
  const rows = weights.map(([part, numbers]) => [part, count(numbers), byteText(2 * numbers)]);
  const parts = table("Weights by part", ["Part", "Numbers", "Bytes"], rows, "state-numbers");
  const ofWeights = `${count(all)} numbers in bfloat16, 2 bytes each.`;
  const ring = run.text.layer_types.includes("sliding_attention")
    ? `A sliding layer keeps ${run.text.sliding_window} tokens at most. ` : "";
  const ofToken = byteText(cacheBytes(run.text, 1));
  const ofCache = `${count(length, "token")}: 2 · G · D numbers in each layer for a token, its keys and values. `
    + `These are ${ofToken} for a token in all layers. ${ring}`
    + `At ${count(longest)} tokens: ${byteText(cacheBytes(run.text, longest))}.${more}`;
  const ofActivations = `All ${count(stages.length)} stages of this text in one pass. `
    + "A model that generates text keeps those of one stage or two at a time.";
  return make("div", { className: "state-cards" },
    card("Weights", 2 * all, paragraph(ofWeights), make("details", {}, make("summary", {}, "by part"), parts)),
    card("Cache", cacheBytes(run.text, length), paragraph(ofCache)),
    card("Activations", activations, paragraph(ofActivations)));
}

function lettersText(run) {
  const { text } = run;
  const S = run.tokens.length;
  const letters = {
    B: [1, "text"],
    S: [S, "tokens"],
    T: [S, "keys"],
    E: [text.hidden_size, "hidden size"],
    H: [text.num_attention_heads, "query heads"],
    G: [text.num_key_value_heads, "key/value heads"],
    D: [text.head_dim, "size of a head"],
    F: [text.intermediate_size, "size of the MLP"],
    V: [text.vocab_size, "vocabulary"],
  };
  const vision = run.config.vision_config;
  if (run.trace["vision.patches"]) {
    letters.P = [run.trace["vision.patches"].shape[0], "patches"];
    letters.C = [vision.hidden_size, "size of their vectors"];
    letters.M = [run.trace["projector.merged"].shape[0], "merged patches"];
    letters["H, F"] = [`${vision.num_attention_heads}, ${vision.intermediate_size}`, "in the vision encoder"];
  }
  return make("dl", { className: "state-letters" }, Object.entries(letters).map(([letter, [size, meaning]]) =>
    make("div", {}, make("dt", {}, letter), make("dd", {}, `${size.toLocaleString("en-US")} ${meaning}`))));
}

function stageTable(run, names, show) {
  const head = ["Stage", "Letters", "Shape", "Bytes"];
  const rows = names.map((name) => {
    const { shape, data } = run.trace[name];
    const letters = SOURCES[name.replace(/layers\.\d+/, "layers.N")][0];
    const properties = { type: "button", className: "state-link", "data-point": name };
    const button = make("button", { ...properties, click: () => show(name) }, name);
    return [button, letters, shape.join(" × "), byteText(stageBytes(name, data))];
  });
  return table("Stages in the order of computing, bytes in bfloat16", head, rows, "state-numbers");
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
    const place = make("span", { className: "state-small" }, `${file}, line ${found.first}`);
    return [
      make("h4", {}, `${functionName} `, place),
      make("pre", { tabIndex: 0, "aria-label": `${functionName} of ${file}` }, lines),
    ];
  });
  return [make("h3", {}, name), ...blocks.flat()];
}
