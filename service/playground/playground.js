"use strict";

// All state is in the form and in the page's URL, which therefore is a link to it. Every URL is
// relative, so that the page also works behind a prefix.

const $ = (id) => document.getElementById(id);
const form = $("form");
let models = [];
let shown = { images: [], seed: "", query: new URLSearchParams() }; // in the grid
let open = 0; // the position of the image in the viewer
let request = null; // an AbortController
let countdown = 0;

const make = (tag, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};
const model = () => models.find((each) => each.name === $("model").value);
const mode = () => form.elements.mode.value;
const percent = (share) => `${Math.round(100 * share)} %`;

// The form ------------------------------------------------------------------------------------

function fillClasses() {
  const { classes } = model();
  $("chips").replaceChildren(
    ...classes.map((name) =>
      make("label", {}, make("input", { type: "checkbox", name: "label", value: name }), make("span", { textContent: name })),
    ),
  );
  for (const id of ["from", "to", "subject"]) {
    $(id).replaceChildren(...classes.map((name) => make("option", { value: name, textContent: name })));
  }
  $("to").selectedIndex = Math.min(1, classes.length - 1);
}

function showMode() {
  for (const part of form.querySelectorAll("[data-mode]")) {
    part.hidden = !part.dataset.mode.split(" ").includes(mode());
  }
  form.querySelector("label[for=n]").textContent = mode() === "mix" ? "Images" : "Images per class";
  form.querySelector("label[for=seed]").textContent = mode() === "interpolate" ? "From seed" : "Seed";
}

function showValues() {
  $("share-value").textContent = percent($("share").value);
  $("truncation-value").textContent = percent($("truncation").value);
}

/** Return the query of /generate that the form describes; null if it is incomplete. */
function read() {
  const query = new URLSearchParams({ model: $("model").value });
  if (mode() === "mix") {
    const share = Number($("share").value);
    const weights = new Map([[$("from").value, 1 - share]]);
    weights.set($("to").value, (weights.get($("to").value) ?? 0) + share);
    if ($("from").value === $("to").value) weights.set($("to").value, 1);
    for (const [label, weight] of weights) query.append("mix", `${label}:${+weight.toFixed(4)}`);
    query.set("n", $("n").value);
  } else if (mode() === "interpolate") {
    query.set("label", $("subject").value);
    query.set("to_seed", $("to-seed").value);
    query.set("steps", $("steps").value);
  } else {
    const labels = [...form.querySelectorAll("input[name=label]:checked")];
    if (!labels.length) {
      complain("Pick at least one class.");
      $("chips").querySelector("input").focus();
      return null;
    }
    for (const { value } of labels) query.append("label", value);
    query.set("n", $("n").value);
  }
  if ($("seed").value) query.set("seed", $("seed").value);
  if (Number($("truncation").value) < 1) query.set("truncation", $("truncation").value);
  return query;
}

/** Return the name of the class of a label: a name or, if no class has that name, an index. */
function className(label) {
  const { classes } = model();
  return classes.includes(label) || !/^[0-9]{1,6}$/.test(label) ? label : classes[Number(label)];
}

/** Return the label and the weight of a part of a mixture; a name may contain a colon. */
const splitPart = (part) => [className(part.slice(0, part.lastIndexOf(":"))), part.slice(part.lastIndexOf(":") + 1)];

/** Fill the form from a query of /generate. */
function write(query) {
  const name = query.get("model");
  if (models.some((each) => each.name === name)) $("model").value = name;
  fillClasses();
  showQuality();
  const mix = query.getAll("mix").map(splitPart);
  form.elements.mode.value = mix.length ? "mix" : query.has("to_seed") ? "interpolate" : "classes";
  if (mix.length) {
    const [[from], [to, share]] = [mix[0], mix[1] ?? [mix[0][0], 0]];
    $("from").value = from;
    $("to").value = to;
    $("share").value = share;
  } else if (query.has("to_seed")) {
    $("subject").value = className(query.get("label"));
    $("to-seed").value = query.get("to_seed");
    $("steps").value = query.get("steps") ?? 12;
  }
  const labels = mode() === "classes" ? query.getAll("label").map(className) : [];
  for (const chip of form.querySelectorAll("input[name=label]")) {
    chip.checked = labels.length ? labels.includes(chip.value) : true;
  }
  $("n").value = query.get("n") ?? 2;
  $("seed").value = query.get("seed") ?? "";
  $("truncation").value = query.get("truncation") ?? 1;
  showMode();
  showValues();
}

// Requests ------------------------------------------------------------------------------------

function complain(text, retryAfterS = 0) {
  clearInterval(countdown);
  const say = () => {
    $("problem").textContent = retryAfterS > 0 ? `${text} Retry in ${retryAfterS} s.` : text;
    $("generate").disabled = retryAfterS > 0;
  };
  $("problem").hidden = !text;
  if (text && retryAfterS > 0) {
    countdown = setInterval(() => {
      retryAfterS -= 1;
      if (retryAfterS <= 0) {
        clearInterval(countdown);
        text += " You can retry now.";
      }
      say();
    }, 1000);
  }
  say();
}

/** Return a response of the service, or throw an Error whose message is for the user. */
async function ask(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The service cannot be reached. Is it running, and are you online?");
  }
  if (answer.ok) return answer;
  const problem = await answer.json().catch(() => ({}));
  const retryAfterS = answer.status === 429 ? Number(answer.headers.get("Retry-After") ?? 1) : 0;
  // The detail of a 429 states the seconds too, but does not count them down.
  const text = retryAfterS && problem.title ? `${problem.title}.` : problem.detail;
  throw Object.assign(new Error(text ?? `The service responded with status ${answer.status}.`), { retryAfterS });
}

async function generate(query) {
  request?.abort();
  const mine = (request = new AbortController());
  complain("");
  $("grid").classList.add("old");
  $("status").textContent = "Generating…";
  const began = performance.now();
  try {
    const answer = await ask(`generate?${query}&format=json`, { method: "POST", signal: mine.signal });
    const { images, sha256 } = await answer.json();
    const took = performance.now() - began;
    // A seed may exceed the precision of a JavaScript number, so it is read from its header.
    shown = { images, sha256, query, seed: answer.headers.get("X-Seed") };
    showImages();
    showTiming(answer.headers.get("Server-Timing") ?? "", took);
  } catch (error) {
    if (error.name === "AbortError") return;
    $("status").textContent = "";
    complain(error.message, error.retryAfterS);
  } finally {
    if (request === mine) $("grid").classList.remove("old");
  }
}

// The images ----------------------------------------------------------------------------------

const source = (image) => `data:image/png;base64,${image.png}`;

function describe(image) {
  const { mix, at } = image.recipe;
  const what = mix
    ? Object.entries(mix).map(([name, weight]) => `${percent(weight)} ${name}`).join(", ")
    : image.class_name;
  return at === undefined ? `${what}, number ${image.index}` : `${what}, ${percent(at)} of the way`;
}

function showImages() {
  const { images, seed } = shown;
  $("grid").replaceChildren(
    ...images.map((image, place) => {
      const button = make("button", { type: "button" }, make("img", { src: source(image), alt: describe(image) }));
      button.addEventListener("click", () => view(place));
      return button;
    }),
  );
  $("status").textContent = `${images.length} ${images.length === 1 ? "image" : "images"} of seed ${seed}`;
  $("keep").hidden = $("seed").value === seed;
}

function showTiming(header, took) {
  const ms = Object.fromEntries([...header.matchAll(/(\w+);dur=([\d.]+)/g)].map(([, name, dur]) => [name, Number(dur)]));
  const all = Math.max(took, 0.001);
  for (const stage of ["queue", "forward", "encode"]) {
    $(`ms-${stage}`).textContent = `${(ms[stage] ?? 0).toFixed(1)} ms`;
    $(`bar-${stage}`).style.width = `${Math.min(100, (100 * (ms[stage] ?? 0)) / all)}%`;
  }
  $("ms-total").textContent = `${took.toFixed(1)} ms`;
  $("timing").hidden = false;
}

/** Return a URL that always gives this image. */
function permanent(image) {
  const { model: name, mix, at, truncation } = image.recipe;
  const query = new URLSearchParams({ model: `${name}@sha256:${shown.sha256}` });
  if (mix) for (const [each, weight] of Object.entries(mix)) query.append("mix", `${each}:${weight}`);
  else query.set("label", image.class_name);
  query.set("seed", shown.seed);
  query.set("index", image.index);
  if (at !== undefined) {
    query.set("to_seed", shown.query.get("to_seed"));
    query.set("at", at);
  }
  if (truncation !== undefined) query.set("truncation", truncation);
  // Readable: neither character has a meaning in a query.
  return new URL(`generate?${query}`, document.baseURI).href.replaceAll("%40", "@").replaceAll("%3A", ":");
}

function view(place) {
  open = place;
  const image = shown.images[place];
  const link = permanent(image);
  $("viewer-title").textContent = describe(image);
  $("large").src = source(image);
  $("large").alt = describe(image);
  const recipe = { ...image.recipe, seed: shown.seed };
  if ("to_seed" in recipe) recipe.to_seed = shown.query.get("to_seed");
  $("recipe").replaceChildren(
    ...Object.entries(recipe).flatMap(([name, value]) => [
      make("dt", { textContent: name }),
      make("dd", { textContent: typeof value === "object" ? JSON.stringify(value) : value }),
    ]),
  );
  $("link").href = link;
  $("link").textContent = link;
  $("curl").textContent = `curl '${link}' -o image.png`;
  $("copied").textContent = "";
  $("previous").disabled = place === 0;
  $("next").disabled = place === shown.images.length - 1;
  if (!$("viewer").open) $("viewer").showModal();
}

function turn(by) {
  const place = open + by;
  if (place < 0 || place >= shown.images.length) return;
  view(place);
  // A disabled button loses the focus.
  if ($("previous").disabled && document.activeElement === document.body) $("next").focus();
  if ($("next").disabled && document.activeElement === document.body) $("previous").focus();
}

async function copy(id) {
  const text = $(id).textContent;
  try {
    await navigator.clipboard.writeText(text);
    $("copied").textContent = "Copied.";
  } catch {
    getSelection().selectAllChildren($(id)); // without HTTPS
    $("copied").textContent = "Selected; copy it with your keyboard.";
  }
}

// The certificate, or the estimate of the run that trained the model ---------------------------

const METRICS = [
  ["Recognised as their class (GAN-test)", "gan_test", (value) => `${(100 * value).toFixed(1)} %`],
  ["Precision", "precision", (value) => value.toFixed(3)],
  ["Recall", "recall", (value) => value.toFixed(3)],
  ["Density", "density", (value) => value.toFixed(3)],
  ["Coverage", "coverage", (value) => value.toFixed(3)],
  ["Fréchet distance", "frechet_distance", (value) => value.toFixed(3)],
];

const row = (...cells) =>
  make("tr", {}, make("th", { scope: "row", textContent: cells[0] }), ...cells.slice(1).map((text) => make("td", { textContent: text })));

function showQuality() {
  const { certificate, quick_metrics: estimate, classes, name, images_seen: seen, training } = model();
  $("certificate").hidden = !certificate && !estimate;
  if (!certificate && !estimate) return;
  const trained = `${name} has seen ${seen.toLocaleString("en")} real images of ${(certificate ?? training).dataset}`;
  const count = (certificate ?? estimate).images.toLocaleString("en");
  $("about").textContent = certificate
    ? `${trained}; ${count} generated images were evaluated${certificate.brief ? ", fewer than for a full certificate" : ""}.`
    : `${trained}. Estimated during training, from ${count} generated images against training images; not a certificate.`;
  const generated = certificate?.generated ?? estimate;
  const rows = METRICS.filter(([, key]) => key in generated).map(([words, key, format]) =>
    row(words, format(generated[key]), ...(certificate ? [format(certificate.real[key])] : [])),
  );
  if (certificate?.gan_train) {
    const { accuracies, real } = certificate.gan_train;
    const mean = accuracies.reduce((sum, each) => sum + each, 0) / accuracies.length;
    rows.unshift(row("Classifier trained on generated images only (GAN-train)", `${(100 * mean).toFixed(1)} %`, `${(100 * real).toFixed(1)} %`));
  }
  $("real-images").hidden = $("recognised").hidden = !certificate;
  $("metrics").tBodies[0].replaceChildren(...rows);
  $("per-class").tBodies[0].replaceChildren(
    ...classes.map((each, label) => {
      const recognised = generated.gan_test_per_class?.[label];
      const line = certificate ? row(each, recognised == null ? "" : `${(100 * recognised).toFixed(1)} %`) : row(each);
      line.append(make("td", {}, make("div", { className: "samples" })));
      return line;
    }),
  );
  showSamples(model());
}

async function showSamples({ name, sha256, classes, ambiguous_labels: ambiguous }) {
  const columns = Math.max(1, Math.min(12, Math.floor(1024 / classes.length)));
  const query = new URLSearchParams({ model: `${name}@sha256:${sha256}`, n: columns, seed: 1, format: "json" });
  // Names of many classes would exceed the longest URL that the service accepts.
  classes.forEach((each, index) => query.append("label", ambiguous.includes(`${index}`) ? each : index));
  try {
    const { images } = await (await ask(`generate?${query}`)).json();
    if (model().name !== name) return;
    const rows = document.querySelectorAll("#per-class .samples");
    for (const image of images) {
      rows[image.label].append(make("img", { src: source(image), alt: `${image.class_name}, sample ${image.index + 1}` }));
    }
  } catch {
    // The table is useful without them; the next request for images reports the error.
  }
}

// Events ------------------------------------------------------------------------------------

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const query = read();
  if (query === null) return;
  if (`?${query}` !== location.search) history.pushState(null, "", `?${query}`);
  generate(query);
});
form.addEventListener("input", showValues);
for (const radio of form.elements.mode) radio.addEventListener("change", showMode);
$("model").addEventListener("change", () => {
  fillClasses();
  for (const chip of form.querySelectorAll("input[name=label]")) chip.checked = true;
  showQuality();
});
$("keep").addEventListener("click", () => {
  $("seed").value = shown.seed;
  $("keep").hidden = true;
  $("seed").focus();
});
$("close").addEventListener("click", () => $("viewer").close());
$("viewer").addEventListener("close", () => $("grid").children[open]?.focus());
$("viewer").addEventListener("click", (event) => {
  if (event.target === $("viewer")) $("viewer").close();
});
$("viewer").addEventListener("keydown", (event) => {
  if (event.key === "ArrowLeft") turn(-1);
  if (event.key === "ArrowRight") turn(1);
});
$("previous").addEventListener("click", () => turn(-1));
$("next").addEventListener("click", () => turn(1));
for (const button of document.querySelectorAll("[data-copy]")) {
  button.addEventListener("click", () => copy(button.dataset.copy));
}

function restore() {
  write(new URLSearchParams(location.search));
  const query = read();
  if (query !== null) generate(query);
}
addEventListener("popstate", restore);

async function begin() {
  try {
    models = (await (await ask("models")).json()).models;
  } catch (error) {
    complain(error.message);
    $("generate").disabled = true;
    return;
  }
  $("model").replaceChildren(...models.map(({ name }) => make("option", { value: name, textContent: name })));
  $("model").value = models.find((each) => each.default).name;
  restore();
}
begin();
