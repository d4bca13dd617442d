// The views of the text: Tokens, Sampling, Attention, Layers.
"use strict";

// ------------------------------------------------------------------------------------------------------- tokens
VIEWS.push({
  id: "tokens",
  title: "Tokens",
  about: "The text as the model reads it: numbered pieces from a fixed vocabulary, each of one or more bytes.",
  render(element, run) {
    const { make, labelOf } = run.help;
    const bytes = run.tokens.reduce((sum, token) => sum + token.bytes.length, 0);
    const rows = run.tokens.map((token, position) => make("tr", {},
      make("th", { scope: "row" }, String(position)), make("td", {}, labelOf(token)), make("td", {}, String(token.id)),
      make("td", {}, [...token.bytes].map((byte) => byte.toString(16).padStart(2, "0")).join(" "))));
    element.replaceChildren(
      make("p", {}, `${run.tokens.length} tokens for ${bytes} bytes.`),
      make("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": "Tokens" },
        make("table", {}, make("thead", {}, make("tr", {}, ["position", "token", "id", "bytes"].map((name) => make("th", { scope: "col" }, name)))),
          make("tbody", {}, rows))));
  },
});
