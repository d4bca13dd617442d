// Ministral and Ministral 3 in plain JavaScript: text models, vision model, tokenizer and sampling, for one text at a
// time. A port of ministral.py, ministral3.py, vision.py, tokenizer/bpe.py and generate.py that runs in a page, a worker
// and Node. Results are float32, as in PyTorch; a sum of products is computed in float64 and rounded once. Letters:
//
//     S  new tokens in this call      H  query heads        V  vocabulary
//     T  keys given to attention      G  key/value heads    P  patches of all images
//     E  hidden size                  D  size of a head     C  size of the encoder's vectors
//
// A matrix (S, E) is one Float32Array, row after row.
"use strict";

// ------------------------------------------------------------------------------------------------------- arithmetic
// The sum of a[i + n] * b[j + n] for n < size; four sums at once keep the processor busy.
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
function linear(x, weight, bias) {
  const [outputs, inputs] = weight.shape, S = x.length / inputs;
  const result = new Float32Array(S * outputs);
  for (let o = 0; o < outputs; o++) {
    const added = bias ? bias.data[o] : 0;
    for (let s = 0; s < S; s++) result[s * outputs + o] = dot(weight.data, o * inputs, x, s * inputs, inputs) + added;
  }
  return result;
}

// Each row of x, scaled to root mean square 1, times a learned weight.
function rmsNorm(x, weight, eps) {
  const E = weight.data.length, result = new Float32Array(x.length);
  for (let row = 0; row < x.length; row += E) {
    const scale = 1 / Math.sqrt(dot(x, row, x, row, E) / E + eps);
    for (let e = 0; e < E; e++) result[row + e] = weight.data[e] * Math.fround(x[row + e] * scale);
  }
  return result;
}

function erf(x) { // 2 / sqrt(pi) exp(-x^2) (x + 2 x^3 / 3 + 4 x^5 / 15 + ...)
  if (Math.abs(x) > 6) return Math.sign(x);
  let term = x, sum = x;
  for (let n = 3; Math.abs(term) > 1e-17 * Math.abs(sum); n += 2) sum += term *= 2 * x * x / n;
  return 2 / Math.sqrt(Math.PI) * Math.exp(-x * x) * sum;
}

const ACTIVATIONS = {
  silu: (x) => x / (1 + Math.exp(-x)),
  gelu: (x) => 0.5 * x * (1 + erf(x / Math.SQRT2)),
  gelu_pytorch_tanh: (x) => 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3))),
};

const add = (x, y) => x.map((value, i) => value + y[i]);
const multiply = (x, y) => x.map((value, i) => value * y[i]);
const sum = (numbers) => numbers.reduce((total, number) => total + number, 0);

function concatenate(arrays) {
  const result = new Float32Array(sum(arrays.map((array) => array.length)));
  let at = 0;
  for (const array of arrays) {
    result.set(array, at);
    at += array.length;
  }
  return result;
}

// Raise an error unless a name is one of those that are supported.
function choose(where, found, supported) {
  if (!supported.includes(found)) throw new Error(`${where}: ${found}; supported: ${supported.join(", ")}`);
  return found;
}

// -------------------------------------------------------------------------------------------------------- recording
// A function keep(name, data, ...shape) that records data under a name of reference/trace.py and returns it.
// keep.heads does the same with (S, heads, D), which is recorded as (heads, S, D). `outer`: dimensions before the shape.
function recorder(record, prefix, ...outer) {
  const keep = (name, data, ...shape) => {
    if (record) record(prefix + name, [...outer, ...shape], data);
    return data;
  };
  keep.heads = (name, data, heads, D) => {
    if (record) keep(name, headsFirst(data, heads, D), heads, data.length / (heads * D), D);
    return data;
  };
  keep.isOn = Boolean(record);
  return keep;
}

function headsFirst(x, heads, D) { // (S, heads, D) -> (heads, S, D)
  const S = x.length / (heads * D), result = new Float32Array(x.length);
  for (let n = 0; n < S * heads; n++) {
    result.set(x.subarray(n * D, (n + 1) * D), (n % heads * S + Math.floor(n / heads)) * D);
  }
  return result;
}

// ------------------------------------------------------------------------------------------------- rotary positions
// theta^(-2i/D), the radians per position of each pair i of the D numbers of a head.
function plainFrequencies(D, theta) {
  return Float32Array.from({ length: D / 2 }, (_, i) => 1 / Math.fround(theta ** Math.fround(2 * i / D)));
}

// YaRN: pairs that turn more than beta_fast times within the original context stay as they are, those that turn less
// than beta_slow times become slower by `factor`, those between in part. See ministral3.py.
function yarnFrequencies(D, rope) {
  const { rope_theta: theta, original_max_position_embeddings: original, beta_fast, beta_slow, truncate } = rope;
  const rampEnd = (turns) => D * Math.log(original / (turns * 2 * Math.PI)) / (2 * Math.log(theta));
  let low = rampEnd(beta_fast ?? 32), high = rampEnd(beta_slow ?? 1);
  if (truncate === undefined || truncate) [low, high] = [Math.floor(low), Math.ceil(high)];
  [low, high] = [Math.max(low, 0), Math.min(high, D - 1)];
  if (low === high) high += 0.001; // a step instead of a ramp
  return plainFrequencies(D, theta).map((plain, i) => {
    const plainShare = 1 - Math.min(Math.max((i - low) / (high - low), 0), 1); // 1: as trained, 0: stretched in full
    const stretched = 1 / (rope.factor * Math.fround(theta ** Math.fround(2 * i / D)));
    return stretched * (1 - plainShare) + plain * plainShare;
  });
}

// A factor on cosine and sine. It is 1 in Ministral 3, whose mscale and mscale_all_dim are equal.
function yarnMagnitude({ factor, attention_factor, mscale, mscale_all_dim }) {
  const magnitude = (scale) => 0.1 * scale * Math.log(factor) + 1;
  if (attention_factor != null) return attention_factor;
  if (mscale && mscale_all_dim) return magnitude(mscale) / magnitude(mscale_all_dim);
  return magnitude(1);
}

// Cosines and sines (S, D) of angle(s, i) for the pairs i; both halves of a row hold the same.
function rotaryTables(S, D, magnitude, angle) {
  const cos = new Float32Array(S * D), sin = new Float32Array(S * D), half = D / 2;
  for (let s = 0; s < S; s++) {
    for (let i = 0; i < half; i++) {
      const turned = Math.fround(angle(s, i)), at = s * D + i;
      cos[at] = cos[at + half] = Math.fround(Math.cos(turned)) * magnitude;
      sin[at] = sin[at + half] = Math.fround(Math.sin(turned)) * magnitude;
    }
  }
  return { cos, sin };
}

// Rotate each pair (x[i], x[i + D/2]) of each head of x (S, heads, D). The mistake `interleaved` takes the pairs
// (x[2i], x[2i + 1]), the layout of Mistral's own files.
function rotate(x, heads, D, { cos, sin }, interleaved = false) {
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
// Keys and values of one layer, (slots, G, D). Position p is in slot p, or, with a window of W, in slot p % W: a ring.
class LayerCache {
  constructor(window, width) {
    this.window = window; // W; null: every position is kept
    this.width = width; // numbers in a slot, G * D
    this.length = 0; // tokens seen so far
    this.positions = []; // the position in each slot that is in use
    this.keys = new Float32Array(64 * width); // rotated
    this.values = new Float32Array(64 * width);
  }

  // Store the keys and values (S, G, D) of new tokens. Returns the cache whose slots their queries need.
  update(k, v) {
    const S = k.length / this.width, start = this.length, W = this.window ?? Infinity;
    let needed = this;
    if (S > 1 && start + S > W) { // the ring is about to lose keys that the first queries see: keep them aside
      needed = new LayerCache(null, this.width);
      for (let p = Math.max(start - W + 1, 0); p < start; p++) needed.append(p, this.keys, this.values, p % W);
      for (let s = 0; s < S; s++) needed.append(start + s, k, v, s);
    }
    for (let s = 0; s < S; s++) this.append(start + s, k, v, s);
    return needed;
  }

  append(position, keys, values, row) {
    const slot = this.window ? this.length % this.window : this.length, { width } = this;
    if ((slot + 1) * width > this.keys.length) {
      this.keys = concatenate([this.keys, this.keys]);
      this.values = concatenate([this.values, this.values]);
    }
    this.keys.set(keys.subarray(row * width, (row + 1) * width), slot * width);
    this.values.set(values.subarray(row * width, (row + 1) * width), slot * width);
    this.positions[slot] = position;
    this.length++;
  }
}

class KVCache {
  constructor({ layer_types, sliding_window, num_key_value_heads, head_dim }) {
    this.layers = layer_types.map((kind) => {
      const window = kind === "sliding_attention" ? sliding_window : null;
      return new LayerCache(window, num_key_value_heads * head_dim);
    });
    this.headDim = head_dim;
  }

  get length() { // tokens seen so far
    return this.layers[0].length;
  }

  record(record) { // what the slots hold: the points cache.layers.N.*
    this.layers.forEach(({ positions, keys, values, width }, n) => {
      const keep = recorder(record, `cache.layers.${n}.`), inUse = positions.length * width;
      const keepHeads = recorder(record, `cache.layers.${n}.`, 1).heads;
      keep("positions", Float32Array.from(positions), positions.length);
      keepHeads("k_rotated", keys.subarray(0, inUse), width / this.headDim, this.headDim);
      keepHeads("v", values.subarray(0, inUse), width / this.headDim, this.headDim);
    });
  }
}

// ----------------------------------------------------------------------------------------------------------- layers
// A mask (S, T), 1 where the query at position start + s sees a key. With a window, these are W keys, its own included.
function attentionMask(start, S, positions, window) {
  const T = positions.length, W = window ?? Infinity, mask = new Float32Array(S * T);
  for (let n = 0; n < S * T; n++) {
    const distance = start + Math.floor(n / T) - positions[n % T];
    if (distance >= 0 && distance < W) mask[n] = 1;
  }
  return mask;
}

// softmax(q k^T / sqrt(D)) v. q (S, H, D), k and v (T, G, D), mask (S, T) -> (S, H * D).
function attention(q, k, v, mask, { H, G, D }, keep) {
  const S = q.length / (H * D), T = mask.length / S, scaling = 1 / Math.sqrt(D);
  const rows = keep.isOn ? H * S : 1; // all rows of scores if they are recorded
  const scores = new Float32Array(rows * T), probabilities = new Float32Array(rows * T);
  const sums = new Float64Array(D), result = new Float32Array(S * H * D);
  for (let h = 0; h < H; h++) {
    const g = Math.floor(h / (H / G)); // neighbouring query heads share a key/value head
    for (let s = 0; s < S; s++) {
      const row = keep.isOn ? (h * S + s) * T : 0, seen = s * T;
      let largest = -Infinity, total = 0;
      for (let t = 0; t < T; t++) {
        if (mask[seen + t] === 0 && !keep.isOn) continue;
        scores[row + t] = Math.fround(dot(q, (s * H + h) * D, k, (t * G + g) * D, D)) * scaling;
        if (mask[seen + t] === 1 && scores[row + t] > largest) largest = scores[row + t];
      }
      for (let t = 0; t < T; t++) {
        probabilities[row + t] = mask[seen + t] === 1 ? Math.exp(scores[row + t] - largest) : 0;
        total += probabilities[row + t];
      }
      sums.fill(0);
      for (let t = 0; t < T; t++) {
        if (probabilities[row + t] === 0) continue;
        probabilities[row + t] /= total;
        for (let d = 0; d < D; d++) sums[d] += probabilities[row + t] * v[(t * G + g) * D + d];
      }
      result.set(sums, (s * H + h) * D);
    }
  }
  keep("attention.scores", scores, H, S, T);
  keep("attention.mask", mask, S, T);
  keep("attention.probabilities", probabilities, H, S, T);
  return result;
}

// One layer of the text model or of the encoder: attention, then the gated feed-forward part. Each reads a normed copy
// of x (S, E), and its result is added to x. attend(q, k, v) computes the results of the heads (S, H * D).
function runLayer(x, layer, attend, keep) {
  const { H, G, D } = layer.sizes, E = layer.inputNorm.data.length, S = x.length / E, F = layer.gate.shape[0];
  const normed = keep("input_norm", rmsNorm(x, layer.inputNorm, layer.eps), S, E);
  const q = keep.heads("attention.q", linear(normed, layer.q), H, D);
  const k = keep.heads("attention.k", linear(normed, layer.k), G, D);
  const v = keep.heads("attention.v", linear(normed, layer.v), G, D);
  const heads = keep("attention.heads", attend(q, k, v), S, H * D);
  x = keep("attention_residual", add(x, keep("attention.output", linear(heads, layer.o), S, E)), S, E);

  const again = keep("post_attention_norm", rmsNorm(x, layer.postNorm, layer.eps), S, E);
  const gate = keep("mlp.gate", linear(again, layer.gate), S, F);
  const up = keep("mlp.up", linear(again, layer.up), S, F);
  const product = keep("mlp.product", multiply(keep("mlp.activation", gate.map(layer.activation), S, F), up), S, F);
  return keep("mlp_residual", add(x, keep("mlp.down", linear(product, layer.down), S, E)), S, E);
}

// The names of a layer's weights.
const TEXT_LAYER = {
  inputNorm: "input_layernorm", q: "self_attn.q_proj", k: "self_attn.k_proj", v: "self_attn.v_proj",
  o: "self_attn.o_proj", postNorm: "post_attention_layernorm", gate: "mlp.gate_proj", up: "mlp.up_proj",
  down: "mlp.down_proj",
};
const VISION_LAYER = {
  inputNorm: "attention_norm", q: "attention.q_proj", k: "attention.k_proj", v: "attention.v_proj",
  o: "attention.o_proj", postNorm: "ffn_norm", gate: "feed_forward.gate_proj", up: "feed_forward.up_proj",
  down: "feed_forward.down_proj",
};

function readLayers(get, prefix, names, config, eps) {
  const H = config.num_attention_heads, G = config.num_key_value_heads ?? H;
  const sizes = { H, G, D: config.head_dim ?? config.hidden_size / H };
  const activation = ACTIVATIONS[choose("hidden_act", config.hidden_act ?? "silu", Object.keys(ACTIVATIONS))];
  return Array.from({ length: config.num_hidden_layers }, (_, n) => {
    const layer = { sizes, eps, activation };
    for (const [key, name] of Object.entries(names)) layer[key] = get(`${prefix}layers.${n}.${name}.weight`);
    return layer;
  });
}

// ------------------------------------------------------------------------------------------------------------ model
// Mistakes that the model makes on demand, with the names and effects of reference/mutants.
const MISTAKES = ["yarn_missing", "yarn_magnitude_1_277", "query_scale_missing", "window_plus_1", "rope_interleaved"];

// The text configuration, with what a config.json may leave out.
function completeConfig(config) {
  const text = { ...(config.text_config ?? config) };
  text.model_type = choose("model_type", text.model_type ?? "ministral3", ["ministral", "ministral3", "mistral"]);
  text.num_key_value_heads ??= text.num_attention_heads;
  text.head_dim ??= text.hidden_size / text.num_attention_heads;
  const kind = text.sliding_window ? "sliding_attention" : "full_attention";
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
    const get = (name) => {
      if (!Object.hasOwn(weights, name)) throw new Error(`weights: no ${name}; supported: model.safetensors as Transformers writes it`);
      return weights[name];
    };
    const prefix = this.vision ? "model.language_model." : "model.";
    this.embedding = get(prefix + "embed_tokens.weight");
    this.layers = readLayers(get, prefix, TEXT_LAYER, this.text, this.text.rms_norm_eps);
    this.norm = get(prefix + "norm.weight");
    const tied = config.tie_word_embeddings ?? this.text.tie_word_embeddings ?? this.vision !== null;
    this.head = tied ? this.embedding : get("lm_head.weight");

    const rope = this.text.rope_parameters, D = this.text.head_dim, yarn = rope.rope_type === "yarn";
    const stretched = yarn && !mistakes.includes("yarn_missing");
    this.frequencies = stretched ? yarnFrequencies(D, rope) : plainFrequencies(D, rope.rope_theta);
    this.magnitude = yarn ? yarnMagnitude(rope) : 1;
    if (yarn && mistakes.includes("yarn_magnitude_1_277")) this.magnitude = 0.1 * Math.log(rope.factor) + 1;
    if (this.vision) this.readVision(get, "model.vision_tower.", "model.multi_modal_projector.");
  }

  readVision(get, tower, projector) {
    const convolution = get(tower + "patch_conv.weight"), C = convolution.shape[0];
    this.patches = { shape: [C, convolution.data.length / C], data: convolution.data }; // steps by whole patches: a matrix
    this.visionNorm = get(tower + "ln_pre.weight");
    this.visionLayers = readLayers(get, tower + "transformer.", VISION_LAYER, this.vision, 1e-5);
    this.projectorNorm = get(projector + "norm.weight");
    this.merging = get(projector + "patch_merger.merging_layer.weight");
    const bias = (name) => this.config.multimodal_projector_bias ? get(name) : null;
    this.projector = ["linear_1", "linear_2"].map((name) => [get(`${projector}${name}.weight`), bias(`${projector}${name}.bias`)]);
    this.projectorActivation = ACTIVATIONS[choose("projector_hidden_act", this.config.projector_hidden_act ?? "gelu", Object.keys(ACTIVATIONS))];
  }

  newCache() {
    return new KVCache(this.text);
  }

  // Ministral 3 scales the query at a position by 1 + beta ln(1 + floor(position / original context)).
  queryScale(position) {
    const { llama_4_scaling_beta: beta, original_max_position_embeddings: original } = this.text.rope_parameters;
    if (this.text.model_type !== "ministral3" || !beta || this.mistakes.includes("query_scale_missing")) return 1;
    return Math.fround(1 + beta * Math.log(1 + Math.floor(position / original)));
  }

  // Run new tokens through all layers and extend the cache. Returns the logits (V,) of the last token.
  //     images     [{pixels, height, width}] of `preprocess`, whose [IMG] tokens are in ids
  //     record     record(name, shape, data) is called for all points of reference/trace.py, in the order of computing
  //     allLogits  return the logits (S, V) of all tokens
  forward(ids, cache = this.newCache(), { images = [], record = null, allLogits = false } = {}) {
    const { hidden_size: E, vocab_size: V, head_dim: D } = this.text, S = ids.length, start = cache.length;
    const keepText = recorder(record, "", 1);
    let x = keepText("embedding", this.embed(ids, images, record), S, E);
    const tables = rotaryTables(S, D, this.magnitude, (s, i) => (start + s) * this.frequencies[i]);
    const scales = Array.from({ length: S }, (_, s) => this.queryScale(start + s));
    const interleaved = this.mistakes.includes("rope_interleaved");
    this.layers.forEach((layer, n) => {
      const { H, G } = layer.sizes, keep = recorder(record, `layers.${n}.`, 1);
      const attend = (q, k, v) => {
        q = keep.heads("attention.q_rotated", rotate(q, H, D, tables, interleaved), H, D);
        k = keep.heads("attention.k_rotated", rotate(k, G, D, tables, interleaved), G, D);
        q = keep.heads("attention.q_scaled", q.map((value, i) => value * scales[Math.floor(i / (H * D))]), H, D);
        const { positions, keys, values } = cache.layers[n].update(k, v);
        let { window } = cache.layers[n];
        if (window && this.mistakes.includes("window_plus_1")) window++;
        return attention(q, keys, values, attentionMask(start, S, positions, window), layer.sizes, keep);
      };
      x = runLayer(x, layer, attend, keep);
    });
    if (!record && !allLogits) return lens(this, x.subarray((S - 1) * E));
    const normed = keepText("final_norm", rmsNorm(x, this.norm, this.text.rms_norm_eps), S, E);
    const logits = keepText("logits", linear(normed, this.head), S, V);
    return allLogits ? logits : logits.subarray((S - 1) * V);
  }

  // The embeddings (S, E) of ids. Those of the images take the [IMG] tokens in order.
  embed(ids, images, record) {
    const { hidden_size: E, vocab_size: V } = this.text, x = new Float32Array(ids.length * E);
    const features = images.length ? this.encodeImages(images, record) : new Float32Array(0);
    let used = 0;
    ids.forEach((id, s) => {
      if (!(id >= 0 && id < V)) throw new Error(`ids: ${id}; supported: 0 to ${V - 1}`);
      const isImage = images.length && id === imageTokenId(this.config);
      const [source, row] = isImage ? [features, used++] : [this.embedding.data, id];
      x.set(source.subarray(row * E, (row + 1) * E), s * E);
    });
    if (used * E !== features.length) throw new Error(`images: ${used} [IMG] tokens; supported: ${features.length / E} for these images`);
    return x;
  }

  // The embeddings (merged patches, E) of images: the encoder, in which a patch sees all patches of its own image, then
  // the projector.
  encodeImages(images, record = null) {
    if (!this.vision) throw new Error(`images: model_type ${this.config.model_type}; supported: mistral3`);
    const { patch_size: size, hidden_size: C } = this.vision, { H, D } = this.visionLayers[0].sizes;
    const m = this.config.spatial_merge_size ?? 2, E = this.text.hidden_size, keep = recorder(record, "");
    const grids = images.map(({ height, width }) => [Math.floor(height / size), Math.floor(width / size)]);
    const places = grids.flatMap(([rows, columns]) => Array.from({ length: rows * columns }, (_, n) => [Math.floor(n / columns), n % columns]));
    const P = places.length, cut = concatenate(images.map((image, n) => cutPatches(image, grids[n], size)));
    const patches = keep("vision.patches", linear(cut, this.patches), P, C);
    const hiddenStates = [keep("vision.ln_pre", rmsNorm(patches, this.visionNorm, 1e-5), P, C)];

    // Of the frequencies, the even ones turn with a patch's row and the odd ones with its column.
    const frequencies = plainFrequencies(D, this.vision.rope_parameters?.rope_theta ?? this.vision.rope_theta ?? 10000);
    const angle = (p, i) => i < D / 4 ? places[p][0] * frequencies[2 * i] : places[p][1] * frequencies[2 * i - D / 2 + 1];
    const tables = rotaryTables(P, D, 1, angle);
    keep("vision.cos", tables.cos, P, D);
    keep("vision.sin", tables.sin, P, D);
    this.visionLayers.forEach((layer, n) => {
      const keepLayer = recorder(record, `vision.layers.${n}.`);
      const attend = (q, k, v) => {
        q = keepLayer.heads("attention.q_rotated", rotate(q, H, D, tables), H, D);
        k = keepLayer.heads("attention.k_rotated", rotate(k, H, D, tables), H, D);
        let end = 0;
        return concatenate(grids.map(([rows, columns]) => {
          const start = end, count = rows * columns, all = new Float32Array(count * count).fill(1);
          end += count;
          const own = [q, k, v].map((part) => part.subarray(start * C, end * C));
          return attention(...own, all, layer.sizes, recorder(null, ""));
        }));
      };
      hiddenStates.push(runLayer(hiddenStates[n], layer, attend, keepLayer));
    });

    const [index] = [this.config.vision_feature_layer ?? -1].flat(); // a number, or a list of one
    const normed = keep("projector.norm", rmsNorm(hiddenStates.at(index), this.projectorNorm, this.text.rms_norm_eps), P, C);
    const merged = linear(mergePatches(normed, grids, C, m), this.merging), M = merged.length / C;
    keep("projector.merged", merged, M, C);
    const [first, second] = this.projector;
    const hidden = keep("projector.hidden", linear(merged, ...first), M, E);
    return keep("projector.output", linear(hidden.map(this.projectorActivation), ...second), M, E);
  }
}

// The logits (V,) of a vector (E,) of the residual stream: final norm and head.
function lens(model, hidden) {
  return linear(rmsNorm(hidden, model.norm, model.text.rms_norm_eps), model.head);
}

// ----------------------------------------------------------------------------------------------------------- images
const imageTokenId = (config) => config.image_token_index ?? config.image_token_id ?? 10;

// Pixels (height, width, 3 or 4) from 0 to 255 -> {pixels: (3, height, width), normalised, height, width}.
function preprocess(rgb, height, width) {
  const mean = [0.48145466, 0.4578275, 0.40821073].map(Math.fround);
  const std = [0.26862954, 0.26130258, 0.27577711].map(Math.fround);
  const area = height * width, step = rgb.length / area, pixels = new Float32Array(3 * area);
  for (let n = 0; n < 3 * area; n++) {
    const channel = Math.floor(n / area), scaled = Math.fround(rgb[n % area * step + channel] / 255);
    pixels[n] = Math.fround(scaled - mean[channel]) / std[channel];
  }
  return { pixels, height, width };
}

// The patches of an image as rows (patches, 3 * size * size).
function cutPatches({ pixels, height, width }, [rows, columns], size) {
  const result = new Float32Array(rows * columns * 3 * size * size);
  let at = 0;
  for (let patch = 0; patch < rows * columns; patch++) {
    const top = Math.floor(patch / columns) * size, left = patch % columns * size;
    for (let line = 0; line < 3 * size; line++) { // channel by channel
      const from = (Math.floor(line / size) * height + top + line % size) * width + left;
      result.set(pixels.subarray(from, from + size), at);
      at += size;
    }
  }
  return result;
}

// m x m neighbours of x (P, C) become one row (merged patches, C * m * m), channel by channel. A last odd row or column
// is left out.
function mergePatches(x, grids, C, m) {
  const merged = [];
  let first = 0;
  for (const [rows, columns] of grids) {
    for (let row = 0; row + m <= rows; row += m) {
      for (let column = 0; column + m <= columns; column += m) {
        for (let n = 0; n < C * m * m; n++) {
          const patch = first + (row + Math.floor(n / m) % m) * columns + column + n % m;
          merged.push(x[patch * C + Math.floor(n / (m * m))]);
        }
      }
    }
    first += rows * columns;
  }
  return Float32Array.from(merged);
}

// -------------------------------------------------------------------------------------------------------- tokenizer
// The special tokens of vocabularies that do not list their own.
const SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
  "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]",
  "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"];
const latin1 = (bytes) => Array.from(bytes, (byte) => String.fromCharCode(byte)).join(""); // one letter for each byte

// Tekken: byte-level BPE. An expression cuts the text into pieces; in each, the two neighbours that together have the
// lowest rank are merged, until no two are in the vocabulary.
class Tokenizer {
  constructor({ config, vocab, special_tokens: listed }) { // a parsed tekken.json
    const count = config.default_num_special_tokens;
    const named = listed ? listed.map((token) => [token.rank, token.token_str]) : [...SPECIAL_TOKENS.entries()];
    const names = new Map(named);
    this.names = Array.from({ length: count }, (_, id) => names.get(id) ?? `<SPECIAL_${id}>`);
    this.special = Object.fromEntries(this.names.map((name, id) => [name, id]));
    this.words = vocab.slice(0, config.default_vocab_size - count).map((entry) => atob(entry.token_bytes));
    this.ranks = new Map(this.words.map((word, rank) => [word, rank]));
    // \s is Unicode's White_Space in Mistral's expression; in JavaScript, it is another set.
    const pattern = config.pattern.replaceAll("\\s", "\\p{White_Space}").replaceAll("\\S", "\\P{White_Space}");
    this.split = new RegExp(`${pattern}|[^]`, "gu");
  }

  encode(text, bos = true) { // special tokens are never made of text
    const ids = bos && "<s>" in this.special ? [this.special["<s>"]] : [];
    const wellFormed = new TextDecoder("utf-8", { ignoreBOM: true }).decode(new TextEncoder().encode(text));
    for (const [piece] of wellFormed.matchAll(this.split)) {
      for (const word of this.merge(latin1(new TextEncoder().encode(piece)))) ids.push(this.names.length + this.ranks.get(word));
    }
    return ids;
  }

  merge(piece) {
    if (this.ranks.has(piece)) return [piece];
    const parts = [...piece], size = this.words.length;
    // The order in which parts n and n + 1 are merged: by the rank of both together, then of the first one.
    const orderOf = (n) => {
      const rank = n + 1 < parts.length ? this.ranks.get(parts[n] + parts[n + 1]) : undefined;
      return rank === undefined ? Infinity : rank * size + this.ranks.get(parts[n]);
    };
    const orders = parts.map((_, n) => orderOf(n));
    while (true) {
      let best = 0;
      for (let n = 1; n < orders.length; n++) if (orders[n] < orders[best]) best = n;
      if (orders[best] === Infinity) return parts;
      parts.splice(best, 2, parts[best] + parts[best + 1]);
      orders.splice(best + 1, 1);
      orders[best] = orderOf(best);
      if (best > 0) orders[best - 1] = orderOf(best - 1);
    }
  }

  name(id) { // of a special token, else null
    return this.names[id] ?? null;
  }

  bytes(id) { // empty for special tokens
    if (id < this.names.length) return new Uint8Array(0);
    const word = this.words[id - this.names.length];
    if (word === undefined) throw new Error(`id: ${id}; supported: 0 to ${this.names.length + this.words.length - 1}`);
    return Uint8Array.from(word, (letter) => letter.charCodeAt(0));
  }

  decode(ids) { // bytes that are no UTF-8 become U+FFFD
    return new TextDecoder("utf-8", { ignoreBOM: true }).decode(Uint8Array.from(ids.flatMap((id) => [...this.bytes(id)])));
  }
}

// The ids of a user's message with images before its text: <s>[INST] images text [/INST].
function encodeChat(tokenizer, config, text, images = []) {
  const control = (name) => {
    if (!Object.hasOwn(tokenizer.special, name)) throw new Error(`tokenizer: no ${name}; supported: vocabularies that have it`);
    return tokenizer.special[name];
  };
  const ids = [control("<s>"), control("[INST]")];
  for (const { height, width } of images) {
    const patch = config.vision_config.patch_size * (config.spatial_merge_size ?? 2);
    const row = [...new Array(Math.floor(width / patch)).fill(imageTokenId(config)), control("[IMG_BREAK]")];
    const rows = new Array(Math.floor(height / patch)).fill(row).flat();
    ids.push(...rows.slice(0, -1), control("[IMG_END]"));
  }
  return [...ids, ...tokenizer.encode(text, false), control("[/INST]")];
}

// --------------------------------------------------------------------------------------------------------- sampling
function softmax(logits) {
  const largest = logits.reduce((a, b) => Math.max(a, b), -Infinity);
  const exponentials = logits.map((logit) => Math.exp(logit - largest)), total = sum(exponentials);
  return exponentials.map((value) => value / total);
}

function argmax(x) { // the first one of equals
  let best = 0;
  for (let i = 1; i < x.length; i++) if (x[i] > x[best]) best = i;
  return best;
}

// Logits (V,) with those of the tokens in ids divided by the penalty if positive, else multiplied.
function penalizeRepetition(logits, ids, penalty) {
  const result = logits.slice();
  for (const id of new Set(ids)) result[id] = logits[id] < 0 ? logits[id] * penalty : logits[id] / penalty;
  return result;
}

// Logits (V,) at a temperature above 0, after each step that is on: [{name, logits}], excluded tokens at -Infinity.
function filterLogits(logits, { temperature, top_k, top_p, min_p }) {
  const steps = [];
  const step = (name, change) => { logits = logits.map(change); steps.push({ name, logits }); };
  const shift = temperature < 1e-6 ? logits.reduce((a, b) => Math.max(a, b)) : 0; // keeps the division from overflowing
  const divisor = Math.fround(Math.max(temperature, 1e-30));
  step("temperature", (logit) => Math.fround(logit - shift) / divisor);
  if (top_k) {
    const kth = logits.slice().sort().at(-Math.min(top_k, logits.length));
    step("top_k", (logit) => logit < kth ? -Infinity : logit);
  }
  if (top_p != null && top_p < 1) { // the least likely tokens, which sum to 1 - p at most; the most likely one stays
    const probabilities = softmax(logits), order = [...logits.keys()].sort((a, b) => logits[a] - logits[b]);
    const dropped = new Set();
    let total = 0;
    for (const id of order.slice(0, -1)) {
      total += probabilities[id];
      if (Math.fround(total) <= Math.fround(1 - top_p)) dropped.add(id);
    }
    step("top_p", (logit, id) => dropped.has(id) ? -Infinity : logit);
  }
  if (min_p != null) {
    const probabilities = softmax(logits), least = Math.fround(Math.fround(min_p) * probabilities[argmax(probabilities)]);
    step("min_p", (logit, id) => probabilities[id] < least ? -Infinity : logit);
  }
  return steps;
}

// The id that is drawn with exponentially distributed random numbers (V,): the largest probability / number. At a
// temperature of 0, the most likely one.
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
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, size)));
  delete header.__metadata__;
  return Object.fromEntries(Object.entries(header).map(([name, { dtype, shape, data_offsets: [start, end] }]) => {
    const bytes = buffer.slice(8 + size + start, 8 + size + end);
    choose(name, dtype, ["BF16", "F16", "F32"]);
    if (dtype === "F32") return [name, { shape, data: new Float32Array(bytes) }];
    const halves = new Uint16Array(bytes);
    if (dtype === "F16") return [name, { shape, data: Float32Array.from(halves, fromFloat16) }];
    const bits = Uint32Array.from(halves, (half) => half << 16); // bfloat16 is the upper half of float32
    return [name, { shape, data: new Float32Array(bits.buffer) }];
  }));
}

function fromFloat16(bits) {
  const sign = bits & 0x8000 ? -1 : 1, exponent = bits >> 10 & 31, fraction = bits & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? (1024 + fraction) * 2 ** (exponent - 25) : fraction * 2 ** -24);
}

// A trace as a .safetensors file (ArrayBuffer) for `python -m reference diff`. points: {name: {shape, data}}; ids: what
// the model read; about: anything that JSON holds, such as the model's name.
function saveTrace(points, ids, about = {}) {
  const tensors = [["input.input_ids", "I64", [1, ids.length], BigInt64Array.from(ids, BigInt)]];
  for (const [name, { shape, data }] of Object.entries(points)) {
    if (name.endsWith(".mask")) tensors.push([name, "BOOL", shape, Uint8Array.from(data)]);
    else tensors.push([name, "F32", shape, data]);
  }
  tensors.sort((a, b) => b[3].BYTES_PER_ELEMENT - a[3].BYTES_PER_ELEMENT); // so that each begins at a multiple of its size
  const header = { __metadata__: { trace: JSON.stringify(about) } };
  let end = 0;
  for (const [name, dtype, shape, data] of tensors) header[name] = { dtype, shape, data_offsets: [end, end += data.byteLength] };
  let text = JSON.stringify(header);
  text = new TextEncoder().encode(text + " ".repeat(7 - (new TextEncoder().encode(text).length + 7) % 8));
  const file = new Uint8Array(8 + text.length + end);
  new DataView(file.buffer).setBigUint64(0, BigInt(text.length), true);
  file.set(text, 8);
  for (const [name, , , data] of tensors) {
    file.set(new Uint8Array(data.buffer, data.byteOffset, data.byteLength), 8 + text.length + header[name].data_offsets[0]);
  }
  return file.buffer;
}

if (typeof module !== "undefined") {
  module.exports = { readWeights, Tokenizer, Model, KVCache, MISTAKES, filterLogits, sample, penalizeRepetition, softmax,
    preprocess, encodeChat, lens, saveTrace, plainFrequencies, yarnFrequencies };
}
