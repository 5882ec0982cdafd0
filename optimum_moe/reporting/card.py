"""The model card that is written beside the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub import ModelCardData

from optimum_moe.plan import CompressionPlan
from optimum_moe.reporting.preview import Preview

_TEMPLATE = """---
{metadata}
---

# {title}

`{base}`, compressed by optimum_moe: {sentence}

## Use

```python
{loading}
```

## Size

| | original | this model | ratio |
|---|---|---|---|
{rows}

Experts of each MoE block: {experts}. FLOPs are 2 x multiply-adds of all weight matmuls for one token.{stable_rank}

## How it was made

```yaml
{recipe}
```

Calibration: {calibration}. `plan.json` and `plan/tensors.safetensors` say which experts went where.

This card states sizes; it makes no claim about quality. Measure it on your task with `optimum-cli moe evaluate`.
"""


@dataclass(frozen=True)
class CardFacts:
    """What a card is made from.

    Args:
        base: Name of the original model.
        auto_class: Class to load with.
        cost: Measured sizes, before and after.
        plan: What was carried out.
        recipe: The recipe as YAML.
    """

    base: str
    auto_class: str
    cost: Preview
    plan: CompressionPlan
    recipe: str


def model_card(facts: CardFacts, name: str) -> str:
    """Text of `README.md` for a checkpoint called `name`."""
    before, after = facts.cost.before, facts.cost.after
    metadata = ModelCardData(
        base_model=facts.base if "/" in facts.base and not facts.base.startswith((".", "/")) else None,
        library_name="transformers",
        tags=["optimum_moe", "mixture-of-experts", str(facts.plan.method.get("method", "compressed"))],
    )
    rows = [
        ("parameters", before.parameters, after.parameters),
        ("bytes", before.bytes, after.bytes),
        ("FLOPs a token", before.flops_upper, after.flops_upper),
    ]
    load = [
        f"from transformers import {facts.auto_class}",
        "",
        f'model = {facts.auto_class}.from_pretrained("{name}")',
    ]
    if not facts.cost.plain:
        load.insert(
            0, "# With optimum-moe installed (no import needed); else an Auto class and trust_remote_code=True."
        )
    return _TEMPLATE.format(
        metadata=metadata.to_yaml(),
        title=name,
        base=facts.base,
        sentence=_sentence(facts.plan),
        loading="\n".join(load),
        rows="\n".join(f"| {label} | {old:,.0f} | {new:,.0f} | {new / old:.3f} |" for label, old, new in rows),
        experts=", ".join(f"{old} -> {new}" for old, new in sorted(set(facts.cost.counts.values()))),
        stable_rank=_stable_rank(facts.plan),
        recipe=facts.recipe.strip(),
        calibration=describe_calibration(facts.plan.calibration),
    )


def _sentence(plan: CompressionPlan) -> str:
    """What was done to the experts."""
    blocks = plan.blocks.values()
    merged = any(len(block.members(group)) > 1 for block in blocks for group in range(block.num_groups))
    done = ["merged"] if merged else ["removed"] if any(not block.keeps_all for block in blocks) else []
    done += ["kept in smaller forms"] if any(block.sizes is not None for block in blocks) else []
    return f"experts were {' and '.join(done) or 'left as they are'}."


def mean_stable_ranks(plan: CompressionPlan) -> tuple[float, float] | None:
    """Mean stable rank of the experts' matrices before and after merging, over all blocks that say so."""
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


def describe_calibration(record: Mapping[str, Any] | None) -> str:
    """One line about the calibration data."""
    if not record:
        return "none (data-free)"
    return f"{record.get('num_tokens', 0):,} tokens, sha256 {str(record.get('hash', ''))[:12]}"
