"""Every choice, its default and its rules, as frozen dataclasses.

A file in configs/ calls `default()`, changes what it wants and returns the ConfigDict; absl flags override it
(`--config.train.steps=100`); `resolve` checks the whole and freezes it before anything runs.
"""

from __future__ import annotations

import dataclasses
import os
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from ml_collections import config_dict

from hdlm_jax.config import sections
from hdlm_jax.config.rules import choice, expand, rule

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# Settings that are paths, or begin with one: `resolve` expands ~ and $VARIABLES in them (and main in --workdir).
PATHS = ("data.files", "data.validation", "data.dir", "tokenizer.file", "hierarchy.embeddings", "train.init_from",
         "evaluate.tasks_data", "evaluate.files", "evaluate.lm1b", "generate.schema", "generate.features",
         "generate.helper", "generate.judge", "released.weights", "released.clusters", "serve.token")
RETIRED = ("hierarchy.keep_single",)  # settings of before, which saved configs still have: `resolve` passes them over

Given: TypeAlias = config_dict.ConfigDict | Mapping[str, Any]  # sections of settings: of a recipe, or saved
Section = TypeVar("Section", bound="DataclassInstance")


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of a run, by section."""

    data: sections.DataConfig = sections.DataConfig()
    tokenizer: sections.TokenizerConfig = sections.TokenizerConfig()
    hierarchy: sections.HierarchyConfig = sections.HierarchyConfig()
    diffusion: sections.DiffusionConfig = sections.DiffusionConfig()
    model: sections.ModelConfig = sections.ModelConfig()
    decoder: sections.DecoderConfig = sections.DecoderConfig()
    optimizer: sections.OptimizerConfig = sections.OptimizerConfig()
    train: sections.TrainConfig = sections.TrainConfig()
    evaluate: sections.EvaluateConfig = sections.EvaluateConfig()
    generate: sections.GenerateConfig = sections.GenerateConfig()
    parallel: sections.ParallelConfig = sections.ParallelConfig()
    checkpoint: sections.CheckpointConfig = sections.CheckpointConfig()
    released: sections.ReleasedConfig = sections.ReleasedConfig()
    serve: sections.ServeConfig = sections.ServeConfig()
    tune: sections.TuneConfig = sections.TuneConfig()

    def check(self) -> None:
        """Raises ConfigError at the first broken rule, cross-field ones last."""
        for field in dataclasses.fields(self):
            getattr(self, field.name).check()
        n = max(self.hierarchy.clusters, default=1)
        for name, most in (("clusters", n), ("head_clusters", self.hierarchy.head_clusters)):
            rule(most <= self.tokenizer.vocab_size, f"hierarchy.{name}", getattr(self.hierarchy, name),
                 f"more clusters than the tokenizer.vocab_size={self.tokenizer.vocab_size} words")
        levels = 1 + sum(c > 1 for c in self.hierarchy.clusters)
        process = self.diffusion.process
        rule(process == "hierarchical" or levels == 1, "hierarchy.clusters", self.hierarchy.clusters,
              f"diffusion.process={process!r} knows no clusters; give (1,)")
        rule(process != "autoregressive" or not self.model.time_conditioning, "model.time_conditioning", True,
              "diffusion.process='autoregressive' has no time; give False")
        rule(self.data.feature_places < self.model.seq_len, "data.feature_places", self.data.feature_places,
             f"must be fewer than the model.seq_len={self.model.seq_len} places of a row")
        rule(not (self.data.feature_places and self.decoder.shifted), "decoder.shifted", True,
             "the first token behind features would be predicted by one of them: does not go with data.features_field")
        rule(not self.evaluate.exact_match or bool(self.data.prompt_field or self.data.features_field),
             "evaluate.exact_match", self.evaluate.exact_match,
             "is of texts behind something given: needs data.prompt_field or data.features_field")
        self.diffusion.level_rates(levels)
        self.tune.check_with(self.train, self.data, self.optimizer)
        self._check_objective(levels)
        self._check_map(levels)
        self._check_channel()
        self._check_latents()
        self._check_drafts()
        if self.model.block:
            self._check_blocks()
        self._check_loops()
        if self.model.trunk == "decoder":
            self.decoder.check_with(self.model)
        else:
            rule(self.decoder == sections.DecoderConfig(), "model.trunk", self.model.trunk,
                 "the settings of decoder are for model.trunk='decoder'")
        classes = self.hierarchy.head_clusters
        rule(self.model.head == "flat" or levels > 1 or classes > 0, "model.head", self.model.head,
              "needs clusters of words: this process has none, give hierarchy.head_clusters, or choose 'flat'")
        rule(not classes or self.model.head == "factorised", "hierarchy.head_clusters", classes,
             "goes with model.head='factorised'")
        rule(not classes or levels == 1, "hierarchy.head_clusters", classes,
             f"the head's classes are the process's own, hierarchy.clusters={self.hierarchy.clusters}; give 0")
        rule(not self.train.recluster_every or levels > 1, "train.recluster_every", self.train.recluster_every,
             f"hierarchy.clusters={self.hierarchy.clusters} has no clusters to make anew; give 0")
        rule(not self.decoder.softcap or self.model.head == "flat", "decoder.softcap", self.decoder.softcap,
             "is of a flat head's logits; give 0, or model.head='flat'")
        rule(process != "sedd" or self.model.head == "flat", "model.head", self.model.head,
             "diffusion.process='sedd' needs scores that are not normalised; choose 'flat'")
        rule(self.generate.length <= self.model.seq_len, "generate.length", self.generate.length,
              f"must be at most model.seq_len={self.model.seq_len}")
        rule(process == "gidd" or not self.generate.corrections, "generate.corrections", self.generate.corrections,
              f"goes with diffusion.process='gidd', not {process!r}")
        plain = (bool(self.decoder.loops) if self.generate.method == "diagonal" else
                 self.generate.method == "ancestral" and not self.generate.options)
        rule(process in ("hierarchical", "sedd") or plain, "generate.method", self.generate.method,
              f"diffusion.process={process!r} has no levels that drop; choose 'ancestral' without options")
        low = 1 / n
        rule(self.diffusion.xi == 1 or low < self.diffusion.xi, "diffusion.xi", self.diffusion.xi,
              f"must lie in (1/n, 1] = ({low:.4g}, 1] for n = {n} clusters"
              if n > 1 else "must be 1 when there is a single cluster (MDLM)")

    def _check_objective(self, levels: int) -> None:
        """train.objective beside the process and the weights."""
        objective, d = self.train.objective, self.diffusion
        if objective in sections.LESSONS:
            rule(not self.tune.objective, "tune.objective", self.tune.objective,
                 f"has a loss of its own, as has train.objective={objective!r}; give one of them")
            rule(not self.data.features_field, "data.features_field", self.data.features_field,
                 f"is not built for train.objective={objective!r}")
        if objective in ("certainty", "adjust"):
            rule(d.xi == 1, "diffusion.xi", d.xi, f"must be 1 with train.objective={objective!r}: a text decides its "
                 "clusters")
            rule(self.data.packing == "concat" or (self.data.packing, self.data.padding) == ("crop", "end"),
                 "data.packing", self.data.packing, f"rows of train.objective={objective!r} are whole: choose concat, "
                 "or crop with data.padding='end'")
        rule(objective not in ("certainty", "adjust") or not self.model.block, "model.block", self.model.block,
             f"is not built for train.objective={objective!r}; give 0")
        if objective == "energy":
            rule(self.model.trunk == "dit" and not self.model.block, "train.objective", objective,
                 "is built for model.trunk='dit' without blocks")
        rule(objective == "nelbo" or d.process == "hierarchical", "train.objective", objective,
             f"is of masks and clusters; with diffusion.process={d.process!r} choose 'nelbo'")
        rule(objective != "rate" or levels == 1, "train.objective", objective,
             f"knows no clusters, and hierarchy.clusters={self.hierarchy.clusters} has some; choose 'count'")
        rule(objective != "rate" or d.weighting == "none", "diffusion.weighting", d.weighting,
             "train.objective='rate' has the bound's own weights; give 'none', or choose train.objective='nelbo'")

    def _check_map(self, levels: int) -> None:
        """hierarchy.map beside what it needs, and what is not built for it."""
        learned, d, m, t, g = self.hierarchy.map == "learned", self.diffusion, self.model, self.train, self.generate
        rule(learned or t.objective != "paired", "train.objective", t.objective, "goes with hierarchy.map='learned'")
        if not learned:
            return
        rule(levels > 1 and d.process == "hierarchical", "hierarchy.map", "learned",
             f"is of words to clusters; diffusion.process={d.process!r} with hierarchy.clusters="
             f"{self.hierarchy.clusters} has none, give 'hard'")
        rule(d.xi <= 0.999, "diffusion.xi", d.xi, "a learned map starts from it; give at most .999, as .9")
        for name, value, only in (
                ("train.objective", t.objective, "paired"), ("diffusion.weighting", d.weighting, "none"),
                ("diffusion.force_transition", d.force_transition, "cavity"),
                ("diffusion.hard_training", d.hard_training, False), ("model.head", m.head, "flat"),
                ("model.trunk", m.trunk, "dit"), ("model.block", m.block, 0),
                ("train.recluster_every", t.recluster_every, 0), ("train.adapt", t.adapt, False),
                ("tune.objective", self.tune.objective, ""), ("generate.clusters", g.clusters, "exact")):
            rule(value == only, name, value, f"hierarchy.map='learned' is for {only!r} alone")
        rule(g.force_transition in ("", "cavity"), "generate.force_transition", g.force_transition,
             "hierarchy.map='learned' is for 'cavity' alone")

    def _check_channel(self) -> None:
        """diffusion.channel beside what it is not built for."""
        d, m, t, g = self.diffusion, self.model, self.train, self.generate
        rule(not g.channel_told or bool(d.channel) and d.channel_times == "shared", "generate.channel_told",
             g.channel_told, "goes with diffusion.channel and channel_times='shared'")
        if not d.channel:
            return
        for name, value, only in (
                ("diffusion.process", d.process, "hierarchical"), ("hierarchy.map", self.hierarchy.map, "hard"),
                ("diffusion.force_transition", d.force_transition, "cavity"), ("model.head", m.head, "flat"),
                ("model.trunk", m.trunk, "dit"), ("model.block", m.block, 0), ("train.objective", t.objective, "nelbo"),
                ("train.recluster_every", t.recluster_every, 0), ("train.adapt", t.adapt, False),
                ("tune.objective", self.tune.objective, ""), ("generate.options", g.options, ""),
                ("generate.clusters", g.clusters, "exact"), ("evaluate.decodings", self.evaluate.decodings, ())):
            rule(value == only, name, value, f"diffusion.channel={d.channel:g} is for {only!r} alone")
        on_ladder = ("first_hitting", "max_prob", "margin", "entropy")
        methods = ("ancestral", *on_ladder) if d.channel_times == "token" else ("ancestral",)
        rule(g.method in methods, "generate.method", g.method,
             f"diffusion.channel={d.channel:g} is for {', '.join(map(repr, methods))} alone")
        rule(g.force_transition in ("", "cavity"), "generate.force_transition", g.force_transition,
             f"diffusion.channel={d.channel:g} is for 'cavity' alone")

    def _check_latents(self) -> None:
        """diffusion.latents beside the sizes it needs and what it is not built for."""
        d, m, t, g = self.diffusion, self.model, self.train, self.generate
        if not d.latents:
            return
        rule(m.seq_len % d.latents == 0, "diffusion.latents", d.latents,
             f"must divide the model.seq_len={m.seq_len} tokens of a row")
        each = m.seq_len // d.latents
        rule(d.latents_width % each == 0, "diffusion.latents_width", d.latents_width,
             f"must be a multiple of the {each} tokens of a latent (model.seq_len / diffusion.latents)")
        for name, value, only in (
                ("diffusion.process", d.process, "hierarchical"), ("hierarchy.map", self.hierarchy.map, "hard"),
                ("diffusion.channel", d.channel, 0.0), ("diffusion.weighting", d.weighting, "none"),
                ("diffusion.hard_training", d.hard_training, False), ("model.head", m.head, "flat"),
                ("model.trunk", m.trunk, "dit"), ("model.block", m.block, 0), ("train.objective", t.objective, "nelbo"),
                ("train.recluster_every", t.recluster_every, 0), ("train.adapt", t.adapt, False),
                ("train.draft_share", t.draft_share, 0.0), ("tune.objective", self.tune.objective, ""),
                ("data.features_field", self.data.features_field, ""), ("generate.length", g.length, 0),
                ("evaluate.decodings", self.evaluate.decodings, ())):
            rule(value == only, name, value, f"diffusion.latents={d.latents} is for {only!r} alone")
        rule(self.data.packing != "documents", "data.packing", "documents",
             f"diffusion.latents={d.latents} are of rows whose tokens all see each other; choose concat or crop")
        rule(g.method in sections.LATENT_METHODS, "generate.method", g.method,
             f"diffusion.latents={d.latents} is for {', '.join(sections.LATENT_METHODS)} alone")

    def _check_drafts(self) -> None:
        """train.draft_share beside what it is not built for."""
        t = self.train
        if not t.draft_share:
            return
        for name, value, only in (
                ("diffusion.process", self.diffusion.process, "hierarchical"), ("hierarchy.map", self.hierarchy.map,
                 "hard"), ("diffusion.channel", self.diffusion.channel, 0.0), ("model.block", self.model.block, 0),
                ("tune.objective", self.tune.objective, "")):
            rule(value == only, name, value, f"train.draft_share={t.draft_share:g} is for {only!r} alone")
        rule(t.objective not in sections.LESSONS, "train.objective", t.objective,
             f"has a loss of its own, and train.draft_share={t.draft_share:g} is of texts; give 0")

    def _check_blocks(self) -> None:
        """model.block beside what does not know two copies of a text."""
        block, n = self.model.block, self.decoder
        rule(self.diffusion.process == "hierarchical", "model.block", block,
             f"is of masks and clusters; diffusion.process={self.diffusion.process!r} has no blocks, give 0")
        for name, none in (("window", 0), ("shifted", False), ("context", "full")):
            rule(getattr(n, name) == none, f"decoder.{name}", getattr(n, name),
                 f"is not built for model.block={block}; give {none!r}, or model.block=0")
        rule(not self.train.open_steps, "train.open_steps", self.train.open_steps,
             f"is not built for model.block={block}; give 0")
        rule(self.tune.objective in ("", "score"), "tune.objective", self.tune.objective,
             "hides tokens of one copy of a text, where blocks see hidden ones before them: no bound of "
             f"model.block={block}; choose 'score'")

    def _check_loops(self) -> None:
        """decoder.loops beside what it is not built for."""
        loops, n, m = self.decoder.loops, self.decoder, self.model
        rule(bool(loops) or not self.evaluate.loops, "evaluate.loops", self.evaluate.loops, "goes with decoder.loops")
        if not loops:
            return
        for name, value, only in (
                ("diffusion.process", self.diffusion.process, "autoregressive"), ("decoder.experts", n.experts, 0),
                ("decoder.window", n.window, 0), ("decoder.lora", n.lora, 0), ("model.order", m.order, False),
                ("model.block_lengths", m.block_lengths, False), ("tune.objective", self.tune.objective, ""),
                ("data.features_field", self.data.features_field, ""), ("released.layout", self.released.layout, "")):
            rule(value == only, name, value, f"decoder.loops={loops} is for {only!r} alone")

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_save(self) -> dict[str, Any]:
        """As a workdir keeps it, where its data can be found from anywhere."""
        folder = self.data.dir and os.path.abspath(self.data.dir)
        return dataclasses.replace(self, data=dataclasses.replace(self.data, dir=folder)).as_dict()


def default() -> config_dict.ConfigDict:
    """All defaults as a ConfigDict with typed, overridable fields."""
    return config_dict.ConfigDict(Config().as_dict())


def resolve(given: Given) -> Config:
    """A checked, frozen Config from a ConfigDict (or plain nested dict); ~ and $VARIABLES in its PATHS are expanded.

    Raises:
      ConfigError: unknown names, wrong types, broken rules.
    """
    values_of = _plain(given)
    built = {}
    for name in values_of:
        check_name(name)
    for name, section in _SECTIONS.items():
        values = values_of.get(name, {})
        rule(isinstance(values, Mapping), f"config.{name}", values,
             f"is a section; its settings are {', '.join(_names(section))}")
        section = change(name, section, {k: v for k, v in values.items() if f"{name}.{k}" not in RETIRED})
        paths = [key for whole, _, key in (path.partition(".") for path in PATHS) if whole == name]
        built[name] = dataclasses.replace(section, **{key: expand(getattr(section, key)) for key in paths})
    if built["data"].files:
        built["data"] = dataclasses.replace(built["data"], source="files")
    if built["tokenizer"].vocab_size == sections.TokenizerConfig.vocab_size:  # the default is gpt2's
        words = sections.FIXED_WORDS.get(built["tokenizer"].kind, sections.TokenizerConfig.vocab_size)
        built["tokenizer"] = dataclasses.replace(built["tokenizer"], vocab_size=words)
    if built["hierarchy"].clusters == (0,):
        clusters = sections.default_clusters(built["tokenizer"].vocab_size)
        built["hierarchy"] = dataclasses.replace(built["hierarchy"], clusters=clusters)
    config = Config(**built)
    config.check()
    return config


_SECTIONS: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(Config)}  # at their defaults
_INHERITED = ("tokenizer", "hierarchy", "diffusion", "model", "decoder")
_MAY_DIFFER = ("diffusion", "model.seq_len", "model.dropout", "model.embeddings", "model.dtype", "model.remat",
               "model.attention", "model.block", "model.order", "model.block_lengths")
_ADAPTED = ("hierarchy", "diffusion", "model.head", "model.prototypes", "model.seq_len", "model.dtype",
            "model.param_dtype", "model.remat", "model.attention", "decoder.context", "decoder.block",
            "decoder.shifted", "decoder.lora")  # as given with train.adapt


def inherit(given: Given, base: Config, name: str) -> dict[str, Any]:
    """What is given (a ConfigDict or nested dict), with what makes the model taken from the run `base` it starts from.

    A setting left at its default is the base's; of those given, the process, the loss and what does not change the
    weights' meaning may differ. With train.adapt what _ADAPTED names is as given.

    Raises:
      ConfigError: all settings that contradict the base, in one line; `name` is what to call it.
    """
    out = _plain(given)
    wrong = []
    own = _ADAPTED if out.get("train", {}).get("adapt") else ()
    for section in _INHERITED:
        values = dict(out.get(section, {}))
        for field in dataclasses.fields(getattr(base, section)):
            was, key = getattr(getattr(base, section), field.name), f"{section}.{field.name}"
            value = values.get(field.name, field.default)
            if key in own or section in own:
                continue
            if value == field.default:
                values[field.name] = was
            elif (expand(value) if key in PATHS else value) != was and not {key, section} & set(_MAY_DIFFER):
                wrong.append(f"{key}={value!r} (there {was!r})")
        out[section] = values
    if own and out["model"].get("head", "flat") != "flat":
        out["model"]["tied"] = False
    rule(not wrong, "train.init_from", name, f"that run has other settings than given here: {'; '.join(wrong)}; leave "
                                              "them out, and the run's own are taken")
    return out


def change(name: str, section: Section, values: Mapping[str, Any]) -> Section:
    """A section with some settings changed: names and types are checked, rules are not (`check` does).

    Raises:
      ConfigError: unknown names, wrong types.
    """
    types = typing.get_type_hints(type(section))
    for key in values:
        check_name(f"{name}.{key}")
    return dataclasses.replace(section, **{k: _typed(f"{name}.{k}", v, types[k]) for k, v in values.items()})


def check_name(name: str) -> None:
    """ConfigError unless `name` is a section ("train") or a setting ("train.steps") of the config."""
    section, dot, key = name.partition(".")
    known = _names(_SECTIONS[section]) if section in _SECTIONS and dot else None
    here, choices = (key, known) if known else (section, tuple(_SECTIONS))
    choice(name, here, choices, f"config.{name}: no such {'setting' if known else 'section'};")


def _plain(given: Given) -> dict[str, Any]:
    return given.to_dict() if isinstance(given, config_dict.ConfigDict) else dict(given)


def _names(section: Any) -> tuple[str, ...]:
    return tuple(f.name for f in dataclasses.fields(section))


def _typed(name: str, value: Any, kind: Any) -> Any:
    """A value as a setting of type `kind` holds it: whole numbers as floats, lists as tuples."""
    if typing.get_origin(kind) is tuple:
        rule(isinstance(value, list | tuple), name, value, "must be a tuple, as in (64,) or (256, 16)")
        return tuple(_typed(name, v, typing.get_args(kind)[0]) for v in value)
    if kind is float and type(value) is int and abs(value) < 2**53:
        return float(value)
    rule(type(value) is kind, name, value, f"must be of type {kind.__name__}")
    rule(kind is not float or abs(value) < 2.0**127, name, value, "must be a finite number, in float32 too")
    return value
