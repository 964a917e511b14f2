"""Where a text ends is part of the text: paddings, what bounds are given, lengths of samples (theory.md section 7)."""
import dataclasses
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_pipeline import EOT, KINDS, write_folder
from tiny import SEQ_LEN, model, read_recipe, trained

import hdlm_jax
from hdlm_jax import config as config_lib
from hdlm_jax.config import PACKINGS, PADDINGS, ConfigError
from hdlm_jax.data import pipeline, prepare
from hdlm_jax.decoding import sampler
from hdlm_jax.diffusion.hierarchical import HierarchicalProcess
from hdlm_jax.diffusion.hierarchy import Hierarchy
from hdlm_jax.diffusion.levels import LevelChain, Proposal
from hdlm_jax.report import __main__ as report
from hdlm_jax.report import compare, page
from hdlm_jax.runs import evaluate, generate, stages, train
from hdlm_jax.training import loading

# ------------------------------------------------------------------------------------- what a bound is given


def test_rows_of_both_paddings():
    pieces = [np.array([5, 6, EOT]), np.array([7, 8, 9, 4, EOT]), np.array([5, 6])]
    hidden = pipeline.rows_of(pieces, 5, EOT, [0, 2, 1])
    ends = pipeline.rows_of(pieces, 5, EOT, [0, 2, 1], ends=True)
    for rows in (hidden, ends):
        assert rows["x"].tolist() == [[5, 6, EOT, EOT, EOT], [7, 8, 9, 4, EOT], [5, 6, EOT, EOT, EOT]]
        assert rows["tokens"].tolist() == [3, 3, 1]
    assert hidden["segment"].tolist() == [[0, 0, 0, -1, -1], [0] * 5, [0, 0, -1, -1, -1]]
    assert hidden["score"].sum(1).tolist() == [3, 3, 1]
    # what does not end is not taken to end there
    assert ends["segment"].tolist() == [[0] * 5, [0] * 5, [0, 0, -1, -1, -1]]
    assert ends["score"].sum(1).tolist() == [5, 3, 1]
    some = pipeline.rows_of(pieces, 5, EOT, ends=np.array([False, True, True]))
    assert some["segment"][0].tolist() == [0, 0, 0, -1, -1]


def sum_over_language(folder, packing, padding, sizes, xi) -> tuple[float, float, float, float]:
    """Sum of exp(-NELBO) over all rows of a split, and the mean NELBO by their frequencies, each with its error.

    The network is the best there is for what rows show: the posterior of the row given z, `segment` and `score`.
    """
    rows = pipeline.valid_rows(folder, 5, packing=packing, padding=padding)
    whole = slice(None) if packing == "crop" else slice(0, -1)  # the last window is as long as the split says
    rows = {name: field[whole] for name, field in rows.items()}
    words = np.where(rows["x"] == EOT, 2, rows["x"])
    shown = rows["segment"]
    both, counts = np.unique(np.stack([words, shown], -1), axis=0, return_counts=True)
    words, shown = jnp.asarray(both[..., 0]), jnp.asarray(both[..., 1])
    h = Hierarchy.from_parents([np.array([0, 0, 1])] if sizes == 2 else [], vocab_size=3)
    process = HierarchicalProcess(h, LevelChain((1.0,) * h.num_levels), xi, "none")
    table = np.zeros((3, h.num_states))  # M of theory.md section 2: how likely a word shows as that symbol
    table[np.arange(3), np.arange(3)] = table[:, h.mask_id] = 1
    if sizes == 2:
        table[:, 3:5] = process.leak + (xi - process.leak) * (h.anc[1][:, None] == np.arange(2))
    log_m, log_q = jnp.log(jnp.asarray(table, jnp.float32)), jnp.log(jnp.asarray(counts / counts.sum(), jnp.float32))

    def denoise(z, segment):
        """[B, 5, 3] log-posteriors of the words."""
        fits = jnp.where(segment[:, None] >= 0, log_m[words[None], z[:, None]], 0.0).sum(-1)  # [B, rows]
        same = (segment[:, None] == shown[None]).all(-1)
        weight = jax.nn.softmax(jnp.where(same, fits + log_q[None], -jnp.inf), axis=-1)
        mass = jnp.einsum("br,rsv->bsv", weight, jax.nn.one_hot(words, 3), precision="highest")
        return jnp.log(jnp.maximum(mass, 1e-12))

    draws, n = 512, len(counts)
    u = (np.random.default_rng(1).permuted(np.arange(draws)[None].repeat(n, 0), axis=1)
         + np.random.default_rng(0).random((n, draws))) / draws
    tau, q = (a.reshape(-1) for a in Proposal(process.chain, 5, 1.0).quantile(u))
    x, segment = jnp.repeat(words, draws, axis=0), jnp.repeat(shown, draws, axis=0)

    @jax.jit
    def nelbo(x, segment, tau, inverse):
        z, _ = process.noised(jax.random.key(2), x, tau, segment >= 0)
        rate = process.nelbo_rate(denoise(z, segment), x, z, tau)
        return jnp.where(segment >= 0, rate, 0.0).sum(-1) * inverse

    nats = np.asarray(nelbo(x, segment, jnp.asarray(tau, jnp.float32), jnp.asarray(1 / q, jnp.float32)))
    nats = nats.reshape(n, draws)
    mean, se = nats.mean(1), nats.std(1, ddof=1) / math.sqrt(draws)
    share = counts / counts.sum()
    p = np.exp(-mean)
    return p.sum(), math.sqrt(((p * se) ** 2).sum()), share @ mean, math.sqrt(((share * se) ** 2).sum())


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    """A letter of two, one to three times: all ordered pairs of the six texts, one after the other."""
    texts = [[letter] * n for letter in (0, 1) for n in (1, 2, 3)]
    documents = [([], text) for first in texts for second in texts for text in (first, second)]
    return write_folder(tmp_path_factory.mktemp("language") / "tokens", documents[:2], documents)


@pytest.mark.parametrize("packing, padding", KINDS)
@pytest.mark.parametrize("levels, xi", [(1, 1.0), (2, 0.8)])
def test_bounds_sum_to_at_most_one_exactly_where_nothing_is_given(language, packing, padding, levels, xi):
    total, se, mean, mean_se = sum_over_language(language, packing, padding, levels, xi)
    if pipeline.given(packing, padding, False, False) == "nothing":
        assert 0.8 < total < 1 + 4 * se
    else:
        assert total > 1.5 + 4 * se  # a bound on -log p cannot do that
    if packing == "crop":  # entropies: of all six texts, or of the letter alone
        assert abs(mean - math.log(6 if padding == "end" else 2)) < 4 * mean_se


def test_given():
    table = {(packing, padding, prompts): pipeline.given(packing, padding, prompts, False)
             for packing in PACKINGS for padding in PADDINGS for prompts in (False, True)}
    assert {key for key, value in table.items() if value == "nothing"} == {
        ("concat", "end", False), ("concat", "hidden", False), ("crop", "end", False), ("crop", "end", True)}
    assert all(pipeline.given(packing, "hidden", True, True) == "nothing" for packing in PACKINGS)
    given = config_lib.default()
    given.data.prompt_field = "prompt"
    with pytest.raises(ConfigError, match="data.packing='concat': with data.prompt_field .* choose crop"):
        config_lib.resolve(given)
    given.data.padding = "nothing"
    with pytest.raises(ConfigError, match="data.padding='nothing': choose one of end, hidden"):
        config_lib.resolve(given)


# ----------------------------------------------------------------------------------------------------- a run


def as_trained_with(tmp_path, **data):
    """A copy of the tiny run that says it was trained on other rows, with the lengths [3, 7] in its data."""
    workdir = shutil.copytree(trained()[1], tmp_path / "run")
    saved = json.loads((workdir / "config.json").read_text())
    saved["data"].update(data, dir=str(workdir / "data"))
    (workdir / "config.json").write_text(json.dumps(saved))
    manifest = json.loads((workdir / "data" / "manifest.json").read_text())
    (workdir / "data" / "manifest.json").write_text(json.dumps(manifest | {"lengths": [[3, 1], [7, 3]]}))
    return str(workdir)


FEW = {"steps": 6, "batch_size": 8}


def test_lengths_are_drawn_where_they_were_given(tmp_path):
    told = hdlm_jax.load(as_trained_with(tmp_path, packing="crop", padding="hidden"))
    assert told.run.given == told.run.given_alone == "lengths"
    g = dataclasses.replace(told.run.config.generate, num_samples=4000)
    assert sampler.lengths_are(told.run, g) == "training"
    canvas = sampler.start_canvas(told.run, g, np.zeros((4000, 2), np.int32))
    assert set(canvas.length.tolist()) == {3, 7}
    assert abs((canvas.length == 7).mean() - 0.75) < 4 * math.sqrt(0.75 * 0.25 / 4000)
    mask = told.hierarchy.mask_id
    assert ((canvas.z == mask).sum(1) == canvas.length - 2).all() and (canvas.z[:, :2] == 0).all()
    longer = sampler.start_canvas(told.run, g, np.zeros((4000, 3), np.int32))
    assert (longer.length == 7).all()  # no text of 3 tokens begins with these
    assert (sampler.start_canvas(told.run, g, np.zeros((3, 9), np.int32)).length == 10).all()
    rows = told._draw(sampler.start_canvas(told.run, g, np.zeros((8, 0), np.int32)), dataclasses.replace(g, steps=6))
    assert set(rows["length"].tolist()) <= {3, 7}
    texts = told.generate(8, stop="", **FEW)
    assert {len(told.tokenizer.encode(t)) for t in texts if "�" not in t and "<|" not in t} <= {3, 7}
    assert sampler.lengths_are(told.run, dataclasses.replace(g, length=5)) == "given"
    shutil.rmtree(tmp_path / "run" / "data")
    with pytest.raises(ConfigError, match=r"generate.length=0: this run was told how long texts are.*generate.length"):
        told.generate(2, **FEW)
    (again,) = told.generate(1, length=5, stop="", **FEW)
    assert told.run.training_lengths() is None and again


def test_runs_say_what_they_are_given(tmp_path):
    assert model().run.given == "nothing" and model().run.given_alone == "lengths" and not model().run.ends
    assert model().nelbo(["ab"])[0]["given"] == "lengths"
    ends = hdlm_jax.load(as_trained_with(tmp_path, packing="crop", padding="end"))
    assert ends.run.ends and ends.run.given == ends.run.given_alone == "nothing"
    (found,) = ends.nelbo(["ab"])
    assert found["given"] == "nothing" and found["tokens"] == 3
    assert found["nats"] > 10 * math.log(257)  # 16 tokens are scored by a network that knows nothing
    assert sampler.lengths_are(ends.run, ends.run.config.generate) == "canvas"


def test_runs_of_earlier_versions_had_hidden_padding(tmp_path):
    workdir = as_trained_with(tmp_path, packing="crop")
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    del saved["data"]["padding"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(saved))
    assert loading.saved_config(workdir).data.padding == "hidden"
    meta = {"config": json.loads(json.dumps(read_recipe(trained()[0]).as_dict()))}
    del meta["config"]["data"]["padding"]
    now = read_recipe(trained()[0])
    with pytest.raises(ConfigError, match="data.padding='end' .there 'hidden'.: the checkpoint in here"):
        train.check_resume(now, meta, "here")
    train.check_resume(dataclasses.replace(now, data=dataclasses.replace(now.data, padding="hidden")), meta, "here")


def test_texts_end_at_their_first_end():
    eot = model().tokenizer.eot
    row = np.array([eot, 97, 98, eot, 99, eot], np.int32)
    assert sampler.ended(row, 1, eot, "end").tolist() == [eot, 97, 98, eot]
    assert sampler.ended(row, 4, eot, "end").tolist() == row.tolist()
    assert sampler.ended(row, 1, eot, "").tolist() == row.tolist()
    assert sampler.ended(row[:3], 1, eot, "end").tolist() == row[:3].tolist()
    assert sampler.text_of(model().tokenizer, np.array([97, eot]), "end") == "a"
    assert sampler.text_of(model().tokenizer, np.array([97, eot]), "") == "a<|endoftext|>"


def test_what_writes_text_cuts_it(monkeypatch):
    eot = model().tokenizer.eot

    def fake(canvas, g):
        z = getattr(canvas, "z", canvas).copy()
        free = z == model().hierarchy.mask_id
        z[free] = np.where(np.cumsum(free, 1)[free] == 2, eot, 98)  # b, end, b, b, ...
        return {"tokens": z, "length": np.full(len(z), g.length or z.shape[1])}

    monkeypatch.setattr(model(), "_draw", fake)
    assert model().generate(1, prompt="aa", **FEW) == ["aab"]
    assert model().generate(1, prompt="aa", stop="", length=6, **FEW) == ["aab<|endoftext|>bb"]
    assert model().infill("a[MASK:3]", **FEW) == ["ab"]
    assert model().infill("a[MASK:3]c", **FEW) == ["ab<|endoftext|>bc"]  # what is given behind it stays
    assert model().infill("a[MASK:1]c[MASK:3]", **FEW) == ["abc"]
    with pytest.raises(ConfigError, match="generate.stop='eot': choose one of end"):
        model().generate(stop="eot")


def test_generate_says_how_much_it_cut(tmp_path):
    recipe, source = trained()
    workdir = shutil.copytree(source, tmp_path / "run")
    config = read_recipe(recipe)
    g = dataclasses.replace(config.generate, num_samples=96, batch_size=96, steps=2, trajectories=0, seed=1)
    config = dataclasses.replace(config, generate=g)
    result = generate.generate(config, str(workdir))
    lines = [json.loads(line) for line in (workdir / "samples.jsonl").read_text().splitlines()]
    eot = model().tokenizer.eot
    assert result["ended"] == sum(line["ids"][-1] == eot for line in lines) > 0  # 1,536 tokens of nearly uniform words
    assert result["cut_tokens"] == 96 * SEQ_LEN - sum(len(line["ids"]) for line in lines) > 0
    assert all(line["ids"].count(eot) == (line["ids"][-1] == eot) for line in lines)
    assert not any("<|endoftext|>" in line["text"] for line in lines)
    assert result["lengths"] == "canvas"


def test_results_say_what_they_are_given_and_are_not_mixed(tmp_path):
    recipe, source = trained()
    for name, padding in (("ends", "end"), ("hidden", "hidden"), ("again", "end")):
        (tmp_path / name).mkdir()
        workdir = as_trained_with(tmp_path / name, packing="crop", padding=padding)
        config = read_recipe(recipe)
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, packing="crop", padding=padding))
        evaluate.evaluate(config, workdir)
        generate.generate(config, workdir)
    found = {name: json.loads((tmp_path / name / "run" / "evaluate.json").read_text())
             for name in ("ends", "hidden")}
    assert (found["ends"]["given"], found["hidden"]["given"]) == ("nothing", "lengths")
    assert found["ends"]["tokens"] == found["hidden"]["tokens"]  # of text
    ends, hidden, again = (str(tmp_path / name / "run") for name in ("ends", "hidden", "again"))
    assert compare.paired_difference(ends, again)[0] == 0
    with pytest.raises(ValueError, match="padding differs"):
        compare.paired_difference(ends, hidden)
    for arguments in ([ends, hidden], [f"--html={tmp_path / 'page.html'}", ends, hidden]):
        with pytest.raises(SystemExit, match="is given nothing, .*lengths: bounds given lengths lie below"):
            report.main(arguments)
    page.write_run_page(hidden)
    assert "NELBO, given lengths" in (tmp_path / "hidden" / "run" / "report.html").read_text()


def test_lengths_are_kept_in_the_manifest(tmp_path):
    folder = write_folder(tmp_path / "t", [([1, 2], [3]), ([], [3]), ([1], [3, 4])], [([], [0])], prompts=True)
    facts = json.loads((folder / prepare.MANIFEST).read_text())
    assert prepare.document_lengths(folder, facts["splits"]["train"]) == [[2, 2], [3, 1]]
    del facts["lengths"]  # of a folder made before
    (folder / prepare.MANIFEST).write_text(json.dumps(facts))
    assert prepare.load_manifest(folder).lengths == [[2, 2], [3, 1]]
    made = prepare.load_manifest(trained()[1] / "data")
    assert sum(count for _, count in made.lengths) == made.train_documents
    assert sum(size * count for size, count in made.lengths) == made.train_scored_tokens


def test_a_run_starts_from_another_without_its_settings(tmp_path):
    recipe, base = trained()
    given = config_lib.default()
    given.train.init_from = str(base)
    given.optimizer.lr = 1e-4
    config = config_lib.resolve(loading.with_base(given, str(tmp_path)))
    was = loading.saved_config(str(base))
    assert (config.tokenizer, config.hierarchy, config.model) == (was.tokenizer, was.hierarchy, was.model)
    assert config.diffusion == was.diffusion and config.optimizer.lr == 1e-4 and config.data.source == "embedded"
    given.model.seq_len, given.diffusion.weighting = 8, "none"  # these may be others
    assert config_lib.resolve(loading.with_base(given, str(tmp_path))).model.seq_len == 8
    given.model.width, given.hierarchy.clusters = 64, (4,)
    with pytest.raises(ConfigError, match=r"train.init_from=.*hierarchy.clusters=\(4,\) \(there \(8,\)\); "
                                          r"model.width=64 \(there 32\); leave them out"):
        loading.with_base(given, str(tmp_path))
    given.train.init_from = str(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="train.init_from='.*nowhere': no run there"):
        loading.with_base(given, str(tmp_path))
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------- trained toys


def toy(tmp_path, records, padding, steps, **data):
    """A byte-level MDLM of width 64 and 2 blocks trained on records; its model."""
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    c = config_lib.default()
    c.data.source, c.data.files = "files", (str(tmp_path / "records.jsonl"),)
    c.data.packing, c.data.padding = "crop", padding
    c.data.update(data)
    c.tokenizer.kind, c.tokenizer.vocab_size = "bytes", 257
    c.hierarchy.clusters = (1,)
    c.diffusion.weighting = "constant"
    c.model.width, c.model.blocks, c.model.heads = 64, 2, 2
    c.model.seq_len = 32 if data else 16
    c.optimizer.lr, c.optimizer.warmup = 2e-3, 50
    c.train.steps, c.train.batch_size, c.train.log_every, c.checkpoint.every = steps, 64, 500, 10**6
    config = config_lib.resolve(c)
    train.train(config, str(tmp_path / padding))
    return hdlm_jax.load(str(tmp_path / padding))


def test_stages_know_the_padding():
    config = read_recipe(trained()[0])
    data = dataclasses.replace(config.data, packing="crop", padding="hidden")
    folder = trained()[1] / "data"
    text = stages.PreparedData(str(folder), prepare.load_manifest(folder), model().tokenizer)
    config = dataclasses.replace(config, data=data)
    assert "segment" in stages.batches_of(config, text).example()
    config = dataclasses.replace(config, data=dataclasses.replace(data, padding="end"))
    assert "tokens" in stages.batches_of(config, text).example()


@pytest.mark.slow
@pytest.mark.parametrize("padding", ["end", "hidden"])
def test_a_trained_run_sums_to_at_most_one(tmp_path, padding):
    """10 letters, 1 to 8 times: 80 texts, entropy ln 80 = 4.382 nats."""
    rng = np.random.default_rng(0)
    records = [{"text": "bdkmptrsvz"[rng.integers(10)] * int(rng.integers(1, 9))} for _ in range(4000)]
    made = toy(tmp_path, records, padding, 2000)
    found = made.nelbo([letter * n for letter in "bdkmptrsvz" for n in range(1, 9)], draws=1024)
    nats, se = (np.array([f[name] for f in found]) for name in ("nats", "se"))
    p = np.exp(-nats - se**2 / 2)  # noise in the exponent raises the mean
    total, error = p.sum(), math.sqrt(((p * se) ** 2).sum())
    mean, mean_se = nats.mean(), math.sqrt((se**2).sum()) / 80
    assert {f["given"] for f in found} == {"nothing" if padding == "end" else "lengths"}
    if padding == "end":
        assert total < 1 + 4 * error and mean > math.log(80) - 4 * mean_se
        assert mean < 5.8  # it has learnt something
    else:
        assert total > 2 + 4 * error and mean < math.log(80) - 4 * mean_se


@pytest.mark.slow
@pytest.mark.parametrize("padding", ["end", "hidden"])
def test_answers_cost_their_entropy_where_nothing_is_given(tmp_path, padding):
    """The letter is in the prompt, how often it comes is not: ln 8 = 2.079 nats an answer."""
    rng = np.random.default_rng(0)
    letters = ["bdkmptrsvz"[i] for i in rng.integers(10, size=4000)]
    records = [{"prompt": f"say {letter} =", "text": letter * int(rng.integers(1, 9))} for letter in letters]
    toy(tmp_path, records, padding, 2000, prompt_field="prompt")
    workdir = str(tmp_path / padding)
    config = configured(workdir, draws=64, checkpoint="latest")
    found = evaluate.evaluate(config, workdir)
    nats = np.load(f"{workdir}/evaluate_rows.npz")["nats"]
    mean, se = nats.mean(), found["se"] * found["tokens"] / len(nats)
    if padding == "end":
        assert math.log(8) - 4 * se < mean < 3 and found["given"] == "nothing"
    else:
        assert mean + 4 * se < 0.5 and found["given"] == "lengths"  # the length was a gift


def configured(workdir, **settings):
    config = loading.saved_config(workdir)
    return dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, **settings))


@pytest.mark.slow
def test_answers_without_their_lengths(tmp_path):
    """A tuned run answers by itself; with hidden padding it cannot, unless it is told how long the answer is."""
    rng, names = np.random.default_rng(0), ["cat", "dog", "owl", "pig", "hen", "fox"]

    def pair(name, n, letter):
        return {"prompt": f"{name}: {n} {letter} =", "response": " " + letter * n}

    records = [pair(names[rng.integers(6)], int(rng.integers(1, 11)), "bdkmpt"[rng.integers(6)]) for _ in range(4000)]
    asked = [pair(names[i % 6], 1 + i % 10, "bdkmpt"[(i // 2) % 6]) for i in range(36)]

    def right(made, method, options, **settings):
        return sum(made.generate(1, steps=32, prompt=r["prompt"], method=method, options=options,
                                 **{k: v(r) for k, v in settings.items()})[0] == r["prompt"] + r["response"]
                   for r in asked)

    fields = dict(prompt_field="prompt", text_field="response")
    made = toy(tmp_path, records, "end", 1500, **fields)
    for method, options in (("ancestral", ""), ("entropy", ""), ("max_prob", "block=8"), ("daedal", ""), ("eoser", "")):
        texts = made.generate(1, steps=32, prompt=[r["prompt"] for r in asked], method=method, options=options)
        assert sum(t == r["prompt"] + r["response"] for t, r in zip(texts, asked, strict=True)) >= 34, method
    told = toy(tmp_path, records, "hidden", 1500, **fields)
    assert right(told, "entropy", "") <= 8  # lengths are drawn
    whole = lambda r: len((r["prompt"] + r["response"]).encode()) + 1  # noqa: E731
    assert right(told, "entropy", "", length=whole) >= 34
