// The views Mistakes (two models read one text) and Image (tokens look at patches). page.js calls them. The first part
// is arithmetic that needs no page; tests/test_explorer_state.py compares it with the Python files.
"use strict";

// ------------------------------------------------------------------------------------------------ arithmetic
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

// --------------------------------------------------------------------------------------------------- mistakes
chosen.mistakes = { name: null, long: false, result: null };

// Known mistakes of ports, by their names in reference/mutants. says(text): what the mistake is and how it happens;
// cannot(text): why this model cannot show it, or null; from(text): the number of tokens from which it shows.
const MISTAKE_TEXTS = {
  yarn_missing: {
    title: "YaRN off",
    says: ({ rope_parameters: rope }) => "The port uses plain rotary frequencies. "
      + "This happens when it reads rope_theta alone, or when it applies YaRN only to texts "
      + "longer than the original context of "
      + `${count(rope.original_max_position_embeddings)} tokens. YaRN acts at every position, also in short texts.`,
    cannot: (text) => hasYarn(text) ? null : "This model has plain rotary positions.",
    from: () => 2,
  },
  yarn_magnitude_1_277: {
    title: "Magnitude 1.277",
    says: ({ rope_parameters: rope }) => {
      const magnitude = 0.1 * Math.log(rope.factor) + 1;
      return `The port multiplies cosine and sine by 0.1 · ln(${rope.factor}) + 1 = ${magnitude.toFixed(3)}, `
        + "the magnitude of the YaRN paper. "
        + "Ministral 3 sets mscale and mscale_all_dim to the same value, and then it is 1. A port that does not read "
        + `these two keys multiplies every score by ${(magnitude ** 2).toFixed(2)}, and attention becomes too sharp.`;
    },
    cannot: (text) => hasYarn(text) ? null : "Only YaRN has a magnitude.",
    from: () => 1,
  },
  query_scale_missing: {
    title: "Query scale off",
    says: ({ rope_parameters: rope }) => "The port does not scale queries by their position (llama_4_scaling_beta). "
      + `The scale is 1 below position ${count(rope.original_max_position_embeddings)}, `
      + "so tests with short texts do not find the mistake.",
    cannot: (text) => text.rope_parameters.llama_4_scaling_beta ? null : "This model does not scale its queries.",
    from: (text) => text.rope_parameters.original_max_position_embeddings + 1,
  },
  window_plus_1: {
    title: "Window W + 1",
    says: ({ sliding_window: window }) => `The port lets a token see ${window} keys and itself. `
      + `Right are ${window} keys, the token's own included: the port sees ${window + 1}. `
      + `FlashAttention's window_size=(W, 0) is W + 1 keys: a port must pass ${window - 1} there.`,
    cannot: (text) => {
      if (text.layer_types.includes("sliding_attention")) return null;
      return "No layer of this model has a window. The page of models/ministral shows this mistake.";
    },
    from: (text) => text.sliding_window + 1,
  },
  rope_interleaved: {
    title: "Interleaved RoPE",
    says: ({ head_dim: D }) => "The port rotates neighbouring numbers of a head, (x[2i], x[2i + 1]). "
      + `These weights are in the order of Transformers, whose pairs are ${D / 2} apart, (x[i], x[i + ${D / 2}]). `
      + "Mistral's own files have the other order, so a port that mixes the two makes this mistake.",
    cannot: () => null,
    from: () => 2,
  },
  no_cache: {
    title: "No cache",
    says: () => "The port reads the whole text again for each new token. The text stays the same. "
      + "Only time is lost, and more with each token.",
    cannot: () => null,
    from: () => 1,
  },
};
const WRITTEN = 24; // tokens that both models write
const TIMED = 12; // tokens that are written at most with a cache and without one
const LONGEST = 480; // tokens of a text that is made longer; the worker reads up to 512

VIEWS.push({
  id: "mistakes",
  title: "Mistakes",
  about: "Known mistakes of other programs that run these models (ports): "
    + "the right model and the mistaken one read the same text, side by side.",
  render(element, run) {
    const state = chosen.mistakes;
    const list = make("fieldset", { className: "state-options" }, make("legend", {}, "Choose a mistake"));
    const lead = make("p", { className: "state-lead", role: "status" });
    const places = { about: make("div"), lead, rest: make("div") };
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
    lead.textContent = "Both models then read the text above: the right one, and one with the mistake.";
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
    const showProgress = ({ done, of, unit }) => {
      if (done !== undefined && isStill()) lead.textContent = `Computing with both models: ${unit} ${done} of ${of} …`;
    };
    try {
      const result = await (name === "no_cache" ? withoutCache(run) : withMistake(run, name, long, showProgress));
      if (!isStill()) return;
      state.result = { key, ...result };
      if (result.most?.size > 0) { // all views render again, this one from the result
        select({ layer: result.most.layer, head: result.most.head });
        return;
      }
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
async function withMistake(run, name, long, showProgress) {
  const { images } = run;
  let ids = run.tokens.map(({ id }) => id);
  let prompt = ids.slice(0, run.prompt);
  if (long) prompt = ids = longerIds(run.tokens, MISTAKE_TEXTS[name].from(run.text) + 15);
  const write = { kind: "run", ids: prompt, images, generate: WRITTEN };
  const ask = (message) => run.ask(message, showProgress);
  const right = long ? (await ask({ kind: "run", ids, images, trace: true })).trace : run.trace;
  const wrong = (await ask({ kind: "run", ids, images, trace: true, mistakes: [name] })).trace;
  const difference = compareTraces(right, wrong);
  if (difference.first === null) return { difference, length: ids.length };
  const answers = [await ask(write), await ask({ ...write, mistakes: [name] })];
  const texts = answers.map(({ tokens }) => tokens.slice(prompt.length));
  const changes = run.text.layer_types.map((_, layer) => largestChange(right, wrong, layer, null));
  const most = changes.reduce((best, change) => (change.size > best.size ? change : best));
  return { right, wrong, texts, difference, most, length: ids.length };
}

// Where the attention of a layer changed most, in one head or (null) in any:
// {layer, head, query, key, before, after, size}.
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
  const [before, after] = [data[most], other[most]];
  const place = { head: Math.floor(most / (S * T)), query: Math.floor(most / T) % S, key: most % T };
  return { layer, ...place, before, after, size: Math.abs(before - after) };
}

// The ids of a text whose tokens that are not special follow again and again, until there are `length`.
function longerIds(tokens, length) {
  const ids = tokens.map(({ id }) => id);
  const again = tokens.filter(({ special }) => special === null).map(({ id }) => id);
  if (again.length === 0) again.push(ids[0]);
  const missing = Math.max(length - ids.length, 0);
  return [...ids, ...Array.from({ length: missing }, (_, index) => again[index % again.length])];
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
    times.push(ends.at(-1) - ends[0]); // the first token needs the prompt in any case
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
  const showCode = () => run.help.showCode(first);
  const show = make("button", { type: "button", className: "state-link", click: showCode }, first);
  const differing = Object.values(points).filter((difference) => difference !== 0).length;
  lead.replaceChildren("The first stage that differs is ", show, `, by up to ${run.help.number(points[first])}. `,
    `${count(differing)} of ${count(Object.keys(points).length)} stages differ.`);
  if (result.length > run.tokens.length) lead.append(` The text was repeated up to ${count(result.length)} tokens.`);
  const { layer, head } = result.most;
  rest.replaceChildren(
    twoTexts(result.texts, "The right model", `The model with the mistake: ${mistake.title}`),
    make("h3", {}, "Attention"),
    make("div", { className: "state-controls" },
      layerChoice(run),
      choice("Head", singleHeads(run), run.selected.head, (value) => select({ head: Number(value) })),
      make("button", { type: "button", click: () => select({ layer, head }) }, "Find the head that changes most")),
    ...threeMaps(run, result),
    make("h3", {}, "Largest difference in the output of each layer"),
    bars(run, layers.map((value, index) => [`layer ${index}`, value]).concat([["logits", points.logits]])));
}

function twoTexts(texts, ...titles) {
  const [right, wrong] = texts;
  let same = 0;
  while (same < right.length && right[same]?.id === wrong[same]?.id) same++;
  const column = (tokens, title) => make("section", { className: "state-text" }, make("h4", {}, title),
    make("p", {}, tokens.slice(0, same).map(({ text }) => text).join(""),
      make("mark", {}, tokens.slice(same).map((token) => token.special ?? token.text).join(""))));
  const end = right.at(-1)?.special === "</s>" ? "." : "; the page stops there.";
  let said = `Both write the same ${countWritten(right)}${end}`;
  if (same < Math.max(right.length, wrong.length)) said = `The texts differ from token ${same + 1} on (marked).`;
  return make("div", {},
    make("h3", {}, "What both write after the prompt"),
    paragraph(said, " Each time, the most likely token is taken."),
    make("div", { className: "state-pair" }, column(right, titles[0]), column(wrong, titles[1])));
}

// The maps of the chosen layer and head: right, wrong, and what changed.
function threeMaps(run, { right, wrong, length }) {
  const { layer, head } = run.selected;
  const name = `layers.${layer}.attention.probabilities`;
  const start = head * length * length;
  const mask = right[`layers.${layer}.attention.mask`].data;
  const change = largestChange(right, wrong, layer, head);
  let words = `Largest change in layer ${layer}, head ${head}: query ${change.query}, key ${change.key}, `
    + `from ${run.help.percent(change.before)} to ${run.help.percent(change.after)}.`;
  if (change.before === change.after) words = `Nothing changes in layer ${layer}, head ${head}.`;
  const map = (title, value, otherMask = mask) => {
    const canvas = make("canvas", { className: "state-map", role: "img", "aria-label": `${title}. ${words}` });
    const hidden = (row, column) => {
      if (mask[row * length + column] || otherMask[row * length + column]) return null;
      return column > row ? "future" : "window";
    };
    const valueOf = (row, column) => value(start + row * length + column);
    run.help.heat(canvas, { rows: length, columns: length, cells: true, value: valueOf, hidden });
    return make("figure", {}, canvas, make("figcaption", {}, title));
  };
  const other = wrong[`layers.${layer}.attention.mask`].data;
  const difference = (index) => Math.abs(right[name].data[index] - wrong[name].data[index]);
  return [
    make("div", { className: "state-maps" },
      map("Right", (index) => right[name].data[index]),
      map("With the mistake", (index) => wrong[name].data[index], other),
      map("Difference, on the same scale", difference, other)),
    paragraph("Rows are queries, columns are keys. ", words)];
}

// Horizontal bars with their numbers: rows of [label, value].
function bars(run, rows) {
  const largest = Math.max(...rows.map(([, value]) => value), 1e-30);
  const drawing = { class: "state-bar", viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" };
  const bar = (value) => make("svg:rect", { x: 0, y: 0, width: (100 * value) / largest, height: 10 });
  return make("dl", { className: "state-bars" }, rows.map(([label, value]) => make("div", {},
    make("dt", {}, label),
    make("dd", {}, make("svg:svg", drawing, bar(value)), make("span", {}, run.help.number(value))))));
}

function showTimes({ lead, rest }, run, { times, texts }) {
  const written = texts[0].length;
  const same = texts[0].map(({ id }) => id).join() === texts[1].map(({ id }) => id).join();
  const found = same ? "The text is the same." : "The texts differ, which must not happen.";
  const kept = Array.from({ length: written }, (_, step) => (step === 0 ? run.prompt : 1));
  const whole = Array.from({ length: written }, (_, step) => run.prompt + step);
  const [few, many] = [kept, whole].map((positions) => positions.reduce((sum, read) => sum + read, 0));
  lead.textContent = `${found} To write ${countWritten(texts[0])}, the model reads `
    + `${count(few)} positions with a cache and ${count(many)} without.`;
  const milliseconds = times.map((time) => `${count(Math.round(time))} ms`);
  const steps = (positions) => positions.map((read, step) => [step + 1, read]);
  const lines = [
    { className: "state-line", points: steps(whole) },
    { className: "state-line-plain", points: steps(kept) },
  ];
  const x = { from: 1, to: Math.max(written, 2), label: "written token", text: String, ticks: [1, written] };
  const y = { from: 0, to: 1.1 * whole.at(-1), ticks: [1, whole.at(-1)], text: count };
  rest.replaceChildren(
    plot("Positions that the model reads for each written token", x, y, lines),
    paragraph("Positions that the model reads for each written token. "
      + "Solid: without a cache, all again. Dashed: with a cache, the prompt once, then one at a time."),
    paragraph(`In this browser, the tokens after the first took ${milliseconds[0]} with a cache `
      + `and ${milliseconds[1]} without. This is one measurement: another one gives other times.`),
    twoTexts(texts, "With a cache", "Without a cache"));
}

// ------------------------------------------------------------------------------------------------------ image
chosen.image = {
  shapes: [{ place: 0, kind: "circle", colour: "red" }, { place: 3, kind: "square", colour: "blue" }],
  question: "What do you see?",
  head: "all",
};

const QUESTIONS = ["What do you see?", "How many shapes are there?", "What is at the top left?",
  "What colour is the circle?", "Where is the blue square?"];
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
    if (run.images.length > 0) {
      result.replaceChildren(...imageResult(run));
      return;
    }
    const what = "Ask the question: the page then shows the answer, and which token looks where.";
    result.replaceChildren(paragraph(what));
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
    // A token of the answer is drawn at the position before it.
    const drawnAt = answered.steps.map((_, step) => answered.prompt + step - 1);
    if (drawnAt.length > 0) lookClosest(answered, ...drawnAt);
  };
  const question = make("input", { type: "text", id: "state-question", value: state.question,
    input: () => { state.question = question.value; },
    keydown: (event) => { if (event.key === "Enter") ask(); } });
  const suggestions = QUESTIONS.map((text) => make("button", { type: "button", click: () => {
    state.question = text;
    question.value = text;
    ask();
  } }, text));
  const button = make("button", { type: "button", className: "primary", click: ask }, "Ask");
  draw();
  return make("div", { className: "state-editor" },
    make("figure", {}, canvas, make("figcaption", { className: "state-small" }, patchText(run.config))),
    make("div", {},
      make("div", { className: "state-places" }, PLACES.map((_, place) => placeEditor(place, draw))), note,
      make("div", { className: "state-control" }, make("label", { htmlFor: "state-question" }, "Question"),
        make("div", { className: "state-ask" }, question, button)),
      make("div", { className: "state-buttons", role: "group", "aria-label": "Questions" }, suggestions)));
}

// Of some tokens, choose the one that gives the largest share to one merged patch, and its layer and head.
function lookClosest(run, ...queries) {
  const places = imagePlaces(run).patches;
  let best = { share: -1 };
  for (const query of queries) {
    run.text.layer_types.forEach((_, layer) => {
      for (let head = 0; head < run.text.num_attention_heads; head++) {
        const share = Math.max(...places.map(attentionOf(run, layer, head, query)));
        if (share > best.share) best = { share, query, layer, head };
      }
    });
  }
  chosen.image.head = best.head;
  select({ query: best.query, layer: best.layer, head: best.head });
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
  return `${IMAGE_SIZE} × ${IMAGE_SIZE} pixels, not resized: `
    + `${all} × ${all} patches of ${patch} × ${patch} pixels (thin lines). `
    + `${merged / patch} × ${merged / patch} neighbours become one token (thick lines): ${rows * rows} tokens.`;
}

// Draw the image, enlarged, with the lines of patches. shares: of attention, of each merged patch; others are veiled.
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
    if (share < 0.0005) return; // there is no room for "< 0.05 %"; the table has it
    context.fillStyle = isDark ? "#000000cc" : "#ffffffdd";
    context.fillRect(x + cell / 2 - 44, y + cell - 40, 88, 34);
    context.fillStyle = isDark ? "#fff" : "#000";
    context.font = "26px system-ui, sans-serif"; // 13 CSS pixels
    context.textAlign = "center";
    context.fillText(percent(share), x + cell / 2, y + cell - 14);
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
  const written = run.tokens.slice(run.prompt).filter(({ special }) => special === null);
  const answer = written.map(({ text }) => text).join("");
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
    paragraph("Choose a token of the question or the answer. A word of the answer is drawn at the token before it: "
      + "choose that token to see where the model looked."),
    tokenChoice(run, places, query),
    make("div", { className: "state-controls" },
      layerChoice(run),
      choice("Heads", headOptions(run), chosen.image.head, (value) => {
        chosen.image.head = value;
        select(value === "all" ? {} : { head: Number(value) });
      }),
      make("button", { type: "button", click: () => lookClosest(run, query) },
        "Find the head that looks at one patch most")),
    make("div", { className: "state-editor" }, make("figure", {}, canvas), make("div", {},
      make("p", { className: "state-lead", role: "status" }, said),
      make("h4", {}, "The image as tokens"), imageTokens(run, places, share),
      paragraph("[IMG_BREAK] ends a row, [IMG_END] the image. "
        + "The model also looks at these, and at the rest of the text."))),
  ];
}

function singleHeads(run) {
  return Array.from({ length: run.text.num_attention_heads }, (_, head) => [head, String(head)]);
}

function headOptions(run) {
  return [["all", "the mean of all"], ...singleHeads(run)];
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
  return `Position ${query}${quoted(run, query)} gives ${percent(all)} of its attention `
    + `to the ${shares.length} merged patches (layer ${run.selected.layer}, ${heads}). `
    + `The largest share, ${percent(shares[most])}, goes to row ${Math.floor(most / rows) + 1}, `
    + `column ${(most % rows) + 1}.`;
}

function tokenChoice(run, places, query) {
  const group = make("div", { className: "state-tokens", role: "group", "aria-label": "Tokens after the image" });
  for (let position = places.last + 1; position < run.tokens.length; position++) {
    const written = position >= run.prompt ? " state-written" : "";
    const choose = () => {
      if (position !== query) select({ query: position });
    };
    group.append(make("button", {
      type: "button", className: `state-token-button${written}`, tabIndex: position === query ? 0 : -1,
      "aria-pressed": String(position === query), click: choose, focus: choose,
    }, run.help.tokenLabel(position)));
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
  const cell = (position) => {
    const number = make("b", {}, run.help.percent(share(position)));
    const element = make("td", { title: `position ${position}` }, `${run.help.tokenLabel(position)} `, number);
    return run.help.tint(element, share(position) / most);
  };
  return make("div", { className: "state-scroll", tabIndex: 0, role: "region", "aria-label": "The image as tokens" },
    make("table", { className: "state-image-tokens" }, make("tbody", {},
      rows.filter((row) => row.length > 0).map((row) => make("tr", {}, row.map(cell))))));
}
