"use strict";
// Texts of the data reach the page through textContent only: nothing in them is ever parsed as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const PAGE = 50;
const LEVELS = 5; // of the colours of captions
const two = data.runs.length === 2;
const tasks = Object.keys(data.tasks);
const byId = (id) => document.getElementById(id);
const SELECTS = ["task", "answer_type", "question_type", "score", "sort"];
const DEFAULTS = {
  task: "", answer_type: "", question_type: "", score: "", sort: two ? "difference" : "order", differ: false, search: "", page: 0,
};
const state = { ...DEFAULTS };
let shown = [];

function make(tag, text, className) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (className) element.className = className;
  return element;
}

const count = (number) => number.toLocaleString("en");
const isCaption = (entry) => data.tasks[entry.task].largest > 1; // CIDEr: more or less good, not right or wrong

function verdict(entry, run) {
  const score = entry.scores[run];
  if (score === null || isCaption(entry)) return "";
  return score >= 0.999 ? "right" : score <= 0.001 ? "wrong" : "partly";
}

const bothKnown = (entry) => two && entry.scores[0] !== null && entry.scores[1] !== null;
const runs = data.runs.map((_, run) => run);

// names and tests of the filter by score
const scoreFilters = [
  ["", "all"],
  ["right", two ? "both right" : "right", (entry) => runs.every((run) => verdict(entry, run) === "right")],
  ["partly", two ? "any partly right" : "partly right", (entry) => runs.some((run) => verdict(entry, run) === "partly")],
  ["wrong", two ? "both wrong" : "wrong", (entry) => runs.every((run) => verdict(entry, run) === "wrong")],
  ...(two ? runs.flatMap((run) => {
    const name = data.runs[run];
    return [
      [`better${run}`, `${name} better`, (entry) => bothKnown(entry) && entry.scores[run] > entry.scores[1 - run]],
      [`right${run}`, `${name} right`, (entry) => verdict(entry, run) === "right"],
      [`wrong${run}`, `${name} wrong`, (entry) => verdict(entry, run) === "wrong"],
    ];
  }) : []),
];

function filters() {
  const found = [];
  for (const name of ["task", "answer_type", "question_type"]) {
    if (state[name]) found.push((entry) => entry[name] === state[name]);
  }
  if (state.score) found.push(scoreFilters.find(([key]) => key === state.score)[2]);
  if (state.differ) found.push((entry) => entry.said[0] !== entry.said[1]);
  if (state.search) {
    const wanted = state.search.toLowerCase();
    const has = (text) => text !== null && text.toLowerCase().includes(wanted);
    found.push((entry) =>
      has(entry.id) || has(entry.text) || entry.said.some(has) || entry.truth.some(has) || entry.images.some((image) => has(image[0])));
  }
  return found;
}

const lowest = (entry) => Math.min(...entry.scores.map((score) => (score === null ? Infinity : score / data.tasks[entry.task].largest)));
const highest = (entry) => Math.max(...entry.scores.map((score) => (score === null ? -Infinity : score / data.tasks[entry.task].largest)));
const compare = (a, b) => (a === b ? 0 : a < b ? -1 : 1); // Infinity - Infinity is NaN
const ids = new Intl.Collator("en", { numeric: true });
const taskAndId = (a, b) => tasks.indexOf(a.task) - tasks.indexOf(b.task) || ids.compare(a.id, b.id);
const orders = {
  order: taskAndId,
  worst: (a, b) => compare(lowest(a), lowest(b)),
  best: (a, b) => compare(highest(b), highest(a)),
};
const SORTS = [["order", "task and id"], ["worst", "worst first"], ["best", "best first"]];

// Captions are coloured by fifths of their task's scores, as the range of CIDEr depends on the data.
const fifths = {};
for (const task of tasks) {
  if (data.tasks[task].largest === 1) continue;
  const all = data.entries.filter((entry) => entry.task === task).flatMap((entry) => entry.scores);
  const scores = all.filter((score) => score !== null).sort((a, b) => a - b);
  fifths[task] = Array.from({ length: LEVELS - 1 }, (_, i) => scores[Math.floor(((i + 1) * scores.length) / LEVELS)]);
}
const level = (entry, run) => `level${fifths[entry.task].filter((limit) => entry.scores[run] >= limit).length}`;

function pictures(entry) {
  const box = make("div", undefined, "pictures");
  if (!data.pictures.length && !entry.images.some((image) => image[2])) return box; // the ids are below the question
  for (const [id, place, problem] of entry.images) {
    const figure = make("figure");
    if (place >= 0) {
      const image = make("img");
      image.src = data.pictures[place];
      image.alt = `image ${id}`;
      image.loading = "lazy";
      figure.append(image);
    } else {
      figure.append(make("div", problem || "no picture", "missing"));
    }
    if (id !== entry.id) figure.append(make("figcaption", id));
    box.append(figure);
  }
  return box;
}

function answer(entry, run) {
  const said = entry.said[run];
  const score = entry.scores[run];
  const colour = score === null ? "" : isCaption(entry) ? level(entry, run) : verdict(entry, run);
  const box = make("div", undefined, colour);
  box.append(make("div", two ? data.runs[run] : "prediction", "name"));
  box.append(make("div", said === null ? "(no prediction)" : said === "" ? "(empty)" : said));
  if (score !== null) {
    const percent = `${(100 * score).toFixed(0)} %`;
    const words = { right: "right", wrong: "wrong", partly: `partly right, ${percent}` };
    box.append(make("div", isCaption(entry) ? `CIDEr ${(100 * score).toFixed(1)}` : words[verdict(entry, run)], "score name"));
  }
  return box;
}

function card(entry) {
  const article = make("article");
  article.tabIndex = 0;
  article.setAttribute("aria-label", `${entry.task} ${entry.id}`);
  const body = make("div", undefined, "body");
  if (entry.text || !isCaption(entry)) body.append(make("h2", entry.text || "(no question)"));
  const images = pictures(entry);
  const names = images.childElementCount ? [] : entry.images.map((image) => image[0]).filter((id) => id !== entry.id);
  const facts = [entry.task, entry.answer_type, entry.question_type, `id ${entry.id}`, ...names];
  body.append(make("p", facts.filter(Boolean).join(" · "), "meta"));
  const answers = make("div", undefined, "answers");
  runs.forEach((run) => answers.append(answer(entry, run)));
  const truth = make("div");
  truth.append(make("div", "truth", "name"));
  if (!entry.truth.length) truth.append(make("div", "(not public)"));
  entry.truth.forEach((text) => truth.append(make("div", text)));
  answers.append(truth);
  body.append(answers);
  if (images.childElementCount) article.append(images);
  else article.className = "text-only";
  article.append(body);
  return article;
}

function means(run) {
  const sums = new Map();
  for (const entry of shown) {
    const score = entry.scores[run];
    if (score === null) continue;
    const sum = sums.get(entry.task) ?? [0, 0];
    sums.set(entry.task, [sum[0] + score, sum[1] + 1]);
  }
  return tasks.filter((task) => sums.has(task)).map((task) => {
    const [sum, number] = sums.get(task);
    return `${task} ${data.tasks[task].largest > 1 ? "CIDEr " : ""}${((100 * sum) / number).toFixed(2)}`;
  });
}

function summary() {
  const lines = [`${count(shown.length)} of ${count(data.entries.length)} questions`];
  for (const run of runs) {
    const found = means(run);
    if (found.length) lines.push(`${two ? `${data.runs[run]}, ` : ""}mean score: ${found.join(" · ")}`);
  }
  byId("summary").replaceChildren(...lines.map((line) => make("p", line)));
}

function select(id, options) {
  const element = byId(id);
  element.replaceChildren(...options.map(([key, text]) => {
    const option = make("option", text);
    option.value = key;
    return option;
  }));
  if (!options.some(([key]) => key === state[id])) state[id] = options[0][0];
  element.value = state[id];
}

const typesOf = {}; // names of the types by field and task, "" for all tasks
for (const name of ["answer_type", "question_type"]) {
  typesOf[name] = { "": new Set() };
  for (const task of tasks) typesOf[name][task] = new Set();
  for (const entry of data.entries) {
    if (entry[name]) typesOf[name][""].add(entry[name]) && typesOf[name][entry.task].add(entry[name]);
  }
}

function controls() {
  select("task", [["", "all"], ...tasks.map((task) => [task, task])]);
  for (const name of ["answer_type", "question_type"]) {
    const found = [...typesOf[name][state.task]].sort();
    select(name, [["", "all"], ...found.map((type) => [type, type])]);
    byId(name).parentElement.hidden = found.length === 0;
  }
  const captions = state.task !== "" && data.tasks[state.task].largest > 1;
  select("score", scoreFilters.filter(([key]) => !captions || key === "" || key.startsWith("better")));
  byId("score").parentElement.hidden = captions && !two;
  select("sort", two ? [["difference", "largest difference"], ...SORTS] : SORTS);
  byId("differ-label").hidden = !two;
  state.differ = two && state.differ;
  byId("differ").checked = state.differ;
  if (byId("search").value !== state.search) byId("search").value = state.search;
}

function render(keepPage) {
  controls();
  const wanted = filters();
  shown = data.entries.filter((entry) => wanted.every((test) => test(entry)));
  if (state.sort !== "difference") shown.sort(orders[state.sort]); // the data is in the order of the difference
  if (!keepPage) state.page = 0;
  summary();
  draw();
}

// Shows one page of the questions that passed the filters.
function draw() {
  const pages = Math.max(1, Math.ceil(shown.length / PAGE));
  state.page = Math.min(Math.max(0, state.page), pages - 1);
  const start = state.page * PAGE;
  const cards = shown.slice(start, start + PAGE).map(card);
  byId("list").replaceChildren(...(cards.length ? cards : [make("p", "No question matches the filters.", "meta")]));
  byId("page").textContent = `page ${count(state.page + 1)} of ${count(pages)}`;
  byId("previous").disabled = state.page === 0;
  byId("next").disabled = state.page === pages - 1;
  const changed = Object.entries(state).filter(([name, value]) => value !== DEFAULTS[name]);
  try {
    history.replaceState(null, "", `#${new URLSearchParams(changed)}`);
  } catch {
    // embedded pages may not change their address, and browsers limit how often it changes
  }
}

function turn(step) {
  const selected = document.activeElement.closest("article") !== null;
  state.page += step;
  draw();
  window.scrollTo(0, 0);
  if (selected) byId("list").firstElementChild.focus({ preventScroll: true });
}

function move(step) {
  const cards = [...byId("list").querySelectorAll("article")];
  const at = cards.indexOf(document.activeElement.closest("article"));
  const next = cards[at < 0 ? 0 : Math.min(Math.max(0, at + step), cards.length - 1)];
  if (next) {
    next.focus({ preventScroll: true });
    next.scrollIntoView({ block: "nearest" });
  }
}

function change(name, value) {
  state[name] = value;
  render();
}

function help() {
  if (!byId("help").open) byId("help").showModal();
}

let waiting = 0;
function search(event) {
  clearTimeout(waiting); // a page of many questions should not be filtered at every key
  waiting = setTimeout(() => change("search", event.target.value), 120);
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || byId("help").open) return;
  if (event.target.matches("input[type=search]")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  if (event.target.matches("select")) return;
  const scrolls = event.target.matches("pre, .scroll"); // keeps the arrows
  const keys = {
    j: () => move(1), k: () => move(-1),
    ...(scrolls ? {} : { ArrowDown: () => move(1), ArrowUp: () => move(-1) }),
    n: () => byId("next").disabled || turn(1), p: () => byId("previous").disabled || turn(-1),
    "/": () => byId("search").focus(), "?": help,
    r: () => change("score", state.score === "right" ? "" : "right"),
    w: () => change("score", state.score === "wrong" ? "" : "wrong"),
    d: () => change("differ", !state.differ),
  };
  if (/^[0-9]$/.test(event.key)) keys[event.key] = () => change("task", tasks[Number(event.key) - 1] ?? "");
  if (Object.hasOwn(keys, event.key)) {
    event.preventDefault();
    keys[event.key]();
  }
});

for (const id of SELECTS) byId(id).addEventListener("change", (event) => change(id, event.target.value));
byId("differ").addEventListener("change", (event) => change("differ", event.target.checked));
byId("search").addEventListener("input", search);
byId("filters").addEventListener("submit", (event) => event.preventDefault());
byId("previous").addEventListener("click", () => turn(-1));
byId("next").addEventListener("click", () => turn(1));
byId("help-button").addEventListener("click", help);

byId("title").textContent = `${data.runs.join(" and ")}: ${data.split} predictions`;
byId("notes").replaceChildren(...data.notes.map((note) => make("p", note)));
document.documentElement.style.setProperty("--side", `${data.side}px`);
byId("protocol").hidden = data.protocols.length === 0;
byId("protocols").textContent = data.protocols.map((protocol) => JSON.stringify(protocol, null, 1)).join("\n\n");

const differing = byId("differing");
const row = (tag, cells) => {
  const line = make("tr");
  line.append(...cells.map((cell) => make(tag, cell)));
  return line;
};
differing.hidden = data.differences.length === 0;
differing.open = data.differences.length <= 6;
differing.querySelector("summary").textContent = `Protocol items in which the runs differ: ${data.differences.length}`;
differing.querySelector("thead").append(row("th", ["item", ...data.runs]));
differing.querySelector("tbody").append(...data.differences.map((cells) => row("td", cells)));

function fromAddress() {
  Object.assign(state, DEFAULTS);
  for (const [name, value] of new URLSearchParams(location.hash.slice(1))) {
    if (!Object.hasOwn(DEFAULTS, name)) continue;
    state[name] = name === "page" ? Math.trunc(Number(value)) || 0 : name === "differ" ? value === "true" : value;
  }
  render(true);
}
window.addEventListener("hashchange", fromAddress);
fromAddress();
