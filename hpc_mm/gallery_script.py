"""What the page of an evaluation does in a browser. Texts of models and annotators only ever become text nodes."""

SCRIPT = r"""
"use strict";
const ROWS = 50; // that are shown at first, and more of on request
const data = JSON.parse(document.getElementById("data").textContent);
const images = new Map(Object.entries(data.images));
const labels = [...document.querySelectorAll(".examples th")].map((heading) => heading.textContent);
const inputs = { search: document.getElementById("search"), trial: document.getElementById("trial") };
const headings = [...document.querySelectorAll("[data-sort]")];
const count = document.getElementById("count");
const body = document.getElementById("rows");
const more = document.getElementById("more");
const inOrder = new Intl.Collator("en", { numeric: true }).compare; // question 9 stands before question 10
const examples = data.examples.map((example) => ({
  ...example,
  own: folded([example.id, example.trial, example.question, example.prediction, ...example.truth]),
  shots: folded(example.demonstrations.flatMap((shot) => [shot.question, shot.answer])),
}));
const trials = new Set(examples.map((example) => example.trial));
let state, words, found;

function folded(texts) {
  return texts.join("\n").toLowerCase();
}

function element(tag, name, text) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) {
    made.textContent = text;
    made.dir = "auto";
  }
  return made;
}

function picture(key) {
  if (!images.has(key)) return element("div", "missing", "no picture");
  const image = element("img");
  image.alt = `Image ${key}`;
  image.src = `data:image/jpeg;base64,${images.get(key)}`;
  return image;
}

function demonstrations(example) {
  const details = element("details");
  const many = example.demonstrations.length;
  details.append(element("summary", "", `${many} ${many === 1 ? "demonstration" : "demonstrations"}`));
  details.addEventListener("toggle", () => {
    for (const shot of example.demonstrations) {
      const box = element("div", "shot");
      const texts = element("div");
      if (shot.question) texts.append(element("p", "", shot.question));
      texts.append(element("p", "", shot.answer));
      if (shot.image) box.append(picture(shot.image)); // zero-shot prompts show texts alone
      box.append(texts);
      details.append(box);
    }
  }, { once: true });
  details.open = !words.every((word) => example.own.includes(word)); // then what was searched for stands in there
  return details;
}

function asked(example) {
  const parts = [];
  if (example.question) parts.push(element("p", "", example.question));
  if (example.demonstrations.length) parts.push(demonstrations(example));
  return parts;
}

function truth(example) {
  const times = new Map();
  for (const text of example.truth) times.set(text, (times.get(text) || 0) + 1);
  const list = element("ul");
  for (const [text, many] of times) {
    const item = element("li", "", text);
    if (many > 1) item.append(element("small", "", ` \u00d7 ${many}`));
    list.append(item);
  }
  return list;
}

function row(example) {
  const right = example.truth.includes(example.prediction) ? "right" : "";
  const cells = [
    ["picture", picture(example.image)],
    ["id", example.id],
    ["trial", example.trial],
    ["said", ...asked(example)],
    ["said", element("p", right, example.prediction || "(nothing)")],
    ["said", truth(example)],
    ["score", (100 * example.score).toFixed(1)],
  ];
  const made = element("tr");
  made.setAttribute("role", "row"); // a narrow page lays the table out in another way, which must stay a table
  cells.forEach(([name, ...parts], place) => {
    const cell = element("td", name);
    cell.setAttribute("role", "cell");
    if (name === "said") cell.dataset.label = labels[place];
    cell.append(...parts);
    made.append(cell);
  });
  return made;
}

function append() {
  const start = body.children.length;
  body.append(...found.slice(start, start + ROWS).map(row));
  const rest = found.length - body.children.length;
  more.hidden = rest === 0;
  more.textContent = `Show ${Math.min(rest, ROWS)} more of ${rest.toLocaleString("en")}`;
  return body.children[start];
}

function ordered(list) {
  if (!state.sort) return list;
  const sign = state.order === "desc" ? -1 : 1;
  const compare = state.sort === "score" ? (a, b) => a - b : inOrder;
  return [...list].sort((a, b) => sign * compare(a[state.sort], b[state.sort])); // stable: ties stay as they came
}

function render() {
  words = folded([state.search]).split(/\s+/).filter(Boolean);
  found = ordered(examples.filter((example) =>
    (!state.trial || example.trial === state.trial) &&
    words.every((word) => example.own.includes(word) || example.shots.includes(word))));
  const all = examples.length.toLocaleString("en");
  const few = found.length < examples.length ? `${found.length.toLocaleString("en")} of ` : "";
  count.textContent = `${few}${all} ${examples.length === 1 ? "example" : "examples"}`;
  for (const button of headings) {
    const sorted = button.dataset.sort === state.sort;
    const order = state.order === "desc" ? "descending" : "ascending";
    button.parentElement.setAttribute("aria-sort", sorted ? order : "none");
  }
  body.replaceChildren();
  append();
}

function read() { // what the address says: a view is a link
  const given = new URLSearchParams(location.hash.slice(1));
  const sort = given.get("sort");
  state = {
    sort: headings.some((button) => button.dataset.sort === sort) ? sort : "",
    order: given.get("order") === "desc" ? "desc" : "asc",
    search: given.get("search") || "",
    trial: given.get("trial") || "",
  };
  if (!trials.has(state.trial)) state.trial = "";
  inputs.search.value = state.search;
  inputs.trial.value = state.trial;
  render();
}

function write() {
  const said = Object.entries(state).filter(([name, value]) => value && (name !== "order" || state.sort));
  history.replaceState(null, "", `#${new URLSearchParams(said)}`);
}

function change(values) {
  Object.assign(state, values);
  render();
}

for (const button of headings) {
  button.addEventListener("click", () => {
    const again = button.dataset.sort === state.sort && state.order === "asc";
    change({ sort: button.dataset.sort, order: again ? "desc" : "asc" });
    write();
  });
}
inputs.search.addEventListener("input", () => change({ search: inputs.search.value }));
inputs.search.addEventListener("change", write); // not at each letter: browsers limit how often
inputs.trial.addEventListener("change", () => {
  change({ trial: inputs.trial.value });
  write();
});
more.addEventListener("click", () => {
  const first = append();
  first.tabIndex = -1;
  first.focus();
});
window.addEventListener("hashchange", read);
for (const trial of trials) inputs.trial.add(new Option(trial, trial));
read();
"""
