"use strict";
// Texts of the data reach the page through textContent only: nothing in them is ever parsed as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const PAGE = 50;
const two = data.runs.length === 2;
const byId = (id) => document.getElementById(id);
const state = { task: "", kind: "", right: "", differ: false, sort: two ? "difference" : "order", search: "", page: 0 };
let shown = [];

function make(tag, text, className) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (className) element.className = className;
  return element;
}

function verdict(score) {
  if (score === null) return "unknown";
  return score >= 0.999 ? "right" : score <= 0.001 ? "wrong" : "partly";
}

const isCaption = (entry) => entry.task === "caption" || entry.task === "tvc" || entry.task === "yc2c";
const difference = (entry) => {
  const known = entry.scores.filter((score) => score !== null);
  const scale = isCaption(entry) ? 10 : 1; // CIDEr is at most 10
  return known.length === 2 ? Math.abs(known[0] - known[1]) / scale : 0;
};
const differs = (entry) => two && entry.said[0] !== entry.said[1];

function matches(entry) {
  if (state.task && entry.task !== state.task) return false;
  if (state.kind && entry.kind !== state.kind) return false;
  if (state.differ && !differs(entry)) return false;
  if (state.right && verdict(entry.scores[0]) !== state.right) return false;
  if (!state.search) return true;
  const wanted = state.search.toLowerCase();
  const texts = [entry.id, entry.text, ...entry.truth, ...entry.said, ...entry.images.map((image) => image[0])];
  return texts.some((text) => text !== null && text.toLowerCase().includes(wanted));
}

const orders = {
  order: null,
  difference: (a, b) => difference(b) - difference(a),
  worst: (a, b) => (a.scores[0] ?? 2) - (b.scores[0] ?? 2),
  best: (a, b) => (b.scores[0] ?? -1) - (a.scores[0] ?? -1),
};

function pictures(entry) {
  const box = make("div", undefined, "pictures");
  for (const [id, place, problem] of entry.images) {
    const figure = make("figure");
    if (place >= 0) {
      const image = make("img");
      image.src = data.pictures[place];
      image.alt = `image ${id}`;
      image.loading = "lazy";
      figure.append(image);
    } else if (data.pictures.length || problem) {
      figure.append(make("div", problem || "no picture", "missing"));
    }
    figure.append(make("figcaption", id));
    box.append(figure);
  }
  return box;
}

function answer(entry, run) {
  const said = entry.said[run];
  const score = entry.scores[run];
  const box = make("div", undefined, isCaption(entry) ? "" : verdict(score));
  box.append(make("div", data.runs[run], "name"));
  box.append(make("div", said === null ? "(no prediction)" : said === "" ? "(empty)" : said));
  if (score !== null) {
    const text = isCaption(entry) ? `CIDEr ${(100 * score).toFixed(1)}` : `${verdict(score)}, ${(100 * score).toFixed(0)} %`;
    box.append(make("div", text, "score name"));
  }
  return box;
}

function card(entry) {
  const article = make("article");
  article.tabIndex = 0;
  const body = make("div", undefined, "body");
  body.append(make("p", entry.text || (isCaption(entry) ? "caption" : "(no question)"), "question"));
  body.append(make("p", [entry.task, entry.kind, `id ${entry.id}`].filter(Boolean).join(" · "), "meta"));
  const answers = make("div", undefined, "answers");
  data.runs.forEach((_, run) => answers.append(answer(entry, run)));
  const truth = make("div");
  truth.append(make("div", "truth", "name"));
  if (!entry.truth.length) truth.append(make("div", "(not public)"));
  entry.truth.forEach((text) => truth.append(make("div", text)));
  answers.append(truth);
  body.append(answers);
  article.append(pictures(entry), body);
  return article;
}

function means() {
  return data.runs.map((name, run) => {
    const parts = [];
    for (const [label, wanted] of [["mean score", false], ["mean CIDEr", true]]) {
      const known = shown.filter((e) => isCaption(e) === wanted && e.scores[run] !== null).map((e) => e.scores[run]);
      if (known.length) parts.push(`${label} ${((100 * known.reduce((a, b) => a + b, 0)) / known.length).toFixed(2)}`);
    }
    return parts.length ? `${name}: ${parts.join(", ")}` : "";
  }).filter(Boolean).join(" · ");
}

function select(id, options, value) {
  const element = byId(id);
  element.replaceChildren(...options.map(([key, text]) => {
    const option = make("option", text);
    option.value = key;
    return option;
  }));
  element.value = options.some(([key]) => key === value) ? value : options[0][0];
  return element.value;
}

const tasks = [...new Set(data.entries.map((entry) => entry.task))];

function controls() {
  state.task = select("task", [["", "all"], ...tasks.map((task) => [task, task])], state.task);
  const kinds = [...new Set(data.entries.filter((e) => !state.task || e.task === state.task).map((e) => e.kind))];
  const named = kinds.filter(Boolean).sort();
  state.kind = select("kind", [["", "all"], ...named.map((kind) => [kind, kind])], state.kind);
  byId("kind").parentElement.hidden = named.length === 0;
  state.right = select("right", [["", "all"], ["right", "right"], ["partly", "partly"], ["wrong", "wrong"]], state.right);
  const sorts = [["order", "as tested"], ["worst", "worst first"], ["best", "best first"]];
  state.sort = select("sort", two ? [["difference", "largest difference"], ...sorts] : sorts, state.sort);
  byId("differ-label").hidden = !two;
  byId("differ").checked = state.differ;
  if (byId("search").value !== state.search) byId("search").value = state.search;
}

function render(keepPage) {
  controls();
  shown = data.entries.filter(matches);
  if (orders[state.sort]) shown = shown.slice().sort(orders[state.sort]);
  const pages = Math.max(1, Math.ceil(shown.length / PAGE));
  state.page = keepPage ? Math.min(Math.max(0, state.page), pages - 1) : 0;
  const start = state.page * PAGE;
  byId("list").replaceChildren(...shown.slice(start, start + PAGE).map(card));
  byId("summary").textContent = [`${shown.length} of ${data.entries.length} questions`, means()].filter(Boolean).join(" · ");
  byId("page").textContent = `page ${state.page + 1} of ${pages}`;
  byId("previous").disabled = state.page === 0;
  byId("next").disabled = state.page === pages - 1;
  const changed = Object.entries(state).filter(([, value]) => value !== "" && value !== false && value !== 0);
  history.replaceState(null, "", `#${new URLSearchParams(changed)}`);
}

function turn(step) {
  state.page += step;
  render(true);
  window.scrollTo(0, 0);
}

function move(step) {
  const cards = [...byId("list").children];
  const at = cards.indexOf(document.activeElement.closest?.("article"));
  const next = cards[at < 0 ? 0 : Math.min(Math.max(0, at + step), cards.length - 1)];
  if (next) {
    next.focus();
    next.scrollIntoView({ block: "nearest" });
  }
}

function toggle(name, value) {
  state[name] = state[name] === value ? (typeof value === "boolean" ? false : "") : value;
  render();
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.matches("input[type=search]")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  if (event.target.matches("select") || byId("help").open) return;
  const keys = {
    j: () => move(1), ArrowDown: () => move(1), k: () => move(-1), ArrowUp: () => move(-1),
    n: () => turn(byId("next").disabled ? 0 : 1), p: () => turn(byId("previous").disabled ? 0 : -1),
    "/": () => byId("search").focus(), "?": () => byId("help").showModal(),
    r: () => toggle("right", "right"), w: () => toggle("right", "wrong"), d: () => two && toggle("differ", true),
  };
  if (/^[0-9]$/.test(event.key)) keys[event.key] = () => { state.task = tasks[Number(event.key) - 1] ?? ""; render(); };
  if (keys[event.key]) {
    event.preventDefault();
    keys[event.key]();
  }
});

for (const id of ["task", "kind", "right", "sort"]) {
  byId(id).addEventListener("change", (event) => { state[id] = event.target.value; render(); });
}
byId("differ").addEventListener("change", (event) => { state.differ = event.target.checked; render(); });
byId("search").addEventListener("input", (event) => { state.search = event.target.value; render(); });
byId("filters").addEventListener("submit", (event) => event.preventDefault());
byId("previous").addEventListener("click", () => turn(-1));
byId("next").addEventListener("click", () => turn(1));
byId("help-button").addEventListener("click", () => byId("help").showModal());

byId("title").textContent = `${data.runs.join(" and ")}: ${data.split} predictions`;
const notes = data.notes.slice();
for (const [name, one, other] of data.differences) {
  notes.push(`The runs differ in ${name}: ${one} in ${data.runs[0]}, ${other} in ${data.runs[1]}`);
}
byId("notes").replaceChildren(...notes.map((note) => make("p", note)));
const known = data.protocols.filter((protocol) => Object.keys(protocol).length);
byId("protocol").hidden = known.length === 0;
byId("protocols").textContent = JSON.stringify(data.protocols, null, 1);

for (const [name, value] of new URLSearchParams(location.hash.slice(1))) {
  if (name in state) state[name] = name === "page" ? Number(value) || 0 : name === "differ" ? value === "true" : value;
}
render(true);
