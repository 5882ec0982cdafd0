"""Models whose text part is a mixture of experts: tiny configs, and inputs with pixels or audio."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.architectures_table import DEFAULTS, Target
from tests.tiny_models import build, by_name

IMAGE, VIDEO, AUDIO, START, END = 90, 91, 92, 93, 94
"""Token ids of placeholders; text has ids from 3 to 88."""

Inputs = dict[str, torch.Tensor]
Media = Callable[[int, torch.Generator], tuple[list[int], Inputs]]
"""Rows and a generator -> the placeholder ids of one row, and the tensors behind those of all rows."""


@dataclass(frozen=True)
class Composite:
    """One composite model.

    Args:
        name: Model type of its config.
        architecture: Class of the whole model.
        config: Class of its config.
        fields: Of the config; sub configs are dicts, completed by the defaults.
        media: Makes placeholders and pixels or audio.
        auto: Auto class that loads it.
        default: Whether it runs in the default tests.
        modality_ids: Whether it takes `mm_token_type_ids`.
        unreached: First parts of the names of blocks that a forward pass does not reach.
        broken_in: Version of transformers in which its own forward pass raises.
    """

    name: str
    architecture: str
    config: str
    fields: dict[str, Any]
    media: Media
    auto: str = "AutoModelForImageTextToText"
    default: bool = False
    modality_ids: bool = False
    unreached: tuple[str, ...] = ()
    broken_in: str = ""

    def tokens_of(self, block: str, batches: Sequence[Inputs]) -> int:
        """Tokens of some batches that a block sees."""
        if block.endswith(("text_moe", "vision_moe")):
            vision = sum(int((batch["input_ids"] == IMAGE).sum()) for batch in batches)
            if block.endswith("vision_moe"):
                return vision
            return sum(batch["input_ids"].numel() for batch in batches) - vision
        if self.name == "dots3_note" and "vision" in block:
            return sum(len(batch["pixel_values"]) for batch in batches)
        return sum(batch["input_ids"].numel() for batch in batches)


def completed(config_class: Any, fields: dict[str, Any]) -> PreTrainedConfig:
    """A config from `fields` and the defaults, with sub configs likewise."""
    known = {f.name for f in dataclasses.fields(config_class)}
    subs = {}
    for name, value in fields.items():
        if isinstance(value, dict) and name in config_class.sub_configs:
            model_type = value.get("model_type")
            sub_class = CONFIG_MAPPING[model_type] if model_type else config_class.sub_configs[name]
            subs[name] = completed(sub_class, {k: v for k, v in value.items() if k != "model_type"})
    return config_class(**{k: v for k, v in DEFAULTS.items() if k in known} | fields | subs)


def build_composite(
    composite: Composite, seed: int = 0, dtype: torch.dtype = torch.float32, vocab_size: int = 99, **ids: int
) -> PreTrainedModel:
    """A random model in eval mode, as `tests.tiny_models.build` makes it; `ids` are fields of its config."""
    config_class = getattr(transformers, composite.config)
    fields = dict(composite.fields)
    if "text_config" in fields:
        fields["text_config"] = fields["text_config"] | {"vocab_size": vocab_size}
    config = completed(config_class, fields | ids)
    subs = {name: getattr(config, name) for name in config.sub_configs if name in fields}
    target = Target(composite.name, composite.architecture, composite.config, fields | ids | subs)
    return build(target, seed, dtype)


def inputs_with_media(composite: Composite, rows: int = 2, length: int = 24, seed: int = 1) -> Inputs:
    """Random text with the placeholders of one image or clip in every row, and what they stand for."""
    generator = torch.Generator().manual_seed(seed)
    placeholders, tensors = composite.media(rows, generator)
    ids = torch.randint(3, 89, (rows, max(length, len(placeholders) + 8)), generator=generator)
    ids[:, 2 : 2 + len(placeholders)] = torch.tensor(placeholders)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **tensors}
    if composite.modality_ids:
        inputs["mm_token_type_ids"] = (ids == IMAGE).long()
    if composite.name == "ernie4_5_vl_moe":
        inputs["moe_mm_token_type_ids"] = (ids == IMAGE).long()
    return inputs


def text_of(name: str, **more: Any) -> dict[str, Any]:
    """The text config of a target of `tests.architectures_table`."""
    return by_name(name).fields | more


def patches(*shape: int, grid: Sequence[int] = (1, 4, 4), name: str = "image_grid_thw", merged: int = 4) -> Media:
    """One grid of flattened patches a row, of which `merged` give one token: Qwen-VL and its relatives."""

    def media(rows: int, generator: torch.Generator) -> tuple[list[int], Inputs]:
        count = math.prod(grid)
        pixels = torch.randn(rows * count, *shape, generator=generator)
        return [IMAGE] * (count // merged), {"pixel_values": pixels, name: torch.tensor([list(grid)] * rows)}

    return media


def images(*shape: int, tokens: int, **more: Any) -> Media:
    """One image a row, in the shape that the model takes; `more` are tensors that all rows share."""

    def media(rows: int, generator: torch.Generator) -> tuple[list[int], Inputs]:
        pixels = torch.randn(rows, *shape, generator=generator)
        return [IMAGE] * tokens, {"pixel_values": pixels, **{k: torch.tensor([v] * rows) for k, v in more.items()}}

    return media


def clips(frames: int, mels: int, tokens: int, mask: str, mels_first: bool = False) -> Media:
    """One clip of mel features a row."""

    def media(rows: int, generator: torch.Generator) -> tuple[list[int], Inputs]:
        shape = (mels, frames) if mels_first else (frames, mels)
        features = torch.randn(rows, *shape, generator=generator)
        return [AUDIO] * tokens, {"input_features": features, mask: torch.ones(rows, frames, dtype=torch.int64)}

    return media


def together(*parts: Media) -> Media:
    """All of several media in every row."""

    def media(rows: int, generator: torch.Generator) -> tuple[list[int], Inputs]:
        made = [part(rows, generator) for part in parts]
        ids = [token for placeholders, _ in made for token in (START, *placeholders, END)]
        return ids, {name: tensor for _, tensors in made for name, tensor in tensors.items()}

    return media


_AUDIO = {"num_hidden_layers": 1, "num_mel_bins": 8, "num_key_value_heads": 4}
_VISION = {"depth": 1, "num_heads": 4, "patch_size": 4, "out_hidden_size": 64}
_IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO}
_IDS_SE = _IDS | {"vision_start_token_id": START, "vision_end_token_id": END}
_THINKER: dict[str, Any] = {
    "text_config": text_of("qwen3_omni_moe_thinker") | by_name("qwen3_vl_moe").fields["text_config"],
    "vision_config": _VISION | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    "audio_config": {
        "num_mel_bins": 8,
        "encoder_layers": 1,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 32,
        "d_model": 64,
        "output_dim": 64,
        "downsample_hidden_size": 8,
    },
    **_IDS_SE,
    "audio_token_id": AUDIO,
    "audio_start_token_id": 95,
}
_IMAGE_AND_CLIP = together(patches(3 * 2 * 16), clips(40, 8, 5, "feature_attention_mask", mels_first=True))

COMPOSITES: tuple[Composite, ...] = (
    Composite(
        "qwen3_vl_moe",
        "Qwen3VLMoeForConditionalGeneration",
        "Qwen3VLMoeConfig",
        {
            "text_config": by_name("qwen3_vl_moe").fields["text_config"],
            "vision_config": _VISION | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
            **_IDS_SE,
        },
        patches(3 * 2 * 16),
        default=True,
        modality_ids=True,
    ),
    Composite(
        "qwen3_5_moe",
        "Qwen3_5MoeForConditionalGeneration",
        "Qwen3_5MoeConfig",
        {"text_config": text_of("qwen3_5_moe"), "vision_config": _VISION | {"num_position_embeddings": 16}, **_IDS_SE},
        patches(3 * 2 * 16),
        modality_ids=True,
    ),
    Composite(
        "qwen4_exp",
        "Qwen4ExpForConditionalGeneration",
        "Qwen4ExpConfig",
        {"text_config": text_of("qwen4_exp"), "vision_config": _VISION | {"num_position_embeddings": 16}, **_IDS_SE},
        patches(3 * 2 * 16),
        modality_ids=True,
    ),
    Composite(
        "glm4v_moe",
        "Glm4vMoeForConditionalGeneration",
        "Glm4vMoeConfig",
        {"text_config": text_of("glm4v_moe"), "vision_config": _VISION | {"image_size": 16}, **_IDS},
        patches(3 * 2 * 16),
        modality_ids=True,
    ),
    Composite(
        "glm5_next",
        "Glm5NextForConditionalGeneration",
        "Glm5NextConfig",
        {"text_config": text_of("glm5_next"), "vision_config": _VISION | {"image_size": 16}, **_IDS},
        patches(3 * 2 * 16),
        modality_ids=True,
    ),
    Composite(
        "ernie4_5_vl_moe",
        "Ernie4_5_VLMoeForConditionalGeneration",
        "Ernie4_5_VLMoeConfig",
        {
            "text_config": text_of("ernie4_5_vl_moe"),
            "vision_config": {"depth": 1, "num_heads": 4, "patch_size": 4},
            **_IDS,
        },
        patches(3 * 16),
        default=True,
        modality_ids=True,
    ),
    Composite(
        "minimax_m3_vl",
        "MiniMaxM3SparseForConditionalGeneration",
        "MiniMaxM3VLConfig",
        {
            "text_config": text_of("minimax_m3_vl"),
            "vision_config": {"num_hidden_layers": 1, "patch_size": 4},
            "image_token_index": IMAGE,
            "video_token_index": VIDEO,
            "projector_hidden_size": 32,
        },
        patches(3 * 2 * 16),
    ),
    Composite(
        "kimi_k25",
        "Kimi_K25ForConditionalGeneration",
        "Kimi_K25Config",
        {
            "text_config": by_name("deepseek_v3").fields | {"model_type": "deepseek_v3"},
            "vision_config": {"num_hidden_layers": 1, "patch_size": 4, "pos_emb_height": 4, "pos_emb_width": 4},
            **_IDS,
            "projection_hidden_size": 64,
        },
        patches(3, 4, 4),
    ),
    Composite(
        "muse_spark",
        "MuseSparkForConditionalGeneration",
        "MuseSparkConfig",
        {
            "text_config": text_of("muse_spark"),
            "vision_config": {"num_hidden_layers": 1, "patch_size": 4, "pos_emb_height": 4, "pos_emb_width": 4},
            "audio_config": {
                "num_hidden_layers": 4,
                "hidden_sizes": [8, 8, 8, 16],
                "depths": [1, 1, 1, 1],
                "out_hidden_size": 64,
            },
            **_IDS,
            "audio_token_id": AUDIO,
            "out_hidden_size": 256,
            "projector_hidden_size": 32,
        },
        patches(3 * 2 * 16),
    ),
    Composite(
        "inkling2",
        "Inkling2ForConditionalGeneration",
        "Inkling2Config",
        {
            "text_config": text_of("inkling2"),
            "vision_config": {
                "num_hidden_layers": 1,
                "patch_size": 4,
                "text_hidden_size": 64,
                "projection_hidden_dim": 32,
                "posemb_grid_size": 4,
            },
            "image_token_id": IMAGE,
        },
        patches(8, 8, 3, grid=(1, 2, 2), merged=1),
    ),
    Composite(
        "inkling_mm_model",
        "InklingForConditionalGeneration",
        "InklingConfig",
        {
            "text_config": text_of("inkling"),
            "vision_config": {"num_hidden_layers": 1, "patch_size": 4, "text_hidden_size": 64},
            "audio_config": {"n_mel_bins": 4, "mel_vocab_size": 8, "text_hidden_size": 64},
            "image_token_id": IMAGE,
            "audio_token_id": AUDIO,
        },
        images(2, 4, 4, 3, tokens=1),
    ),
    Composite(
        "aria",
        "AriaForConditionalGeneration",
        "AriaConfig",
        {
            "text_config": text_of("aria"),
            "vision_config": {
                "model_type": "idefics3_vision",
                "num_hidden_layers": 1,
                "patch_size": 4,
                "image_size": 8,
            },
            "projector_patch_to_query_dict": {4: 3},
            "image_token_index": IMAGE,
        },
        images(3, 8, 8, tokens=3),
    ),
    Composite(
        "mistral_large4",
        "MistralLarge4ForConditionalGeneration",
        "MistralLarge4Config",
        {
            "text_config": text_of("mistral_large4"),
            "vision_config": {"model_type": "pixtral", "num_hidden_layers": 1, "patch_size": 4, "image_size": 16},
            "image_token_index": IMAGE,
        },
        images(3, 16, 16, tokens=4, image_sizes=[16, 16]),
    ),
    Composite(
        "deepseek_ocr2",
        "DeepseekOcr2ForConditionalGeneration",
        "DeepseekOcr2Config",
        {
            "text_config": text_of("deepseek_ocr2", hidden_size=160),
            "vision_config": {
                "sam_config": {
                    "num_hidden_layers": 1,
                    "image_size": 64,
                    "patch_size": 4,
                    "output_channels": 16,
                    "global_attn_indexes": [0],
                    "window_size": 4,
                    "downsample_channels": [32, 64],
                },
                "encoder_config": {"num_hidden_layers": 1},
            },
            "image_token_id": IMAGE,
        },
        images(3, 64, 64, tokens=145),
    ),
    Composite(
        "unlimited_ocr",
        "UnlimitedOcrForConditionalGeneration",
        "UnlimitedOcrConfig",
        {
            "text_config": text_of("unlimited_ocr"),
            "vision_config": {
                "sam_config": {
                    "num_hidden_layers": 1,
                    "image_size": 64,
                    "patch_size": 4,
                    "output_channels": 16,
                    "global_attn_indexes": [0],
                    "window_size": 4,
                    "downsample_channels": [32, 64],
                },
                "encoder_config": {"num_hidden_layers": 1, "image_size": 16, "patch_size": 4},
            },
            "image_token_id": IMAGE,
        },
        images(3, 64, 64, tokens=21),
    ),
    Composite(
        "gemma4",
        "Gemma4ForConditionalGeneration",
        "Gemma4Config",
        {
            "text_config": text_of("gemma4"),
            "vision_config": {
                "num_hidden_layers": 1,
                "patch_size": 4,
                "pooling_kernel_size": 2,
                "position_embedding_size": 16,
            },
            "audio_config": None,
            **_IDS,
            "audio_token_id": AUDIO,
        },
        images(16, 48, tokens=4, image_position_ids=[[x, y] for y in range(4) for x in range(4)]),
        modality_ids=True,
    ),
    Composite(
        "nemotron_h_omni",
        "NemotronH_Omni_Reasoning_V3",
        "NemotronH_Omni_Reasoning_V3_Config",
        {
            "text_config": by_name("nemotron_h").fields | {"model_type": "nemotron_h"},
            "vision_config": {
                "model_type": "radio",
                "num_hidden_layers": 1,
                "patch_size": 4,
                "image_size": 16,
                "video_temporal_patch_size": 2,
            },
            "vision_hidden_size": 64,
            "projector_hidden_size": 32,
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "audio_token_id": AUDIO,
        },
        patches(3 * 16, grid=(4, 4), name="image_grid_hw"),
    ),
    Composite(
        "dots3_note",
        "Dots3NoteForConditionalGeneration",
        "Dots3NoteConfig",
        {
            "text_config": text_of("dots3_note"),
            "vision_config": {
                "num_hidden_layers": 2,
                "patch_size": 4,
                "adapter_in_dim": 64,
                "adapter_out_dim": 64,
                "mlp_layer_types": ["dense", "sparse"],
            },
            "audio_config": {
                "num_hidden_layers": 1,
                "adapter_input_size": 64,
                "adapter_out_dim": 64,
                "feature_size": 8,
            },
            **_IDS,
            "audio_token_id": AUDIO,
        },
        patches(3 * 16),
    ),
    Composite(
        "qwen3_omni_moe_thinker",
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        "Qwen3OmniMoeThinkerConfig",
        _THINKER,
        _IMAGE_AND_CLIP,
    ),
    Composite(
        "qwen3_omni_moe",
        "Qwen3OmniMoeForConditionalGeneration",
        "Qwen3OmniMoeConfig",
        {
            "thinker_config": _THINKER,
            "talker_config": {
                "text_config": by_name("qwen3_omni_moe_talker").fields,
                "code_predictor_config": {"num_hidden_layers": 1, "num_code_groups": 4},
                "thinker_hidden_size": 64,
                "accept_hidden_layer": 1,
                "num_code_groups": 4,
                "speaker_id": {"one": 3},
                "spatial_merge_size": 2,
            },
            "code2wav_config": {"num_hidden_layers": 1, "decoder_dim": 32, "codebook_size": 16, "num_quantizers": 4},
        },
        _IMAGE_AND_CLIP,
        auto="AutoModelForMultimodalLM",
        unreached=("talker",),
    ),
    Composite(
        "llama4",
        "Llama4ForConditionalGeneration",
        "Llama4Config",
        {
            "text_config": text_of("llama4"),
            "vision_config": {
                "num_hidden_layers": 1,
                "image_size": 16,
                "patch_size": 4,
                "intermediate_size": 256,
                "projector_input_dim": 64,
                "projector_output_dim": 64,
                "vision_output_dim": 64,
            },
            "image_token_index": IMAGE,
        },
        images(3, 16, 16, tokens=4),
        # It reads `image_outputs` of its language model, whose output has no such field.
        broken_in="5.24.0",
    ),
    Composite(
        "step3p7",
        "Step3p7ForConditionalGeneration",
        "Step3p7Config",
        {
            "text_config": text_of("step3p7"),
            "vision_config": {"num_hidden_layers": 1, "image_size": 16, "patch_size": 4},
            "image_token_id": IMAGE,
        },
        images(3, 16, 16, tokens=1),
    ),
    Composite(
        "nemo_speechlm",
        "Nemotron3_5TranscribeForConditionalGeneration",
        "Nemotron3_5TranscribeConfig",
        {
            "text_config": by_name("nemotron_h").fields | {"model_type": "nemotron_h"},
            "audio_config": {
                "asr_config": _AUDIO,
                "diarization_config": {
                    "model_type": "nemotron3_diarization",
                    "audio_config": _AUDIO,
                    "head_config": {"hidden_size": 16, "audio_hidden_size": 64},
                    "streaming_config": {},
                },
            },
            "word_timestamp_config": {"num_hidden_layers": 1, "num_key_value_heads": 4, "blank_token_id": 98},
            "audio_token_id": AUDIO,
        },
        clips(40, 8, 5, "input_features_mask"),
        auto="AutoModelForMultimodalLM",
        default=True,
    ),
)


def composite_named(name: str) -> Composite:
    return next(composite for composite in COMPOSITES if composite.name == name)
