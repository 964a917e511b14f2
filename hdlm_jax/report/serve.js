// The page of a served run (hdlm_jax/runs/serve.py), behind report.js.

// Server-sent events of a request as objects; throws what the server says is wrong.
async function* events(path, body, key, signal) {
  const answer = await fetch(path, {method: "POST", body: JSON.stringify(body), signal,
    headers: {"Content-Type": "application/json", ...(key ? {Authorization: `Bearer ${key}`} : {})}});
  if (!answer.ok) throw new Error((await answer.json()).error.message);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const {value, done} = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (part === "data: [DONE]") return;
      const found = JSON.parse(part.slice(6));
      if (found.error) throw new Error(found.error.message);
      yield found;
    }
  }
}

const BLANK = /\[(MASK(:\d+)?|LIKE(@\d+)?:[^[\]]+)\]/g;

// One method: its choices, and the text it writes.
function pane(number, run, t) {
  const of = name => run.methods.find(m => m.name === name);
  const method = make("select", {id: `method${number}`}, ...run.methods.map(m => make("option", {value: m.name}, m.name)));
  const steps = make("input", {type: "number", id: `steps${number}`, min: 1, max: 4096, value: Math.min(run.default.steps, 64)});
  const options = make("input", {type: "text", id: `options${number}`, spellcheck: "false", autocomplete: "off"});
  const hint = make("p", {class: "quiet hint"}), host = make("div", {}), said = make("p", {class: "quiet said", role: "status"});
  function chosen() {
    const m = of(method.value);
    steps.disabled = !m.steps;
    options.disabled = !m.options;
    options.placeholder = m.options || "none";
    hint.textContent = m.about && `${m.about}.`;
  }
  method.value = number === 1 || !of("fast_dllm") ? run.default.method : "fast_dllm";
  if (number === 1) options.value = run.default.options;
  if (number === 2 && method.value === "fast_dllm") options.value = "threshold=.5 draw=sample";
  method.addEventListener("change", () => { options.value = ""; chosen(); });
  chosen();
  const field = (label, input) => make("div", {class: "field"}, make("label", {for: input.id}, label), input);

  async function write(path, body, key, signal) {
    let add = null, canvas = null, text = "";
    host.replaceChildren();
    said.className = "quiet said";
    said.textContent = "waiting … (a method is compiled for its first text)";
    const more = {method: method.value, stream: true, canvas: true, ...(steps.disabled ? {} : {steps: +steps.value}),
      ...(options.value && !options.disabled ? {options: options.value} : {})};
    const began = performance.now();
    try {
      for await (const {choices: [choice]} of events(path, {...body, ...more}, key, signal)) {
        const seen = choice.canvas;
        text += choice.text ?? choice.delta?.content ?? "";
        if (seen && (!add || seen.start && seen.start.length !== canvas.length)) {  // a canvas that grows begins anew
          canvas = seen.start;
          host.replaceChildren();
          add = viewer(host, {call: [seen.call], t: [seen.t], samples: [{start: seen.start, frames: []}]}, t, number);
        } else if (seen) add(seen.call, seen.t, seen.changes);
        if (seen) said.textContent = `writing: ${whole(seen.call)} calls`;
      }
      said.textContent = `done in ${((performance.now() - began) / 1000).toFixed(1)} s`;
    } catch (error) {
      said.textContent = error.name === "AbortError" ? "stopped" : error.message;
      if (error.name !== "AbortError") said.className = "said wrong";
    }
    return text;
  }
  const node = make("div", {class: "pane", role: "group", "aria-label": `method ${number}`}, make("div", {class: "fields"},
    field("Method", method), field("Steps", steps), field("Options", options)), hint, said, host);
  return {node, write};
}

async function live(host) {
  let key = sessionStorage.getItem("token") || "", answer;
  for (;;) {
    answer = await fetch("/v1/run", key ? {headers: {Authorization: `Bearer ${key}`}} : {});
    if (answer.status !== 401) break;
    key = await ask(host, key);
    sessionStorage.setItem("token", key);
  }
  const run = await answer.json(), t = tree(run.hierarchy);
  document.title = `${run.name} – hdlm_jax`;
  const text = make("textarea", {id: "prompt", rows: 3, spellcheck: "false"});
  const tokens = make("input", {type: "number", id: "tokens", min: 1, max: run.seq_len, placeholder: "all"});
  const seed = make("input", {type: "number", id: "seed", min: 0, max: 4294967295, placeholder: "random"});
  const both = make("input", {type: "checkbox", id: "both"}), chat = make("input", {type: "checkbox", id: "chat"});
  const go = make("button", {type: "submit", class: "main", id: "write"}, "Write"), stop = make("button", {type: "button", id: "stop", disabled: true}, "Stop");
  const what = make("p", {class: "quiet", id: "what"}), panes = [pane(1, run, t), pane(2, run, t)];
  const place = make("div", {class: "panes"}, panes[0].node);
  let abort = null;
  const blanks = () => chat.checked ? 0 : (text.value.match(BLANK) || []).length;
  function tell() {
    const n = blanks();
    tokens.disabled = n > 0;
    what.textContent = n ? `${n} ${n === 1 ? "blank is" : "blanks are"} filled in; the rest stays.` : chat.checked
      ? "The model answers this." : "The text goes on from here. Blanks: [MASK], [MASK:5] for five tokens"
        + (t.top > 1 ? ", [LIKE:word] for one of that word's cluster." : ".");
  }
  const field = (label, input) => make("div", {class: "field"}, make("label", {for: input.id}, label), input);
  const check = (label, input) => make("label", {class: "check", for: input.id}, input, label);
  const form = make("form", {class: "ask", onsubmit: event => { event.preventDefault(); write(); }},
    field("Prompt, or a text with blanks", text), what,
    make("div", {class: "fields"}, field("New tokens", tokens), field("Seed", seed)),
    make("div", {class: "row"}, go, stop, check("two methods side by side", both), ...(run.chats ? [check("as a chat", chat)] : []),
      make("span", {class: "quiet"}, "Ctrl+Enter writes, Esc stops")));
  async function write() {
    if (abort) abort.abort();
    const mine = abort = new AbortController(), n = blanks();
    const body = {seed: seed.value === "" ? Math.floor(Math.random() * 2 ** 32) : +seed.value,
      ...(tokens.value && !n ? {max_tokens: +tokens.value} : {}),
      ...(chat.checked ? {messages: [{role: "user", content: text.value}]} : n ? {template: text.value} : {prompt: text.value})};
    stop.disabled = false;
    host.dataset.state = "writing";
    const path = chat.checked ? "/v1/chat/completions" : "/v1/completions";
    await Promise.all(panes.slice(0, both.checked ? 2 : 1).map(p => p.write(path, body, key, mine.signal)));
    if (abort === mine) { stop.disabled = true; host.dataset.state = "done"; abort = null; }
  }
  stop.addEventListener("click", () => abort && abort.abort());
  both.addEventListener("change", () => both.checked ? place.append(panes[1].node) : panes[1].node.remove());
  for (const input of [text, chat]) input.addEventListener("input", tell);
  document.addEventListener("keydown", event => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); write(); }
    if (event.key === "Escape" && abort) abort.abort();
  });
  tell();
  host.replaceChildren(make("header", {}, make("p", {class: "kicker"}, "hdlm_jax, live"), make("h1", {}, run.name),
    make("p", {class: "lead"}, run.description)), form, place);
  text.focus();
}

// The token a server asks for.
function ask(host, wrong) {
  return new Promise(done => {
    const input = make("input", {type: "password", id: "token", autocomplete: "off"});
    host.replaceChildren(make("form", {class: "ask", onsubmit: event => { event.preventDefault(); done(input.value); }},
      make("p", {}, wrong ? "That was not it." : "This server asks for its token (serve.token)."),
      make("div", {class: "field"}, make("label", {for: "token"}, "Token"), input),
      make("button", {type: "submit", class: "main"}, "Go on")));
    input.focus();
  });
}

delete document.documentElement.dataset.ready;
live(part("live")).then(() => { document.documentElement.dataset.ready = "yes"; });
