// The first screen of an SAE, the search in all of them, what is near in others, and names that the reader gives.

// Rare (about a token in a thousand) with peaks that agree: what a reader can most often make sense of.
function interest(i) {
  if (sae.interest) return sae.interest[i];
  sae.interest = Float32Array.from({length: sae.facts.features}, (_, f) => {
    if (sae.count[f] < shape.top) return 0;
    return (.25 + agreement(f)) * Math.exp(-((Math.log10(sae.count[f] / sae.facts.tokens) + 3) ** 2) / 2);
  });
  return sae.interest[i];
}

// Share of pairs of top contexts that peak on the same token.
function agreement(i) {
  const seen = new Map();
  for (const t of sae.peaks.subarray(i * shape.top, (i + 1) * shape.top)) if (t) seen.set(t, (seen.get(t) ?? 0) + 1);
  return [...seen.values()].reduce((sum, n) => sum + n * n, 0) / shape.top ** 2;
}

function remarkable() {
  const found = new Map(), n = sae.facts.features, numbers = Array.from({length: n}, (_, i) => i).filter((i) => sae.count[i]);
  const take = (most, key, why) => {
    const values = new Map(numbers.map((i) => [i, key(i)]));
    for (const i of numbers.toSorted((a, b) => values.get(b) - values.get(a)).slice(0, 40)) {
      if (most && !found.has(i)) { found.set(i, why(i)); most--; }
    }
  };
  take(4, (i) => interest(i), () => "peaks that agree");
  take(2, (i) => sae.count[i], (i) => `densest: ${format(100 * sae.count[i] / sae.facts.tokens)} % of tokens`);
  take(2, (i) => sae.maximum[i], (i) => `largest activation: ${format(sae.maximum[i])}`);
  take(2, (i) => sae.count[i] < shape.top ? 0 : sae.maximum[i] / sae.mean[i], (i) => `${format(sae.maximum[i] / sae.mean[i])} times its mean at most`);
  return found;
}

function overview() {
  const {facts} = sae, alive = sae.count.reduce((sum, c) => sum + (c > 0), 0), fired = sae.count.reduce((sum, c) => sum + c, 0);
  const canvas = el("canvas", {id: "scatter", tabIndex: -1, ariaLabel: "every feature by density and largest activation"});
  const items = [...remarkable()].map(([i, why]) => el("li", {}, el("a", {href: address(facts, i)}, String(i)), ` ${peaks(i, 4)} `, el("small", {}, why)));
  by("feature").replaceChildren(
    el("h2", {}, `Layer ${facts.layer} of ${facts.name}`),
    el("p", {className: "facts"}, `${whole(alive)} of ${whole(facts.features)} features fire on these ${whole(facts.tokens)} tokens, ` +
      `${format(fired / facts.tokens)} a token. Every point is a feature: click one, or choose from the list.`),
    canvas, el("h3", {}, "Remarkable features"), el("ul", {className: "remarkable"}, ...items),
    el("p", {className: "note"}, "Names and stars stay in this browser; ", el("button", {type: "button", id: "save", onclick: saveNotes}, "save them"),
      " as notes.js, and put it beside this page to keep and share them."));
  scatter(canvas);
}

// Density to the right, largest activation upwards, both logarithmic.
function scatter(canvas) {
  const {facts} = sae, W = canvas.clientWidth, H = canvas.clientHeight, left = 46, base = H - 34, ratio = devicePixelRatio;
  const style = getComputedStyle(document.documentElement), colour = (name) => style.getPropertyValue(name);
  const fired = Array.from({length: facts.features}, (_, i) => i).filter((i) => sae.count[i]);
  if (!fired.length || !W) return;
  const log = Math.log10, tops = fired.map((i) => log(sae.maximum[i]));
  const [x0, x1] = [Math.min(...fired.map((i) => log(sae.count[i] / facts.tokens))), 0], y0 = Math.min(...tops), y1 = Math.max(...tops, y0 + .1);
  const x = (i) => left + 8 + (W - left - 20) * (log(sae.count[i] / facts.tokens) - x0) / (x1 - x0);
  const y = (i) => base - 8 - (base - 20) * (log(sae.maximum[i]) - y0) / (y1 - y0);
  [canvas.width, canvas.height] = [W * ratio, H * ratio];
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  pen.font = "12px system-ui, sans-serif";
  pen.fillStyle = colour("--heat");
  pen.globalAlpha = Math.max(.25, Math.min(.8, 2000 / fired.length));
  for (const i of fired) { pen.beginPath(); pen.arc(x(i), y(i), 2.5, 0, 7); pen.fill(); }
  pen.globalAlpha = 1;
  pen.fillStyle = colour("--faint");
  pen.strokeStyle = colour("--line");
  pen.strokeRect(left, -1, W, base + 1);
  pen.textAlign = "center";
  for (let e = Math.ceil(x0); e <= 0; e++) pen.fillText(e > -4 ? `${format(100 * 10 ** e)} %` : `1e${e}`, left + 8 + (W - left - 20) * (e - x0) / (x1 - x0) - (e ? 0 : 16), base + 14);
  pen.fillText("density, share of tokens", (left + W) / 2, H - 4);
  pen.textAlign = "right";
  pen.fillText(format(10 ** y1), left - 4, 16);
  pen.fillText(format(10 ** y0), left - 4, base - 4);
  pen.textAlign = "left";
  pen.fillText("largest activation", left + 6, 14);
  const nearest = (event) => {
    let best = null, least = 144;
    for (const i of fired) {
      const d = (x(i) - event.offsetX) ** 2 + (y(i) - event.offsetY) ** 2;
      if (d < least) [best, least] = [i, d];
    }
    return best;
  };
  canvas.onmousemove = (event) => {
    const i = nearest(event);
    canvas.style.cursor = i === null ? "" : "pointer";
    by("token").textContent = i === null ? "" : `feature ${i} · density ${format(sae.count[i] / facts.tokens)} · at most ${format(sae.maximum[i])} · ${peaks(i, 4)}`;
  };
  canvas.onmouseleave = () => { by("token").textContent = ""; };
  canvas.onclick = (event) => {
    const i = nearest(event);
    if (i !== null) location.hash = address(facts, i);
  };
}
const redraw = () => { const canvas = by("scatter"); if (canvas) scatter(canvas); };
addEventListener("resize", redraw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

// One set of tokens a term: word, word*, *word*, "exact" or #id; every term must be met. Case and spaces around count in "" alone.
function termsOf(query, vocabulary) {
  const fold = (text) => text.trim().toLowerCase();
  return (query.match(/"[^"]*"?|\S+/g) ?? []).map((term) => {
    const exact = /^"([^"]*)"?$/.exec(term), id = /^#(\d+)$/.exec(term), found = new Set();
    if (id) return new Set([Number(id[1])]);
    const [, open, word, on] = exact ? [null, "", exact[1], ""] : /^(\*?)(.*?)(\*?)$/s.exec(fold(term));
    const meets = (text) => open && on ? text.includes(word) : on ? text.startsWith(word) : open ? text.endsWith(word) : text === word;
    vocabulary.forEach((text, i) => { if (meets(exact ? text : fold(text))) found.add(i); });
    return found;
  });
}

// How often each feature meets the terms, 0 unless it meets all of them.
function matchesOf(terms, column, n) {
  const matches = new Uint16Array(n).fill(1), width = column.length / n;
  for (const tokens of terms) {
    const met = new Uint16Array(n);
    for (let i = 0; i < column.length; i++) if (column[i] && tokens.has(column[i] - 1)) met[Math.floor(i / width)]++;
    for (let i = 0; i < n; i++) matches[i] = met[i] && matches[i] ? matches[i] + met[i] : 0;
  }
  return matches;
}

// What meets the search in every layer of every run, a line an SAE.
async function everywhere() {
  const turn = ++asked, query = by("search").value.trim(), where = by("where").value, list = el("ul", {className: "remarkable", id: "hits"});
  document.body.classList.add("showing");
  by("feature").replaceChildren(el("a", {className: "back", href: address(sae.facts)}, "← all features"),
    el("h2", {}, `${query} in every SAE`), el("p", {className: "note"}, "The features that meet it most often."), list);
  for (const facts of catalogue.saes) {
    const [index, vocabulary] = await Promise.all([load(`${facts.name}/${facts.folder}/index`), load(`${facts.text}/vocabulary`)]);
    if (turn !== asked) return;
    const matches = matchesOf(termsOf(query, vocabulary), index[where], facts.features);
    const found = Array.from(matches.keys()).filter((i) => matches[i]).sort((a, b) => matches[b] - matches[a] || a - b);
    const links = found.slice(0, 12).flatMap((i) => [" ", el("a", {href: address(facts, i)}, String(i))]);
    list.append(el("li", {}, `layer ${facts.layer} of ${facts.name}: ${whole(found.length)}`, ...links));
  }
}

// The nearest feature by decoder cosine in each SAE that this one was compared with.
async function elsewhere(facts, i) {
  const others = catalogue.saes.filter((s) => facts.near.includes(s.folder.split(".").at(-1)));
  const found = await Promise.all(others.map((s) => load(`${facts.name}/${facts.folder}/near-${s.folder.split(".").at(-1)}`)));
  return others.flatMap((s, n) => found[n].feature[i] < 0 ? [] : [el("li", {},
    el("a", {href: address(s, found[n].feature[i])}, String(found[n].feature[i])),
    s.name === facts.name ? ` layer ${s.layer} ` : ` ${s.name} `, el("small", {}, format(found[n].cosine[i])))]);
}

// --- names: {address of a feature: name}, of the file notes.js and what was added in this browser ---

let notes = {};
const KEPT_NOTES = `notes of ${location.pathname}`;
async function readNotes() {
  const [file] = await load("notes").catch(() => [{}]);
  let here = {};
  try { here = JSON.parse(localStorage.getItem(KEPT_NOTES) ?? "{}"); } catch { /* a browser that keeps nothing for files */ }
  notes = {...file, ...here};
}
const noteOf = (i) => notes[address(sae.facts, i)] ?? null;

function note(i, value) {
  notes[address(sae.facts, i)] = value;
  try { localStorage.setItem(KEPT_NOTES, JSON.stringify(notes)); } catch { /* then it lasts as long as the page */ }
  draw();
}

function noteFields(i) {
  const name = el("input", {id: "name", placeholder: "name it", ariaLabel: "a name for this feature", value: noteOf(i)?.name ?? "", autocomplete: "off"});
  const star = el("button", {type: "button", id: "star", ariaLabel: "star"}, noteOf(i) ? "★" : "☆");
  name.addEventListener("input", () => { note(i, {name: name.value}); star.textContent = "★"; });
  star.addEventListener("click", () => {
    note(i, noteOf(i) ? null : {name: name.value});
    star.textContent = noteOf(i) ? "★" : "☆";
  });
  return el("p", {className: "line"}, star, name);
}

function saveNotes() {
  const kept = Object.fromEntries(Object.entries(notes).filter(([, value]) => value));
  const text = `pages.take("notes",${JSON.stringify([kept])});\n`;
  const link = el("a", {href: URL.createObjectURL(new Blob([text], {type: "text/javascript"})), download: "notes.js"});
  link.click();
  URL.revokeObjectURL(link.href);
}

if (catalogue.saes.length) readNotes().then(route);
else by("feature").replaceChildren(el("p", {className: "note"}, "There are no feature pages yet: run `rsae eval pages`."));
