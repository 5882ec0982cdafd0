"""The model card of a compressed checkpoint."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from optimum_moe.checkpoint.names import data_set_name
from optimum_moe.formats.rounded import ROUNDED
from optimum_moe.plan import CompressionPlan
from optimum_moe.reporting.card_quality import eval_results, quality_section
from optimum_moe.reporting.loads_in import LoadsIn, markdown
from optimum_moe.reporting.papers import papers
from optimum_moe.reporting.preview import Preview
from optimum_moe.reporting.versions import versions

_TEMPLATE = """---
{metadata}
---

# {title}

`{base}`, compressed by optimum_moe: {sentence}

## Use

{use}

## Size

| | original | this model | ratio |
|---|---:|---:|---:|
{rows}

Experts of each MoE block: {experts}. FLOPs are 2 x multiply-adds of all weight matmuls for one token.{stable_rank}

{loads_in}

{quality}

## Limits

{limits}

## How it was made

```yaml
{recipe}
```

Stages: {stages}. Calibration: {calibration}. Seed: {seed}. Made with {versions}. {papers}

| file | what it is | sha256 |
|---|---|---|
| `recipe.yaml` | the recipe above, for `optimum-cli moe compress --recipe` | {recipe_digest} |
| `plan.json`, `plan/tensors.safetensors` | which experts were merged, removed or kept | {plan_digest} |
| `compression_report.json` | sizes, and use of the experts, as numbers | |
{page}"""
NOT_TRAINED = "Nothing was trained after the cut. Fine-tuning on your data can win back some of what was lost."
"""A limit that a training ends."""
_PAGE = "| `report.html` | the run as one page: what each expert became, and how it was used | |\n"


@dataclass(frozen=True)
class CardFacts:
    """The content of a model card.

    Args:
        base: Name of the original model, without its path.
        auto_class: Class to load with.
        cost: Measured sizes, before and after.
        plan: The plan that was carried out.
        recipe: The recipe as YAML.
        hub_id: Hub id of the original, None if it has none.
        inherited: Metadata of the original's card that also apply to the compressed model.
        page: Whether the report is there as HTML.
    """

    base: str
    auto_class: str
    cost: Preview
    plan: CompressionPlan
    recipe: str
    hub_id: str | None = None
    inherited: Mapping[str, Any] = field(default_factory=dict)
    page: bool = True


_INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")


def inherited_metadata(directory: Path | None) -> dict[str, Any]:
    """License, language and task from the original's model card in a folder; empty if it has none of them."""
    card = None if directory is None else directory / "README.md"
    if card is None or not card.is_file():
        return {}
    block = re.match(
        r"\ufeff?---\s*\n(.*?)\n---\s*(\n|$)", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL
    )
    try:
        # Every scalar remains a string: YAML would read the language "no" as false.
        found = yaml.load(block[1], Loader=yaml.BaseLoader) if block else {}
    except yaml.YAMLError as error:
        warnings.warn(
            f"The metadata of the original's README.md are not valid YAML ({str(error).splitlines()[0]}). Add its "
            "license and language to the new card.",
            stacklevel=2,
        )
        return {}
    if not isinstance(found, Mapping):
        return {}
    return {key: found[key] for key in _INHERITED if _is_text(found.get(key))}


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))


def model_card(
    facts: CardFacts, name: str, loads_in: Sequence[LoadsIn], plan_digest: str, report: Mapping[str, Any]
) -> str:
    """Text of `README.md`.

    Args:
        facts: Its content.
        name: What the checkpoint is called.
        loads_in: Where it loads.
        plan_digest: SHA-256 of the plan.
        report: Content of the report's file.
    """
    before, after = facts.cost.before, facts.cost.after
    rows = [
        ("parameters", before.parameters, after.parameters),
        ("bytes", before.bytes, after.bytes),
        ("FLOPs per token", before.flops_upper, after.flops_upper),
    ]
    cited = ", ".join(f"[arXiv:{number}](https://arxiv.org/abs/{number})" for number in papers(facts.plan.stages))
    return _TEMPLATE.format(
        metadata=_metadata(facts, name, report).to_yaml(),
        title=name,
        base=facts.base,
        sentence=describe_cut(facts.plan),
        use=how_to_use(name, facts, loads_in),
        rows="\n".join(f"| {label} | {old:,.0f} | {new:,.0f} | {new / old:.3f} |" for label, old, new in rows),
        experts=facts.cost.experts,
        stable_rank=_stable_rank(facts.plan),
        loads_in=markdown(loads_in),
        quality=quality_section(report),
        limits="\n".join(f"- {said}" for said in _limits(facts, report)),
        recipe=facts.recipe.strip(),
        stages=describe_stages(facts.plan.stages),
        calibration=describe_calibration(facts.plan.calibration),
        seed=facts.plan.seed,
        versions=", ".join(f"{name} {version}" for name, version in versions().items()),
        papers=f"Papers: {cited}." if cited else "",
        recipe_digest=hashlib.sha256(facts.recipe.encode("utf-8", "surrogateescape")).hexdigest()[:16],
        plan_digest=plan_digest[:16],
        page=_PAGE if facts.page else "",
    )


def _metadata(facts: CardFacts, name: str, report: Mapping[str, Any]) -> ModelCardData:
    """What the Hub reads of the card."""
    sources = (facts.plan.calibration or {}).get("sources", ())
    data_sets = [named[0] for source in sources if (named := data_set_name(str(source.get("name")))) is not None]
    rounded = any(set(block.sizes.parts) & set(ROUNDED.values()) for block in facts.plan.blocks.values() if block.sizes)
    scores = eval_results(report)
    return ModelCardData(
        model_name=name if scores else None,
        eval_results=scores or None,
        base_model=facts.hub_id,
        # The Hub knows no relation of a model to one with fewer or other experts.
        base_model_relation="quantized" if facts.hub_id and rounded else None,
        library_name="transformers",
        **facts.inherited,
        datasets=list(dict.fromkeys(data_sets)) or None,
        tags=["optimum_moe", "mixture-of-experts", *_stage_names(facts.plan)],
    )


def how_to_use(name: str, facts: CardFacts, loads_in: Sequence[LoadsIn]) -> str:
    """Code for each runtime that loads the checkpoint.

    Args:
        name: What it is called.
        facts: Content of the card.
        loads_in: Where it loads.
    """
    load = [
        f"from transformers import {facts.auto_class}",
        "",
        f'model = {facts.auto_class}.from_pretrained("{name}")',
    ]
    if not facts.cost.plain:
        load.insert(0, "# With optimum-moe installed (no import needed), or with trust_remote_code=True.")
    parts = ["\n".join(["```python", *load, "```"])]
    loaded = {row.runtime for row in loads_in if row.says.startswith("loads")}
    if "vllm" in loaded:
        parts.append(f"In vLLM{_WITHOUT[facts.cost.plain]}:\n\n```bash\nvllm serve {name}\n```")
    if "llama.cpp" in loaded:
        parts.append(
            "In llama.cpp, where it runs the original:\n\n```bash\n"
            f"optimum-cli moe export {name} --to gguf --output model.gguf --llama-cpp llama.cpp\n"
            "llama-cli -m model.gguf\n```"
        )
    return "\n\n".join(parts)


_WITHOUT = {True: ", where it runs the original", False: ", with optimum-moe installed beside it"}


def _limits(facts: CardFacts, report: Mapping[str, Any]) -> Iterator[str]:
    """What users have to expect, in plain words."""
    plan = facts.plan
    if plan.calibration:
        yield (
            "What it lost was chosen on the calibration data below. Text of other kinds, such as other languages or "
            "code, may lose more."
        )
    else:
        yield "No data was read: what it lost was chosen from the weights alone."
    routed = [block["routed"].split() for block in report.get("blocks", {}).values() if "routed" in block]
    unused = sum(counts.count("0") for counts in routed)
    if unused:
        total = sum(block.num_experts for block in plan.blocks.values())
        yield f"The calibration data reached all but {unused:,} of {total:,} experts; nothing is known of their use."
    yield NOT_TRAINED
    if not facts.cost.plain:
        yield "Runtimes that are not listed above do not know how its experts are stored, and stop with an error."
    yield "What the original gets wrong, and what its license and terms of use demand, holds for this model too."


def describe_cut(plan: CompressionPlan) -> str:
    """A sentence on what was done to the experts."""
    blocks = plan.blocks.values()
    merged = any(block.merges for block in blocks)
    done = ["merged"] if merged else ["removed"] if any(not block.keeps_all for block in blocks) else []
    narrow = any(n is not None for block in blocks if block.is_stock for n in block.neurons or ())
    done += ["made narrower"] if narrow else []
    done += ["partly set to zero"] if any(block.weights != "original" for block in blocks) else []
    done += ["stored in smaller formats"] if any(b.sizes is not None and not b.is_stock for b in blocks) else []
    return f"experts were {' and '.join(done) or 'left unchanged'}."


def mean_stable_ranks(plan: CompressionPlan) -> tuple[float, float] | None:
    """Mean stable rank of the experts' matrices before and after merging, over all blocks that record it."""
    found = [block.stable_rank for block in plan.blocks.values() if block.stable_rank is not None]
    if not found:
        return None
    before, after = (round(sum(ranks) / len(found), 3) for ranks in zip(*found, strict=True))
    return before, after


def _stable_rank(plan: CompressionPlan) -> str:
    ranks = mean_stable_ranks(plan)
    if ranks is None:
        return ""
    return f"\n\nMean stable rank of the experts' matrices: {ranks[0]:.2f} before merging, {ranks[1]:.2f} after."


def _stage_names(plan: CompressionPlan) -> list[str]:
    return [str(stage.get("stage")) for stage in plan.stages] or ["compressed"]


def describe_stages(stages: Sequence[Mapping[str, Any]]) -> str:
    """Name and settings of each stage, in order."""
    return ", then ".join(_described(stage) for stage in stages) or "given plan ()"


def _described(settings: Mapping[str, Any]) -> str:
    given = {key: value for key, value in settings.items() if key != "stage" and value is not None}
    return f"{settings.get('stage')} ({', '.join(f'{key}={value}' for key, value in given.items())})"


def describe_calibration(record: Mapping[str, Any] | None) -> str:
    """One line about the calibration data."""
    if not record:
        return "none (data-free)"
    named = ", ".join(_source(source) for source in record.get("sources", ())) or "data without a name"
    settings = [f"rows of {record['sequence_length']}"] if record.get("sequence_length") else []
    settings += [f"seed {record['seed']}"] if record.get("seed") is not None else []
    said = "; ".join([f"{record.get('num_tokens', 0):,} tokens of {named}", *settings])
    return f"{said}; sha256 {str(record.get('hash', ''))[:12]}"


def _source(source: Mapping[str, Any]) -> str:
    """A source of calibration data, with weight and number of tokens if it is one of several."""
    weight = source.get("weight")
    share = "" if weight in (None, 1.0) else f" (weight {weight:g}, {source.get('tokens', 0):,} tokens)"
    return f"{source.get('name')}{share}"
