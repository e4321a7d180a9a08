"""Frontends: a torch module or an ONNX file in, a Model (ir/model.py) out."""
