// Keeps the page of `hdlm-jax watch` new: records are added to its curves, other changes load it again.
{
  const live = DATA.live, run = DATA.run, host = part("live"), now = part("state");
  const seconds = 2;
  async function look() {
    let found;
    try {
      found = await (await fetch(`state.json?since=${live.count}`)).json();
    } catch {
      now.textContent = "hdlm-jax watch has ended; what is shown stays as it is.";
      return;
    }
    now.textContent = "";
    if (found.mark !== live.mark || (found.curves && !part("curves"))) return location.reload();
    host.replaceChildren(make("dl", {class: "facts"}, ...found.facts.map(([value, unit, name]) => make("div", {},
      make("dt", {}, name), make("dd", {}, make("b", {}, value), " ", make("span", {}, unit))))));
    live.count = found.count;
    if (found.curves) {
      for (const kind of ["train", "valid"]) {
        for (const key in found.curves[kind]) run.curves[kind][key].push(...found.curves[kind][key]);
      }
      part("curves").replaceChildren();
      curves(part("curves"), [run], run.unigram);
    }
  }
  setInterval(look, 1000 * seconds);
}
