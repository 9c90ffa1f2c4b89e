from __future__ import annotations

import pytest

from optimizer.families import FAMILIES, family
from optimizer.quantize.policy import (
    KEEP,
    LEVELS,
    Policy,
    Rule,
    Scheme,
    default_policy,
    policy_names,
)
from profiles.errors import SpecError

W4 = Scheme(bits=4, group=64)


def test_the_first_matching_rule_decides() -> None:
    policy = Policy(
        rules=(
            Rule(pattern="conv_in", scheme=KEEP),
            Rule(pattern="*.to_q", scheme=Scheme(bits=8)),
            Rule(pattern="*", scheme=W4),
        )
    )
    assert policy.scheme("conv_in", 64) == KEEP
    assert policy.scheme("mid.to_q", 64) == Scheme(bits=8)
    assert policy.scheme("mid.to_k", 64) == W4
    reversed_policy = Policy(rules=policy.rules[::-1])
    assert reversed_policy.scheme("conv_in", 64) == W4


def test_a_layer_that_no_rule_names_is_kept() -> None:
    assert Policy().scheme("anything", 64) == KEEP
    assert Policy(rules=(Rule(pattern="a.*", scheme=W4),)).scheme("b.c", 64) == KEEP


@pytest.mark.parametrize(
    ("inputs", "found"),
    [
        (64, W4),
        (320, W4),
        (96, Scheme(bits=4, group=32)),
        (32, Scheme(bits=4, group=32)),
        (48, Scheme(bits=8)),
        (4, Scheme(bits=8)),
    ],
)
def test_groups_that_do_not_divide_fall_to_32_and_then_to_8_bits(
    inputs: int, found: Scheme
) -> None:
    assert Policy(rules=(Rule(pattern="*", scheme=W4),)).scheme("layer", inputs) == found


def test_a_fallback_keeps_how_the_input_is_rounded() -> None:
    scheme = Scheme(bits=4, group=64, activation="static")
    policy = Policy(rules=(Rule(pattern="*", scheme=scheme),))
    assert policy.scheme("layer", 96).activation == "static"
    assert policy.scheme("layer", 5).activation == "static"


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("quant", policy_names())
def test_a_default_policy_round_trips_and_says_what_it_does(quant: str, name: str) -> None:
    for component in family(name).components:
        policy = default_policy(quant, component)
        assert Policy.model_validate_json(policy.model_dump_json()) == policy
        assert policy.quantizes == (quant != "none" and component.role == "denoiser")
        assert policy.calibrates == (policy.quantizes and LEVELS[quant].activation != "none")


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_a_denoisers_ends_are_kept_and_its_embeddings_get_8_bits(quant: str) -> None:
    policy = default_policy(quant, family("sd1").component("unet"))
    assert policy.scheme("conv_in", 4) == policy.scheme("conv_out", 320) == KEEP
    embedding = Scheme(bits=8)
    assert policy.scheme("time_embedding.linear_1", 320) == embedding
    assert policy.scheme("down_blocks.0.resnets.0.time_emb_proj", 1280) == embedding
    assert policy.scheme("down_blocks.1.resnets.0.conv_shortcut", 320) == embedding
    assert policy.scheme("mid_block.attentions.0.proj_in", 1280) == LEVELS[quant]


def test_with_rounded_inputs_the_queries_and_keys_of_self_attention_are_rounded_too() -> None:
    component = family("sd1").component("unet")
    block = "mid_block.attentions.0.transformer_blocks.0"
    int8, int4 = (default_policy(quant, component) for quant in ("int8", "int4"))
    for name in ("attn1.to_q", "attn1.to_k"):
        assert int8.scheme(f"{block}.{name}", 1280).output == "static"
        assert int4.scheme(f"{block}.{name}", 1280).output == "none"
    for name in ("attn1.to_v", "attn2.to_q", "attn2.to_k"):
        assert int8.scheme(f"{block}.{name}", 1280) == LEVELS["int8"]


def test_an_unknown_level_names_the_known_ones() -> None:
    with pytest.raises(SpecError) as caught:
        default_policy("int3", family("sd1").component("unet"))
    assert str(caught.value) == "--quant int3 is not known: use one of none, int8, int4."
