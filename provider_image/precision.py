"""The precisions of the inference: what each means to OpenVINO, and how far answers in it may differ.

Read by commands and settings, by the check and by the compiler. Must not import anything.
"""

from __future__ import annotations

#: Name -> OpenVINO's hint. auto leaves the choice to OpenVINO: on a CPU with AVX512_BF16 or AMX it computes in bf16,
#: two to five times as fast, and two correct machines differ by up to 0.26 in a logit.
PRECISIONS = {"f32": "f32", "bf16": "bf16", "auto": None}
#: What a worker may be set to beside these: the copy of a model in one of REDUCED that is the quickest on this
#: processor among those that passed their judgement on it, else f32.
FASTEST = "fastest"
#: Precisions in which a classifier may be installed as a copy, NAME_PRECISION, that is judged before it is installed.
REDUCED = ("bf16", "int8")
#: A copy is installed only if its first label is that of f32 on this share of the images, and no probability differs by
#: more than TOLERANCE_BF16, unless the operator demands more.
MIN_AGREEMENT = 0.99
#: Largest difference of a probability from the reference in f32. Two correct machines differ by about 1e-6. Also the
#: most that f16 weights may change unless the user allows more; those of EfficientNet-Lite0 change 0.004.
TOLERANCE = 1e-4
#: The same in bf16, and in auto, which may be bf16. EfficientNet-Lite0 differed by 0.012 in the median and by 0.104 at
#: most on 130 photos and parts of photos, on a processor with AMX. This is twice that, so it only detects gross errors;
#: small damage to files is detected by their digests.
TOLERANCE_BF16 = 0.2
