"""What was run: the LM, the SAE, the recipe, and the machine."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ksparse import config as recipes
from ksparse.config import ActsConfig, Recipe
from ksparse.report.sections.base import Section
from ksparse.report.source import RunSource, is_number
from ksparse.report.tables import format_duration, format_plain

TEMPLATE = """\
{% from "parts.html.jinja" import facts_list %}
{{ facts_list(facts.run) }}
{% if facts.machine %}
<h3>Machine and versions</h3>
{{ facts_list(facts.machine) }}
{% endif %}
{% if facts.changed %}
<details>
<summary>Differences from the default recipe ({{ facts.changed | length }})</summary>
<ul class="plain">
{% for change in facts.changed %}
<li><code>{{ change }}</code></li>
{% endfor %}
</ul>
</details>
{% endif %}
<details>
<summary>{{ facts.title }}</summary>
<pre class="code" tabindex="0">
{% for line in facts.recipe %}
{{ line }}
{% endfor %}
</pre>
</details>
"""


def read_facts(source: RunSource) -> dict[str, Any]:
    """Return what was trained on what, and on which machine."""
    recipe = source.recipe
    if recipe is None:
        return {
            "run": describe_judged(source),
            "machine": {},
            "recipe": source.run.subject_file.read_text(encoding="utf-8").splitlines(),
            "title": source.run.subject_file.name,
            "changed": [],
        }
    text = source.run.recipe_file.read_text(encoding="utf-8")
    return {
        "run": describe_run(source, recipe),
        "machine": describe_machine(source),
        "recipe": text.splitlines(),
        "title": "The whole recipe",
        "changed": recipes.differences(recipes.to_dict(Recipe()), recipes.to_dict(recipe)),
    }


def describe_acts(acts: ActsConfig) -> dict[str, str]:
    """Return the LM, site, text and contexts as text, by name."""
    text = (acts.text, acts.text_config, acts.text_split)
    return {
        "Subject LM": acts.lm + ("" if acts.revision == "main" else f" at {acts.revision}"),
        "Site": acts.site,
        "Text": " · ".join(part for part in text if part and part != "train"),
        "Contexts": f"{acts.context} tokens, borders {acts.borders}, BOS {acts.bos}, positions "
        f"kept: {acts.keep}",
    }


def describe_judged(source: RunSource) -> dict[str, str]:
    """Return what is known of an SAE that was not trained here, as text, by name."""
    subject = source.subject
    judged = subject.judged
    if judged is None:
        return {}
    parts = [judged.source, judged.subfolder, judged.revision and f"revision {judged.revision}"]
    facts = {
        "Autoencoder": " · ".join(part for part in parts if part),
        "Format": judged.format,
        "Weights": f"SHA-256 {judged.weights_sha256[:16]}…",
        **describe_acts(subject.acts),
        "Latents": f"{subject.n_latents:,}, of width {subject.d_model:,}",
        "Activation": subject.activation_name,
        "Active latents per token": subject.bound,
        "Normalisation": subject.normalize,
    }
    if judged.step is not None:
        facts["Step of its training"] = f"{judged.step:,}"
    if judged.forced:
        facts["Forced"] = "yes: its own metadata may contradict the LM, site or contexts"
    return facts


def describe_run(source: RunSource, recipe: Recipe) -> dict[str, str]:
    """Return the main settings of a run's recipe as text, by name."""
    acts, sae, tokens_trained = recipe.acts, recipe.sae, source.tokens_trained
    planned_tokens = recipe.steps * recipe.batch
    options = [f"{key} {value}" for key, value in asdict(sae.activation).items() if key != "kind"]
    return {
        **describe_acts(acts),
        "Latents": f"{sae.n_latents:,}",
        "Activation": ", ".join([source.activation, *options]),
        "Active latents per token": f"k = {sae.k}" if sae.activation.kind == "topk" else sae.bound,
        "Training": f"{tokens_trained:,} tokens in batches of {recipe.batch:,}"
        + (f" (the recipe has {planned_tokens:,})" if tokens_trained < planned_tokens else ""),
        "Normalisation": acts.normalize,
        "Learning rate": f"{recipe.lr:.3g}" + ("" if recipe.optim.lr else ", from the 1/√n law"),
        "AuxK": f"weight {sae.auxk_coef:.3g}, dead after {recipe.dead_after:,} tokens"
        if sae.uses_auxk
        else "off",
        "Weights": f"average with decay {recipe.ema:.4g}" if recipe.ema else "the last step's",
        "Seed": str(recipe.seed),
    }


def describe_machine(source: RunSource) -> dict[str, str]:
    """Return the hardware, the versions and the time that the run recorded."""
    environment, last = source.environment, source.metrics[-1] if source.metrics else {}
    facts = {
        "Hardware": describe_hardware(environment),
        "System": environment.get("platform"),
        "Versions": format_plain(environment.get("versions") or {}),
    }
    if is_number(last.get("seconds")):
        facts["Time"] = format_duration(last["seconds"])
    if is_number(last.get("tokens_per_s")):
        facts["Speed"] = f"{last['tokens_per_s']:,.0f} tokens per second"
    return {key: str(value) for key, value in facts.items() if value}


def describe_hardware(environment: dict[str, Any]) -> str:
    """Return the GPUs, the processor and the CPU threads of a recorded environment."""
    threads = environment.get("threads")
    parts = [
        format_plain(environment.get("gpus") or ""),
        format_plain(environment.get("processor") or ""),
        f"{threads} CPU thread{'' if threads == 1 else 's'}" if threads else "",
    ]
    return ", ".join(part for part in parts if part)


SECTION = Section("subject", "What was run", read_facts, TEMPLATE)
