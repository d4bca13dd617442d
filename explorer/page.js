// The page: it starts the worker, keeps the run that all views show, and calls the views.
//
// A view is an object {id, title, about, render(element, run)} in VIEWS. It fills `element` each time that the run, the
// selection or the sampling settings change; after that, the element with the focus gets it again by its place in the
// tree. A view may also have first(run) (a selection to begin with), glow(run, position) (a share that colours a token
// above) and legend(run) (what that colour means). Text of models and readers only ever becomes `textContent`.
//
//     run.config, run.text          the parsed config.json, and its text configuration with all fields
//     run.tokens                    [{id, text, bytes, special}] of everything read and written
//     run.prompt                    how many of them are the prompt
//     run.trace                     {name: {shape, data}}, points of reference/trace.py of one pass over all tokens
//     run.steps                     [{id, logits, settings}] of each written token, drawn from the logits (V,)
//     run.images                    [{rgb, height, width}] that were read with the text
//     run.source                    {text, mode, images} that the tokens come from
//     run.settings                  the sampling settings of the page, as of now
//     run.selected                  {layer, head, query, key, ahead}; change it with select({layer: 2}). ahead: the
//                                   token after the query is meant, which is the last and not drawn yet
//     run.sources                   {"ministral.py": text, ...}
//     run.tensors                   {name: shape} of the weights
//     run.generation, run.name      the parsed generation_config.json, and the name of the model
//     run.ask(message, progress)    Promise of an answer of the worker, see worker.js
//     run.codePoint                 the point whose Python lines are to be shown (help.showCode), or undefined
//     run.help                      the functions below
"use strict";

const VIEWS = [];
// Their tabs, from left to right. A script may hold views that are not neighbours.
const ORDER = ["tokens", "sampling", "attention", "layers", "cache", "positions", "mistakes", "image", "sizes"];
const data = JSON.parse(document.getElementById("data").textContent);
const state = {
  run: null, // null until the model has read the first text
  view: "attention",
  settings: {}, // the last usable numbers of the fields, by the ids of the fields
  back: null, // {view, scroll} from which the Python lines were opened
  busy: false,
  next: null, // what was asked for while the page was busy: a function
  pending: 0, // messages that the worker has not answered
  parameters: 0,
  tensors: {},
  live: null, // {tokens, prompt} while tokens are being written
};
const byId = (id) => document.getElementById(id);

// --------------------------------------------------------------------------------------------------- the worker
let worker = null;
const waiting = new Map(); // number of a message -> {resolve, reject, progress}
let messages = 0;

function startWorker() {
  const source = ["model.js", "worker.js"].map((name) => byId(name).textContent).join("\n");
  const address = URL.createObjectURL(new Blob([source], { type: "text/javascript" }));
  worker = new Worker(address);
  worker.onerror = (event) => showError(event.message);
  worker.onmessage = ({ data: { number, result, error, progress } }) => {
    const { resolve, reject, progress: report } = waiting.get(number);
    if (progress !== undefined) {
      report?.(progress);
      return;
    }
    waiting.delete(number);
    state.pending = waiting.size;
    if (error !== undefined) reject(new Error(error));
    else resolve(result);
  };
}

function ask(message, progress) {
  messages += 1;
  const number = messages;
  worker.postMessage({ number, message });
  state.pending += 1;
  return new Promise((resolve, reject) => waiting.set(number, { resolve, reject, progress }));
}

// ------------------------------------------------------------------------------------------------------ helpers
// An element with properties and children. Properties that exist are set, functions are listeners, others attributes.
// "svg:line" is an element of SVG, whose properties are all attributes.
function make(tag, properties = {}, ...children) {
  const isDrawing = tag.startsWith("svg:");
  const space = isDrawing ? "http://www.w3.org/2000/svg" : "http://www.w3.org/1999/xhtml";
  const element = document.createElementNS(space, tag.replace("svg:", ""));
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined) continue;
    if (typeof value === "function") element.addEventListener(name, value);
    else if (name in element && !isDrawing) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return element;
}

// A token as a short text, with signs for blanks and newlines: " the" -> "·the".
function labelOf({ text, bytes, special }) {
  if (special !== null) return special.replaceAll(/\p{C}/gu, hexOf);
  const isWhole = !text.includes("\ufffd");
  if (!isWhole) return [...bytes].map((byte) => `<${byte.toString(16).padStart(2, "0")}>`).join("");
  const signs = { " ": "·", "\n": "↵", "\t": "⇥" };
  return text.replaceAll(/[\p{C}\p{Z}]/gu, (character) => signs[character] ?? hexOf(character));
}

function hexOf(character) {
  return `<U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}>`;
}

// The label of the token at a position of the run.
function tokenLabel(position) {
  return labelOf(state.run.tokens[position]);
}

// A number in so many significant digits: 10,870 or 0.5000. Below 0.001, and from a million on: 1.087 · 10⁶.
function number(x, digits = 4) {
  if (x === 0) return "0";
  if (!Number.isFinite(x)) return String(x).replace("Infinity", "∞").replace("-", "−");
  const size = Math.abs(x);
  const rounding = { minimumSignificantDigits: digits, maximumSignificantDigits: digits };
  if (size >= 1e-3 && size < 1e6) return x.toLocaleString("en-US", rounding).replace("-", "−");
  const [mantissa, exponent] = x.toExponential(digits - 1).split("e");
  return `${mantissa.replace("-", "−")}\u00a0·\u00a0${powerOfTen(exponent)}`;
}

function powerOfTen(exponent) {
  const raised = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" };
  return `10${Array.from(String(Number(exponent)), (sign) => raised[sign]).join("")}`;
}

// A share in percent, 0 only if it is 0. The blank before the sign does not break a line.
function percent(p) {
  if (p === 0) return "0\u00a0%";
  if (p < 0.0005) return "< 0.05\u00a0%";
  return `${(100 * p).toFixed(1)}\u00a0%`;
}

// A share in percent with the digits that it has, up to so many significant ones: 0.0001 -> 0.01 %.
function exactPercent(p, digits = 12) {
  return `${(100 * p).toLocaleString("en-US", { maximumSignificantDigits: digits })}\u00a0%`;
}

// A number with separators of thousands. With a word, so many things: count(1, "token") -> "1 token", 2 -> "2 tokens".
function count(n, word = null) {
  const written = n.toLocaleString("en-US");
  if (word === null) return written;
  return `${written} ${word}${n === 1 ? "" : "s"}`;
}

// So many written tokens. The end token is one of them, which is said.
function countWritten(tokens) {
  const end = tokens.at(-1)?.special;
  const words = count(tokens.length, "token");
  return end === "</s>" ? `${words}, </s> included` : words;
}

function isDark() {
  const { theme } = document.documentElement.dataset;
  if (theme !== undefined) return theme === "dark";
  return matchMedia("(prefers-color-scheme: dark)").matches;
}

// Colours of a scale from 0 to 1, monotone in lightness: legible in grey, too.
const SCALES = {
  light: [[253, 249, 244], [252, 222, 190], [244, 165, 100], [205, 92, 30], [122, 40, 8], [58, 14, 2]],
  dark: [[30, 30, 33], [74, 46, 36], [135, 66, 30], [205, 104, 44], [246, 172, 105], [255, 240, 220]],
};
// Hidden cells: plain, and the lines of hatches.
const HIDDEN = { light: ["#e6e7ec", "#c3c6d0"], dark: ["#2e3445", "#566080"] };

// The colour of a share from 0 to 1 as [red, green, blue]. Small shares are widened: the square root is shown.
function scaleColour(share, colours = scaleOfTheme()) {
  const place = Math.sqrt(Math.min(Math.max(share, 0), 1)) * (colours.length - 1);
  const low = Math.min(Math.floor(place), colours.length - 2);
  return colours[low].map((value, i) => Math.round(value + (colours[low + 1][i] - value) * (place - low)));
}

// Asking for the theme takes longer than finding a colour: a map with many cells asks once.
function scaleOfTheme() {
  return SCALES[isDark() ? "dark" : "light"];
}

// Text on that colour: black or white, whichever has the larger contrast.
function inkOn([red, green, blue]) {
  const linear = [red, green, blue].map((value) => (value / 255) ** 2.2);
  const luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  return luminance > 0.18 ? "#000" : "#fff";
}

// Colour an element by a share, with legible text.
function tint(element, share) {
  const colour = scaleColour(share);
  element.style.background = `rgb(${colour.join()})`;
  element.style.color = inkOn(colour);
  return element;
}

// Draw a heat map on a canvas of `size` CSS pixels, or, with `cells`, of one pixel for each cell, for CSS to enlarge.
//     value(row, column)   a share from 0 to 1
//     hidden(row, column)  null, or why a cell is hidden: "future" is plain, everything else has hatches
function heat(canvas, { rows, columns, value, hidden = () => null, size = 64, cells = false }) {
  let ratio = Math.min(window.devicePixelRatio || 1, 2);
  if (cells) [size, ratio] = [columns, 1];
  const pixels = Math.round(size * ratio);
  [canvas.width, canvas.height] = [pixels, Math.max(Math.round((pixels * rows) / columns), 1)];
  const scale = scaleOfTheme();
  const [plain, line] = HIDDEN[isDark() ? "dark" : "light"].map(rgbOf).map(packed);
  const colours = new Uint32Array(rows * columns);
  const hasHatches = new Uint8Array(rows * columns);
  for (let cell = 0; cell < colours.length; cell++) {
    const [row, column] = [Math.floor(cell / columns), cell % columns];
    const why = hidden(row, column);
    colours[cell] = why === null ? packed(scaleColour(value(row, column), scale)) : plain;
    hasHatches[cell] = Number(why !== null && why !== "future");
  }
  const image = new ImageData(canvas.width, canvas.height);
  const result = new Uint32Array(image.data.buffer);
  for (let y = 0, place = 0; y < canvas.height; y++) {
    const start = Math.min(Math.floor((y * rows) / canvas.height), rows - 1) * columns;
    for (let x = 0; x < canvas.width; x++, place++) {
      const cell = start + Math.floor((x * columns) / canvas.width);
      const isLine = hasHatches[cell] === 1 && (x + y) % (4 * ratio) < ratio;
      result[place] = isLine ? line : colours[cell];
    }
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}

// [red, green, blue] as one number, in the byte order of an ImageData.
function packed([red, green, blue]) {
  return ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0;
}

function rgbOf(hex) {
  return [1, 3, 5].map((start) => parseInt(hex.slice(start, start + 2), 16));
}

// The points of the trace with this name, for example point("layers.2.attention.scores") -> {shape, data}.
function point(name) {
  return state.run.trace[name];
}

// --------------------------------------------------------------------------------------- parts of several views
// What the reader chose in a view, by the id of the view: a view is made anew when the selection changes.
const chosen = {};
let madeIds = 0;

// An id for a control and its label.
function newId() {
  madeIds += 1;
  return `state-${madeIds}`;
}

// A list of [value, text] under a label.
function choice(label, options, value, changed) {
  const id = newId();
  const item = ([key, text]) => make("option", { value: key, selected: String(key) === String(value) }, text);
  const list = make("select", { id, change: () => changed(list.value) }, options.map(item));
  return make("div", { className: "state-control" }, make("label", { htmlFor: id }, label), list);
}

function paragraph(...children) {
  return make("p", {}, ...children);
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

// The token of a position in quotes, after a blank; nothing beyond the end of the text.
function quoted(run, position) {
  if (position >= run.tokens.length) return "";
  return ` “${run.help.tokenLabel(position)}”`;
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
    const band = ({ className, from, to }) => make("svg:rect", { class: className, x: toX(from), y: top,
      width: Math.max(toX(to) - toX(from), 0), height: height - bottom - top });
    element.replaceChildren(make("svg:svg", { width, height, role: "img", "aria-label": description },
      zones.map(band),
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

function layerChoice(run) {
  const layers = run.text.layer_types.map((kind, index) => [index, `${index}: ${kind.replace("_", " ")}`]);
  const changed = (layer) => select({ layer: Number(layer) });
  return choice("Layer (in all views)", layers, run.selected.layer, changed);
}

// ------------------------------------------------------------------------------------------- run and selection
// The numbers of the fields. A field whose number is not supported says so, and its last number counts in the views;
// nothing is written then.
function settingsOfPage() {
  const complaints = [];
  for (const input of byId("settings").querySelectorAll("input")) {
    const found = complaint(input.labels[0].textContent.trim(), input);
    input.setAttribute("aria-invalid", String(found !== null));
    if (found === null) state.settings[input.id] = input.valueAsNumber;
    else complaints.push(`${found}. Until you change it, ${state.settings[input.id]} counts.`);
  }
  byId("complaint").textContent = complaints.join(" ");
  return { ...state.settings };
}

// Why the number in a field is not supported; null if it is. Numbers between its steps are, unless the step is 1.
function complaint(name, { valueAsNumber: found, min, max, step }) {
  const isWhole = step === "1";
  const isInside = found >= Number(min) && (max === "" || found <= Number(max));
  if (isInside && (!isWhole || Number.isInteger(found))) return null;
  const kind = isWhole ? "whole numbers " : "";
  const end = max === "" ? "on" : `to ${count(Number(max))}`;
  const shown = Number.isNaN(found) ? "no number" : String(found).replace("-", "−");
  return `${name}: ${shown}; supported: ${kind}from ${min} ${end}`;
}

// Choose a layer, head, query or key; all views render again. A query comes with the key that it looks at most.
function select(changes) {
  const { selected } = state.run;
  if ("query" in changes) selected.ahead = false;
  Object.assign(selected, changes);
  if ("query" in changes && !("key" in changes)) selected.key = strongestKey(selected);
  renderStrip();
  renderView();
}

function strongestKey({ layer, head, query }) {
  const { shape: [, , S, T], data } = state.run.trace[`layers.${layer}.attention.probabilities`];
  const row = data.subarray((head * S + query) * T, (head * S + query + 1) * T);
  return row.indexOf(Math.max(...row));
}

// Show the lines of Python that compute a point of the trace, and a button that leads back.
function showCode(name) {
  state.run.codePoint = name;
  const back = { view: state.view, scroll: window.scrollY };
  const { title } = currentView();
  openView("sizes");
  state.back = back;
  byId("back").textContent = `← Back to “${title}”`;
  byId("back").hidden = false;
  byId("back").focus();
}

function goBack() {
  const { view, scroll } = state.back;
  openView(view);
  byId(`tab-${view}`).focus({ preventScroll: true });
  window.scrollTo(0, scroll);
}

function setRun(result, source, steps) {
  const { config, generation, name, sources } = data;
  const text = textConfig();
  const isFirst = state.run === null;
  const old = state.run?.selected ?? { layer: 0, head: 0, query: 0, key: 0 };
  const last = result.tokens.length - 1;
  const help = {
    make, tokenLabel, labelOf, number, percent, scaleColour, inkOn, tint, heat, isDark, point, showCode,
    openView, read, answer: (source) => beginNext(() => answer(source)),
  };
  state.run = {
    config, generation, name, sources, text, tensors: state.tensors, trace: result.trace, steps,
    tokens: result.tokens, prompt: result.tokens.length - steps.length,
    source, images: source.images ?? [], settings: settingsOfPage(),
    selected: { ...old, query: last, ahead: steps.length === 0 }, ask, help,
  };
  if (isFirst) {
    for (const view of VIEWS) Object.assign(state.run.selected, view.first?.(state.run));
  }
  state.run.selected.key = strongestKey(state.run.selected);
  renderStrip();
  renderView();
}

// The text configuration with the fields that a config.json may leave out.
function textConfig() {
  return completeConfig(data.config);
}

// Read a text, {text, mode: "text" or "chat", images: [{rgb, height, width}]}; all views show it.
async function read(source = sourceOfPage()) {
  await busyWith("Reading ...", async () => {
    byId("stop").hidden = true; // it acts between two written tokens
    const started = performance.now();
    const result = await ask({ kind: "run", ...source, trace: true }, showProgress);
    setRun(result, source, []);
    showStatus(`Read ${count(result.tokens.length, "token")} in ${seconds(started)}.`);
  });
}

// Ask a question about images, {text, mode: "chat", images}; all views show it with the most likely answer.
async function answer(source) {
  await busyWith("Answering ...", async () => {
    byId("prompt").value = source.text;
    document.querySelector("input[name=mode][value=chat]").checked = true;
    showWhichExample();
    const message = { kind: "run", ...source, generate: 60, settings: { temperature: 0 }, trace: true };
    const result = await ask(message, showProgress);
    setRun(result, source, result.steps);
    const end = result.ended === null ? " The answer is not finished; “Write the answer” goes on." : "";
    showStatus(`Answered with ${countWritten(result.tokens.slice(result.prompt))}.${end}`);
  });
}

const ENDS = {
  "end token": " The model has ended its text.",
  limit: " The text is as long as this page allows.",
  stop: " Stopped.",
};
// What the button writes: so many tokens of a text; an answer up to its own end.
const WRITE = {
  text: { words: "Write 40 tokens", most: 40 },
  chat: { words: "Write the answer (up to 100 tokens)", most: 100 },
};

// Write tokens after the text; it is read first if it has changed.
async function write(howMany) {
  const source = sourceOfPage();
  const isNew = state.run === null || !sameSource(source, state.run.source);
  await busyWith("Writing ...", async () => {
    const started = performance.now();
    const steps = isNew ? [] : [...state.run.steps];
    const { seed, ...settings } = settingsOfPage();
    const isUsable = byId("complaint").textContent === "";
    if (!isUsable) throw new Error("Nothing was written: a setting is not supported.");
    const message = { kind: "run", ...source, generate: howMany, settings, seed };
    if (!isNew) message.ids = state.run.tokens.map(({ id }) => id);
    let first = null;
    const result = await ask({ ...message, trace: true }, (progress) => {
      const { read: tokens, token, step } = progress;
      showProgress(progress);
      if (progress.done !== undefined) return;
      if (tokens !== undefined) state.live = { tokens, prompt: tokens.length - steps.length };
      if (token !== undefined) {
        if (first === null) showStatus("Writing ...");
        first ??= seconds(started);
        state.live.tokens.push(token);
        steps.push(step);
      }
      renderStrip();
    });
    state.live = null;
    setRun(result, source, steps);
    const written = countWritten(result.tokens.slice(result.prompt));
    let end = ENDS[result.ended] ?? "";
    if (result.ended === null && source.mode === "chat" && howMany > 1) {
      end = " The answer is not finished; press again.";
    }
    showStatus(`Wrote ${written}; the first came after ${first ?? "0 s"}.${end}`);
  });
}

function sourceOfPage() {
  const mode = document.querySelector("input[name=mode]:checked").value;
  const source = { text: byId("prompt").value, mode, images: [] };
  const old = state.run?.source;
  if (old?.images?.length && old.text === source.text) return old; // with the images of this text
  return source;
}

function sameSource(a, b) {
  const isSameText = a.text === b.text && a.mode === b.mode;
  return isSameText && (a.images === b.images || a.images.length + b.images.length === 0);
}

async function busyWith(words, work) {
  if (state.busy) return;
  state.busy = true;
  setButtons();
  showStatus(words);
  try {
    await work();
  } catch (error) {
    showError(error.message);
  }
  state.live = null;
  state.busy = false;
  setButtons();
  const { next } = state;
  state.next = null;
  next?.();
}

// Begin a work, or stop the one in progress and begin when it has ended. The promise waits for the end.
function beginNext(work) {
  return new Promise((resolve) => {
    const begin = () => work().then(resolve);
    if (!state.busy) {
      begin();
      return;
    }
    state.next = begin;
    stopWork();
  });
}

function stopWork() {
  worker.postMessage({ message: { kind: "stop" } });
}

function setButtons() {
  for (const id of ["read", "next", "write"]) byId(id).setAttribute("aria-disabled", String(state.busy));
  byId("stop").hidden = !state.busy;
}

function showStatus(words) {
  byId("status").textContent = words;
  byId("status").classList.remove("error");
}

// How far the worker is: in the text before it writes, or in the layers of the pass that all views show.
function showProgress({ done, of, unit }) {
  if (done === undefined) return;
  const words = { token: "Reading", layer: "Reading all for the views" }[unit];
  showStatus(`${words}: ${count(done)} of ${count(of, unit)} ...`);
}

function showError(words) {
  byId("status").textContent = words;
  byId("status").classList.add("error");
}

const seconds = (started) => `${((performance.now() - started) / 1000).toFixed(2)} s`;

// -------------------------------------------------------------------------------------------------- token strip
// The text as tokens. In views of attention, `glow(position)` gives each token a share that colours it.
function renderStrip() {
  const { tokens, prompt } = state.live ?? state.run;
  const strip = byId("strip");
  const hadFocus = strip.contains(document.activeElement);
  const selected = state.live === null ? state.run.selected.query : -1;
  const glow = currentView()?.glow;
  strip.replaceChildren(...tokens.map((token, position) => {
    const kind = token.special === null ? "" : " special";
    const written = position >= prompt ? " written" : "";
    const element = make("span", {
      className: `token${kind}${written}`, role: "option", tabIndex: position === selected ? 0 : -1,
      "aria-selected": String(position === selected), title: `position ${position}, id ${token.id}`,
      click: () => { select({ query: position }); focusToken(); },
    }, labelOf(token));
    if (glow && state.live === null) {
      const share = glow(state.run, position);
      if (share !== null) tint(element, share);
    }
    return element;
  }));
  const legends = [];
  if (state.live === null) legends.push(currentView()?.legend?.(state.run) ?? "");
  if (prompt < tokens.length) legends.push("Underlined: written by the model.");
  byId("legend").textContent = legends.join(" ");
  breakLines(strip, tokens);
  if (hadFocus) focusToken();
  const shown = state.live === null ? strip.querySelector("[aria-selected=true]") : strip.lastElementChild;
  showInStrip(strip, shown);
}

// Scroll the strip, and nothing else, to a token.
function showInStrip(strip, element) {
  if (element === null) return;
  const top = element.offsetTop;
  const bottom = top + element.offsetHeight;
  if (top < strip.scrollTop) strip.scrollTop = top - 8;
  else if (bottom > strip.scrollTop + strip.clientHeight) strip.scrollTop = bottom + 8 - strip.clientHeight;
}

// A line of the text is a line of the strip.
function breakLines(strip, tokens) {
  const children = [...strip.children];
  tokens.forEach((token, position) => {
    if (token.text.includes("\n") && position < tokens.length - 1) children[position].after(make("br"));
  });
}

function focusToken() {
  byId("strip").querySelector("[aria-selected=true]")?.focus();
}

function stripKeys(event) {
  const last = state.run.tokens.length - 1;
  const { query } = state.run.selected;
  const [next, before] = [query + 1, query - 1];
  const targets = {
    ArrowRight: next, ArrowDown: next, ArrowLeft: before, ArrowUp: before, Home: 0, End: last,
  };
  const target = targets[event.key];
  if (target === undefined) return;
  event.preventDefault();
  select({ query: Math.min(Math.max(target, 0), last) });
  focusToken();
}

// -------------------------------------------------------------------------------------------------------- views
function currentView() {
  return VIEWS.find(({ id }) => id === state.view);
}

function openView(id) {
  state.view = id;
  state.back = null;
  byId("back").hidden = true;
  renderTabs();
  if (state.run !== null) {
    renderStrip();
    renderView();
  }
}

function makeTabs() {
  VIEWS.sort((a, b) => ORDER.indexOf(a.id) - ORDER.indexOf(b.id));
  byId("tabs").replaceChildren(...VIEWS.map(({ id, title }) => make("button", {
    type: "button", role: "tab", id: `tab-${id}`, "aria-controls": "panel", click: () => openView(id),
  }, title)));
}

function renderTabs() {
  for (const { id } of VIEWS) {
    const isOpen = id === state.view;
    byId(`tab-${id}`).tabIndex = isOpen ? 0 : -1;
    byId(`tab-${id}`).setAttribute("aria-selected", String(isOpen));
  }
  byId("panel").setAttribute("aria-labelledby", `tab-${state.view}`);
}

function tabKeys(event) {
  const place = VIEWS.findIndex(({ id }) => id === state.view);
  const targets = { ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: VIEWS.length - 1 };
  if (targets[event.key] === undefined) return;
  event.preventDefault();
  openView(VIEWS[(targets[event.key] + VIEWS.length) % VIEWS.length].id);
  byId(`tab-${state.view}`).focus();
}

// Call the view. The element that had the focus gets it again, by its place in the tree.
function renderView() {
  const view = currentView();
  const element = byId("view");
  const path = pathOf(document.activeElement, element);
  state.run.settings = settingsOfPage();
  byId("view-title").textContent = view.title;
  byId("about").textContent = view.about;
  if (element.dataset.view !== view.id) element.replaceChildren();
  element.dataset.view = view.id;
  try {
    view.render(element, state.run);
  } catch (error) {
    element.replaceChildren(make("p", { className: "error" }, `${view.title}: ${error.message}`));
    console.error(error);
  }
  if (path !== null && !element.contains(document.activeElement)) {
    let target = element;
    for (const index of path) target = target?.children[index];
    target?.focus({ preventScroll: true });
  }
}

function pathOf(element, ancestor) {
  if (element === ancestor || !ancestor.contains(element)) return null;
  const path = [];
  for (; element !== ancestor; element = element.parentElement) {
    path.unshift([...element.parentElement.children].indexOf(element));
  }
  return path;
}

// -------------------------------------------------------------------------------------------------------- start
// Where the browser stores nothing for this page, the tour begins each time.
function remember(name, value) {
  try {
    localStorage.setItem(`explorer-${name}`, value);
  } catch { /* not allowed here */ }
}

function remembered(name) {
  try {
    return localStorage.getItem(`explorer-${name}`);
  } catch {
    return null;
  }
}

function showTheme() {
  byId("theme").textContent = isDark() ? "Light" : "Dark";
  byId("theme").setAttribute("aria-label", isDark() ? "Use light colours" : "Use dark colours");
}

function changeTheme() {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  remember("theme", document.documentElement.dataset.theme);
  showTheme();
  if (state.run !== null) {
    renderStrip();
    renderView();
  }
}

function showExamples() {
  const options = data.examples.map(({ title }, place) => make("option", { value: String(place) }, title));
  byId("example").replaceChildren(...options, make("option", { value: "own" }, "Your own text"));
  useExample(0);
}

// The list of examples names the one that the text and the mode are of, if they are. The button says what it writes.
function showWhichExample() {
  const { text, mode } = sourceOfPage();
  byId("write").textContent = WRITE[mode].words;
  const place = data.examples.findIndex((example) => example.text === text && modeOf(example) === mode);
  byId("example").value = place < 0 ? "own" : String(place);
}

function modeOf({ mode }) {
  return mode === "chat" ? "chat" : "text";
}

function useExample(place) {
  const example = data.examples[place];
  byId("prompt").value = example.text;
  document.querySelector(`input[name=mode][value=${modeOf(example)}]`).checked = true;
  showWhichExample();
}

function chooseExample({ target: { value } }) {
  if (value === "own") {
    byId("prompt").focus();
    return;
  }
  useExample(Number(value));
  beginNext(() => read());
}

function useGenerationConfig() {
  const { temperature, top_k, top_p } = data.generation;
  for (const [name, value] of Object.entries({ temperature, top_k, top_p })) {
    if (typeof value === "number") byId(name).value = String(value);
  }
}

function listen() {
  const click = (id, action) => byId(id).addEventListener("click", action);
  click("read", () => read());
  click("next", () => write(1));
  click("write", () => write(WRITE[sourceOfPage().mode].most));
  click("stop", stopWork);
  click("theme", changeTheme);
  click("back", goBack);
  byId("example").addEventListener("change", chooseExample);
  byId("prompt").addEventListener("input", showWhichExample);
  byId("modes").addEventListener("change", showWhichExample);
  byId("settings").addEventListener("input", () => state.run !== null && renderView());
  byId("strip").addEventListener("keydown", stripKeys);
  byId("tabs").addEventListener("keydown", tabKeys);
  byId("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) read();
  });
  let timer = 0;
  window.addEventListener("resize", () => {
    clearTimeout(timer);
    timer = setTimeout(() => state.run !== null && renderView(), 150);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    showTheme();
    if (state.run !== null) select({});
  });
}

async function startPage() {
  const hasChat = data.tekken.special_tokens?.some(({ token_str: name }) => name === "[INST]") ?? true;
  byId("modes").hidden = !hasChat;
  const theme = remembered("theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
  showTheme();
  showExamples();
  settingsOfPage();
  useGenerationConfig();
  listen();
  makeTabs();
  openView(state.view);
  document.title = `${data.name}: explorer`;
  byId("title").textContent = data.name;
  const text = textConfig();
  startWorker();
  const { config, tekken } = data;
  const weights = byId("weights").textContent;
  const { parameters, tensors } = await ask({ kind: "start", config, tekken, weights });
  Object.assign(state, { parameters, tensors });
  byId("weights").remove();
  const millions = (parameters / 1e6).toFixed(1);
  byId("subtitle").textContent = `${millions} million parameters, ${text.num_hidden_layers} layers, `
    + `${count(text.num_attention_heads, "query head")} on `
    + `${count(text.num_key_value_heads, "key/value head")}. `
    + "The model runs in this page; nothing is sent.";
  await read();
  if (remembered("tour") === null) startTour(false);
}

// What the other scripts use.
Object.assign(globalThis, { VIEWS, select, make, openView, remember, explorer: state });
Object.assign(globalThis, { chosen, newId, choice, layerChoice, paragraph, arrowKeys, quoted, plot });
Object.assign(globalThis, { count, countWritten, number, percent, exactPercent, powerOfTen, complaint });
document.addEventListener("DOMContentLoaded", () => startPage().catch((error) => showError(error.message)));
