"use strict";
// Draws the parts of a report (hdlm_jax/report/page.py) from the JSON in #data. Texts only ever become text nodes.
const DATA = JSON.parse(document.getElementById("data").textContent);

const part = name => document.querySelector(`[data-part=${name}]`);
function make(kind, attributes, ...inside) {
  return fill(document.createElement(kind), attributes, inside);
}
function draw(kind, attributes, ...inside) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", kind), attributes, inside);
}
function fill(node, attributes, inside) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...inside.filter(x => x !== null));
  return node;
}
const whole = n => n.toLocaleString("en-US");
const short = n => n >= 1e9 ? `${+(n / 1e9).toPrecision(3)}B` : n >= 1e6 ? `${+(n / 1e6).toPrecision(3)}M`
  : n >= 1e3 ? `${+(n / 1e3).toPrecision(3)}k` : `${+n.toPrecision(3)}`;

// ---- charts ------------------------------------------------------------------------------------------------------

function ticks(low, high, about) {
  const rough = (high - low) / about, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(m => m * power).find(s => s >= rough);
  const out = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) out.push(+(i * step).toPrecision(12));
  return out;
}

// series: {name, x, y, colour, dots, lines, width, low, high (a band)}; options: title, x, y (axis names), range, xs
function chart(series, options) {
  const host = make("figure", {class: "chart"}), legend = make("div", {class: "legend"});
  const values = key => series.flatMap(s => s[key] || []).filter(v => v !== null);
  const xs = options.xs || [0, Math.max(...values("x"))];
  let [low, high] = options.range || [Math.min(...values("y")), Math.max(...values("y"))];
  if (!(high > low)) [low, high] = [low - 1, high + 1];
  const pad = options.range ? 0 : 0.05 * (high - low);
  [low, high] = [low - pad, high + pad];
  const format = options.format || (v => +v.toPrecision(4));

  function labels(near) {
    legend.replaceChildren(...series.filter(s => s.name).map(s => {
      const value = near === null ? null : s.at(near);
      return make("span", {}, make("i", {style: `color: ${s.colour}; border-top-style: ${s.dash ? "dashed" : "solid"}`}), s.name,
        value === null ? "" : make("b", {}, ` ${format(value)}`));
    }));
    if (near !== null) legend.append(make("span", {}, `at ${options.x} `, make("b", {}, options.xs ? near.toFixed(2) : short(near))));
  }
  for (const s of series) {
    s.at = s.at || (x => {
      let best = null;
      s.x.forEach((v, i) => { if (s.y[i] !== null && (best === null || Math.abs(v - x) < Math.abs(s.x[best] - x))) best = i; });
      return best === null ? null : s.y[best];
    });
  }
  function render() {
    const width = Math.max(240, host.clientWidth), height = Math.round(Math.min(280, 150 + width / 6));
    const left = 44, right = width - 8, top = 8, bottom = height - 34;
    const px = x => left + (right - left) * (x - xs[0]) / (xs[1] - xs[0]);
    const py = y => bottom - (bottom - top) * (Math.min(Math.max(y, low), high) - low) / (high - low);
    const hair = draw("line", {class: "hair", y1: top, y2: bottom, visibility: "hidden"});
    const root = draw("svg", {viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": options.title});
    for (const y of ticks(low, high, 4)) {
      root.append(draw("line", {class: "grid", x1: left, x2: right, y1: py(y), y2: py(y)}),
        draw("text", {x: left - 7, y: py(y) + 4, "text-anchor": "end"}, short(y)));
    }
    for (const x of ticks(xs[0], xs[1], width < 330 ? 3 : 5)) {
      root.append(draw("text", {x: px(x), y: bottom + 16, "text-anchor": "middle"}, short(x)));
    }
    root.append(draw("text", {x: right, y: height - 4, "text-anchor": "end"}, options.x));
    for (const s of series) {
      if (s.low) {
        const up = s.x.map((x, i) => `${px(x)} ${py(s.high[i])}`), down = s.x.map((x, i) => `${px(x)} ${py(s.low[i])}`);
        root.append(draw("path", {d: `M${up.join("L")}L${down.reverse().join("L")}Z`,
          style: `fill: ${s.colour}; fill-opacity: .14; stroke: none`}));
      }
      const d = s.x.map((x, i) => s.y[i] === null ? null : `${px(x).toFixed(1)} ${py(s.y[i]).toFixed(1)}`).filter(Boolean);
      if (!s.only) root.append(draw("path", {d: `M${d.join("L")}`, "stroke-dasharray": s.dash || null,
        style: `stroke: ${s.colour}; stroke-width: ${s.width || 1.8}`}));
      if (s.dots || s.only || d.length === 1) s.x.forEach((x, i) => s.y[i] === null ? null : root.append(
        draw("circle", {cx: px(x), cy: py(s.y[i]), r: 2.6, style: `fill: ${s.colour}; fill-opacity: ${s.only ? .62 : 1}`})));
    }
    root.append(hair);
    root.addEventListener("pointermove", event => {
      const box = root.getBoundingClientRect(), at = (event.clientX - box.left) / box.width * width;
      const x = xs[0] + (Math.min(Math.max(at, left), right) - left) / (right - left) * (xs[1] - xs[0]);
      fill(hair, {x1: px(x), x2: px(x), visibility: "visible"}, []);
      labels(x);
    });
    root.addEventListener("pointerleave", () => { hair.setAttribute("visibility", "hidden"); labels(null); });
    host.replaceChildren(make("h3", {}, options.title), legend, root);
  }
  labels(null);
  let last = 0;
  new ResizeObserver(() => { if (host.clientWidth !== last) { last = host.clientWidth; render(); } }).observe(host);
  return host;
}

const exp = values => values.map(v => v === null ? null : Math.exp(v));

// runs: {name, curves}; one run shows its training batches as well
function curves(host, runs, unigram) {
  const one = runs.length === 1, colour = i => `var(--s${i % 8})`, known = runs.filter(r => r.curves);
  const of = (kind, value, more) => known.map((r, i) => ({name: one ? more.name : r.name, x: r.curves[kind].tokens,
    y: value(r.curves[kind]), colour: colour(runs.indexOf(r)), ...more, ...(one ? {} : {name: r.name})})).filter(s => s.x.length);
  const end = Math.max(...known.flatMap(r => [...r.curves.train.tokens, ...r.curves.valid.tokens]));
  const flat = (y, name) => ({name, x: [0, end], y: [y, y], colour: "var(--soft)", dash: "4 4", width: 1.2});
  const valid = of("valid", c => c.nelbo, {name: "validation", dots: true});
  const batches = one ? of("train", c => c.nelbo, {name: "training batches", colour: "var(--mask)", width: 1}) : [];
  const ys = [...valid, ...batches].flatMap(s => s.y.filter(v => v !== null).slice(s.y.length > 12 ? 2 : 0));
  const loss = of("train", c => c.loss, {name: "weighted loss", width: 1.4});
  const base = unigram ? [flat(unigram, "unigram")] : [];
  const top = Math.max(...ys, unigram || -Infinity), bottom = Math.min(...ys);
  if (loss.length) host.append(chart(loss, {title: "Loss (weighted), nats per token", x: "tokens", xs: null}));
  if (ys.length) host.append(chart([...batches, ...valid, ...base], {title: "NELBO, nats per token", x: "tokens",
    range: [bottom - 0.05 * (top - bottom + 0.1), top + 0.05 * (top - bottom + 0.1)]}));
  const perplexity = of("valid", c => exp(c.nelbo), {name: "validation", dots: true});
  if (perplexity.length) host.append(chart(perplexity, {title: "Perplexity on validation text", x: "tokens"}));
}

function levels(host, found, names, colours) {
  const series = names.map((name, k) => {
    const y = found.beta.map(b => b[k]), off = y.map(b => 2 * Math.sqrt(b * (1 - b) / (found.tokens || 1)));
    return {name, x: found.t, y, colour: colours[k], ...(found.points ? {low: y.map((v, i) => v - off[i]), high: y.map((v, i) => v + off[i])} : {})};
  });
  const dots = found.points ? names.map((name, k) => ({name: null, x: found.points.t, y: found.points.share.map(s => s[k]),
    colour: colours[k], only: true})) : [];
  host.append(chart([...series, ...dots], {title: "Share of tokens at each level", x: "t", xs: [0, 1], range: [0, 1],
    format: v => v.toFixed(3)}));
}

// ---- words and clusters ------------------------------------------------------------------------------------------

// The hierarchy with what the page asks of it: members of every node by frequency, names of nodes.
function tree(h) {
  const top = h.sizes.length - 1;
  const count = h.counts || h.words.map(() => 1), order = h.words.map((_, i) => i);
  if (h.counts) order.sort((a, b) => count[b] - count[a] || a - b);
  const up = [order.map((_, i) => i)];
  for (let k = 1; k < top; k++) up.push(up[k - 1].map(node => h.parents[k - 1][node]));
  up.push(up[0].map(() => 0));
  const members = h.sizes.map((n, k) => k === 0 || k === top ? null : Array.from({length: n}, () => []));
  const mass = h.sizes.map(n => new Float64Array(n)), total = count.reduce((a, b) => a + b, 0);
  for (const word of order) {
    for (let k = 1; k < top; k++) {
      members[k][up[k][word]].push(word);
      mass[k][up[k][word]] += count[word] / Math.max(total, 1);
    }
  }
  const bare = word => h.words[word].trim() || "␣";
  const levelOf = symbol => { let k = 0; while (k < top && symbol >= h.offsets[k + 1]) k++; return k; };
  const name = (k, node, n) => k === top ? "mask" : k === 0 ? bare(node) : members[k][node].slice(0, n).map(bare).join("·");
  const labels = h.sizes.map((_, k) => k === 0 ? "words" : k === top ? "mask" : top === 2 ? "clusters" : `clusters ${k}`);
  const colours = h.sizes.map((_, k) => k === top ? "var(--mask)" : `var(--l${k % 5})`);
  return {...h, top, order, up, members, mass, bare, levelOf, name, labels, colours, known: !!h.counts};
}

function clusters(host, t) {
  const search = make("input", {type: "search", id: "find", placeholder: "a word", autocomplete: "off", spellcheck: "false"});
  const found = make("ul", {class: "chips", "data-found": true}), path = make("div", {"data-path": true});
  const list = make("ul", {class: "list"}), tabs = make("div", {class: "row"});
  const heaviest = k => t.mass[k].indexOf(Math.max(...t.mass[k]));
  let word = null, shown = [1, heaviest(1)], level = 1, many = 60;

  const share = v => `${(100 * v).toFixed(v < 0.01 ? 2 : 1)} % of tokens`;
  const sign = text => text.startsWith(" ") ? [make("span", {class: "space-sign"}, "␣"), text.slice(1)] : [text];
  const chip = w => make("li", {}, make("button", {type: "button", "data-word": w, "aria-pressed": w === word ? "true" : null,
    onclick: () => choose(w)}, ...sign(t.words[w])));
  function card(k, node) {
    const all = t.members[k][node], facts = [`${whole(all.length)} words`];
    if (t.known) facts.push(share(t.mass[k][node]));
    if (k > 1) facts.push(`${whole(t.parents[k - 1].filter(p => p === node).length)} clusters`);
    return make("div", {class: "cluster", style: `--c: ${t.colours[k]}`, "data-level": k, "data-cluster": node},
      make("h3", {}, `Level ${k}, cluster ${node} `, make("span", {class: "quiet"}, facts.join(", "))),
      make("ul", {class: "chips"}, ...all.slice(0, many).map(chip),
        all.length > many ? make("li", {}, make("button", {type: "button", onclick: () => { many *= 8; show(); }},
          `${whole(all.length - many)} more`)) : null));
  }
  function show() {
    const cards = [];
    if (word === null) cards.push(card(...shown));
    else {
      cards.push(make("p", {}, make("b", {}, ...sign(t.words[word])), make("span", {class: "quiet"},
        t.known ? ` ${whole(t.counts[word])} times in the training tokens` : "", `, word ${whole(word)}`)));
      for (let k = 1; k < t.top; k++) cards.push(card(k, t.up[k][word]));
    }
    path.replaceChildren(...cards);
    const here = word === null ? shown : [level, t.up[level][word]];
    const order = [...t.mass[level].keys()].sort((a, b) => t.mass[level][b] - t.mass[level][a]);
    const most = t.mass[level][order[0]];
    list.replaceChildren(...order.map(node => make("li", {}, make("button", {type: "button", "data-node": node,
      style: `--c: ${t.colours[level]}; --w: ${(100 * t.mass[level][node] / most).toFixed(1)}%`,
      "aria-pressed": here[0] === level && here[1] === node ? "true" : null,
      onclick: () => { word = null; shown = [level, node]; many = 60; show(); }},
      make("span", {}, t.name(level, node, 4)),
      make("small", {}, t.known ? `${(100 * t.mass[level][node]).toFixed(1)} %` : whole(t.members[level][node].length))))));
    const on = list.querySelector("[aria-pressed]");
    if (on) list.scrollTop = on.offsetTop - list.offsetTop - list.clientHeight / 3;
    tabs.replaceChildren(...(t.top < 3 ? [] : t.labels.slice(1, -1).map((name, i) => make("button", {type: "button",
      "aria-pressed": level === i + 1 ? "true" : "false", onclick: () => { level = i + 1; word = null; shown = [level, heaviest(level)]; show(); }},
      `Level ${i + 1}: ${whole(t.sizes[i + 1])}`))));
  }
  function choose(w) { word = w; many = 60; show(); }
  function seek() {
    const given = search.value.trim(), query = given.toLowerCase(), ranks = [[], [], [], []];
    if (query) for (const w of t.order) {
      const bare = t.bare(w), low = bare.toLowerCase();
      if (low.includes(query)) ranks[bare === given ? 0 : low === query ? 1 : low.startsWith(query) ? 2 : 3].push(w);
    }
    const hits = ranks.flat().slice(0, 14);
    if (hits.length) choose(hits[0]);
    found.replaceChildren(...(query && !hits.length ? [make("li", {class: "quiet"}, "no such word")] : hits.map(chip)));
  }
  search.addEventListener("input", seek);
  show();
  host.append(make("label", {for: "find", class: "quiet"}, "Find a word "), search, found, make("div", {class: "browser"}, path,
    make("div", {}, make("h3", {}, `All clusters, by ${t.known ? "share of tokens" : "number of words"}`), tabs, list)));
}

// ---- the viewer --------------------------------------------------------------------------------------------------

// film: {call, t, samples: [{start, frames}]}. name: behind its elements' ids, where a page has several. The first sample
// may grow: what is given back adds a frame, (call, t, position symbol confidence, ...).
function viewer(host, film, t, name = "") {
  const last = () => film.call.length - 1, calls = () => film.call[last()];
  const slider = make("input", {type: "range", min: 0, max: last(), value: 0, "aria-label": "network calls done", id: `frame${name}`});
  const play = make("button", {type: "button", id: `play${name}`, "aria-pressed": "false"}, "▶ Play");
  const status = make("div", {class: "status", id: `status${name}`}), strip = make("div", {class: "strip"});
  const text = make("div", {class: "text", id: `text${name}`, tabindex: 0, role: "group",
    "aria-label": "the text; up and down go from token to token, left and right from call to call"});
  const about = make("p", {class: "about", "aria-live": "polite"});
  const choices = film.samples.map((_, i) => make("button", {type: "button", "aria-pressed": "false", "data-sample": i,
    onclick: () => load(i)}, `Sample ${i + 1}`));
  let steps = [], cells = [], frame = 0, timer = null, counts = [], picked = null;

  // of every position what it shows: [frame, symbol, confidence], the first one from frame 0
  function load(which) {
    const sample = film.samples[which];
    steps = sample.start.map(symbol => [[0, symbol, null]]);
    sample.frames.forEach((flat, i) => {
      for (let j = 0; j < flat.length; j += 3) steps[flat[j]].push([i + 1, flat[j + 1], flat[j + 2] / 1000]);
    });
    counts = film.call.map(() => t.sizes.map(() => 0));
    for (const way of steps) way.forEach(([from, symbol], i) => {
      const until = i + 1 < way.length ? way[i + 1][0] : film.call.length, k = t.levelOf(symbol);
      for (let f = from; f < until; f++) counts[f][k]++;
    });
    cells = steps.map((_, place) => cell(place));
    text.replaceChildren(...cells);
    choices.forEach((b, i) => b.setAttribute("aria-pressed", String(i === which)));
    fillStrip();
    show(frame);
  }
  function part(symbol) {
    const k = t.levelOf(symbol), node = symbol - t.offsets[k];
    return k === t.top ? make("span", {}, " ") : k === 0 ? make("span", {}, t.bare(node))
      : make("span", {class: "name"}, t.name(k, node, 2));
  }
  function cell(place) {
    const way = steps[place], end = way[way.length - 1][1], spaced = t.levelOf(end) > 0 || /^[ ↵]/.test(t.words[end]);
    return make("span", {class: "tok", "data-place": place, "data-space": spaced || null}, ...way.map(([, symbol]) => part(symbol)));
  }
  function add(call, time, flat) {
    film.call.push(call);
    film.t.push(time);
    film.samples[0].frames.push(flat);
    counts.push([...counts[counts.length - 1]]);
    for (let j = 0; j < flat.length; j += 3) {
      const place = flat[j], way = steps[place], now = counts[last()];
      now[t.levelOf(way[way.length - 1][1])]--;
      now[t.levelOf(flat[j + 1])]++;
      way.push([last(), flat[j + 1], flat[j + 2] / 1000]);
      const other = cell(place);
      cells[place].replaceWith(other);
      cells[place] = other;
    }
    slider.max = last();
    fillStrip();
    show(last());
  }
  const at = (way, f) => { let i = way.length - 1; while (way[i][0] > f) i--; return i; };

  function fillStrip() {
    const total = steps.length, root = draw("svg", {viewBox: `0 0 ${Math.max(last(), 1)} 1`, preserveAspectRatio: "none", "aria-hidden": "true"});
    let below = counts.map(() => 0);
    for (let k = 0; k <= t.top; k++) {
      const above = counts.map((c, f) => below[f] + c[k] / total);
      const up = above.map((v, f) => `${f} ${1 - v}`), down = below.map((v, f) => `${f} ${1 - v}`).reverse();
      root.append(draw("path", {d: `M${up.join("L")}L${down.join("L")}Z`, style: `fill: ${t.colours[k]}; fill-opacity: ${k === t.top ? .22 : k ? .55 : .8}`}));
      below = above;
    }
    strip.replaceChildren(root);
  }

  function show(f) {
    frame = Math.max(0, Math.min(last(), f));
    slider.value = frame;
    steps.forEach((way, place) => {
      const i = at(way, frame), k = t.levelOf(way[i][1]), cell = cells[place];
      [...cell.children].forEach((part, j) => part.classList.toggle("on", j === i));
      cell.className = ["tok", cell.dataset.space !== undefined ? "space" : "", k === t.top ? "top" : k ? "l" : "word",
        way.length === 1 && k === 0 ? "given" : "", place === picked ? "picked" : "", frame && way[i][0] === frame ? "fresh" : ""].join(" ");
      cell.style.setProperty("--c", t.colours[k]);
      cell.dataset.level = k;
      cell.title = tell(place);
    });
    // all written: the text closes its gaps, the box stays as high as it was
    const settled = counts[frame][0] === steps.length;
    if (!settled) text.style.minHeight = ""; else if (!text.classList.contains("settled")) text.style.minHeight = `${text.offsetHeight}px`;
    text.classList.toggle("settled", settled);
    status.dataset.frame = frame;
    status.dataset.call = film.call[frame];
    status.dataset.counts = counts[frame].join(",");
    slider.setAttribute("aria-valuetext", `call ${film.call[frame]} of ${calls()}: `
      + [...t.sizes.keys()].reverse().map(k => `${t.labels[k]} ${counts[frame][k]}`).join(", "));
    status.replaceChildren(make("span", {}, "call ", make("b", {}, whole(film.call[frame])), ` of ${whole(calls())}`),
      make("span", {}, "t = ", make("b", {}, film.t[frame].toFixed(2))),
      ...[...t.sizes.keys()].reverse().map(k => make("span", {class: "key", style: `--c: ${t.colours[k]}`}, `${t.labels[k]} `,
        make("b", {"data-count": k}, whole(counts[frame][k])))));
  }

  function tell(place) {
    const way = steps[place], now = at(way, frame);
    if (way.length === 1) return `position ${place + 1}: “${t.name(t.levelOf(way[0][1]), way[0][1] - t.offsets[t.levelOf(way[0][1])], 3)}”, given`;
    return `position ${place + 1}: ` + way.slice(0, now + 1).map(([f, symbol, sure]) => {
      const k = t.levelOf(symbol), name = t.name(k, symbol - t.offsets[k], 4);
      return f === 0 ? name : `${k ? name : `“${name}”`} at call ${film.call[f]} (p = ${sure === 0 ? "< .001" : sure.toFixed(3).replace(/^0/, "")})`;
    }).join(" → ");
  }
  const idle = () => { about.textContent = "Point at a token for its history. Highlighted: what fell in the calls since the frame before."; };
  text.addEventListener("pointerover", event => {
    const cell = event.target.closest(".tok");
    if (cell) about.textContent = tell(+cell.dataset.place); else idle();
  });
  text.addEventListener("pointerleave", idle);
  text.addEventListener("keydown", event => {
    const step = {ArrowUp: -1, ArrowDown: 1}[event.key];
    if (!step) return;
    picked = picked === null ? 0 : Math.max(0, Math.min(steps.length - 1, picked + step));
    show(frame);
    about.textContent = tell(picked);
    event.preventDefault();
  });
  text.addEventListener("blur", () => { picked = null; show(frame); idle(); });

  function stop() { clearInterval(timer); timer = null; play.textContent = "▶ Play"; play.setAttribute("aria-pressed", "false"); }
  function toggle() {
    if (timer !== null) return stop();
    if (frame === last()) show(0);
    play.textContent = "❚❚ Pause";
    play.setAttribute("aria-pressed", "true");
    timer = setInterval(() => { show(frame + 1); if (frame === last()) stop(); }, Math.max(60, Math.min(400, 15000 / film.call.length)));
  }
  play.addEventListener("click", toggle);
  slider.addEventListener("input", () => { stop(); show(+slider.value); });
  document.addEventListener("keydown", function keys(event) {
    if (!text.isConnected) return document.removeEventListener("keydown", keys);
    const step = {ArrowLeft: -1, ArrowRight: 1}[event.key], box = host.getBoundingClientRect();
    if (!step || event.target.closest("input, select, textarea") || event.altKey || event.ctrlKey || event.metaKey) return;
    if (box.bottom < 0 || box.top > innerHeight) return;
    stop();
    show(frame + step);
    event.preventDefault();
  });
  host.append(make("div", {class: "viewer"}, make("div", {class: "row", style: "margin-bottom: .9rem"}, play, ...(choices.length > 1 ? choices : [])), strip,
    slider, status, text, about));
  frame = Math.round(last() * 0.55);
  load(0);
  idle();
  return add;
}

// ---- the leaderboard ---------------------------------------------------------------------------------------------

// Columns are sorted by what their cells say is their number; cells without one, which give a reason, come last.
function sortable(table) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0], names = heads.map(head => head.textContent);
  const number = cell => cell.dataset.value === undefined ? null : +cell.dataset.value;
  function sort(column, down) {
    const by = (a, b) => {
      const [one, other] = [a, b].map(row => number(row.cells[column]));
      if (one !== null && other !== null) return down ? other - one : one - other;
      if (one !== null || other !== null) return one === null ? 1 : -1;
      const [text, next] = [a, b].map(row => row.cells[column].textContent);
      return down ? next.localeCompare(text) : text.localeCompare(next);
    };
    body.append(...[...body.rows].sort(by));
    heads.forEach((head, i) => head.setAttribute("aria-sort", i !== column ? "none" : down ? "descending" : "ascending"));
  }
  heads.forEach((head, i) => head.replaceChildren(make("button", {
    onclick: () => sort(i, head.getAttribute("aria-sort") === "ascending")}, names[i])));
  const pick = make("select", {onchange: () => sort(+pick.value, false)},
    make("option", {value: "", disabled: true, selected: true}, "the first text"), ...names.map((name, i) => make("option", {value: i}, name)));
  table.before(make("label", {class: "narrow quiet"}, "Sorted by ", pick));
}

// A row for every run: its bits per byte with a bar of one standard error; bounds are open circles.
function board(host, texts) {
  for (const {text, runs} of texts) {
    const figure = make("figure", {class: "chart"}), title = make("h3", {}, text);
    const low = Math.min(...runs.map(r => r.value - (r.se || 0))), high = Math.max(...runs.map(r => r.value + (r.se || 0)));
    const pad = 0.06 * (high - low) || 0.1, render = () => {
      const width = Math.max(240, host.firstChild.clientWidth), left = 8, right = width - 12, bottom = 40 * runs.length + 6;
      const px = x => left + 8 + (right - left - 8) * (x - low + pad) / (high - low + 2 * pad);
      const root = draw("svg", {viewBox: `0 0 ${width} ${bottom + 34}`, role: "img", "aria-label": `bits per byte of ${text}`});
      for (const x of ticks(low - pad, high + pad, width < 330 ? 3 : 5)) {
        root.append(draw("line", {class: "grid", x1: px(x), x2: px(x), y1: 0, y2: bottom}),
          draw("text", {x: px(x), y: bottom + 15, "text-anchor": "middle"}, `${+x.toPrecision(4)}`));
      }
      runs.forEach((r, i) => {
        const y = 40 * i + 28, se = r.se || 0, exact = r.law.startsWith("exact"), name = draw("text", {x: left, y: y - 13, class: "ink"});
        name.append(r.name, draw("tspan", {class: "soft"}, `  ${exact ? "" : "≤ "}${r.value.toFixed(4)}, ${r.law}`));
        root.append(name, draw("path", {d: `M${px(r.value - se)} ${y}H${px(r.value + se)}`, style: "stroke: var(--s0); stroke-width: 2.4"}),
          draw("circle", {cx: px(r.value), cy: y, r: 4.6, style: `fill: ${exact ? "var(--s0)" : "var(--paper)"}; stroke: var(--s0); stroke-width: 1.8`}));
      });
      root.append(draw("text", {x: right, y: bottom + 31, "text-anchor": "end"}, "bits per byte"));
      figure.replaceChildren(title, runs.length ? root : make("p", {class: "quiet"}, "no run has a number"));
    };
    host.append(figure);
    requestAnimationFrame(render);
    addEventListener("resize", render);
  }
}

// ---- the page ----------------------------------------------------------------------------------------------------

if (DATA.runs) curves(fill(part("curves"), {class: "charts"}, []), DATA.runs, DATA.unigram);
document.querySelectorAll("table.sortable").forEach(sortable);
if (DATA.board) board(fill(part("board"), {class: "charts two"}, []), DATA.board);
if (DATA.run) {
  const run = DATA.run, t = run.hierarchy ? tree(run.hierarchy) : null;
  if (part("curves")) curves(fill(part("curves"), {class: "charts"}, []), [run], run.unigram);
  if (part("viewer")) viewer(part("viewer"), run.trajectories, t);
  if (part("levels")) levels(part("levels"), run.occupancy, t.labels, t.colours);
  if (part("clusters")) clusters(part("clusters"), t);
}
document.documentElement.dataset.ready = "yes";
