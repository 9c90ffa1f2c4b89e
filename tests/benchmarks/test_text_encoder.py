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
    ways = found["ways"]
    assert list(ways)[:4] == ["torch fp32", "int8w", "int8-dyn", "nf4"]
    assert {"bitsandbytes-int8", "bitsandbytes-nf4"} <= ways.keys()
    assert all(set(row["tokens"]) == {"3", "7"} for row in ways.values())
    fp32 = ways["torch fp32"]["bytes"]
    assert 0.25 < ways["int8w"]["bytes"] / fp32 < 0.3, "codes of a byte, scales, norms and a bias"
    assert 0.125 < ways["nf4"]["bytes"] / fp32 < 0.18
    db = {name: row["db"] for name, row in ways.items() if "db" in row}
    assert db["int8w"] > db["int8-dyn"] > db["nf4"] > 10
    assert len(lines(found)) == len(ways)
