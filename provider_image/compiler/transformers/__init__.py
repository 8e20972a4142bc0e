"""The compiler's part for vision transformers (ViT, DeiT, BEiT) in the files of Hugging Face's library.

A folder as its `save_pretrained` writes it has `config.json`, which describes the network, `model.safetensors`, its
weights, and `preprocessor_config.json`; all are data. The graph is written directly in OpenVINO's operations, so
neither torch nor tensorflow is needed.
"""
