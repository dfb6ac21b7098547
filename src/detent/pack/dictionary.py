"""The preset dictionary that headers are deflated with: part of the format, word for word in docs/format.md."""

from __future__ import annotations

__all__ = ["DICTIONARY"]

# Deflate reaches back: what stands last costs least. Nothing here may change without a new version of the format.
_LINES = r"""
float32 bfloat16 float16 positions last
BinaryRelax(GDTanh(PMF(PARQ(STE(MirrorDescent(Masked(PartialFreeze(Penalty(Proximal(Clip(HardProjection(
CodebookLearning(reduce='mean',reassign_every=ADMM(rho=0.01,every=1,until=PSG(strength=1.0,gain=start=, form='update')
{"kind":"Binary","scale":null}{"kind":"Ternary","scale":"alternate"}{"kind":"PowerOfTwo","bits":5
{"kind":"Structured","group":"filter","keep":0.5,"block":[{"kind":"NM","n":2,"m":4,"along":"columns"}{"kind":"Zero"}
{"kind":"VectorCodebook","block":8,"size":256,"codebook_bits":null,"book":"global","zero":true,"few":"refuse","seed":0}
{"kind":"KernelCodebook","size":512,"book":"global"}"codebook_bits":8,"param_dtype":"bfloat16"
{"kind":"TopK","keep":0.1,"scope":"model","share":"lamp"}{"kind":"Round","dtype":"bfloat16"}{"kind":"Round"}
{"kind":"Uniform","bits":4,"granularity":{"kind":"Group","size":128},"range":"minmax","param_dtype":"float16"}
{"kind":"SparseLevels","sparse":{"kind":"TopK","keep":"nonzero"},"survivors":{"kind":"LearnedLevels","k":8,"zero":true}}
"survivors":{"kind":"Uniform","bits":3,"range":"alternate","zero":false}},"param_dtype":"float16"}}
{"kind":"Uniform","bits":8,"granularity":"channel"}{"kind":"Uniform","bits":8}PSG(){"kind":"Uniform","bits":4
kept by rule 0 (match='claimed by a later stage
passed over: 1-D parameter (bias, gain or normalisation weight); name it in include= to claim it
passed over: normalisation weight; name it in include= to claim itpassed over: bias; name it in include= to claim it
re-estimatedown, rounded to bfloat16own, rounded to float16no rule matches
transformer.wte.weight
transformer.h.0.ln_1.weight
transformer.h.0.attn.c_attn.weight
transformer.h.0.attn.c_proj.weight
transformer.h.0.ln_2.weight
transformer.h.0.mlp.c_fc.weight
bert.encoder.layer.0.attention.self.query.weight
bert.encoder.layer.0.attention.self.key.weight
bert.encoder.layer.0.attention.self.value.weight
bert.encoder.layer.0.attention.output.dense.weight
bert.encoder.layer.0.attention.output.LayerNorm.weight
bert.encoder.layer.0.intermediate.dense.weight
encoder.layers.0.self_attn.in_proj_weight
blocks.0.norm1.weight
blocks.0.attn.qkv.weight
blocks.0.attn.proj.weight
blocks.0.mlp.fc1.weight
model.embed_tokens.weight
model.layers.0.self_attn.q_proj.weight
model.layers.0.self_attn.k_proj.weight
model.layers.0.self_attn.v_proj.weight
model.layers.0.self_attn.o_proj.weight
model.layers.0.mlp.gate_proj.weight
model.layers.0.mlp.up_proj.weight
model.layers.0.mlp.down_proj.weight
model.layers.0.input_layernorm.weight
model.layers.0.post_attention_layernorm.weight
model.norm.weight
lm_head.weight
features.0.weight
features.0.bias
features.3.squeeze.weight
features.3.expand1x1.weight
features.3.expand3x3.weight
classifier.0.weight
embedding.weight
head.weight
linear.weight
layer1.0.downsample.0.weight
layer1.0.shortcut.0.weight
0.weight
0.bias
2.weight
2.bias
4.weight
4.bias
conv.weight
conv1.weight
bn1.weight
bn1.bias
bn1.running_mean
bn1.running_var
bn1.num_batches_tracked
layer1.0.conv1.weight
layer1.0.bn1.weight
layer1.0.bn1.bias
layer1.0.bn1.running_mean
layer1.0.bn2.running_var
fc.weight
fc.bias
conv1.weight
conv1.bias
conv2.weight
conv2.bias
fc1.weight
fc1.bias
fc2.weight
fc2.bias
fc3.weight
fc3.bias
valuestoplevelsbooknonemasksurvivors.codesscalecodesbuffer0.1.0.dev0
"""

DICTIONARY = _LINES.strip("\n").encode("ascii")
