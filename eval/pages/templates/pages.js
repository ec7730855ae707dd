"use strict";
// Everything that is shown comes from data files that hand themselves over with pages.take(key, value). Text is set as text.
const catalogue = JSON.parse(document.getElementById("catalogue").textContent);
const shape = catalogue.shape, contexts = shape.top + shape.samples;
const by = (id) => document.getElementById(id);

// --- data ---

const TYPES = {
  uint8: Uint8Array, int8: Int8Array, uint16: Uint16Array, int32: Int32Array, float32: Float32Array,
};
const waiting = new Map(), loaded = new Map(), KEPT = 300;
const pages = {take: (key, value) => waiting.get(key)?.(value)};

function column([type, text]) {
  const letters = atob(text), bytes = new Uint8Array(letters.length);
  for (let i = 0; i < letters.length; i++) bytes[i] = letters.charCodeAt(i);
  return new TYPES[type](bytes.buffer);
}

function load(key) {
  let promise = loaded.get(key);
  loaded.delete(key);
  if (!promise) {
    promise = new Promise((resolve, reject) => {
      const script = document.createElement("script");
      const path = key.split("/").map(encodeURIComponent).join("/") + ".js";
      const failed = () => { waiting.delete(key); loaded.delete(key); reject(Error(`cannot load ${path}: it belongs beside this page`)); };
      waiting.set(key, (value) => {
        waiting.delete(key);
        resolve(Array.isArray(value) ? value : Object.fromEntries(Object.entries(value).map(([name, c]) => [name, column(c)])));
      });
      script.onerror = failed;
      script.onload = () => { script.remove(); if (waiting.has(key)) failed(); };
      script.src = path;
      document.head.append(script);
    });
  }
  loaded.set(key, promise);  // the last used is the last in order
  if (loaded.size > KEPT) loaded.delete(loaded.keys().next().value);
  return promise;
}

const pad = (n) => String(n).padStart(3, "0");

// --- what is shown as what ---

function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in node && name !== "style") node[name] = value; else node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

// What would not be seen, or would change how its surroundings are seen, is spelt out.
function visible(text) {
  return text.replace(/[\p{Cc}\p{Cf}\p{Co}\p{Cs}\p{Zl}\p{Zp}]/gu, (c) =>
    c === "\n" ? "↵" : c === "\t" ? "⇥" : `⟨${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);
}
const spelt = (id) => sae.vocabulary[id] ?? `#${id}`;
const shown = (id) => visible(spelt(id));
const alone = (id) => shown(id).replace(/^ +| +$/g, (spaces) => "␣".repeat(spaces.length)) || "∅";

function format(x) {
  if (x === 0) return "0";
  const size = Math.abs(x);
  return size >= 1e5 || size < 1e-3 ? x.toExponential(1) : x.toPrecision(3).replace(/(\.\d*?)0+$/, "$1").replace(/\.$/, "");
}
const whole = (n) => n.toLocaleString("en");
const lambda = (x) => String(Number(Number(x).toPrecision(3)));

// --- which SAE, which feature ---

const runs = [...new Set(catalogue.saes.map((s) => `${s.name}\n${s.snapshot}`))];
const runOf = (s) => `${s.name}\n${s.snapshot}`;
let sae = null;       // facts, index columns, vocabulary
let feature = null;   // its number
let order = [];       // the features of the list
let asked = 0;        // what is asked for last is what is shown

function address(s, i = null) {
  return "#" + [s.name, s.snapshot, s.layer, ...(i === null ? [] : [i])].map(encodeURIComponent).join("/");
}

function parse() {
  let parts;
  try { parts = location.hash.slice(1).split("/").map(decodeURIComponent); } catch { parts = []; }
  const wanted = catalogue.saes.find((s) => s.name === parts[0] && s.snapshot === parts[1] && String(s.layer) === parts[2]);
  const number = /^\d+$/.test(parts[3] ?? "") ? Number(parts[3]) : null;
  return {facts: wanted ?? catalogue.saes[0], number: wanted ? number : null};
}

async function route() {
  const turn = ++asked, {facts, number} = parse();
  try {
    if (sae?.facts !== facts) {
      const [index, vocabulary] = await Promise.all([
        load(`${facts.name}/${facts.folder}/index`), load(`${facts.text}/vocabulary`)]);
      if (turn !== asked) return;
      sae = {facts, vocabulary, ...index};
      choose();
      refresh();
    }
    feature = number !== null && number < sae.facts.features ? number : null;
    document.body.classList.toggle("showing", feature !== null);
    mark();
    if (feature === null) {
      overview();
      document.title = "SAE features";
    } else {
      await show(turn);
    }
  } catch (error) {
    if (turn === asked) by("feature").replaceChildren(el("p", {className: "error"}, error.message));
    document.body.classList.add("showing");
  }
}

function choose() {
  const {facts} = sae;
  by("run").replaceChildren(...runs.map((r) => el("option", {value: r, selected: r === runOf(facts)}, r.replace(/\nfinal$/, "").replace("\n", " · "))));
  const layers = catalogue.saes.filter((s) => runOf(s) === runOf(facts));
  by("layer").replaceChildren(...layers.map((s) => el("option", {value: s.layer, selected: s === facts}, String(s.layer))));
  by("about").textContent = `${whole(facts.features)} features on ${whole(facts.tokens)} held-out tokens · ` +
    (facts.trained_tokens ? `trained on ${whole(facts.trained_tokens)} tokens` : "trained elsewhere") + (facts.lambda ? `, λ ${lambda(facts.lambda)}` : "");
}

// A site is the number of a layer, or a number and a hook: 12 or "12.mlp_out".
const hookOf = (site) => String(site).replace(/^\d+/, "");
const apart = (a, b) => Math.abs(Number.parseInt(a) - Number.parseInt(b)) + (hookOf(a) === hookOf(b) ? 0 : .5);

// The same feature number is another feature elsewhere, so a jump leads to the list.
function jump(run, layer) {
  const there = catalogue.saes.filter((s) => runOf(s) === run);
  if (!there.length) return;
  const nearest = there.reduce((a, b) => apart(b.layer, layer) < apart(a.layer, layer) ? b : a);
  location.hash = address(nearest);
}

function step(list, now, by) {
  const at = list.indexOf(now) + by;
  return at >= 0 && at < list.length ? list[at] : null;
}

// --- the list ---

function number(field, otherwise) {
  const text = by(field).value.trim(), value = text === "" ? otherwise : Number(text.replace("%", "")) / (text.endsWith("%") ? 100 : 1);
  by(field).setAttribute("aria-invalid", String(Number.isNaN(value)));
  return Number.isNaN(value) ? otherwise : value;
}

function refresh() {
  const n = sae.facts.features, query = by("search").value.trim();
  const least = number("least", 0), most = number("most", 1), density = (i) => sae.count[i] / sae.facts.tokens;
  const terms = termsOf(query, sae.vocabulary), matches = matchesOf(terms, sae[by("where").value], n);
  const starred = by("sort").value === "starred";
  order = [];
  for (let i = 0; i < n; i++) if (density(i) >= least && density(i) <= most && matches[i] && !(starred && !noteOf(i))) order.push(i);
  const keys = {
    rarest: (i) => sae.count[i], densest: (i) => -sae.count[i], maximum: (i) => -sae.maximum[i], mean: (i) => -sae.mean[i],
    matches: (i) => -matches[i], number: (i) => i, interest: (i) => -interest(i), starred: (i) => i,
  };
  const value = Float64Array.from({length: n}, (_, i) => matches[i] ? keys[by("sort").value](i) : 0);
  order.sort((a, b) => value[a] - value[b] || a - b);
  by("everywhere").hidden = !query;
  by("found").textContent = `${whole(order.length)} of ${whole(n)} features` + (terms.some((tokens) => !tokens.size) ? " · no such token" : "");
  by("list").scrollTop = 0;
  draw();
}

function rowHeight() { return matchMedia("(max-width: 760px)").matches ? 40 : 32; }

// Only the rows that are seen exist.
function draw() {
  const list = by("list"), height = rowHeight(), first = Math.max(0, Math.floor(list.scrollTop / height) - 8);
  const last = Math.min(order.length, first + Math.ceil(list.clientHeight / height) + 16);
  by("spacer").style.height = `${order.length * height}px`;
  by("spacer").replaceChildren(...order.slice(first, last).map((i, k) => row(i, (first + k) * height)));
}

function row(i, top) {
  const line = el("a", {href: address(sae.facts, i), className: "row"},
    el("span", {className: "number"}, String(i)),
    el("span", {className: "density"}, sae.count[i] ? format(sae.count[i] / sae.facts.tokens) : "never"),
    el("span", {className: "words"}, noteOf(i) ? `★ ${noteOf(i).name} ` : "", peaks(i, 4)));
  line.style.top = `${top}px`;
  if (i === feature) line.setAttribute("aria-current", "true");
  return line;
}

// The tokens on which it peaks, the most frequent first.
function peaks(i, most) {
  const seen = new Map();
  for (const t of sae.peaks.subarray(i * shape.top, (i + 1) * shape.top)) if (t) seen.set(t, (seen.get(t) ?? 0) + 1);
  return [...seen].sort((a, b) => b[1] - a[1]).slice(0, most).map(([t]) => alone(t - 1)).join(" · ");
}

function mark() {
  const at = order.indexOf(feature), list = by("list"), height = rowHeight();
  if (at >= 0) {
    if (at * height < list.scrollTop) list.scrollTop = at * height;
    if ((at + 1) * height > list.scrollTop + list.clientHeight) list.scrollTop = (at + 1) * height - list.clientHeight;
  }
  draw();
}

// From what is asked for, which may not be shown yet: keys are faster than files.
function move(by) {
  if (!order.length) return;
  const at = order.indexOf(parse().number), next = at < 0 ? 0 : Math.min(order.length - 1, Math.max(0, at + by));
  location.hash = address(sae.facts, order[next]);
}

// --- one feature ---

async function show(turn) {
  const {facts} = sae, i = feature, k = i % shape.chunk;
  const chunk = await load(`${facts.name}/${facts.folder}/${pad(Math.floor(i / shape.chunk))}`);
  const rows = chunk.row.subarray(k * contexts, (k + 1) * contexts);
  const size = catalogue.texts[facts.text], needed = new Set();
  for (const row of rows) if (row >= 0) needed.add(Math.floor(row / size));
  const text = new Map(await Promise.all([...needed].map(async (n) => [n, (await load(`${facts.text}/${pad(n)}`)).tokens])));
  const near = await elsewhere(facts, i);
  if (turn !== asked) return;
  const all = Array.from(rows, (row, n) => row < 0 ? null : context(chunk, i, k * contexts + n, row, text.get(Math.floor(row / size)), size));
  const top = all.slice(0, shape.top).filter(Boolean), sample = all.slice(shape.top).filter(Boolean);
  document.title = `feature ${i} · layer ${facts.layer} · ${facts.name}`;
  by("token").textContent = "";
  by("feature").replaceChildren(
    el("a", {className: "back", href: address(facts)}, "← all features"),
    el("h2", {}, `Feature ${i}`), noteFields(i),
    el("p", {className: "facts"}, `layer ${facts.of ?? facts.layer} · ${facts.name} · ` + (sae.count[i]
      ? `fires on ${whole(sae.count[i])} of ${whole(facts.tokens)} tokens (density ${format(sae.count[i] / facts.tokens)}), ` +
        `mean ${format(sae.mean[i])} where it does, at most ${format(sae.maximum[i])}`
      : `never fires on the ${whole(facts.tokens)} held-out tokens`)),
    el("div", {className: "columns"},
      el("section", {}, el("h3", {}, `Promoted tokens${chunk.layer_share ? ` at layer ${facts.outputs.at(-1)}` : ""}`), words(i, k, "promoted", chunk), el("h3", {}, "Suppressed tokens"), words(i, k, "suppressed", chunk)),
      sae.count[i] ? el("section", {}, el("h3", {}, "Activations"), histogram(chunk.bins.subarray(k * shape.bins, (k + 1) * shape.bins), 0, chunk.bin_width[k], "activation"),
        ...logits(chunk, k)) : null),
    ...layers(chunk, k, facts), el("div", {className: "columns"},
      el("section", {}, el("h3", {}, "Nearest by decoder cosine"), neighbours(chunk, k, "similar", (n) => format(chunk.similar_cosine[n]))),
      el("section", {}, el("h3", {}, "Firing together"), neighbours(chunk, k, "together",
        (n) => `${format(chunk.together_jaccard[n])} (${whole(chunk.together_count[n])})`),
      el("p", {className: "note"}, `Jaccard index (tokens with both), on ${whole(facts.together_tokens)} random tokens`)),
      near.length ? el("section", {}, el("h3", {}, "Nearest in other SAEs"), el("ul", {className: "chips elsewhere"}, ...near)) : null),
    ...(top.length ? [el("h3", {}, "Top contexts"), el("div", {id: "top"}, ...top)] : []),
    ...fifths(sample));
  by("feature").scrollTop = 0;
}

function fifths(sample) {
  if (!sample.length) return [];
  const names = ["Highest fifth", "Second fifth", "Middle fifth", "Fourth fifth", "Lowest fifth"];
  const parts = names.map((name, j) => [name, sample.slice(Math.ceil(j * sample.length / 5), Math.ceil((j + 1) * sample.length / 5))]);
  return [el("h3", {}, "Samples by quantile"),
    el("p", {className: "note"}, `${sample.length === 1 ? "The only token" : `${sample.length} tokens`} on which it fires` +
      (sample.length < shape.samples ? "" : ", drawn at random") + ", in the order of activation"),
    ...parts.filter(([, part]) => part.length).flatMap(([name, part]) => [el("h4", {}, name), el("div", {className: "fifth"}, ...part)])];
}

function words(i, k, name, chunk) {
  const items = Array.from({length: shape.words}, (_, n) => {
    const logit = chunk[`${name}_logit`][k * shape.words + n], id = sae[name][i * shape.words + n] - 1;
    return el("li", {title: `token #${id}`}, el("span", {className: "t"}, alone(id)), " ", el("small", {}, (logit > 0 ? "+" : "") + format(logit)));
  });
  return el("ul", {className: `chips ${name === "promoted" ? "up" : "down"}`}, ...items);
}

function neighbours(chunk, k, name, note) {
  const width = chunk[name].length / chunk.bin_width.length, items = [];
  for (let n = k * width; n < (k + 1) * width; n++) {
    if (chunk[name][n] < 0) continue;
    const other = chunk[name][n], says = peaks(other, 1);
    const link = el("a", {href: address(sae.facts, other), title: peaks(other, 4)}, String(other));
    items.push(el("li", {}, link, ` ${says} `, el("small", {}, note(n))));
  }
  return items.length ? el("ul", {className: `chips ${name}`}, ...items) : el("p", {className: "note"}, "none");
}

// Counts by bins of one width, the first of which begins at `from`; of `what`, tokens on a logarithmic axis.
function histogram(bins, from, width, what) {
  const used = bins.findLastIndex((n) => n > 0) + 1, most = Math.max(...bins), W = 420, H = 120, base = H - 18, left = 44;
  const svg = (tag, attributes, ...children) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...children);
    return node;
  };
  const step = (W - left - 8) / used, tall = (n) => n ? Math.max(1, (base - 10) * Math.log10(1 + n) / Math.log10(1 + most)) : 0;
  const bars = Array.from(bins.subarray(0, used), (n, j) => svg("rect",
    {x: left + j * step, y: base - tall(n), width: Math.max(.5, step - 1), height: tall(n)},
    svg("title", {}, `${format(from + j * width)} to ${format(from + (j + 1) * width)}: ${whole(n)} tokens`)));
  return svg("svg", {class: "histogram", viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `how many tokens have which ${what}`},
    svg("line", {x1: left, x2: W - 8, y1: base, y2: base}), ...bars,
    svg("text", {x: left - 4, y: 16, "text-anchor": "end"}, whole(most)),
    svg("text", {x: left - 4, y: base, "text-anchor": "end"}, "0"),
    svg("text", {x: left, y: H - 4}, format(from)),
    svg("text", {x: (left + W) / 2, y: H - 4, "text-anchor": "middle"}, `${what} · tokens, logarithmic`),
    svg("text", {x: W - 8, y: H - 4, "text-anchor": "end"}, format(from + used * width)));
}

function layers({layer_share: all}, k, {outputs: of}) {  // of a crosscoder
  const chip = (layer, j, _, a = all[k * of.length + j]) => el("li", {style: `--a: ${a}`}, `layer ${layer} `, el("small", {}, `${(100 * a).toFixed(1)} %`));
  return all ? [el("h3", {}, "Share of its squared decoder norm"), el("ul", {className: "chips layers"}, ...of.map(chip))] : [];
}

// Of all tokens. Pages of earlier versions have none.
function logits(chunk, k) {
  if (!chunk.logit_bins) return [];
  const n = shape.logit_bins, most = Math.max(chunk.promoted_logit[k * shape.words], -chunk.suppressed_logit[k * shape.words]);
  return [el("h3", {}, "Logits of all tokens"), histogram(chunk.logit_bins.subarray(k * n, (k + 1) * n), -most, 2 * most / n, "logit")];
}

function context(chunk, i, n, row, text, size) {
  const {facts} = sae, position = row % facts.context, at = row % size;
  const first = wordStart(text, at, Math.max(-shape.before, -position)), last = Math.min(shape.after, facts.context - 1 - position);
  const value = new Map();
  for (let j = chunk.near_start[n]; j < chunk.near_start[n + 1]; j++) value.set(chunk.near_at[j], chunk.near_value[j]);
  const spans = [];
  for (let offset = first; offset <= last; offset++) {
    const id = text[at + offset], z = value.get(offset) ?? 0, token = el("span", {className: offset ? "t" : "t peak"}, shown(id));
    if (z) token.style.setProperty("--a", (z / sae.maximum[i]).toFixed(3));
    token.dataset.about = `“${alone(id)}” #${id} · activation ${format(z)} · position ${position + offset} · row ${whole(facts.first_row + row + offset)}`;
    spans.push(token);
  }
  return el("div", {className: "context"}, el("span", {className: "value"}, format(value.get(0))), el("div", {className: "tokens"}, ...spans));
}

// The first offset at which a word begins: the model read what is cut off, a reader stumbles over it.
function wordStart(text, at, first) {
  if (at % sae.facts.context + first <= 0) return first;
  for (let offset = first; offset < Math.min(0, first + 8); offset++) if (/^\s/.test(spelt(text[at + offset]))) return offset;
  return first;
}

// --- what the reader does ---

function pointed(event) {
  const about = event.target.closest?.("[data-about]")?.dataset.about;
  if (about || event.type === "click") by("token").textContent = about ?? "";
}
by("feature").addEventListener("click", pointed);
by("feature").addEventListener("mouseover", pointed);
by("list").addEventListener("scroll", draw);
addEventListener("resize", () => { if (sae) draw(); });
addEventListener("hashchange", route);
by("filters").addEventListener("submit", (event) => event.preventDefault());
for (const id of ["search", "least", "most"]) by(id).addEventListener("input", refresh);
by("everywhere").addEventListener("click", everywhere);
for (const id of ["where", "sort"]) by(id).addEventListener("change", refresh);
by("run").addEventListener("change", () => jump(by("run").value, sae.facts.layer));
by("layer").addEventListener("change", () => jump(runOf(sae.facts), by("layer").value));
by("number").addEventListener("keydown", (event) => {
  const wanted = by("number").value.trim();
  if (event.key === "Enter" && /^\d+$/.test(wanted) && Number(wanted) < sae.facts.features) {
    location.hash = address(sae.facts, Number(wanted));
    by("number").value = "";
    by("number").blur();
  }
});
function toggleKeys() {
  by("keys").hidden = !by("keys").hidden;
  by("keys-button").setAttribute("aria-expanded", String(!by("keys").hidden));
}
by("keys-button").addEventListener("click", toggleKeys);

const layersOf = (run) => catalogue.saes.filter((s) => runOf(s) === run).map((s) => s.layer);
function otherLayer(by) {
  const {facts} = parse(), to = step(layersOf(runOf(facts)), facts.layer, by);
  if (to !== null) jump(runOf(facts), to);
}
function otherRun(by) {
  const {facts} = parse(), to = step(runs, runOf(facts), by);
  if (to !== null) jump(to, facts.layer);
}
const KEYS = {
  j: () => move(1), k: () => move(-1), "]": () => otherLayer(1), "[": () => otherLayer(-1), "}": () => otherRun(1), "{": () => otherRun(-1),
  "/": () => by("search").select(), g: () => by("number").select(), "?": toggleKeys,
  r: () => { if (order.length) location.hash = address(sae.facts, order[Math.floor(Math.random() * order.length)]); },
  Escape: () => { if (!by("keys").hidden) toggleKeys(); else if (feature !== null) location.hash = address(sae.facts); },
};
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !sae) return;
  if (event.target.closest("input, select")) {
    if (event.key === "Escape") {
      event.preventDefault();  // a field for searching would empty itself without saying so
      event.target.blur();
    }
    return;
  }
  if (Object.hasOwn(KEYS, event.key)) {
    event.preventDefault();
    if (["/", "g"].includes(event.key)) document.body.classList.remove("showing");  // on a phone the fields are with the list
    KEYS[event.key]();
  }
});

