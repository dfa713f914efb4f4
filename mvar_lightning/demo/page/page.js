// The page: a form, four panels, and a stream of events for each job (mvar_lightning/demo/app.py).
import { Painter } from "./paint.js";
import { Inside } from "./inside.js";

const $ = (id) => document.getElementById(id);
const form = $("form"), status = $("status"), go = $("go"), stop = $("stop");
const WORDS = { sample: "Generate", edit: "Paint", compare: "Compare", inside: "Show tokens" };
const state = { models: [], tab: "sample", job: null, last: null };

export const source = (image) => `data:image/png;base64,${image}`;
export const element = (name, values = {}, ...inside) => {
  const made = Object.assign(document.createElement(name), values);
  made.append(...inside);
  return made;
};
const part = (panel, name) => $(panel).querySelector(`[data-part=${name}]`);
const model = () => state.models.find((each) => each.name === form.model.value);

function say(words, wrong = false) {
  status.textContent = words;
  status.classList.toggle("wrong", wrong);
}

// Asking: one job of this visitor at a time, the others wait; a job's events come as lines. The model stays what it is
// until all are answered.

let open = 0, before = Promise.resolve();

function ask(name, content, onEvent) {
  open += 1;
  go.disabled = form.model.disabled = true;
  before = before.then(() => send(name, content, onEvent)).finally(() => {
    open -= 1;
    go.disabled = form.model.disabled = open > 0;
  });
  return before;
}

async function send(name, content, onEvent) {
  const job = [...crypto.getRandomValues(new Uint8Array(12))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  state.job = job;
  stop.disabled = false;
  say("Waiting.");
  try {
    const headers = { "Content-Type": "application/json" };
    const response = await fetch(`/api/${name}`, { method: "POST", headers, body: JSON.stringify({ ...content, job }) });
    let rest = "", ended = false;
    const decoder = new TextDecoder(), reader = response.body.getReader();
    for (;;) {
      const { value, done } = await reader.read();
      rest += decoder.decode(value, { stream: !done });
      const lines = rest.split("\n");
      rest = done ? "" : lines.pop();
      for (const line of lines) if (line.trim()) ended = heard(JSON.parse(line), onEvent) || ended;
      if (done) break;
    }
    if (!ended) say("The server ended the answer early.", true);
  } catch (error) {
    say(`The server does not answer (${error.message}).`, true);
  } finally {
    state.job = null;
    stop.disabled = true;
  }
}

function heard(event, onEvent) {
  if (event.event === "waiting") say(`Waiting: ${event.ahead} before this one.`);
  else if (event.event === "begun") say("Working.");
  else if (event.event === "scale") say(`Scale ${event.scale + 1} of ${model().scales.length}.`);
  else if (event.event === "error") say(event.message, true);
  else if (event.event === "stopped") say("Stopped.");
  else if (event.event === "done") say(/ made in /.test(status.textContent) ? status.textContent : "Done.");
  if (!["waiting", "begun", "error", "stopped", "done"].includes(event.event)) onEvent(event);
  return ["error", "stopped", "done"].includes(event.event);
}

function settings() {
  const number = (name) => {
    const value = form[name].valueAsNumber;
    if (Number.isNaN(value)) throw new Error(`${name.replace("_", "-")}: give a number`);
    return value;
  };
  const guided = form.guided.value.trim();
  if (guided && !/^\d+\s*-\s*\d+$/.test(guided)) throw new Error("guided scales: give the first and the last, like 1-2");
  return {
    model: form.model.value, label: form.label.value.trim() || "none", count: number("count"), seed: number("seed"),
    cfg: number("cfg"), guidance: form.guidance.value, guided_scales: guided ? guided.split("-").map(Number) : [],
    top_k: number("top_k"), top_p: number("top_p"), temperature: number("temperature"),
    more_smooth: form.more_smooth.checked, grow: form.grow.checked,
  };
}

// Showing images and their strip, in the panels that draw.

function show(panel, seed) {
  const images = part(panel, "images"), strip = part(panel, "strip"), sides = model().scales;
  images.replaceChildren();
  strip.replaceChildren();
  let table = null;
  const cell = (row, scale, image) => {
    if (!table) {
      const head = element("tr", {}, ...sides.map((shape) => element("th", { textContent: shape.join(" x ") })));
      table = element("table", {}, head);
      strip.append(table);
    }
    while (table.rows.length <= row + 1) {
      table.append(element("tr", {}, ...sides.map(() => element("td", {}, element("img", { alt: "" })))));
    }
    Object.assign(table.rows[row + 1].cells[scale].firstChild, { src: source(image), alt: `After ${sides[scale].join(" x ")}` });
  };
  const put = (index, image, caption) => {
    while (images.children.length <= index) images.append(element("figure", {}, element("img", { alt: "" }), element("figcaption")));
    const figure = images.children[index];
    figure.firstChild.src = source(image);
    figure.firstChild.alt = `Image ${index + 1}`;
    if (caption) figure.lastChild.replaceChildren(caption);
  };
  let finished = false, drawn = 0;
  return (event) => {
    if (event.event === "grown") {
      event.images.forEach((image, index) => {
        cell(index, event.scale, image);
        if (!finished) put(index, image);
      });
      images.dataset.shown = `${event.scale}:${(Date.now() / 1000 - drawn).toFixed(3)}`;
    } else if (event.event === "made") {
      finished = true;
      event.images.forEach((image, index) => {
        const save = element("a", { href: source(image), download: event.files[index], title: `Save ${event.files[index]}`, textContent: `seed ${seed}, image ${index + 1}` });
        put(index, image, save);
        cell(index, sides.length - 1, image);
      });
      part(panel, "command").textContent = event.command;
      part(panel, "python").textContent = event.python;
      state.last = { model: form.model.value, label: String(event.label), image: event.images[0], tokens: event.tokens[0] };
      state.seconds = event.seconds;
      say(`${event.images.length} made in ${event.seconds.toFixed(2)} s.`);
    }
    if (event.at) drawn = event.at;
  };
}

const painter = new Painter($("paint"), $("brush"));
const inside = new Inside({ ask, say, source, element, part, model, state });

// What each panel asks for.

const panels = {
  sample: () => {
    const asked = settings();
    return ask("sample", asked, show("sample", asked.seed));
  },
  edit: () => {
    if (!painter.image) throw new Error("picture: upload one, or take the last sample");
    const asked = { ...settings(), image: painter.png, mask: painter.mask(), outpaint: $("outpaint").checked };
    $("save-picture").href = source(asked.image);
    $("save-mask").href = source(asked.mask);
    const draw = show("edit", asked.seed);
    return ask("edit", asked, (event) => {
      draw(event);
      if (event.event !== "made") return;
      const before = element("figure", {}, element("img", { src: source(asked.image), alt: "Before" }), element("figcaption", { textContent: "before" }));
      part("edit", "images").prepend(before);
    });
  },
  compare: () => {
    const rivals = [...$("rivals").children].map((row) => [...row.querySelectorAll("select")].map((select) => select.value));
    part("compare", "sides").replaceChildren();
    const asked = { ...settings(), others: rivals.map((each) => each[0]), precisions: rivals.map((each) => each[1]) };
    return ask("compare", asked, (event) => event.event === "compared" && part("compare", "sides").append(side(event)));
  },
  inside: () => inside.show(),
};

function side(event) {
  const bytes = (value) => (value < 1e6 ? `${(value / 1e3).toFixed(1)} kB` : `${(value / 1e6).toFixed(1)} MB`);
  const rows = [
    ["seconds", event.seconds.toFixed(2)], ["key-value cache per image", bytes(event.cache_bytes)],
    ["weights", bytes(event.weight_bytes)], ["memory before, and more at its peak", `${bytes(event.begin_bytes)}, ${bytes(event.peak_bytes - event.begin_bytes)}`], ["attention", event.attention],
  ].map(([name, value]) => element("tr", {}, element("th", { textContent: name }), element("td", { textContent: value })));
  const images = event.images.map((image, index) => element("figure", {}, element("img", { src: source(image), alt: `Image ${index + 1} of ${event.name}` })));
  return element("article", {}, element("h2", { textContent: `${event.name}, ${event.precision}` }),
    element("div", { className: "images" }, ...images), element("table", {}, ...rows));
}

function addRival() {
  const names = state.models.map((each) => each.name), rows = $("rivals").children.length;
  const select = (label, values, chosen) => {
    const made = element("select", {}, ...values.map((value) => element("option", { value, textContent: value })));
    made.value = chosen;
    return element("label", { textContent: label }, made);
  };
  const other = names[(names.indexOf(form.model.value) + rows + 1) % names.length];
  const remove = element("button", { type: "button", className: "quiet", textContent: "Remove" });
  const row = element("div", {}, select("Beside it", names, other), select("Precision", state.precisions, names.length > 1 ? state.precision : state.precisions.at(2) ?? "bf16"), remove);
  remove.onclick = () => { row.remove(); $("add").disabled = false; };
  $("rivals").append(row);
  $("add").disabled = $("rivals").children.length >= 3;
}

// Uploads are cut to the model's size by the server, which also tells what is wrong with them.

async function upload(file) {
  const { name, size } = model();
  const response = await fetch(`/api/picture?model=${encodeURIComponent(name)}`, {
    method: "POST", headers: { "Content-Type": file.type.startsWith("image/") ? file.type : "image/unknown" }, body: file,
  });
  const event = await response.json();
  if (event.event === "error") throw new Error(event.message);
  if (model().name !== name) throw new Error("The model is another now; upload the picture once more.");
  say(`${file.name}: its middle at ${size.join(" x ")} pixels.`);
  return event.image;
}

const taking = (input, use) => async () => {
  if (!input.files.length) return;
  try {
    await use(await upload(input.files[0]));
  } catch (error) {
    say(error.message, true);
  }
  input.value = "";
};
$("edit-file").onchange = taking($("edit-file"), (image) => painter.open(image, model().size));
$("inside-file").onchange = taking($("inside-file"), (image) => inside.open({ image }));
const takeLast = (use) => () => (state.last?.model === form.model.value ? use(state.last) : say("Generate an image with this model first.", true));
$("edit-take").onclick = takeLast((last) => painter.open(last.image, model().size));
$("inside-take").onclick = takeLast((last) => inside.open({ tokens: last.tokens, label: last.label }));
$("clear").onclick = () => painter.clear();
$("half").onclick = () => painter.fill(0.5, 0, 0.5, 1);
$("add").onclick = addRival;
$("dice").onclick = () => { form.seed.value = crypto.getRandomValues(new Uint32Array(1))[0]; remember(); };
stop.onclick = () => state.job && fetch("/api/stop", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ job: state.job }) });

form.onsubmit = async (event) => {
  event.preventDefault();
  try {
    remember();
    await panels[state.tab]();
  } catch (error) {
    say(error.message, true);
  }
};

$("more").open = matchMedia("(min-width: 52rem)").matches;

// Tabs, the chosen model, and what a reload keeps.

function choose(tab) {
  state.tab = tab;
  for (const name of Object.keys(WORDS)) {
    $(name).hidden = name !== tab;
    $(`tab-${name}`).setAttribute("aria-selected", String(name === tab));
  }
  go.textContent = WORDS[tab];
  if (tab === "inside") inside.mask();
  if (tab === "compare" && !$("rivals").children.length) addRival();
  remember();
}
for (const name of Object.keys(WORDS)) $(`tab-${name}`).onclick = () => choose(name);

function described() {
  const it = model();
  $("about").textContent = `${it.size.join(" x ")} pixels, scales ${it.scales.map(([height, width]) => (height === width ? height : `${height}x${width}`)).join(" ")}, ${(it.parameters / 1e6).toFixed(1)}M parameters, ${it.attention}`;
  $("classes").replaceChildren(...Array.from({ length: it.num_classes }, (_, index) => element("option", { value: index, textContent: it.classes[index] ?? `class ${index}` })), element("option", { value: "none" }));
  const label = form.label.value.trim();
  if (!(label === "none" || it.classes.includes(label) || (/^\d+$/.test(label) && Number(label) < it.num_classes))) form.label.value = it.num_classes ? "0" : "none";
  form.grow.checked = it.grow;
  inside.reset();
  painter.forget();
}
form.model.onchange = () => { described(); if (state.tab === "inside") inside.mask(); remember(); };
form.oninput = remember;

function remember() {
  const values = Object.fromEntries([...form.elements].filter((each) => each.name).map((each) => [each.name, each.type === "checkbox" ? each.checked : each.value]));
  try { sessionStorage.setItem("form", JSON.stringify({ ...values, tab: state.tab })); } catch { /* a browser without it forgets */ }
}

function recall() {
  let values = {};
  try { values = JSON.parse(sessionStorage.getItem("form") ?? "{}"); } catch { /* as above */ }
  if (state.models.some((each) => each.name === values.model)) form.model.value = values.model;
  described();
  for (const [name, value] of Object.entries(values)) {
    if (name === "model" || !form[name]) continue;
    if (form[name].type === "checkbox") form[name].checked = value; else form[name].value = value;
  }
  return values.tab in WORDS ? values.tab : "sample";
}

try {
  Object.assign(state, await (await fetch("/api/models")).json());
  form.model.append(...state.models.map((each) => element("option", { value: each.name, textContent: each.name })));
  form.label.value = "3";
  const tab = recall();
  go.disabled = false;
  say("Ready.");
  choose(tab);  // which may ask for something
} catch (error) {
  say(`The server does not answer (${error.message}).`, true);
}
