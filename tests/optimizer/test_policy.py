from __future__ import annotations

import pytest

from optimizer.families import FAMILIES, family
from optimizer.quantize.policy import LEVELS, Policy, Rule, default_policy
from optimizer.quantize.schemes import KEEP, W4A16, W8A8, W8A16
from profiles.errors import SpecError

W4 = W4A16()


def test_the_first_matching_rule_decides() -> None:
    policy = Policy(
        rules=(
            Rule(pattern="conv_in", scheme=KEEP),
            Rule(pattern="*.to_q", scheme=W8A16()),
            Rule(pattern="*", scheme=W4),
        )
    )
    assert policy.scheme("conv_in", (8, 64)) == KEEP
    assert policy.scheme("mid.to_q", (8, 64)) == W8A16()
    assert policy.scheme("mid.to_k", (8, 64)) == W4
    reversed_policy = Policy(rules=policy.rules[::-1])
    assert reversed_policy.scheme("conv_in", (8, 64)) == W4


def test_a_layer_that_no_rule_names_is_kept() -> None:
    assert Policy().scheme("anything", (8, 64)) == KEEP
    assert Policy(rules=(Rule(pattern="a.*", scheme=W4),)).scheme("b.c", (8, 64)) == KEEP


def test_a_policy_gives_the_scheme_that_fits_the_layer() -> None:
    policy = Policy(rules=(Rule(pattern="*", scheme=W4),))
    assert policy.scheme("layer", (8, 96)) == W4A16(group=32)
    assert policy.scheme("layer", (8, 4, 3, 3)) == W8A16()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("quant", LEVELS)
def test_a_default_policy_round_trips_and_says_what_it_does(quant: str, name: str) -> None:
    for component in family(name).components:
        policy = default_policy(quant, component, "hqq")
        assert Policy.model_validate_json(policy.model_dump_json()) == policy
        assert policy == Policy() or policy.solver == "hqq"
        assert policy.quantizes == (quant != "none" and component.role == "denoiser")
        assert policy.calibrates == (policy.quantizes and LEVELS[quant].calibrates)


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_a_denoisers_ends_are_kept_and_its_embeddings_get_8_bits(quant: str) -> None:
    policy = default_policy(quant, family("sd1").component("unet"))
    kernel = (320, 320, 3, 3)
    assert policy.scheme("conv_in", kernel) == policy.scheme("conv_out", kernel) == KEEP
    assert policy.scheme("time_embedding.linear_1", (1280, 320)) == W8A16()
    assert policy.scheme("down_blocks.0.resnets.0.time_emb_proj", (320, 1280)) == W8A16()
    assert policy.scheme("down_blocks.1.resnets.0.conv_shortcut", kernel) == W8A16()
    assert policy.scheme("mid_block.attentions.0.proj_in", (1280, 1280)) == LEVELS[quant]


def test_with_rounded_inputs_the_queries_and_keys_of_self_attention_are_rounded_too() -> None:
    component = family("sd1").component("unet")
    block = "mid_block.attentions.0.transformer_blocks.0"
    int8, int4 = (default_policy(quant, component) for quant in ("int8", "int4"))
    for name in ("attn1.to_q", "attn1.to_k"):
        assert int8.scheme(f"{block}.{name}", (1280, 1280)) == W8A8(output=True)
        assert int4.scheme(f"{block}.{name}", (1280, 1280)) == LEVELS["int4"]
    for name in ("attn1.to_v", "attn2.to_q", "attn2.to_k"):
        assert int8.scheme(f"{block}.{name}", (1280, 1280)) == LEVELS["int8"]


def test_an_unknown_level_names_the_known_ones() -> None:
    with pytest.raises(SpecError) as caught:
        default_policy("int3", family("sd1").component("unet"))
    assert str(caught.value) == (
        "--quant int3 is not known: use one of none, int8, int8w, int8-dyn, llm-int8, "
        "torchao-int8-dyn, int4, int4-dyn, fp8, nf4, nvfp4, auto."
    )
