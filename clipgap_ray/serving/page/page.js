// The search page: no framework, no build. State is the query (words, a file, or a row of the index) and k.

const $ = (id) => document.getElementById(id);
const state = { query: null, neighbours: [], tests: null, splits: [], asked: 0 };

// --- talking to the service ------------------------------------------------------------------------------

async function call(path, body) {
  const headers = {};
  if ($("token").value) headers.authorization = `Bearer ${$("token").value}`;
  const form = body instanceof FormData;
  if (body && !form) headers["content-type"] = "application/json";
  const method = body ? "POST" : "GET";
  const response = await fetch(path, { method, headers, body: form ? body : body && JSON.stringify(body) });
  if (response.ok) return response;
  if (response.status === 401) {
    $("token-field").hidden = false;
    $("token-field").open = true;
  }
  const { error } = await response.json().catch(() => ({ error: { message: response.statusText } }));
  throw new Error([error.message, error.hint].filter(Boolean).join(". "));
}

const json = async (path, body) => (await call(path, body)).json();

function request(fields) {
  const index = $("index").value;
  const all = index ? { ...fields, index } : fields;
  if (!state.query.file) return { ...all, ...(state.query.uid ? { uid: state.query.uid } : { text: state.query.text }) };
  const form = new FormData();
  for (const [name, value] of Object.entries(all)) form.append(name, Array.isArray(value) ? JSON.stringify(value) : value);
  form.append("file", state.query.file);
  return form;
}

function thumbnail(rowId) {
  const index = $("index").value;
  return `/v1/thumbnails/${rowId}${index ? `?index=${encodeURIComponent(index)}` : ""}`;
}

// A browser sends no token with <img src>: with one, pictures are fetched.
async function show(image, address) {
  try {
    image.src = $("token").value ? URL.createObjectURL(await (await call(address)).blob()) : address;
  } catch {
    image.dispatchEvent(new Event("error"));
  }
}

// --- asking ------------------------------------------------------------------------------------------------

async function ask(query, remember = true) {
  state.query = query;
  const asked = ++state.asked; // an older answer that comes late is dropped
  if (remember && !query.file) {
    const words = query.uid ? { uid: query.uid, row: query.row } : { text: query.text };
    history.pushState(null, "", `#${new URLSearchParams(words)}`);
  }
  showQuery();
  say("Searching…");
  try {
    const found = await json("/v1/search", request({ k: Number($("k").value), filter: filter() }));
    if (asked !== state.asked) return;
    state.neighbours = found.results[0];
    showResults();
    say(`${state.neighbours.length} nearest of index ${found.index}` + (found.degraded
      ? `; ${found.shards - found.shards_ok} of ${found.shards} shards did not answer: some may be missing` : ""));
    await showCoverage(asked);
  } catch (error) {
    if (asked === state.asked) say(error.message, true);
  }
}

function say(text, isError = false) {
  $("status").textContent = text;
  $("status").classList.toggle("error", isError);
}

function showQuery() {
  const { file, uid, row, text } = state.query;
  $("query").hidden = false;
  $("query-words").textContent = file ? file.name : uid ? "This training image" : `“${text}”`;
  $("query-image").hidden = !(file || uid);
  URL.revokeObjectURL($("query-image").src); // of the file before; of an address it does nothing
  if (file) $("query-image").src = URL.createObjectURL(file);
  if (uid) show($("query-image"), thumbnail(row));
  $("text").value = text ?? "";
  $("zero-shot").hidden = !(file || uid);
  $("classes-found").replaceChildren();
}

// --- results -----------------------------------------------------------------------------------------------

const filter = () => [
  ...[...document.querySelectorAll("#filters input:checked")].map((box) => ({ split: box.value })),
  ...conditions($("where").value),
];

// `width>=512 label=cat caption="a red bird"`, as for `clipgap query --filter`; in quotes a number is a text.
function conditions(words) {
  const term = /(\w+)\s*(>=|<=|=)\s*(?:"([^"]*)"|(\S+))/g;
  const left = words.replace(term, "").trim();
  if (left) throw new Error(`Where “${left}”? Expected for example width>=512 label=cat`);
  const tests = { ">=": "at_least", "<=": "at_most", "=": "equals" };
  return [...words.matchAll(term)].map(([, column, sign, quoted, plain]) => ({
    column, [tests[sign]]: quoted ?? (Number.isNaN(Number(plain)) ? plain : Number(plain)),
  }));
}

const showResults = () => $("results").replaceChildren(...state.neighbours.map(card));

function card(row) {
  const item = $("result").content.cloneNode(true).firstElementChild;
  const [button, image] = [item.querySelector("button"), item.querySelector("img")];
  image.addEventListener("error", () => button.classList.add("none"));
  image.alt = row.caption || `row ${row.row_id_str}`;
  show(image, thumbnail(row.row_id_str));
  button.addEventListener("click", () => ask({ uid: row.uid, row: row.row_id_str }));
  item.querySelector(".similarity").textContent = row.similarity.toFixed(3);
  item.querySelector(".caption").textContent = row.caption || "no caption";
  item.querySelector(".kept").textContent = row.splits ? keptBy(row.splits) : "";
  return item;
}

const keptBy = (names) => (names.length ? `kept by ${names.join(", ")}` : "kept by no split");

// --- coverage ----------------------------------------------------------------------------------------------

async function showCoverage(asked) {
  $("coverage").hidden = true;
  // The histograms are of images: what words are alike to an image is on another scale.
  if (!state.tests?.length || state.query.text !== undefined) return;
  const { results: [own] } = await json("/v1/similarity", request({ k: 2 }));
  if (asked !== state.asked || own.similarity === null) return;
  $("coverage").hidden = false;
  $("tests").replaceChildren(...own.tests.map((test) => histogram(test, own.similarity)));
  const rows = own.splits.map((split) => [split.name, { true: "drops it", false: "keeps it" }[split.drops] ?? "cannot say"]);
  $("splits").replaceChildren(table(rows));
}

function histogram(test, similarity) {
  const info = state.tests.find((known) => known.name === test.test);
  const [low, high] = [info.edges[0], info.edges.at(-1)];
  const tallest = Math.max(1, ...info.train, ...(info.reference || []));
  const width = 100 / info.train.length;
  const place = Math.min(99.5, Math.max(0.5, (100 * (similarity - low)) / (high - low)));
  const bars = info.train.map((n, i) => {
    const height = (30 * n) / tallest;
    return `<rect class="train" x="${i * width}" y="${30 - height}" width="${width * 0.9}" height="${height}"/>`;
  });
  const line = (info.reference || []).map((n, i) => `${(i + 0.5) * width},${30 - (30 * n) / tallest}`).join(" ");
  const figure = document.createElement("figure");
  // Numbers only: nothing of the service's texts goes through innerHTML.
  figure.innerHTML = `<figcaption></figcaption><svg viewBox="0 0 100 30" preserveAspectRatio="none" aria-hidden="true">
    ${bars.join("")}<polyline class="reference" points="${line}"/><line class="here" x1="${place}" x2="${place}" y1="0" y2="30"/>
    </svg><div class="axis"><span>${low.toFixed(2)}</span><span>${high.toFixed(2)}</span></div>`;
  const share = test.percentile === null ? "?" : test.percentile.toFixed(0);
  const standing = `${test.test}: nearer to the training set than ${share} % of its ${info.rows}`;
  const margin = test.margin === null ? "" : test.margin > 0
    ? "; closer to one of its images than the reference is" : "; no closer to it than the reference";
  figure.firstElementChild.textContent = standing + margin;
  return figure;
}

function table(rows) {
  const element = document.createElement("table");
  for (const cells of rows) {
    const row = element.insertRow();
    for (const cell of cells) row.insertCell().textContent = cell;
  }
  return element;
}

// --- zero-shot ---------------------------------------------------------------------------------------------

async function classify() {
  try {
    const file = state.query.file || (await (await call(thumbnail(state.query.row))).blob());
    const form = new FormData();
    const classes = $("classes").value.split("\n").map((name) => name.trim()).filter(Boolean);
    for (const name of classes) form.append("classes", name);
    form.append("templates", $("template").value);
    form.append("top", Math.min(10, classes.length || 1));
    form.append("file", file, "image");
    const { results: [best] } = await json("/v1/zero-shot", form);
    $("classes-found").replaceChildren(...table(best.map((row) => [row.label, `${(100 * row.probability).toFixed(1)} %`])).rows);
    say("Classified.");
  } catch (error) {
    say(error.message, true);
  }
}

// --- start -------------------------------------------------------------------------------------------------

async function start() {
  try {
    const { indices } = await json("/v1/indices");
    $("index").replaceChildren(...indices.map(({ name }) => new Option(name, name)));
    $("index-field").hidden = indices.length < 2;
    const rows = indices.reduce((sum, index) => sum + index.rows, 0);
    $("about").textContent = `${rows.toLocaleString()} training images, ${indices[0].model}`;
    state.tests = (await json("/v1/tests")).tests;
    state.splits = (await json("/v1/splits")).splits;
    const legend = $("filters").querySelector("legend");
    $("filters").replaceChildren(legend, ...state.splits.map(({ name }) => checkbox(name)));
    $("filters").hidden = !state.splits.length;
    restore();
  } catch (error) {
    say(error.message, true);
  }
}

function checkbox(name) {
  const label = document.createElement("label");
  const box = Object.assign(document.createElement("input"), { type: "checkbox", value: name });
  box.addEventListener("change", () => state.query && ask(state.query, false));
  label.append(box, ` ${name}`);
  return label;
}

function restore() {
  const words = new URLSearchParams(location.hash.slice(1));
  if (words.get("uid")) ask({ uid: words.get("uid"), row: words.get("row") }, false);
  else if (words.get("text")) ask({ text: words.get("text") }, false);
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if ($("text").value.trim()) ask({ text: $("text").value.trim() });
});
$("file").addEventListener("change", () => $("file").files[0] && ask({ file: $("file").files[0] }));
document.querySelector(".file").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" && event.key !== " ") return;
  event.preventDefault();
  $("file").click();
});
$("k").addEventListener("input", () => ($("count").value = $("k").value));
$("k").addEventListener("change", () => state.query && ask(state.query, false));
$("index").addEventListener("change", () => state.query && ask(state.query, false));
$("where").addEventListener("change", () => state.query && ask(state.query, false));
$("token").addEventListener("change", start);
$("classify").addEventListener("click", classify);
addEventListener("popstate", restore);
addEventListener("keydown", (event) => {
  if (event.key !== "/" || /INPUT|TEXTAREA/.test(document.activeElement.tagName)) return;
  event.preventDefault();
  $("text").focus();
});
for (const name of ["dragover", "dragleave", "drop"]) {
  addEventListener(name, (event) => {
    event.preventDefault();
    document.body.classList.toggle("dropping", name === "dragover");
    if (name === "drop" && event.dataTransfer.files[0]) ask({ file: event.dataTransfer.files[0] });
  });
}
start();
