"""The precisions that an operator may ask for. Named by commands and settings, so it must not import anything."""

from __future__ import annotations

#: What each means to OpenVINO. auto leaves the choice to it: on a CPU with AVX512_BF16 or AMX it then computes in bf16,
#: two to five times as fast, and two honest machines differ by up to 0.26 in a logit.
PRECISIONS = {"f32": "f32", "bf16": "bf16", "auto": None}
