// The guided tour: six stops, begun by itself at the first visit only, and by its button.
"use strict";

const STOPS = [
  {
    view: "tokens", mark: "text", title: "The model reads tokens",
    text: "Your text is cut into pieces from a fixed vocabulary. A blank usually belongs to the word after it. "
      + "Click a token: all views follow it.",
  },
  {
    view: "sampling", mark: "input", title: "It writes one token at a time",
    text: "Press “Next token”. The view shows how likely each candidate was, "
      + "and what temperature, top-k, top-p and min-p left of it. Change a setting and watch the bars.",
  },
  {
    view: "attention", mark: "views", title: "Tokens look back",
    text: "Each small map is a head. A line beside the diagonal is a head that looks at the token before. "
      + "Point at a cell of the large map to read its score, and why it is hidden if it is.",
  },
  {
    view: "layers", mark: "views", title: "The guess forms layer by layer",
    text: "After each layer, the vector of a token can be read as a guess of the next one. "
      + "Here you see from which layer on the guess stands.",
  },
  {
    view: "cache", mark: "views", title: "Keys and values are kept",
    text: "The model reads a token once. Its keys and values stay in the cache, "
      + "in a sliding layer in a ring with a fixed number of slots. Move the slider to see which slot is overwritten.",
  },
  {
    view: "mistakes", mark: "views", title: "Now break it",
    text: "Switch a known mistake on, and compare text and numbers with the right model. "
      + "Then write your own text at the top: everything is live.",
  },
];
const byId = (id) => document.getElementById(id);
let current = 0; // the stop that is shown

function startTour(takeFocus) {
  byId("tour").hidden = false;
  document.body.classList.add("touring");
  showStop(0);
  if (takeFocus) byId("tour").focus();
}

function showStop(stop) {
  current = stop;
  const { view, mark, title, text } = STOPS[stop];
  openView(view);
  byId("tour-count").textContent = `Stop ${stop + 1} of ${STOPS.length}`;
  byId("tour-title").textContent = title;
  byId("tour-text").textContent = text;
  byId("tour-back").hidden = stop === 0;
  byId("tour-next").textContent = stop === STOPS.length - 1 ? "Finish" : "Next";
  byId("tour-skip").hidden = stop === STOPS.length - 1;
  const covered = byId("tour").offsetHeight + 24; // pixels at the end of the window
  document.documentElement.style.scrollPaddingBottom = `${covered}px`;
  markStop(mark);
}

function markStop(mark) {
  for (const element of document.querySelectorAll(".toured")) element.classList.remove("toured");
  if (mark === null) return;
  byId(mark).classList.add("toured");
  const blocks = { views: "start", input: "end", text: "nearest" }; // the input ends with the settings
  if (current > 0) byId(mark).scrollIntoView({ block: blocks[mark] });
}

function endTour() {
  byId("tour").hidden = true;
  document.body.classList.remove("touring");
  document.documentElement.style.scrollPaddingBottom = "";
  markStop(null);
  remember("tour", "seen");
  byId("start-tour").focus({ preventScroll: true });
}

document.addEventListener("DOMContentLoaded", () => {
  byId("start-tour").addEventListener("click", () => startTour(true));
  byId("tour-back").addEventListener("click", () => showStop(current - 1));
  byId("tour-skip").addEventListener("click", endTour);
  byId("tour-next").addEventListener("click", () => {
    if (current < STOPS.length - 1) showStop(current + 1);
    else endTour();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !byId("tour").hidden) endTour();
  });
});
Object.assign(globalThis, { startTour });
