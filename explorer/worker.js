// The worker of the page: it holds the model, so that the page stays responsive. model.js stands before this text.
//
// The page sends {number, message}; the worker answers {number, result} or {number, error}, and {number, progress}
// before. Messages are answered one after the other. message.kind is one of:
//
//     start   {config, tekken, weights}          once, first -> {parameters, tensors: {name: shape}}
//     encode  {text, mode, images}               -> {tokens}
//     run     {ids | text, mode, images, mistakes, cache, generate, settings, seed, trace}
//                                                -> {tokens, prompt, steps, trace, ended}, see `run` below
//     lens    {vectors}  (n, E), one after another -> n lists of {id, text, probability}, the most likely first
//     name    {ids}                              -> {tokens}
//     stop    ends a run after its current token; has no answer
//
// The progress of a run is {read: tokens} once, {token, step} of each written token, and {done, of, unit} of long work.
"use strict";

const LIMIT = 512; // tokens of a text: its trace would otherwise need more than 100 MB
const CHUNK = 64; // tokens of a long text that are read before its progress is reported
let parts = null; // {config, tokenizer, weights} after "start"
const models = new Map(); // names of mistakes -> Model
let kept = null; // {key, ids, cache, logits} of the last run of the right model, to go on from
let stopped = false;
let queue = Promise.resolve();

if (typeof WorkerGlobalScope !== "undefined") {
  self.onmessage = ({ data: { number, message } }) => {
    if (message.kind === "stop") stopped = true;
    else queue = queue.then(() => answer(number, message));
  };
}

async function answer(number, message) {
  const requests = { start, encode, run, lens: lensOf, name: ({ ids }) => ({ tokens: ids.map(describe) }) };
  try {
    const report = (progress) => self.postMessage({ number, progress });
    const result = await requests[message.kind](message, report);
    self.postMessage({ number, result }, buffersOf(result));
  } catch (error) {
    self.postMessage({ number, error: error.message });
  }
}

// The buffers of a trace, which are handed over and not copied.
function buffersOf(result) {
  return [...new Set(Object.values(result.trace ?? {}).map(({ data }) => data.buffer))];
}

async function start({ config, tekken, weights }) {
  const binary = atob(weights);
  const packed = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) packed[i] = binary.charCodeAt(i);
  const { readable, writable } = new DecompressionStream("deflate");
  const writer = writable.getWriter(); // WebKit cannot read a Blob's stream in a page that is a file
  writer.write(packed);
  writer.close();
  const planes = new Uint8Array(await new Response(readable).arrayBuffer());
  const file = new Uint8Array(planes.length); // bytes at even places first, then those at odd places
  const half = Math.ceil(planes.length / 2);
  for (let i = 0; i < half; i++) file[2 * i] = planes[i];
  for (let i = half; i < planes.length; i++) file[2 * (i - half) + 1] = planes[i];
  parts = { config, tokenizer: new Tokenizer(tekken), weights: readWeights(file.buffer) };
  models.set("", new Model(config, parts.weights));
  const tensors = Object.fromEntries(Object.entries(parts.weights).map(([name, { shape }]) => [name, shape]));
  const parameters = Object.values(parts.weights).reduce((sum, { data }) => sum + data.length, 0);
  return { parameters, tensors };
}

function describe(id) {
  const bytes = parts.tokenizer.bytes(id);
  return { id, bytes, text: new TextDecoder().decode(bytes), special: parts.tokenizer.name(id) };
}

// The images of a message, {rgb, height, width} with one byte for a number, as the model takes them.
function readImages(images) {
  return images.map(({ rgb, height, width }) => preprocess(rgb, height, width));
}

function idsOf({ text, mode = "text", images = [] }) {
  if (mode === "text" && images.length === 0) return parts.tokenizer.encode(text);
  return encodeChat(parts.tokenizer, parts.config, text, readImages(images));
}

function encode(message) {
  return { tokens: idsOf(message).map(describe) };
}

// Read a text, or ids that were read before; then write `generate` tokens.
//     mistakes  names of reference/mutants; `cache` false: each step reads the whole text again
//     trace     whether the result has the points of one forward pass over all tokens
//     result    tokens: all; prompt: how many were read; steps: [{id, logits}] of those written; ended: by </s>
async function run(message, report) {
  const { mistakes = [], cache: useCache = true, generate = 0, seed = 0 } = message;
  const settings = message.settings ?? { temperature: 0 };
  const ends = [parts.config.eos_token_id ?? parts.config.text_config?.eos_token_id ?? 2].flat();
  stopped = false;
  const model = modelOf(mistakes);
  const images = readImages(message.images ?? []);
  const ids = [...(message.ids ?? idsOf(message))];
  const prompt = ids.length;
  if (prompt > LIMIT) throw new Error(`The text has ${prompt} tokens; this page reads up to ${LIMIT}.`);
  const tokens = ids.map(describe);
  report({ read: tokens });
  const steps = [];
  let ended = null;
  let state = null;
  for (let step = 0; step < generate && ended === null; step++) {
    const before = useCache ? state ?? reusable(mistakes, ids, message.images) : null;
    state = advance(model, ids, images, before, report);
    const id = sample(state.logits, settings, noiseOf(seed, ids.length, state.logits.length));
    ids.push(id);
    tokens.push(describe(id));
    steps.push({ id, logits: state.logits, settings });
    report({ token: tokens.at(-1), step: steps.at(-1) });
    await new Promise((resolve) => setTimeout(resolve)); // "stop" may have come
    if (ends.includes(id)) ended = "end token";
    else if (ids.length >= LIMIT) ended = "limit";
    else if (stopped) ended = "stop";
  }
  const trace = {};
  if (message.trace) {
    const of = model.layers.length;
    const record = (name, shape, data) => {
      trace[name] = { shape, data };
      const layer = name.match(/^layers\.(\d+)\.mlp_residual$/);
      if (layer) report({ done: Number(layer[1]) + 1, of, unit: "layer" });
    };
    const cache = model.newCache(); // the pass also fills a cache, so that the next token needs no second one
    const logits = Float32Array.from(model.forward(ids, cache, { images, record }));
    state = { ids: [...ids], cache, logits };
  }
  const isUsable = state !== null && (useCache || message.trace) && mistakes.length === 0;
  if (isUsable) kept = { ...state, key: imagesKey(message.images) };
  return { tokens, prompt, steps, trace, ended };
}

function modelOf(mistakes) {
  const key = mistakes.join();
  if (!models.has(key)) models.set(key, new Model(parts.config, parts.weights, mistakes));
  return models.get(key);
}

// Read the tokens that the cache lacks. state: {ids, cache, logits} of tokens that `ids` begins with, or null. A long
// text is read in chunks, between which `report` tells how far it is. The numbers are those of one pass.
function advance(model, ids, images, state, report) {
  const start = state?.ids.length ?? 0;
  if (start === ids.length) return state;
  const cache = state?.cache ?? model.newCache();
  const given = state === null ? images : [];
  let logits = null;
  for (let done = start; done < ids.length;) {
    let end = done + CHUNK;
    if (given.length > 0 || end + 1 >= ids.length) end = ids.length; // images are read at once; no chunk has 1 token
    if (end < ids.length || done > start) report({ done, of: ids.length, unit: "token" });
    logits = model.forward(ids.slice(done, end), cache, { images: given });
    done = end;
  }
  return { ids: [...ids], cache, logits: Float32Array.from(logits) };
}

function reusable(mistakes, ids, images) {
  if (kept === null || mistakes.length > 0 || kept.key !== imagesKey(images)) return null;
  return kept.ids.every((id, place) => id === ids[place]) ? kept : null;
}

function imagesKey(images = []) {
  return JSON.stringify(images.map(({ rgb, height, width }) => [height, width, ...rgb]));
}

// Exponentially distributed numbers that depend only on the seed and on the place in the text.
function noiseOf(seed, place, count) {
  let state = (Math.imul(seed, 0x9e3779b1) ^ Math.imul(place + 1, 0x85ebca6b)) >>> 0;
  return Float32Array.from({ length: count }, () => { // the generator mulberry32
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    const uniform = ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
    return Math.max(-Math.log1p(-uniform), 1e-30);
  });
}

// The logit lens: what the head would say of vectors of the residual stream.
function lensOf({ vectors, best = 8 }) {
  const model = modelOf([]);
  const E = model.text.hidden_size;
  const guesses = [];
  for (let start = 0; start < vectors.length; start += E) {
    const logits = lens(model, vectors.slice(start, start + E));
    guesses.push(mostLikely(logits, best));
  }
  return { guesses };
}

function mostLikely(logits, count) {
  const largest = logits.reduce((a, b) => Math.max(a, b));
  const total = logits.reduce((sum, logit) => sum + Math.exp(logit - largest), 0);
  const order = [...logits.keys()].sort((a, b) => logits[b] - logits[a]);
  const probability = (id) => Math.exp(logits[id] - largest) / total;
  return order.slice(0, count).map((id) => ({ ...describe(id), probability: probability(id) }));
}

if (typeof module !== "undefined") module.exports = { noiseOf, advance };
