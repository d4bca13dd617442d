// Runs explorer/model.js for tests/test_explorer_port.py: a JSON list of tasks on stdin, a list of answers on stdout.
"use strict";
const fs = require("fs");
const path = require("path");
const port = require("../explorer/model.js");

const readJson = (file) => JSON.parse(fs.readFileSync(file, "utf-8"));
const readBuffer = (file) => new Uint8Array(fs.readFileSync(file)).buffer;

function loadModel(directory, mistakes) {
  const weights = port.readWeights(readBuffer(path.join(directory, "model.safetensors")));
  return new port.Model(readJson(path.join(directory, "config.json")), weights, mistakes);
}

const toImage = ({ pixels, height, width }) => ({ pixels: Float32Array.from(pixels), height, width });

const TASKS = {
  // A trace of a text, whole or in steps, in a file.
  trace({ model, ids, steps, images = [], mistakes = [], output }) {
    const points = {}, loaded = loadModel(model, mistakes), cache = loaded.newCache();
    let end = 0;
    (steps ?? [ids.length]).forEach((length, n) => {
      const record = (name, shape, data) => { points[steps ? `step.${n}.${name}` : name] = { shape, data }; };
      loaded.forward(ids.slice(end, end += length), cache, { images: n ? [] : images.map(toImage), record });
      if (steps) cache.record(record);
    });
    fs.writeFileSync(output, Buffer.from(port.saveTrace(points, ids, { model, dtype: "float32" })));
    return Object.keys(points);
  },

  // The logits of the last token.
  logits({ model, ids, images }) {
    return [...loadModel(model).forward(ids, undefined, { images: images.map(toImage) })];
  },

  // Ids and decoded texts.
  encode({ tekken, texts }) {
    const tokenizer = new port.Tokenizer(readJson(tekken));
    return texts.map((text) => {
      const ids = tokenizer.encode(text);
      return [ids, tokenizer.decode(ids)];
    });
  },

  // Greedy continuations of prompts (ids, images), up to an end or the number of tokens.
  write({ model, prompts, tokens }) {
    const loaded = loadModel(model);
    return prompts.map(({ ids, images = [] }) => {
      const cache = loaded.newCache(), written = [];
      let logits = loaded.forward(ids, cache, { images: images.map(toImage) });
      while (written.length < tokens) {
        written.push(port.sample(logits, { temperature: 0 }));
        if (written.at(-1) === loaded.text.eos_token_id) break;
        if (written.length < tokens) logits = loaded.forward(written.slice(-1), cache);
      }
      return written;
    });
  },

  // The ids and the pixels of a user's message with an image.
  chat({ model, text, rgb, height, width }) {
    const image = port.preprocess(Uint8Array.from(rgb), height, width);
    const tokenizer = new port.Tokenizer(readJson(path.join(model, "tekken.json")));
    const config = readJson(path.join(model, "config.json"));
    return [port.encodeChat(tokenizer, config, text, [image]), [...image.pixels]];
  },

  // The tokens that are kept, their probabilities, and the one that is drawn.
  sample({ cases }) {
    return cases.map(({ logits, settings, noise }) => {
      const given = Float32Array.from(logits);
      const id = port.sample(given, settings, Float32Array.from(noise));
      if (settings.temperature === 0) return [id, [], []];
      const steps = port.filterLogits(given, settings);
      const last = steps.at(-1).logits, kept = [...last.keys()].filter((i) => last[i] > -Infinity);
      const probabilities = port.softmax(last);
      return [id, kept, kept.map((i) => probabilities[i]), steps.map(({ name }) => name)];
    });
  },

  // What an error says.
  error({ model, changes, mistakes }) {
    const config = { ...readJson(path.join(model, "config.json")), ...changes };
    try {
      new port.Model(config, port.readWeights(readBuffer(path.join(model, "model.safetensors"))), mistakes);
    } catch (error) {
      return error.message;
    }
    return "";
  },
};

const tasks = JSON.parse(fs.readFileSync(0, "utf-8"));
process.stdout.write(JSON.stringify(tasks.map(({ task, ...options }) => TASKS[task](options))));
