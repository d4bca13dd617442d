// Ministral and Ministral 3 in plain JavaScript: text models, vision model, tokenizer and sampling, for one text at a
// time. A port of ministral.py, ministral3.py, vision.py, tokenizer/ and generate.py for pages, workers and Node.
// Results are float32, as in PyTorch. A sum of products is computed in float64 and rounded once. Letters:
//     S  new tokens in this call      H  query heads        V  vocabulary
//     T  keys given to attention      G  key/value heads    P  patches of all images
//     E  hidden size                  D  size of a head     C  size of the encoder's vectors
// A matrix (S, E) is one Float32Array, row after row. Weights are {shape, data}.
"use strict";

// ------------------------------------------------------------------------------------------------------- arithmetic
// The sum of a[i + n] * b[j + n] for n < size. Four sums at once keep the processor busy.
function dot(a, i, b, j, size) {
  let sum0 = 0, sum1 = 0, sum2 = 0, sum3 = 0, n = 0;
  for (; n < size - 3; n += 4) {
    sum0 += a[i + n] * b[j + n];
    sum1 += a[i + n + 1] * b[j + n + 1];
    sum2 += a[i + n + 2] * b[j + n + 2];
    sum3 += a[i + n + 3] * b[j + n + 3];
  }
  for (; n < size; n++) sum0 += a[i + n] * b[j + n];
  return sum0 + sum1 + sum2 + sum3;
}
// x (S, inputs) times a matrix (outputs, inputs), as it is stored, plus a bias (outputs,) if there is one.
function linear(x, { shape: [outputs, inputs], data }, bias = null) {
  const S = x.length / inputs, result = new Float32Array(S * outputs);
  for (let o = 0; o < outputs; o++) {
    const added = bias ? bias.data[o] : 0;
    for (let s = 0; s < S; s++) result[s * outputs + o] = dot(data, o * inputs, x, s * inputs, inputs) + added;
  }
  return result;
}
// Each row of x (S, E), scaled to root mean square 1, times a learned weight (E,).
function rmsNorm(x, { shape: [E], data }, eps) {
  const result = new Float32Array(x.length);
  for (let row = 0; row < x.length; row += E) {
    const scale = 1 / Math.sqrt(dot(x, row, x, row, E) / E + eps);
    for (let e = 0; e < E; e++) result[row + e] = data[e] * Math.fround(x[row + e] * scale);
  }
  return result;
}
// Turn the numbers x[start], ... into probabilities, in place, and return x.
function softmax(x, start = 0, size = x.length) {
  let largest = -Infinity, total = 0;
  for (let i = start; i < start + size; i++) if (x[i] > largest) largest = x[i];
  for (let i = start; i < start + size; i++) total += x[i] = Math.exp(x[i] - largest);
  for (let i = start; i < start + size; i++) x[i] /= total;
  return x;
}
function erf(x) { // 2 / sqrt(pi) exp(-x^2) (x + 2 x^3 / 3 + 4 x^5 / 15 + ...); beyond 6, it is 1
  let term = Math.min(Math.max(x, -6), 6), total = term, square = term * term;
  for (let n = 3; Math.abs(term) > 1e-17 * Math.abs(total); n += 2) total += term *= 2 * square / n;
  return 2 / Math.sqrt(Math.PI) * Math.exp(-square) * total;
}
const ACTIVATIONS = {
  silu: (x) => x / (1 + Math.exp(-x)),
  gelu: (x) => 0.5 * x * (1 + erf(x / Math.SQRT2)),
};
const add = (x, y) => x.map((value, i) => value + y[i]);
// Return what was found, or raise an error if it is not supported.
function choose(where, found, supported) {
  if (!supported.includes(found)) throw new Error(`${where}: ${found}; supported: ${supported.join(", ")}`);
  return found;
}
const activation = (where, name) => ACTIVATIONS[choose(where, name, Object.keys(ACTIVATIONS))];
// keep(name, data, ...shape) records data under a name of reference/trace.py, and returns it. keep.heads takes
// (S, heads, D), which is recorded as (heads, S, D). `outer` comes before each shape.
function recorder(record, prefix, ...outer) {
  const keep = (name, data, ...shape) => {
    if (record) record(prefix + name, [...outer, ...shape], data);
    return data;
  };
  keep.isOn = Boolean(record);
  keep.heads = (name, x, heads, D) => {
    const S = x.length / (heads * D), row = (n) => Math.floor(n / D) % S * heads + Math.floor(n / D / S);
    if (record) keep(name, x.map((_, n) => x[row(n) * D + n % D]), heads, S, D);
    return x;
  };
  return keep;
}

// ------------------------------------------------------------------------------------------------- rotary positions
// The radians per position of each pair i of the D numbers of a head: theta^(-2i/D). YaRN (`stretch`) leaves pairs as
// they are that turn more than beta_fast times within the original context. Those that turn less than beta_slow times
// become slower by `factor`, those between in part. See ministral3.py.
function rotaryFrequencies(D, rope, stretch = false) {
  const { rope_theta: theta, original_max_position_embeddings: original, truncate } = rope;
  const rampEnd = (turns) => D * Math.log(original / (turns * 2 * Math.PI)) / (2 * Math.log(theta));
  let low = rampEnd(rope.beta_fast ?? 32), high = rampEnd(rope.beta_slow ?? 1);
  if (truncate === undefined || truncate) [low, high] = [Math.floor(low), Math.ceil(high)];
  [low, high] = [Math.max(low, 0), Math.min(high, D - 1)];
  if (low === high) high += 0.001; // a step instead of a ramp
  return Float32Array.from({ length: D / 2 }, (_, i) => {
    const period = Math.fround(theta ** Math.fround(2 * i / D)), plain = Math.fround(1 / period);
    const plainShare = 1 - Math.min(Math.max((i - low) / (high - low), 0), 1); // 1: as trained, 0: stretched in full
    return stretch ? 1 / (rope.factor * period) * (1 - plainShare) + plain * plainShare : plain;
  });
}
// YaRN's factor on cosine and sine. It is 1 in Ministral 3, whose mscale and mscale_all_dim are equal.
function yarnMagnitude({ factor, attention_factor, mscale, mscale_all_dim }) {
  const magnitude = (scale) => 0.1 * scale * Math.log(factor) + 1;
  return attention_factor ?? (mscale && mscale_all_dim ? magnitude(mscale) / magnitude(mscale_all_dim) : magnitude(1));
}
// Cosines and sines (S, D) of angle(s, i) for the pairs i. Both halves of a row hold the same.
function rotaryTables(S, D, angle, magnitude = 1, interleaved = false) {
  const cos = new Float32Array(S * D), sin = new Float32Array(S * D), half = D / 2;
  for (let n = 0; n < S * half; n++) {
    const s = Math.floor(n / half), at = s * D + n % half, radians = Math.fround(angle(s, n % half));
    cos[at] = cos[at + half] = Math.fround(Math.cos(radians)) * magnitude;
    sin[at] = sin[at + half] = Math.fround(Math.sin(radians)) * magnitude;
  }
  return { cos, sin, interleaved };
}
// Rotate each pair (x[i], x[i + D/2]) of each head of x (S, heads, D). The mistake `interleaved` takes the pairs
// (x[2i], x[2i + 1]), the layout of Mistral's own files.
function rotate(x, heads, D, { cos, sin, interleaved }) {
  const half = D / 2, result = new Float32Array(x.length);
  const step = interleaved ? 2 : 1, other = interleaved ? 1 : half;
  for (let at = 0; at < x.length; at += D) {
    const row = Math.floor(at / (heads * D)) * D;
    for (let i = 0; i < half; i++) {
      const a = x[at + i * step], b = x[at + i * step + other];
      result[at + i] = a * cos[row + i] - b * sin[row + i];
      result[at + i + half] = b * cos[row + i] + a * sin[row + i];
    }
  }
  return result;
}

// ------------------------------------------------------------------------------------------------------------ cache
const enlarge = (old) => Float32Array.from({ length: 2 * old.length }, (_, i) => old[i] ?? 0);
// Keys and values of one layer, (slots, G, D). Position p is in slot p, or, with a window of W, in slot p % W: a ring.
class LayerCache {
  constructor(window, width) {
    this.window = window; // W; null: every position is kept
    this.width = width; // numbers in a slot, G * D
    this.length = 0; // tokens seen so far
    this.positions = []; // the position in each slot that is in use
    this.keys = new Float32Array(64 * width); // rotated; there may be room for more slots
    this.values = new Float32Array(64 * width);
  }
  // Store the keys and values (S, G, D) of new tokens. Returns the cache whose slots their queries need.
  update(k, v) {
    const S = k.length / this.width, start = this.length, W = this.window ?? Infinity;
    let needed = this;
    if (S > 1 && start + S > W) { // the ring will lose keys that the first queries see
      needed = new LayerCache(null, this.width);
      for (let p = Math.max(start - W + 1, 0); p < start; p++) needed.append(p, this.keys, this.values, p % W);
      for (let s = 0; s < S; s++) needed.append(start + s, k, v, s);
    }
    for (let s = 0; s < S; s++) this.append(start + s, k, v, s);
    return needed;
  }
  append(position, keys, values, row) {
    const { width } = this, slot = this.length++ % (this.window ?? Infinity);
    if (slot * width === this.keys.length) [this.keys, this.values] = [this.keys, this.values].map(enlarge);
    this.positions[slot] = position;
    this.keys.set(keys.subarray(row * width, (row + 1) * width), slot * width);
    this.values.set(values.subarray(row * width, (row + 1) * width), slot * width);
  }
}
class KVCache {
  constructor({ layer_types, sliding_window, num_key_value_heads: G, head_dim: D }) {
    const windows = { sliding_attention: sliding_window, full_attention: null };
    this.layers = layer_types.map((kind) => new LayerCache(windows[kind], G * D));
    this.headDim = D;
  }
  record(record) { // what the slots hold: the points cache.layers.N.*
    this.layers.forEach(({ positions, keys, values, width }, n) => {
      const T = positions.length, keep = recorder(record, `cache.layers.${n}.`, 1);
      record(`cache.layers.${n}.positions`, [T], Float32Array.from(positions));
      keep.heads("k_rotated", keys.subarray(0, T * width), width / this.headDim, this.headDim);
      keep.heads("v", values.subarray(0, T * width), width / this.headDim, this.headDim);
    });
  }
}

// ----------------------------------------------------------------------------------------------------------- layers
// softmax(q k^T / sqrt(D)) v. q (S, H, D), k and v (T, G, D), mask (S, T): 1 where a query sees a key -> (S, H * D).
function attention(q, k, v, mask, { H, G, D }, keep) {
  const S = q.length / (H * D), T = mask.length / S, scaling = 1 / Math.sqrt(D);
  const rows = keep.isOn ? H * S : 1; // all rows of scores if they are recorded
  const scores = new Float32Array(rows * T), probabilities = new Float32Array(rows * T);
  const sums = new Float64Array(D), result = new Float32Array(S * H * D);
  for (let head = 0; head < S * H; head++) { // of all tokens
    const s = Math.floor(head / H), h = head % H, g = Math.floor(h * G / H); // H / G neighbours share keys and values
    const row = keep.isOn ? (h * S + s) * T : 0;
    for (let t = 0; t < T; t++) {
      const visible = mask[s * T + t] === 1;
      if (visible || keep.isOn) scores[row + t] = Math.fround(dot(q, head * D, k, (t * G + g) * D, D)) * scaling;
      probabilities[row + t] = visible ? scores[row + t] : -Infinity;
    }
    softmax(probabilities, row, T);
    sums.fill(0);
    for (let t = 0; t < T; t++) {
      const probability = probabilities[row + t], value = (t * G + g) * D;
      if (probability === 0) continue; // of hidden keys
      for (let d = 0; d < D; d++) sums[d] += probability * v[value + d];
    }
    result.set(sums, head * D);
  }
  keep("attention.scores", scores, H, S, T);
  keep("attention.mask", mask, S, T);
  keep("attention.probabilities", probabilities, H, S, T);
  return result;
}
// One layer of the text model or of the encoder: attention, then the gated feed-forward part. Each reads a normed copy
// of x (S, E), and its result is added to x. attend(q, k, v) computes the results of the heads (S, H * D).
function runLayer(x, layer, tables, attend, keep) {
  const { sizes: { H, G, D }, inputNorm, postNorm, eps } = layer, E = inputNorm.data.length, S = x.length / E;
  const normed = keep("input_norm", rmsNorm(x, inputNorm, eps), S, E), F = layer.gate.shape[0];
  let q = keep.heads("attention.q", linear(normed, layer.q), H, D);
  let k = keep.heads("attention.k", linear(normed, layer.k), G, D);
  const v = keep.heads("attention.v", linear(normed, layer.v), G, D);
  q = keep.heads("attention.q_rotated", rotate(q, H, D, tables), H, D);
  k = keep.heads("attention.k_rotated", rotate(k, G, D, tables), G, D);
  const heads = keep("attention.heads", attend(q, k, v), S, H * D);
  x = keep("attention_residual", add(x, keep("attention.output", linear(heads, layer.o), S, E)), S, E);
  const again = keep("post_attention_norm", rmsNorm(x, postNorm, eps), S, E);
  const gate = keep("mlp.gate", linear(again, layer.gate), S, F);
  const up = keep("mlp.up", linear(again, layer.up), S, F);
  const activated = keep("mlp.activation", gate.map(layer.act), S, F);
  const product = keep("mlp.product", activated.map((value, i) => value * up[i]), S, F);
  return keep("mlp_residual", add(x, keep("mlp.down", linear(product, layer.down), S, E)), S, E);
}
// The weights of layers. The text model and the encoder name the parts of a layer differently.
const TEXT_PARTS = ["input_layernorm", "self_attn", "post_attention_layernorm", "mlp"];
const VISION_PARTS = ["attention_norm", "attention", "ffn_norm", "feed_forward"];
function readLayers(get, prefix, [inputNorm, attention, postNorm, mlp], config, eps) {
  const H = config.num_attention_heads, G = config.num_key_value_heads ?? H;
  const sizes = { H, G, D: config.head_dim ?? config.hidden_size / H };
  const act = activation("hidden_act", config.hidden_act);
  return Array.from({ length: config.num_hidden_layers }, (_, n) => {
    const own = (name) => get(`${prefix}layers.${n}.${name}`);
    const [q, k, v, o] = [..."qkvo"].map((letter) => own(`${attention}.${letter}_proj`));
    const [gate, up, down] = ["gate", "up", "down"].map((name) => own(`${mlp}.${name}_proj`));
    return { sizes, eps, act, inputNorm: own(inputNorm), q, k, v, o, postNorm: own(postNorm), gate, up, down };
  });
}

// ------------------------------------------------------------------------------------------------------------ model
// Mistakes that a model makes on demand, with the names and effects of reference/mutants.
const MISTAKES = ["yarn_missing", "yarn_magnitude_1_277", "query_scale_missing", "window_plus_1", "rope_interleaved"];
// The configuration of the text model, with what a config.json may leave out.
function completeConfig(config) {
  const text = { model_type: "ministral3", ...(config.text_config ?? config) };
  choose("model_type", text.model_type, ["ministral", "ministral3", "mistral"]);
  text.num_key_value_heads ??= text.num_attention_heads;
  text.head_dim ??= text.hidden_size / text.num_attention_heads;
  const kind = text.sliding_window ? "sliding_attention" : "full_attention"; // of all layers
  text.layer_types ??= new Array(text.num_hidden_layers).fill(kind);
  text.rope_parameters ??= { rope_type: "default", rope_theta: text.rope_theta };
  choose("rope_type", text.rope_parameters.rope_type, ["default", "yarn"]);
  return text;
}
class Model {
  // config: the parsed config.json. weights: of `readWeights`. mistakes: some of MISTAKES.
  constructor(config, weights, mistakes = []) {
    this.config = config;
    this.text = completeConfig(config);
    this.vision = config.vision_config ?? null;
    this.mistakes = mistakes.map((mistake) => choose("mistakes", mistake, MISTAKES));
    const get = (name) => weights[`${name}.weight`] ?? choose("weights lack", name, ["the names of Transformers"]);
    const prefix = this.vision ? "model.language_model." : "model.";
    this.embedding = get(prefix + "embed_tokens");
    this.layers = readLayers(get, prefix, TEXT_PARTS, this.text, this.text.rms_norm_eps);
    this.norm = get(prefix + "norm");
    const tied = config.tie_word_embeddings ?? this.text.tie_word_embeddings ?? this.vision !== null;
    this.head = tied ? this.embedding : get("lm_head");
    if (this.vision) this.readVision(get, "model.vision_tower.", "model.multi_modal_projector.");
    this.bias = (name) => weights[`model.multi_modal_projector.${name}.bias`]; // most models have none

    const rope = this.text.rope_parameters, yarn = rope.rope_type === "yarn";
    this.frequencies = rotaryFrequencies(this.text.head_dim, rope, yarn && !mistakes.includes("yarn_missing"));
    const forgotten = mistakes.includes("yarn_magnitude_1_277") ? { attention_factor: null, mscale: null } : {};
    this.magnitude = yarn ? yarnMagnitude({ ...rope, ...forgotten }) : 1;
  }
  readVision(get, tower, projector) {
    const { shape: [C], data } = get(tower + "patch_conv");
    this.patches = { shape: [C, data.length / C], data }; // a convolution that steps by whole patches is a matrix
    this.visionNorm = get(tower + "ln_pre");
    this.visionLayers = readLayers(get, tower + "transformer.", VISION_PARTS, this.vision, 1e-5);
    [this.projectorNorm, this.merging, this.linear1, this.linear2] =
      ["norm", "patch_merger.merging_layer", "linear_1", "linear_2"].map((name) => get(projector + name));
    this.projectorAct = activation("projector_hidden_act", this.config.projector_hidden_act ?? "gelu");
  }
  newCache = () => new KVCache(this.text);
  // Ministral 3 scales the query at a position by 1 + beta ln(1 + floor(position / original context)).
  queryScale(position) {
    const { llama_4_scaling_beta: beta, original_max_position_embeddings: original } = this.text.rope_parameters;
    if (this.text.model_type !== "ministral3" || !beta || this.mistakes.includes("query_scale_missing")) return 1;
    return Math.fround(1 + beta * Math.log(1 + Math.floor(position / original)));
  }
  // Run new tokens through all layers and extend the cache. Returns the logits (V,) of the last token.
  //     images     [{pixels, height, width}] of `preprocess`, whose [IMG] tokens are in ids
  //     record     record(name, shape, data) is called for the points of reference/trace.py, in the order of computing
  //     allLogits  return the logits (S, V) of all tokens
  forward(ids, cache = this.newCache(), { images = [], record = null, allLogits = false } = {}) {
    const { hidden_size: E, vocab_size: V, head_dim: D } = this.text, S = ids.length, start = cache.layers[0].length;
    const angle = (s, i) => (start + s) * this.frequencies[i], keepWhole = recorder(record, "", 1);
    const tables = rotaryTables(S, D, angle, this.magnitude, this.mistakes.includes("rope_interleaved"));
    let x = keepWhole("embedding", this.embed(ids, images, record), S, E);
    this.layers.forEach((layer, n) => {
      const keep = recorder(record, `layers.${n}.`, 1);
      x = runLayer(x, layer, tables, (q, k, v) => {
        const { positions, keys, values } = cache.layers[n].update(k, v);
        const scaled = q.map((value, i) => value * this.queryScale(start + Math.floor(i * S / q.length)));
        keep.heads("attention.q_scaled", scaled, layer.sizes.H, D);
        const mask = this.mask(start, S, positions, cache.layers[n].window);
        return attention(scaled, keys, values, mask, layer.sizes, keep);
      }, keep);
    });
    if (!record && !allLogits) return lens(this, x.subarray((S - 1) * E));
    const normed = keepWhole("final_norm", rmsNorm(x, this.norm, this.text.rms_norm_eps), S, E);
    const logits = keepWhole("logits", linear(normed, this.head), S, V);
    return allLogits ? logits : logits.subarray((S - 1) * V);
  }
  // A mask (S, T), 1 where the query at position start + s sees a key. A window lets it see W keys, its own included.
  mask(start, S, positions, window) {
    const T = positions.length, W = (window ?? Infinity) + (this.mistakes.includes("window_plus_1") ? 1 : 0);
    const seen = (distance) => distance >= 0 && distance < W ? 1 : 0;
    return new Float32Array(S * T).map((_, n) => seen(start + Math.floor(n / T) - positions[n % T]));
  }
  // The embeddings (S, E) of ids. Those of the images take the [IMG] tokens in order.
  embed(ids, images, record) {
    const { hidden_size: E, vocab_size: V } = this.text, x = new Float32Array(ids.length * E);
    const features = images.length ? this.encodeImages(images, record) : new Float32Array(0);
    let used = 0;
    ids.forEach((id, s) => {
      if (!(id >= 0 && id < V)) throw new Error(`ids: ${id}; supported: 0 to ${V - 1}`);
      const isImage = images.length > 0 && id === imageTokenId(this.config), row = isImage ? used++ : id;
      x.set((isImage ? features : this.embedding.data).subarray(row * E, (row + 1) * E), s * E);
    });
    choose("images: number of [IMG] tokens", used, [features.length / E]);
    return x;
  }
  // The embeddings (merged patches, E) of images: the encoder, then the projector.
  encodeImages(images, record = null) {
    choose("images: model_type", this.config.model_type, ["mistral3"]);
    const { patch_size: size, hidden_size: C } = this.vision, { D } = this.visionLayers[0].sizes;
    const m = this.config.spatial_merge_size ?? 2, E = this.text.hidden_size, keep = recorder(record, "");
    const places = images.flatMap((image) => {
      const rows = Math.floor(image.height / size), columns = Math.floor(image.width / size);
      return Array.from({ length: rows * columns }, (_, n) =>
        ({ image, rows, columns, row: Math.floor(n / columns), column: n % columns }));
    });
    const P = places.length, cut = unfold(places, 3, size, ({ image, row, column }, c, y, x) =>
      image.pixels[(c * image.height + row * size + y) * image.width + column * size + x]);
    const patches = keep("vision.patches", linear(cut, this.patches), P, C);
    const hiddenStates = [keep("vision.ln_pre", rmsNorm(patches, this.visionNorm, 1e-5), P, C)];

    // Of the frequencies, the even ones turn with a patch's row and the odd ones with its column.
    const frequencies = rotaryFrequencies(D, this.vision.rope_parameters ?? { rope_theta: 10000, ...this.vision });
    const tables = rotaryTables(P, D, (p, i) =>
      i < D / 4 ? places[p].row * frequencies[2 * i] : places[p].column * frequencies[2 * i - D / 2 + 1]);
    keep("vision.cos", tables.cos, P, D);
    keep("vision.sin", tables.sin, P, D);
    const sameImage = (_, n) => places[Math.floor(n / P)].image === places[n % P].image ? 1 : 0;
    const mask = new Float32Array(P * P).map(sameImage); // a patch sees all patches of its own image
    this.visionLayers.forEach((layer, n) => {
      const attend = (q, k, v) => attention(q, k, v, mask, layer.sizes, recorder(null));
      hiddenStates.push(runLayer(hiddenStates[n], layer, tables, attend, recorder(record, `vision.layers.${n}.`)));
    });

    const used = hiddenStates.at([this.config.vision_feature_layer ?? -1].flat()[0]); // a number, or a list of one
    const normed = keep("projector.norm", rmsNorm(used, this.projectorNorm, this.text.rms_norm_eps), P, C);
    const begins = (at, size) => at % m === 0 && at + m <= size; // m x m patches; a last odd row is left out
    const isCorner = (p) => begins(places[p].row, places[p].rows) && begins(places[p].column, places[p].columns);
    const corners = [...places.keys()].filter(isCorner), M = corners.length;
    const blocks = unfold(corners, C, m, (p, c, y, x) => normed[(p + y * places[p].columns + x) * C + c]);
    const merged = keep("projector.merged", linear(blocks, this.merging), M, C);
    const hidden = keep("projector.hidden", linear(merged, this.linear1, this.bias("linear_1")), M, E);
    return keep("projector.output", linear(hidden.map(this.projectorAct), this.linear2, this.bias("linear_2")), M, E);
  }
}
// The logits (V,) of a vector (E,) of the residual stream: final norm and head.
const lens = (model, hidden) => linear(rmsNorm(hidden, model.norm, model.text.rms_norm_eps), model.head);
const imageTokenId = (config) => config.image_token_index ?? config.image_token_id ?? 10;
// Pixels (height, width, 3 or 4) from 0 to 255 -> {pixels: (3, height, width), normalised, height, width}.
function preprocess(rgb, height, width) {
  const mean = [0.48145466, 0.4578275, 0.40821073], std = [0.26862954, 0.26130258, 0.27577711];
  const area = height * width, step = rgb.length / area;
  const pixels = new Float32Array(3 * area).map((_, n) => {
    const channel = Math.floor(n / area), scaled = Math.fround(rgb[n % area * step + channel] / 255);
    return Math.fround(scaled - Math.fround(mean[channel])) / Math.fround(std[channel]);
  });
  return { pixels, height, width };
}
// For each place, size x size numbers of each channel: (places, channels * size * size).
function unfold(places, channels, size, read) {
  return new Float32Array(places.length * channels * size * size).map((_, n) => {
    const place = places[Math.floor(n / (channels * size * size))], channel = Math.floor(n / (size * size)) % channels;
    return read(place, channel, Math.floor(n / size) % size, n % size);
  });
}

// -------------------------------------------------------------------------------------------------------- tokenizer
const SPECIAL_TOKENS = ("<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] " +
  "[/TOOL_RESULTS] [TOOL_CALLS] [IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] [SYSTEM_PROMPT] " +
  "[/SYSTEM_PROMPT] [TOOL_CONTENT]").split(" "); // of vocabularies that do not list their own
const toBytes = (text) => new TextEncoder().encode(text);
const toText = (bytes) => new TextDecoder("utf-8", { ignoreBOM: true }).decode(bytes); // others become U+FFFD
// Tekken: byte-level BPE. An expression cuts the text into pieces. In each, the two neighbours that together have the
// lowest rank are merged, until no two are in the vocabulary. Here, a letter from U+0000 to U+00FF stands for a byte.
class Tokenizer {
  constructor({ config, vocab, special_tokens: listed }) { // a parsed tekken.json
    const count = config.default_num_special_tokens;
    const names = new Map(listed ? listed.map(({ rank, token_str }) => [rank, token_str]) : SPECIAL_TOKENS.entries());
    this.names = Array.from({ length: count }, (_, id) => names.get(id) ?? `<SPECIAL_${id}>`);
    this.special = Object.fromEntries(this.names.map((name, id) => [name, id]));
    this.words = vocab.slice(0, config.default_vocab_size - count).map(({ token_bytes }) => atob(token_bytes));
    this.ranks = new Map(this.words.map((word, rank) => [word, rank]));
    // \s is Unicode's White_Space in Mistral's expression; in JavaScript, it is another set.
    const pattern = config.pattern.replaceAll("\\s", "\\p{White_Space}").replaceAll("\\S", "\\P{White_Space}");
    this.split = new RegExp(`${pattern}|[^]`, "gu");
  }
  encode(text, bos = true) { // special tokens are never made of text
    const ids = bos && Object.hasOwn(this.special, "<s>") ? [this.special["<s>"]] : [];
    for (const [piece] of toText(toBytes(text)).matchAll(this.split)) {
      const letters = Array.from(toBytes(piece), (byte) => String.fromCharCode(byte));
      for (const word of this.merge(letters)) ids.push(this.names.length + this.ranks.get(word));
    }
    return ids;
  }
  merge(parts) {
    if (this.ranks.has(parts.join(""))) return [parts.join("")];
    while (true) {
      let best = -1, lowest = Infinity;
      for (let n = 0; n + 1 < parts.length; n++) {
        const rank = this.ranks.get(parts[n] + parts[n + 1]);
        if (rank < lowest) [best, lowest] = [n, rank]; // undefined, where there is none, is not lower
      }
      if (best < 0) return parts;
      parts.splice(best, 2, parts[best] + parts[best + 1]);
    }
  }
  name = (id) => this.names[id] ?? null; // of a special token, else null
  bytes = (id) => Uint8Array.from(this.words[id - this.names.length] ?? "", (letter) => letter.charCodeAt(0));
  decode = (ids) => toText(Uint8Array.from(Array.from(ids).flatMap((id) => [...this.bytes(id)])));
}
// The ids of a user's message with images before its text: <s>[INST] images text [/INST].
function encodeChat(tokenizer, config, text, images = []) {
  const control = (name) => tokenizer.special[choose("special token", name, tokenizer.names)];
  const ids = [control("<s>"), control("[INST]")];
  for (const { height, width } of images) {
    const patch = config.vision_config.patch_size * (config.spatial_merge_size ?? 2);
    const row = [...new Array(Math.floor(width / patch)).fill(imageTokenId(config)), control("[IMG_BREAK]")];
    ids.push(...new Array(Math.floor(height / patch)).fill(row).flat().slice(0, -1), control("[IMG_END]"));
  }
  return [...ids, ...tokenizer.encode(text, false), control("[/INST]")];
}

// --------------------------------------------------------------------------------------------------------- sampling
const argmax = (x) => x.reduce((best, value, i) => value > x[best] ? i : best, 0); // the first of equals
// Logits (V,) at a temperature above 0 after each step that is on: [{name, logits}], excluded tokens at -Infinity.
function filterLogits(logits, { temperature, top_k, top_p, min_p }) {
  const steps = [], step = (name, change) => steps.push({ name, logits: logits = logits.map(change) });
  const shift = temperature < 1e-6 ? logits[argmax(logits)] : 0; // keeps the division from overflowing
  step("temperature", (logit) => Math.fround(logit - shift) / Math.fround(Math.max(temperature, 1e-30)));
  const kth = logits.slice().sort().at(-Math.min(top_k || 1, logits.length));
  if (top_k) step("top_k", (logit) => logit < kth ? -Infinity : logit);
  if (top_p != null && top_p < 1) { // drops the least likely tokens, which sum to 1 - p at most, but never the last
    const probabilities = softmax(logits.slice()), dropped = new Set();
    let total = 0;
    for (const id of [...logits.keys()].sort((a, b) => logits[a] - logits[b] || a - b).slice(0, -1)) {
      total += probabilities[id];
      if (Math.fround(total) <= Math.fround(1 - top_p)) dropped.add(id);
    }
    step("top_p", (logit, id) => dropped.has(id) ? -Infinity : logit);
  }
  if (min_p != null) {
    const probabilities = softmax(logits.slice()), least = Math.fround(min_p) * probabilities[argmax(probabilities)];
    step("min_p", (logit, id) => probabilities[id] < Math.fround(least) ? -Infinity : logit);
  }
  return steps;
}
// The id that is drawn with exponentially distributed numbers (V,): the largest probability / number. At a temperature
// of 0, the most likely one.
function sample(logits, settings, noise) {
  if (!settings.temperature) return argmax(logits);
  const probabilities = softmax(filterLogits(logits, settings).at(-1).logits);
  if (probabilities.some(Number.isNaN)) throw new Error("logits: NaN; supported: numbers");
  return argmax(probabilities.map((probability, id) => probability / noise[id]));
}

// ------------------------------------------------------------------------------------------------------------ files
// The tensors of a .safetensors file (ArrayBuffer) as float32: {name: {shape, data}}.
function readWeights(buffer) {
  const size = Number(new DataView(buffer).getBigUint64(0, true));
  const { __metadata__, ...tensors } = JSON.parse(toText(new Uint8Array(buffer, 8, size)));
  const readers = {
    F32: (bytes) => new Float32Array(bytes),
    BF16: (bytes) => new Float32Array(new Uint32Array(new Uint16Array(bytes)).map((bits) => bits << 16).buffer),
    F16: (bytes) => new Float32Array(new Uint16Array(bytes)).map((bits) => // sign, 5 bits of exponent, fraction
      (bits >> 15 ? -1 : 1) * ((bits & 1023) + (bits & 31744 && 1024)) * 2 ** (Math.max(bits >> 10 & 31, 1) - 25)),
  };
  return Object.fromEntries(Object.entries(tensors).map(([name, { dtype, shape, data_offsets: [start, end] }]) => {
    const read = readers[choose(`weights: type of ${name}`, dtype, Object.keys(readers))];
    return [name, { shape, data: read(buffer.slice(8 + size + start, 8 + size + end)) }];
  }));
}
// A trace as a .safetensors file (ArrayBuffer) for `python -m reference diff`. points: {name: {shape, data}}. ids:
// those that the model read. about: anything that JSON holds, such as the name of the model.
function saveTrace(points, ids, about = {}) {
  const tensors = [["input.input_ids", "I64", [1, ids.length], BigInt64Array.from(ids, BigInt)]];
  for (const [name, { shape, data }] of Object.entries(points)) tensors.push([name, "F32", shape, data]);
  const header = { __metadata__: { trace: JSON.stringify(about) } };
  let end = 0;
  for (const [name, dtype, shape, data] of tensors) {
    header[name] = { dtype, shape, data_offsets: [end, end += data.byteLength] };
  }
  const text = JSON.stringify(header), bytes = toBytes(text + " ".repeat(-toBytes(text).length & 7)); // whole 8 bytes
  const file = new Uint8Array(8 + bytes.length + end);
  new DataView(file.buffer).setBigUint64(0, BigInt(bytes.length), true);
  file.set(bytes, 8);
  for (const [name, , , { buffer, byteOffset, byteLength }] of tensors) {
    file.set(new Uint8Array(buffer, byteOffset, byteLength), 8 + bytes.length + header[name].data_offsets[0]);
  }
  return file.buffer;
}
if (typeof module !== "undefined") module.exports = { readWeights, saveTrace, Tokenizer, encodeChat, preprocess, Model,
  MISTAKES, lens, rotaryFrequencies, filterLogits, sample, softmax };
