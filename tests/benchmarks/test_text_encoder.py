"""The section text-encoder on a small T5: every way runs, and holds what its bits say."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.text_encoder import lines, measure_ways

SIZES = {
    "d_model": 64,
    "d_ff": 128,
    "d_kv": 16,
    "num_heads": 4,
    "vocab_size": 99,
    "feed_forward_proj": "gated-gelu",
}


def test_all_ways_run_on_the_same_tokens(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    measure_ways(SIZES, 1, (3, 7), out, lambda _done, _total: None, rounds=2)
    found = json.loads(out.read_text("utf-8"))
    for dtype, rows in found["dtypes"].items():
        assert list(rows)[:5] == ["torch", "int8w", "int8-dyn", "llm-int8", "nf4"]
        assert {"bitsandbytes-int8", "bitsandbytes-nf4"} <= rows.keys()
        assert all(set(row["tokens"]) == {"3", "7"} for row in rows.values())
        db = {name: row["db"] for name, row in rows.items() if "db" in row}
        assert min(db["int8w"], db["llm-int8"]) > db["nf4"] > 10
        assert ("torch" in db) == (dtype == "bf16")
    fp32, bf16 = found["dtypes"]["fp32"], found["dtypes"]["bf16"]
    assert fp32["int8w"]["db"] > fp32["int8-dyn"]["db"] > fp32["nf4"]["db"]
    assert bf16["torch"]["bytes"] == fp32["torch"]["bytes"] / 2
    assert 0.25 < fp32["int8w"]["bytes"] / fp32["torch"]["bytes"] < 0.3, "scales, norms and a bias"
    assert 0.125 < fp32["nf4"]["bytes"] / fp32["torch"]["bytes"] < 0.18
    assert len(lines(found)) == len(fp32) + len(bf16)
